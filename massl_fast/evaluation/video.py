"""Video object segmentation by label propagation: what neighbouring patches carry, and where (DAVIS-2017, as DINO and iBOT run it).

The first frame's mask is carried through the sequence by similarity of patch tokens (`propagation`); nothing is trained. J and F are those
of the official evaluator (`metrics.video`).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from massl_fast.evaluation.base import Figure, Protocol, Result, Settings
from massl_fast.evaluation.extra import needs
from massl_fast.evaluation.images import AsItIs, SizedImages, files_below, in_order
from massl_fast.evaluation.layouts.davis import Sequence, read_sequences
from massl_fast.evaluation.layouts.masks import read_mask, write_mask
from massl_fast.evaluation.metrics.video import davis_scores, region_and_boundary
from massl_fast.evaluation.pictures import Picture, painted, row_of, spread
from massl_fast.evaluation.propagation import PropagationSettings, hard_labels, propagate
from massl_fast.evaluation.subject import RAW_PIXELS, Subject
from massl_fast.evaluation.tokens import demand_finite, evaluated, normalised, patch_colours, patch_side, patch_tokens

SHORTER_SIDE = 480
LONGER_MULTIPLE = 64
FIRST_MASK = "first mask repeated"
BENCHMARK = (30, 61)
PUBLISHED = (
    ("DINO ViT-B/16 400 epochs", 62.3, "MMC, video table"),
    ("MSN ViT-B/16", 61.4, "MMC, video table"),
    ("MAE ViT-B/16", 47.4, "MMC, video table"),
    ("MMC ViT-B/16", 63.8, "MMC, video table"),
)


class VideoSettings(Settings):
    data: str
    """The folder DAVIS, which holds JPEGImages/480p, Annotations/480p and ImageSets/2017."""
    split: str = "val"
    """The list of sequences in ImageSets/2017."""
    write: str = ""
    """Folder for the predicted masks, as the official evaluator reads them: a folder per network; empty: none."""
    context: int = Field(7, ge=0)
    """Frames before a frame that it takes labels from, besides the first."""
    radius: int = Field(12, ge=0)
    """Patches in row and column between a patch and its sources."""
    neighbours: int = Field(5, ge=1)
    """Sources that a patch takes its label from, over all frames of its context."""


class Video(Protocol):
    """Video object segmentation: the first frame's mask is carried through a sequence by similarity of frozen patch features.

    J is the overlap of masks, F the agreement of their boundaries, each a mean over objects. The table also has the repeated first mask
    and, as raw pixels, the mean and deviation of each patch's colours.
    """

    name = "video"
    title = "Video object segmentation, %"
    Settings = VideoSettings
    settings: VideoSettings
    recipes = ("patches",)

    def figures(self) -> list[Figure]:
        names = {"jf_mean": "J&F", "j_mean": "J", "j_recall": "J recall", "j_decay": "J decay"}
        names |= {"f_mean": "F", "f_recall": "F recall", "f_decay": "F decay"}
        return [Figure(f"{key}_percent", title, higher_is_better="decay" not in key) for key, title in names.items()]

    def prepare(self, subject: Subject) -> list[str]:
        patch_side(subject)
        needs("scipy.spatial", "the boundary measure of DAVIS")
        sequences = read_sequences(Path(self.settings.data), self.settings.split)
        short = [sequence.name for sequence in sequences if len(sequence.frames) < 3]
        if len(short) == len(sequences):
            raise ValueError(f"No sequence of {self.settings.data} has three frames; the first and the last are not scored.")
        notes = [f"The sequence {name} has fewer than three frames, of which none is scored; it is left out." for name in short]
        blind = [sequence.name for sequence in sequences if None in sequence.masks and sequence.name not in short]
        if blind and not self.settings.write:
            raise ValueError(f"The sequence {blind[0]} has no masks beyond the first to compare with. Set --write to keep predictions.")
        return notes + [f"The sequence {name} has no masks beyond the first and is not scored." for name in blind]

    def run(self, subject: Subject) -> Result:
        settings, notes = self.settings, self.prepare(subject)
        sequences = [s for s in read_sequences(Path(settings.data), settings.split) if len(s.frames) >= 3]
        mine = []
        for position in range(len(sequences))[subject.shard[0] :: subject.shard[1]]:
            mine.append((position, self._one(subject, sequences[position])))
        parts = [part for _, part in in_order(mine, subject.shard)]
        scored = [part for part in parts if part["scores"]]
        lost = [f"{part['name']}: {part['lost']}" for part in parts if part["lost"]]
        if lost:
            notes.append(f"Objects too small to hold the centre of a patch in the first frame are never predicted: {'; '.join(lost)}.")
        results, by_sequence = {}, {}
        for name in scored[0]["scores"] if scored else ():
            region, edge = ([part["scores"][name][which] for part in scored] for which in (0, 1))
            row = davis_scores(region, edge)
            results[name] = {f"{key.lower().replace('&', '').replace('-', '_')}_percent": 100 * value for key, value in row.items()}
            by_sequence[name] = {part["name"]: _jf(part, name) for part in scored}
        objects = sum(len(part["scores"][FIRST_MASK][0]) for part in scored)
        own = (len(scored), objects) == BENCHMARK and settings.split == "val"
        return Result(
            results=results,
            data={"test": {"path": settings.data, "sequences": len(sequences), "objects": objects}},
            features="patches",
            image_size=subject.size_or(SHORTER_SIDE),
            about=f"{len(scored)} scored sequences with {objects} objects of {settings.data}.",
            departures=self._departures(subject, len(scored), objects),
            notes=notes,
            published=[dict(who=who, value=value, source=source) for who, value, source in PUBLISHED] if own else [],
            more={"sequences": by_sequence},
            pictures=self._pictures(subject, sequences, by_sequence) if subject.pictures and by_sequence else [],
        )

    def _departures(self, subject: Subject, sequences: int, objects: int) -> list[str]:
        settings, default = self.settings, VideoSettings(data="")
        changed = [f"{key} {getattr(settings, key)} for {getattr(default, key)}" for key in ("context", "radius", "neighbours")]
        changed = [text for text in changed if text.split()[1] != text.split()[3]]
        departures = [
            "Features are normalised by the checkpoint's mean and deviation; DINO's code has a deviation of 0.228 for red.",
        ]
        if (sequences, objects) != BENCHMARK:
            departures.append(
                f"The data are {sequences} sequences with {objects} objects; DAVIS-2017 val has {BENCHMARK[0]} with {BENCHMARK[1]}."
            )
        if changed:
            departures.append(f"Settings differ: {', '.join(changed)}.")
        if subject.size_or(SHORTER_SIDE) != SHORTER_SIDE:
            departures.append(f"The shorter side is {subject.image_size} px instead of {SHORTER_SIDE}.")
        return departures

    def _one(self, subject: Subject, sequence: Sequence) -> dict:
        """Scores of one sequence by network, and which of its objects are lost on the grid."""
        truth, first = sequence.truth(), read_mask(sequence.masks[0])
        first = np.where(first == 255, 0, first)
        masks, lost = self.predict(subject, sequence, first)
        if self.settings.write:
            for name, labels in masks.items():
                for frame, mask in zip(sequence.frames, labels):
                    write_mask(Path(self.settings.write) / name / sequence.name / f"{frame.stem}.png", mask)
        scores = {}
        if truth is not None and first.any():
            masks[FIRST_MASK] = np.broadcast_to(first, truth.shape)
            scores = {name: region_and_boundary(truth, labels) for name, labels in masks.items()}
        return {"name": sequence.name, "scores": scores, "lost": ", ".join(map(str, lost))}

    def predict(self, subject: Subject, sequence: Sequence, first: np.ndarray) -> tuple[dict[str, np.ndarray], list[int]]:
        """({network: uint8 masks [T, H, W]}, numbers of the objects that are lost on the grid of patches).

        Args:
            first [H, W]: the mask of the first frame.
        """
        patch = patch_side(subject)
        frames = load_frames(sequence)
        size = network_size(frames.shape[-2:], subject.size_or(SHORTER_SIDE), patch)
        resized = F.interpolate(frames.float(), size, mode="bilinear", align_corners=False)
        grid = (size[0] // patch, size[1] // patch)
        one_hot = one_hot_on_grid(first, grid)
        features = {name: _frame_tokens(subject, name, resized, patch) for name in subject.networks}
        if subject.raw_pixels:
            features[RAW_PIXELS] = patch_colours(normalised(subject, resized), patch)
        settings = PropagationSettings(self.settings.context, self.settings.radius, self.settings.neighbours)
        demand_finite(features)
        masks = {}
        for name, tokens in features.items():
            soft = propagate(tokens, one_hot.to(subject.device), settings)
            labels = torch.cat([hard_labels(frame[None], patch) for frame in soft]).cpu()
            labels = F.interpolate(labels[None].float(), first.shape, mode="nearest-exact")[0].to(torch.uint8).numpy()
            masks[name] = np.concatenate([first[None].astype(np.uint8), labels])
        return masks, [number for number in range(1, len(one_hot)) if not one_hot[number].any()]

    def _pictures(self, subject: Subject, sequences: list[Sequence], by_sequence: dict) -> list[Picture]:
        """First, middle and last frame with the masks of the first network, of the best, the median and the worst sequence."""
        network = next(iter(subject.networks))
        found, by_name = [], {sequence.name: sequence for sequence in sequences}
        for rank, name in spread(by_sequence[network]):
            sequence = by_name[name]
            truth = sequence.truth()
            masks, _ = self.predict(subject, sequence, np.where(truth[0] == 255, 0, truth[0]))
            frames = load_frames(sequence)
            shown = [0, len(frames) // 2, len(frames) - 1]
            images = [painted(Image.fromarray(frames[i].permute(1, 2, 0).numpy()), masks[network][i]) for i in shown]
            caption = f"{rank} sequence, {name}: J&F {by_sequence[network][name]:.1f} %, {network}; first, middle and last frame"
            found.append(Picture(f"video_{rank}", caption, row_of(images)))
        return found


def _jf(part: dict, name: str) -> float:
    region, edge = part["scores"][name]
    return float(50 * (region.mean() + edge.mean()))


def load_frames(sequence: Sequence) -> Tensor:
    """uint8 [T, 3, H, W]; raises ValueError where a frame cannot be read or has another size."""
    folder = sequence.frames[0].parent
    images = SizedImages(files_below(folder, [frame.name for frame in sequence.frames]), AsItIs())
    frames = [images[position][1] for position in range(len(images))]
    for path, pixels in zip(sequence.frames, frames):
        if pixels is None:
            raise ValueError(f"The frame {path} cannot be read; a sequence needs all of its frames.")
        if pixels.shape != frames[0].shape:
            raise ValueError(f"The frame {path} is of another size than the first of its sequence.")
    return torch.stack(frames)


def network_size(shape: tuple[int, int], shorter: int, patch: int) -> tuple[int, int]:
    """(height, width) of the network's input: the shorter side as said, the longer down to a multiple of 64, both to whole patches.

    The published code resizes to this and crops nothing.
    """
    scale = shorter / min(shape)
    longer = max(int(max(shape) * scale) // LONGER_MULTIPLE, 1) * LONGER_MULTIPLE
    sizes = [shorter if side == min(shape) else longer for side in shape]
    return tuple(max(size // patch, 1) * patch for size in sizes)


def one_hot_on_grid(mask: np.ndarray, grid: tuple[int, int]) -> Tensor:
    """The first mask at the centres of the patches, one channel per number: [1 + objects, h, w] float32.

    An object that no patch's centre hits keeps an empty channel: numbers stay those of the mask.
    """
    small = F.interpolate(torch.from_numpy(mask.astype(np.float32))[None, None], grid, mode="nearest-exact")[0, 0].long()
    return F.one_hot(small, int(mask.max()) + 1).permute(2, 0, 1).float()


def _frame_tokens(subject: Subject, name: str, frames: Tensor, patch: int) -> Tensor:
    """Patch tokens of all frames of a sequence [T, h, w, C], as many at a time as the batch size allows for 224 × 224 pixels."""
    at_once = max(1, subject.batch_size * 224**2 // (frames.shape[-1] * frames.shape[-2]))
    with evaluated(subject):
        return torch.cat([patch_tokens(subject.networks[name], normalised(subject, some), patch) for some in frames.split(at_once)])
