"""What a protocol evaluates and with what: networks, their normalisation, the device, and the way to data and features."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from massl_fast.data.loaders import open_data
from massl_fast.evaluation.features import FeatureFunction, Features, LabelledImages, extract, raw_pixels
from massl_fast.evaluation.store import FeatureStore
from massl_fast.models.backbone import Encoder
from massl_fast.models.recipes import default_recipe, demand_recipe, features_of

if TYPE_CHECKING:
    from massl_fast.data.sources import Source

RAW_PIXELS = "raw pixels"
KEPT_BYTES = 2**30


class RecipeFunction(nn.Module):
    """A network's features by a recipe: normalised images [N, 3, H, W] → [N, C] ([N, h·w, C] for patches)."""

    def __init__(self, network: nn.Module, recipe: str) -> None:
        super().__init__()
        self.network, self.recipe = network, recipe

    def forward(self, images: Tensor) -> Tensor:
        if isinstance(self.network, Encoder):
            return self.network.features(images, self.recipe)
        return features_of(self.network, images, self.recipe)


@dataclass(frozen=True)
class Subject:
    """Networks under evaluation, and everything that a protocol needs besides its own settings."""

    networks: Mapping[str, nn.Module]
    """{name: timm network or ``Encoder``}, on ``device``. Evaluated in eval mode and put back."""
    image_size: int
    """Side of the images, pixels, where a protocol has no size of its own."""
    mean: Sequence[float]
    std: Sequence[float]
    """Deviation of each channel (range 0 to 1) by which the networks' training normalised; ``mean`` likewise."""
    device: torch.device
    batch_size: int = 256
    num_workers: int = 0
    precision: str = "fp32"
    """fp32, bf16 or fp16: autocast of the networks' forward pass."""
    seed: int = 0
    recipe: str | None = None
    """Feature recipe that the user chose; None: the protocol's own choice."""
    raw_pixels: bool = True
    """Whether pixels themselves stand beside the networks, where that makes sense."""
    shard: tuple[int, int] = (0, 1)
    """(rank, world size)."""
    store: FeatureStore | None = None
    """Where features are kept between runs; None: nowhere."""
    keep_images: bool = False
    """Hold decoded images of up to 1 GiB in memory for the next evaluation."""
    size_is_chosen: bool = False
    """Whether the user chose ``image_size``; if not, a protocol with a published size of its own takes that."""
    pictures: bool = False
    """Whether protocols are to draw pictures."""
    option: Callable[[str], str] = "--{}".format
    """How the user writes a setting of that name, for sentences."""
    open_source: Callable[[str, str, str], Source] = open_data
    """(path, setting's name for sentences, role) → source."""
    opened: dict[Any, Any] = field(default_factory=dict)
    """Sources and image sets that are open already, shared by all subjects made of this one."""

    def size_or(self, published: int) -> int:
        """The side that the user chose, or else the published one."""
        return self.image_size if self.size_is_chosen else published

    def of(self, networks: Mapping[str, nn.Module]) -> Subject:
        """The same for other networks; what is open stays open."""
        return replace(self, networks=networks)

    def source(self, path: str, name: str, role: str) -> Source:
        """The source at ``path``, which the setting ``name`` gave; ``role`` is train or test. Opened once."""
        key = ("source", path, role)
        if key not in self.opened:
            self.opened[key] = self.open_source(path, self.option(name), role)
        return self.opened[key]

    def labelled(self, source: Source, *, image_size: int | None = None, **arguments: Any) -> LabelledImages:
        """The images of a labelled source, this rank's share of them; ``arguments`` go to ``LabelledImages``. Made once."""
        key = ("images", id(source), image_size, *((name, _hashable(value)) for name, value in sorted(arguments.items())))
        if key not in self.opened:
            self.opened[key] = LabelledImages(source, image_size or self.image_size, shard=self.shard, **arguments)
        return self.opened[key]

    def features_name(self, default: Callable[[nn.Module], str] = default_recipe, *, patches: bool = False) -> str:
        """The recipe to take: the user's, or ``default`` of the first network. ValueError where a network cannot give it, and for
        patches where the caller does not allow them.
        """
        networks = [backbone_of(network) for network in self.networks.values()]
        recipe = self.recipe or default(networks[0])
        if recipe == "patches" and not patches:
            raise ValueError(
                "This evaluation needs one vector per image, and the features patches are one per patch. Choose --features mean."
            )
        for network in networks:
            demand_recipe(network, recipe)
        return recipe

    def functions(self, recipe: str) -> dict[str, FeatureFunction]:
        """Feature functions by name, raw pixels among them where they are to stand beside."""
        functions: dict[str, FeatureFunction] = {name: RecipeFunction(network, recipe) for name, network in self.networks.items()}
        return functions | ({RAW_PIXELS: raw_pixels} if self.raw_pixels and recipe != "patches" else {})

    def features(self, images: LabelledImages, recipe: str) -> dict[str, Features]:
        """{name: features of ``images``} of every network and of raw pixels, in one pass over the images. With several ranks a
        collective call.
        """
        functions = self.functions(recipe)
        arguments = dict(
            device=self.device,
            mean=self.mean,
            std=self.std,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            amp_dtype=self.amp_dtype,
        )
        if self.store is not None:
            return self.store.features(functions, images, recipe=recipe, precision=self.precision, **arguments)
        return extract(functions, images, keep_images=self.keep_images and self._kept_bytes() <= KEPT_BYTES, **arguments)

    @property
    def amp_dtype(self) -> torch.dtype | None:
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[self.precision]

    def _kept_bytes(self) -> int:
        return sum(images.num_bytes for images in self.opened.values() if isinstance(images, LabelledImages))


def backbone_of(network: nn.Module) -> nn.Module:
    return network.backbone if isinstance(network, Encoder) else network


def _hashable(value: Any) -> Any:
    return value.tobytes() if hasattr(value, "tobytes") else value
