"""Settings that are known to train badly, said before they cost GPU hours."""

from __future__ import annotations

from massl_fast.config import Config


def known_to_fail(config: Config, total_steps: int, num_images: int) -> list[str]:
    """One sentence a problem.

    Source of the first: the cause most often found for flat losses of this family on small data and batches is a teacher that
    averages too slowly (threads dino#61, dino#246, dinov2#298).
    """
    objective, batch, momentum = config.objective, config.train.global_batch, config.teacher.momentum
    remembered = 1 / (1 - momentum) if momentum < 1 else float("inf")
    remainder = objective.memory_size % objective.block_size
    problems = {
        f"teacher.momentum {momentum} averages over about {remembered:.0f} steps, a large part of this run's {total_steps}: the teacher "
        f"will hardly move. Small batches and short runs want a lower momentum.": remembered > total_steps / 4,
        f"objective.memory_size {objective.memory_size} exceeds the {num_images} training images: the memory will hold several embeddings "
        f"of the same image.": objective.memory_size > num_images,
        f"objective.memory_size {objective.memory_size} holds only {objective.memory_size / batch:.1f} steps of "
        f"{batch} images.": objective.memory_size < 8 * batch,
        f"objective.block_size {objective.block_size} does not divide objective.memory_size {objective.memory_size}: {remainder} random "
        f"entries ({100 * remainder / objective.memory_size:.1f}%) sit out each step.": remainder > 0,
        f"one block holds the whole memory (objective.block_size {objective.block_size}): nothing is random about it, and it is the random "
        f"blocks that keep the representation from collapsing.": objective.block_size == objective.memory_size,
    }
    return [sentence for sentence, holds in problems.items() if holds]
