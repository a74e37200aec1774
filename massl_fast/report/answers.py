"""What a person asks of a run first, from its own metrics: did it learn, is it collapsing, what bounds the speed, what to do next."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from massl_fast.objectives.base import is_beyond
from massl_fast.run.reading import RunFolder

CLEAR_POINTS = 2.0
"""Percentage points of accuracy; smaller differences are within the noise of a few hundred test images."""
STARVED_PERCENT = 20.0
"""Share of the time spent waiting for data from which on the loader bounds the run."""
UNEVEN = 1.15
"""The slowest rank's step over the fastest one's."""
GOOD, BAD, OPEN = "good", "bad", "open"


@dataclass(frozen=True)
class Answer:
    question: str
    verdict: str
    reason: str
    mark: str
    """good, bad, or open where nothing can be said or done about it."""


def answers_of(run: RunFolder) -> list[Answer]:
    """Four answers, each with the figures that it rests on. Nothing is said that the run has not logged."""
    learned, collapse, speed = did_it_learn(run), is_it_collapsing(run), what_bounds_the_speed(run)
    return [learned, collapse, speed, what_next(run, learned, collapse, speed)]


def did_it_learn(run: RunFolder) -> Answer:
    question = "Did it learn?"
    headline, untrained = run.headline_knn("teacher"), run.headline_knn("untrained")
    if headline is None:
        steps, losses = run.series("loss")
        said = f" The loss went from {losses[0]:.3f} to {losses[-1]:.3f}, which alone is no evidence." if len(losses) > 1 else ""
        return Answer(question, "Not measured", f"No labelled images were evaluated during the run.{said}", OPEN)
    k, steps, values = headline
    best = max(range(len(values)), key=values.__getitem__)
    at = f"k-NN accuracy of the teacher (k = {k}) is {values[-1]:.1f} % at step {steps[-1]:g}"
    past = f" Its best was {values[best]:.1f} % at step {steps[best]:g}." if values[best] - values[-1] > CLEAR_POINTS else ""
    if untrained is None or untrained[0] != k:
        return Answer(question, "Not compared", f"{at}; the untrained network was not evaluated.{past}", OPEN)
    gain = values[-1] - untrained[2][0]
    reason = f"{at}, {gain:+.1f} points from the untrained network's {untrained[2][0]:.1f} %.{past}"
    if gain > CLEAR_POINTS:
        return Answer(question, "Yes", reason, GOOD)
    return Answer(question, "No" if gain < -CLEAR_POINTS else "Not yet", reason, BAD)


def is_it_collapsing(run: RunFolder) -> Answer:
    """Answer by the metrics that declare from where on the representation has collapsed."""
    question = "Is it collapsing?"
    found, signs = [], []
    for metric in run.declared:
        values = run.series(metric.key)[1]
        if metric.collapsed is None or not values:
            continue
        side, limit = metric.collapsed
        value = median(values[-5:])
        told = f"{metric.title}: {value:.3g} (collapsed {side} {limit:.3g})"
        found.append(told)
        if is_beyond(value, side, limit):
            signs.append(told)
    if not found:
        return Answer(question, "Not measured", "The run has logged no metric that its objective declares as a sign of collapse.", OPEN)
    if signs:
        return Answer(question, "Yes", f"{'; '.join(signs)}. All images get nearly the same representation.", BAD)
    return Answer(question, "No", f"{'; '.join(found)}.", GOOD)


def what_bounds_the_speed(run: RunFolder) -> Answer:
    question = "What bounds the speed?"
    waits, speeds, used = (run.series(key)[1] for key in ("data_wait_percent", "images_per_second", "model_flops_utilization_percent"))
    if not waits or not speeds:
        return Answer(question, "Not measured", "The run has logged no step with its time.", OPEN)
    wait, rate = median(waits), f"{median(speeds):.3g} images per second"
    if wait >= STARVED_PERCENT:
        return Answer(question, "The loader", f"Steps wait for data {wait:.0f} % of the time, at {rate}.", BAD)
    slowest, fastest = (run.series(f"step_seconds_{which}")[1] for which in ("slowest", "fastest"))
    if slowest and fastest and median(slowest) > UNEVEN * median(fastest):
        ratio = median(slowest) / median(fastest)
        return Answer(
            question, "The slowest rank", f"Its steps take {ratio:.2f} times as long as those of the fastest one, at {rate}.", BAD
        )
    share = f" The GPU does {median(used):.0f} % of the operations that it could do." if used else ""
    return Answer(question, "The network", f"Steps wait for data only {wait:.0f} % of the time, at {rate}.{share}", GOOD)


AGAIN = "Take a lower optimizer.learning_rate, a longer optimizer.warmup_epochs or a network with batch norms; more steps do not help."
LABELS = "Name labelled images with --evaluation.train and --evaluation.test, or evaluate the run's folder with massl-fast eval knn."
LONGER = "Short runs need settings that get them off the ground; docs/demo.md says which did and which did not."
FEED = "Raise --data.num_workers, store smaller images, or install DALI; massl-fast bench train says what bounds the run."
SLOWEST = "Another program or a slower device holds all ranks back; slowest_rank in metrics.jsonl names it."
USE = "massl-fast eval all runs further protocols, and massl-fast export writes the backbone for timm."


def what_next(run: RunFolder, learned: Answer, collapse: Answer, speed: Answer) -> Answer:
    """The first thing that helps, and what helps after it."""
    rising = _rise_of_the_last_quarter(run) if learned.mark == GOOD else 0.0
    steps = {
        ("Start again", " ".join([AGAIN, *run.advice])): collapse.mark == BAD,
        ("Continue the run", f"The same command goes on from the last checkpoint; step {run.last_step} is the last one logged."): (
            collapse.mark != BAD and bool(run.stopped or not run.summary)
        ),
        ("Measure it", LABELS): learned.verdict == "Not measured",
        ("Change the settings that the run warned of", " ".join(run.advice)): (
            bool(run.advice) and learned.mark != GOOD and collapse.mark != BAD
        ),
        ("Train longer, or with other settings", LONGER): learned.mark == BAD and collapse.mark != BAD,
        ("Feed it faster", FEED): speed.verdict == "The loader",
        ("Look at the slowest rank", SLOWEST): speed.verdict == "The slowest rank",
        ("Train longer", f"k-NN accuracy still rose by {rising:.1f} points in the last quarter."): rising > CLEAR_POINTS,
        ("Evaluate and use it", USE): learned.verdict not in ("Not measured", "No", "Not yet"),
    }
    (verdict, first), *further = [step for step, helps in steps.items() if helps] or [("Nothing yet", "There is too little to go by.")]
    return Answer("What to do next?", verdict, " ".join([first, *(f"{name}: {sentence}" for name, sentence in further)]), OPEN)


def _rise_of_the_last_quarter(run: RunFolder) -> float:
    """Points of k-NN accuracy from the last evaluation in the first three quarters to the last one of all."""
    headline = run.headline_knn("teacher")
    if headline is None:
        return 0.0
    _, steps, values = headline
    before = [value for step, value in zip(steps, values) if step <= 0.75 * steps[-1]]
    return values[-1] - before[-1] if before else 0.0
