"""Patch tokens, attention and vectors of networks at any image size.

Position embeddings of a network that was built for one size are resampled for others (timm: bicubic with antialiasing, to the exact grid).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from massl_fast.evaluation.features import FeatureFunction, SquareImages, eval_mode
from massl_fast.evaluation.images import USUAL_SIDE, SizedImages, Square, in_order
from massl_fast.evaluation.subject import RAW_PIXELS, Subject, backbone_of
from massl_fast.models.backbone import patch_size
from massl_fast.models.recipes import demand_recipe, features_of

RAW_SIDE = 32
MOST_KEPT = 2**34
"""Bytes of patch tokens of one set that go to a store: 16 GiB."""


def patch_side(subject: Subject) -> int:
    """Side in pixels of a patch of the networks.

    Raises:
        ValueError: a network has no patch tokens (a convolutional one, say), or they differ in their patches.
    """
    sides = set()
    for network in subject.networks.values():
        backbone = backbone_of(network)
        side = patch_size(backbone)
        try:
            demand_recipe(backbone, "patches")
        except ValueError as reason:
            raise ValueError(
                f"This evaluation needs a vision transformer's patch tokens, which {type(backbone).__name__} does not give: {reason}"
            ) from None
        if side is None:
            raise ValueError(f"The patches of this {type(backbone).__name__} have no fixed side in pixels; take another network.")
        sides.add(side)
    if len(sides) > 1:
        raise ValueError(f"The networks have patches of {' and '.join(map(str, sorted(sides)))} px; compare networks of one patch size.")
    return sides.pop()


def cut_to_patches(images: Tensor, patch: int | None) -> Tensor:
    """Images [..., H, W] without the last rows and columns that fill no patch; sides below one patch are enlarged to it, bilinearly."""
    if patch is None:
        return images
    height, width = images.shape[-2:]
    if min(height, width) < patch:
        images = F.interpolate(images, (max(height, patch), max(width, patch)), mode="bilinear", align_corners=False)
        height, width = images.shape[-2:]
    return images[..., : height // patch * patch, : width // patch * patch]


def patch_tokens(network: nn.Module, images: Tensor, patch: int) -> Tensor:
    """Patch tokens after the final norm: normalised images [N, 3, H, W] → [N, H/patch, W/patch, C], float32.

    Raises:
        ValueError: the network has no patch tokens or does not take this size.
    """
    tokens = _taken(network, images, lambda backbone: features_of(backbone, images, "patches"))
    return tokens.float().unflatten(1, (images.shape[-2] // patch, images.shape[-1] // patch))


def block_tokens(network: nn.Module, images: Tensor, blocks: Sequence[int]) -> Tensor:
    """Patch tokens of several blocks (from 0), each after the final norm: normalised images [N, 3, H, W] → [N, blocks · C, h, w].

    Raises:
        ValueError: the network does not take this size.
    """

    def of(backbone: nn.Module) -> Tensor:
        arguments = dict(indices=list(blocks), norm=True, output_fmt="NCHW", intermediates_only=True)
        return torch.cat(backbone.forward_intermediates(images, **arguments), 1)

    return _taken(network, images, of)


def _taken(network: nn.Module, images: Tensor, function: Callable[[nn.Module], Tensor]) -> Tensor:
    """What `function` makes of the backbone; a network that does not take the size says so in a sentence."""
    backbone = backbone_of(network)
    try:
        return function(backbone)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, RuntimeError) as error:
        height, width = images.shape[-2:]
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"{type(backbone).__name__} does not take images of {width} × {height} px ({reason}). Set --image-size to one that it "
            f"takes, or choose a network that takes any size, such as vit_*."
        ) from None


def patch_colours(pixels: Tensor, patch: int) -> Tensor:
    """Mean and deviation of each channel over each patch: pixels [N, 3, H, W] → [N, h, w, 6]; the floor beside patch tokens."""
    parts = pixels.float().unfold(2, patch, patch).unfold(3, patch, patch).flatten(4)  # [N, 3, h, w, patch²]
    return torch.cat([parts.mean(-1), parts.std(-1, unbiased=False)], 1).permute(0, 2, 3, 1)


@contextlib.contextmanager
def evaluated(subject: Subject) -> Iterator[None]:
    """The networks in eval mode, without gradients, under the subject's autocast; afterwards all is as it was."""
    dtype = subject.amp_dtype
    autocast = torch.autocast(subject.device.type, dtype=dtype, enabled=dtype is not None)
    with torch.no_grad(), eval_mode(subject.networks.values()), autocast:
        yield


