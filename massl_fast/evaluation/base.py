"""What an evaluation is: one file with a ``Protocol`` and its settings, and one line in ``registry.PROTOCOLS``.

An evaluation from outside the package is a file that calls ``registry.register`` and that the user names:
``massl-fast eval NAME --plugin FILE.py`` or ``run.plugins`` of a training run.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

if TYPE_CHECKING:
    from massl_fast.evaluation.features import LabelledImages
    from massl_fast.evaluation.pictures import Picture
    from massl_fast.evaluation.subject import Subject


class Settings(BaseModel):
    """Settings of a protocol. On the command line ``field_name`` is ``--field-name``, with the field's docstring as its help."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, coerce_numbers_to_str=True)


def checked_settings(values: Mapping[str, Any], kind: type[Settings], written: Callable[[str], str]) -> Settings:
    """``values`` as settings; ``written`` is how the user writes a setting's name. Raises ValueError with a sentence per problem."""
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(problem, kind, written) for problem in error.errors())) from None


def _sentence(problem: Any, kind: type[Settings], written: Callable[[str], str]) -> str:
    if problem["type"] == "value_error":
        return str(problem["ctx"]["error"])
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"{written(name)} is missing: {kind.model_fields[name].description}"
    if problem["type"] == "extra_forbidden":
        return f"There is no setting {written(name)}. There are {', '.join(map(written, kind.model_fields))}."
    return f"{written(name)} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


@dataclass(frozen=True)
class Figure:
    """One number that a protocol finds for every network."""

    key: str
    """Key in ``Result.results``, with its unit at the end: k20_percent. During training the key is ``PROTOCOL_NETWORK_KEY``."""
    title: str
    """The head of its column: k = 20."""
    unit: str = "%"
    higher_is_better: bool = True


@dataclass
class Result:
    """What a protocol found. Sentences in ``departures`` and ``notes`` are for the user."""

    results: dict[str, dict[str, Any]]
    """{network, or baseline: {figure's key: number}}."""
    data: dict[str, dict[str, Any]]
    """{role, such as train and test: what it was, with path, images, classes}."""
    features: str
    """Name of the feature recipe (``models.recipes``)."""
    image_size: int
    """Side of the images, pixels."""
    about: str = ""
    """One sentence: what was evaluated on what."""
    departures: list[str] = field(default_factory=list)
    """Every way in which this is not the published protocol."""
    notes: list[str] = field(default_factory=list)
    unreadable: tuple[str, ...] = ()
    """Names of images that could not be read and were left out."""
    published: list[dict[str, Any]] = field(default_factory=list)
    """Figures of papers: who, value, source; only where data and protocol are the benchmark's own."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further entries of the JSON object; plain values."""
    pictures: list[Picture] = field(default_factory=list)
    """The median, the best and the worst case, where the subject asks for pictures."""


class Protocol(ABC):
    """An evaluation of frozen networks.

    A protocol object serves any number of subjects: during training the same one sees the networks of every evaluated step.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    """Heading of the table, with the unit: k-NN accuracy, %."""
    Settings: ClassVar[type[Settings]]
    recipes: ClassVar[tuple[str, ...]] = ()
    """Feature recipes that the protocol may ask for by default; empty: the network's own pooled output or class token."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @abstractmethod
    def figures(self) -> Sequence[Figure]:
        """The columns of the table, in order. Known before anything is evaluated."""

    @property
    def headline(self) -> Figure:
        """The one figure that stands for the whole, and by which a run finds its best checkpoint."""
        return self.figures()[0]

    def prepare(self, subject: Subject) -> list[str]:
        """Open the data and check that it will do, before anything is computed; returns notes for the user.

        Raises ValueError for what the user has to mend.
        """
        return []

    @abstractmethod
    def run(self, subject: Subject) -> Result:
        """Evaluate the networks of ``subject``. With several ranks a collective call that gives the same result on each."""


def classes_in(images: LabelledImages) -> int:
    """Classes that occur among the images."""
    return len(images.labels.unique())


def described(path: str, images: LabelledImages) -> dict[str, Any]:
    """An entry of ``Result.data`` for a labelled set."""
    return {"path": path, "images": len(images.labels), "classes": classes_in(images)}


def flat(result: Mapping[str, Mapping[str, Any]], protocol: str, figures: Sequence[Figure]) -> dict[str, float]:
    """``Result.results`` by the keys of metrics.jsonl: PROTOCOL_NETWORK_KEY, to three decimals."""
    return {
        f"{protocol}_{network}_{figure.key}": round(found[figure.key], 3)
        for network, found in result.items()
        for figure in figures
        if found.get(figure.key) is not None
    }
