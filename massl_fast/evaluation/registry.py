"""The evaluations there are: one line each. Light to import, so that `massl-fast --help` answers at once."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from massl_fast.registry import Registry, demand_whole

if TYPE_CHECKING:
    from massl_fast.evaluation.base import Protocol

PROTOCOLS: Registry[tuple[str | type[Protocol], str]] = Registry(
    "The evaluation",
    {
        # name: (module:class, or the class itself; what it measures)
        "knn": ("massl_fast.evaluation.knn:Knn", "weighted k-NN accuracy of a checkpoint"),
        "retrieval": ("massl_fast.evaluation.retrieval:Retrieval", "instance retrieval (revisited Oxford and Paris)"),
        "copies": ("massl_fast.evaluation.copies:Copies", "copy detection (Copydays, or your own pairs)"),
        "cluster": ("massl_fast.evaluation.cluster:Cluster", "spherical k-means, compared with the classes"),
        "multilabel": ("massl_fast.evaluation.multilabel:Multilabel", "support vector machines on several labels per image (VOC07)"),
        "attention": ("massl_fast.evaluation.attention:Attention", "attention maps as masks of objects"),
        "prompt": ("massl_fast.evaluation.prompt:Prompt", "a patch as the prompt for its object"),
        "similarity": ("massl_fast.evaluation.similarity:Similarity", "similarities of patches within and between categories"),
        "segment": ("massl_fast.evaluation.segment:Segment", "segmentation on frozen patches (VOC2012, ADE20K, Cityscapes)"),
        "backgrounds": ("massl_fast.evaluation.backgrounds:Backgrounds", "accuracy with exchanged backgrounds (ImageNet-9)"),
        "correspond": ("massl_fast.evaluation.correspond:Correspond", "patches of two views that find each other"),
        "transfer": ("massl_fast.evaluation.transfer:Transfer", "k-NN on other data sets than the network was trained on"),
        "video": ("massl_fast.evaluation.video:Video", "video object segmentation by label propagation (DAVIS)"),
        "linear": ("massl_fast.evaluation.linear:Linear", "linear probe: heads of a sweep of learning rates, trained at once"),
        "logistic": ("massl_fast.evaluation.logistic:Logistic", "logistic regression, whole sets, low shot and long tails"),
        "fewshot": ("massl_fast.evaluation.fewshot:FewShot", "k-NN, logistic and linear heads on n images per class, over draws"),
    },
)


def register(protocol: type[Protocol]) -> type[Protocol]:
    """Add an evaluation by its ``name``; a decorator for classes in plugins.

    Raises ValueError where another evaluation has the name already, or where something is lacking.
    """
    demand_whole(protocol, "an evaluation", ("name", "title", "Settings"))
    PROTOCOLS.add(protocol.name, (protocol, (protocol.__doc__ or "").strip().split("\n")[0].rstrip(".")))
    return protocol


def protocol_named(name: str) -> type[Protocol]:
    """The class of an evaluation; raises ValueError with the choices where there is none of that name."""
    where, _ = PROTOCOLS.chosen(name)
    if not isinstance(where, str):
        return where
    module, _, attribute = where.partition(":")
    return getattr(importlib.import_module(module), attribute)