def normalised(subject: Subject, pixels: Tensor) -> Tensor:
    """uint8 [N, 3, H, W] → the networks' input, on their device."""
    mean, std = (torch.tensor(values, device=subject.device).view(3, 1, 1) for values in (subject.mean, subject.std))
    return ((pixels.to(subject.device).float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def tokens_of(subject: Subject, images: SizedImages, *, colours: bool = True) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yields (position, {network: patch tokens [h, w, C] float32 on the device}) of this rank's images.

    Images are cut to whole patches. Raw pixels, where the subject wants them and `colours` allows, are means and deviations of colours.
    Tokens of images that are squeezed to a square go to the subject's store, where it has one, and come from there the next time, whatever
    the protocol; sets of more than 16 GiB do not, and a warning says so. With a store and several ranks a collective call.
    """
    patch = patch_side(subject)
    if subject.store is not None and isinstance(images.geometry, Square):
        grid = max(1, images.geometry.side // patch)
        numbers = sum(backbone_of(network).num_features for network in subject.networks.values())
        size = 4 * len(images.positions) * grid**2 * numbers
        if size <= MOST_KEPT:
            yield from _kept_tokens(subject, images, patch, grid, colours)
            return
        warnings.warn(f"Patch tokens of {images.source.path} would take {size / 2**30:.0f} GiB; they are not kept.", stacklevel=2)
    for positions, pixels in images.batches(subject.batch_size, subject.num_workers):
        with evaluated(subject):
            pixels = cut_to_patches(pixels.float(), patch)
            batch = normalised(subject, pixels)
            found = {name: patch_tokens(network, batch, patch) for name, network in subject.networks.items()}
            if colours and subject.raw_pixels:
                found[RAW_PIXELS] = patch_colours(batch, patch)
        demand_finite(found)
        for row, position in enumerate(positions):
            yield position, {name: tokens[row] for name, tokens in found.items()}


class _PatchTokens(nn.Module):
    """Normalised images [N, 3, H, W] → patch tokens [N, h·w, C]."""

    def __init__(self, network: nn.Module, patch: int) -> None:
        super().__init__()
        self.network, self.patch = network, patch

    def forward(self, images: Tensor) -> Tensor:
        return patch_tokens(self.network, cut_to_patches(images, self.patch), self.patch).flatten(1, 2)


def _kept_tokens(subject: Subject, images: SizedImages, patch: int, grid: int, colours: bool) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What `tokens_of` yields, by way of the store."""
    functions: dict[str, FeatureFunction] = {name: _PatchTokens(network, patch) for name, network in subject.networks.items()}
    if colours and subject.raw_pixels:

        def patch_colours_of(batch: Tensor) -> Tensor:
            return patch_colours(cut_to_patches(batch, patch), patch).flatten(1, 2)

        patch_colours_of.__name__ = f"colours of patches of {patch}"
        functions[RAW_PIXELS] = patch_colours_of
    squares = SquareImages(images.source, images.geometry.side, positions=images.positions, shard=subject.shard)
    kept = subject.store.features(
        functions,
        squares,
        recipe="patches",
        precision=subject.precision,
        device=subject.device,
        mean=subject.mean,
        std=subject.std,
        batch_size=max(1, subject.batch_size * USUAL_SIDE**2 // images.geometry.side**2),
        num_workers=subject.num_workers,
        amp_dtype=subject.amp_dtype,
    )
    row_of = {position: row for row, position in enumerate(next(iter(kept.values())).indices.tolist())}
    images.set_aside([position for position in images.mine if position not in row_of])
    for position in images.mine:
        if position in row_of:
            rows = {name: part.features[row_of[position] : row_of[position] + 1].to(subject.device).float() for name, part in kept.items()}
            demand_finite(rows)
            yield position, {name: row[0].unflatten(0, (grid, grid)) for name, row in rows.items()}


def vectors_of(
    subject: Subject, images: SizedImages, recipe: str, *, scales: Sequence[float] = (1.0,)
) -> tuple[dict[str, Tensor], list[int]]:
    """({network: features [n, C], float32, CPU, not normalised}, positions [n]) of the readable images of all ranks, by position.

    With several scales, features are the mean over the image resized by each (bilinear). With several ranks a collective call.
    """
    rows: list[tuple[int, dict[str, Tensor]]] = []
    sides = {name: patch_size(backbone_of(network)) for name, network in subject.networks.items()}
    for positions, pixels in images.batches(subject.batch_size, subject.num_workers):
        with evaluated(subject):
            batch = normalised(subject, pixels)
            found = {}
            for name, network in subject.networks.items():
                found[name] = (
                    torch.stack([_vector(network, resized, sides[name], recipe) for resized in _scaled(batch, scales)]).mean(0).cpu()
                )
            if subject.raw_pixels:
                found[RAW_PIXELS] = F.adaptive_avg_pool2d(batch.float(), RAW_SIDE).flatten(1).cpu()
        rows += [(position, {name: values[row] for name, values in found.items()}) for row, position in enumerate(positions)]
    ordered = in_order(rows, images.shard)
    if not ordered:
        raise ValueError(
            f"None of the {len(images.positions)} images of {images.source.path} can be read; run `massl-fast data check` on it."
        )
    vectors = {name: torch.stack([row[name] for _, row in ordered]) for name in ordered[0][1]}
    demand_finite(vectors)
    return vectors, [position for position, _ in ordered]


def _scaled(batch: Tensor, scales: Sequence[float]) -> Iterator[Tensor]:
    for scale in scales:
        yield batch if scale == 1 else F.interpolate(batch, scale_factor=scale, mode="bilinear", align_corners=False)


def _vector(network: nn.Module, images: Tensor, patch: int | None, recipe: str) -> Tensor:
    images = cut_to_patches(images, patch)
    return _taken(network, images, lambda backbone: features_of(backbone, images, recipe)).float()


def demand_finite(features: Mapping[str, Tensor]) -> None:
    """Raise ValueError, naming the network, where features overflowed."""
    for name, values in features.items():
        broken = int((~values.flatten(1).isfinite().all(1)).sum())
        if broken:
            raise ValueError(
                f"The features of {name} are not finite for {broken} of {len(values)} images. Lower precision overflows: choose "
                f"--precision fp32; in fp32 the network has diverged."
            )
