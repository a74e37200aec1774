"""Every setting of a training run: one model per concern, one docstring per field.

A recipe (YAML) and the command line (``--section.key VALUE``) are merged as plain dictionaries and validated once, so a misspelt key or a
wrong type reads the same wherever it was written. Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import textwrap
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, coerce_numbers_to_str=True, validate_default=True)


class RunSection(Section):
    folder: str = ""
    """Where config, metrics, checkpoints and the report go. Empty: runs/<recipe name>."""
    seed: int = Field(0, ge=0)
    """Seed of weights, data order, augmentation, drop path and partitions."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the folder's last checkpoint if there is one; must: fail without one;
    never: move an old run aside and start over."""
    init_from: str = ""
    """Checkpoint (a massl-fast folder or a published .pth) whose backbone student and teacher start from. Empty: random weights."""


class DataSection(Section):
    train: str = ""
    """Training images: a folder of class folders, a folder of images, WebDataset tars (path/train-{000..003}.tar),
    or `demo` (generated on first use)."""
    loader: Literal["auto", "torchvision", "dali"] = "auto"
    """Which loader decodes and augments. auto: DALI where it imports and feeds a GPU, torchvision otherwise;
    the start of a run says which and why."""
    num_workers: int = Field(-1, ge=-1)
    """Loader processes (torchvision) or threads (DALI) per rank. -1: the cores of this host divided by its ranks, one kept for the step."""
    bad_files: str = ""
    """List written by `massl-fast data check`; the files it names as unreadable are left out from the start. Empty: none."""
    max_bad_percent: float = Field(5.0, ge=0, le=100)
    """Share of unreadable images above which a run ends. Below it they are named in bad_files.txt and replaced."""
    decode: Literal["cpu", "mixed"] = "mixed"
    """DALI only: JPEG decoding on the CPU or on the GPU with a share of hardware decoding. Without a GPU it is cpu, and the run says so."""
    augment: Literal["cpu", "gpu"] = "gpu"
    """DALI only: where crops are augmented. Without a GPU it is cpu, and the run says so."""


class CropsSection(Section):
    global_size: int = Field(224, ge=8)
    """Side of the 2 global crops, pixels."""
    local_size: int = Field(96, ge=8)
    """Side of the local crops, pixels."""
    num_local: int = Field(10, ge=0)
    """Local crops an image; they pass through the student only."""
    global_scale: tuple[float, float] = (0.32, 1.0)
    """Area of a global crop as a share of the image, smallest and largest."""
    local_scale: tuple[float, float] = (0.05, 0.32)
    """Area of a local crop as a share of the image, smallest and largest."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Probability of a horizontal flip."""
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: float = Field(0.8, ge=0, le=1)
    """Probability that a crop is colour-jittered."""
    grayscale_probability: float = Field(0.2, ge=0, le=1)
    """Probability that a crop turns grey."""
    blur_probability: tuple[float, float, float] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur for the first global, the second global and the local crops."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur, pixels, smallest and largest."""
    solarize_probability: tuple[float, float, float] = (0.0, 0.2, 0.0)
    """Probability of solarization for the first global, the second global and the local crops."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Subtracted from each channel (range 0 to 1)."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Each channel is divided by this."""


class ModelSection(Section):
    architecture: str = "vit_small_patch16_224"
    """Any timm vision transformer, or any timm network with pooled features."""
    model_args: dict[str, Any] = {}
    """Further arguments of timm.create_model, as a YAML mapping: {depth: 4, embed_dim: 192}."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student (the teacher has none)."""
    head_hidden_dim: int = Field(2048, ge=1)
    """Width of the projection head's hidden layers."""
    head_layers: int = Field(3, ge=1)
    """Linear layers in the projection head."""
    embedding_dim: int = Field(256, ge=2)
    """Width of the embeddings (and of the memory)."""
    crops_pass: Literal["auto", "packed", "separate"] = "auto"
    """packed: one pass over the tokens of all crops; separate: one pass a crop size. auto: packed where the network allows it."""
    compile: bool = False
    """torch.compile the transformer blocks."""
    recompute: Literal["nothing", "pointwise", "blocks"] = "nothing"
    """What the student's backward pass computes again instead of keeping it. pointwise: norms, activations and concatenations, no matrix
    product (by estimate a third less memory for a tenth more time); blocks: all but each block's input (less than a third of the memory, a
    quarter more time). docs/performance.md has the figures."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Format of the tokens between transformer blocks when train.precision is bf16. With bf16 a step moves a quarter fewer bytes, for more
    rounding; docs/performance.md has the figures."""


class ObjectiveSection(Section):
    memory_size: int = Field(65536, ge=2)
    """Entries of the memory, K."""
    block_size: int = Field(16384, ge=2)
    """Entries of a block; the last K modulo block_size entries of each partition sit out a step."""
    partition: Literal["stochastic", "blockwise"] = "stochastic"
    """stochastic: a fresh random partition every step; blockwise: contiguous blocks (the ablation that collapses, paper table 13)."""
    partition_scope: Literal["shared", "rank"] = "shared"
    """shared: all ranks cut the memory into the same blocks; rank: each into its own, so that a step sees more different blocks."""
    student_temperature: float = Field(0.1, gt=0)
    """Temperature of the student's softmax."""
    teacher_temperature_start: float = Field(0.04, gt=0)
    """Temperature of the teacher's softmax at step 0."""
    teacher_temperature: float = Field(0.07, gt=0)
    """Temperature of the teacher's softmax after its warm-up."""
    teacher_temperature_warmup_epochs: float = Field(30, ge=0)
    """Epochs over which the teacher temperature rises linearly."""
    block_reduction: Literal["mean", "sum"] = "mean"
    """Losses of the blocks are averaged (published code) or summed (paper, eq. 3)."""
    enqueue_view: Literal["first", "second"] = "second"
    """Which global crop's teacher embedding enters the memory: the second (published code) or the first (paper's listing)."""
    memory_dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Storage of the memory. auto: that of the step's precision."""
    backend: Literal["auto", "reference", "streaming", "triton"] = "auto"
    """Implementation of the loss. auto: the fastest that runs on the device; an asked-for one that cannot run is an error."""

    @property
    def entries_in_blocks(self) -> int:
        """Entries that take part in a step: those of whole blocks."""
        return self.memory_size // self.block_size * self.block_size


class OptimizerSection(Section):
    name: Literal["adamw", "adamw_with_teacher", "adamw_apex", "sgd", "lars"] = "adamw"
    """For transformers adamw (PyTorch's fused one), adamw_with_teacher (the same step, the teacher's and clipping in one kernel that
    touches each byte once; GPUs of compute capability 8.0 or newer, whole weights) or adamw_apex (apex's FusedAdam, if built); sgd and
    lars for convolutional networks."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate, for a global batch of 256 if it scales with the batch."""
    learning_rate_scaling: Literal["linear", "none"] = "linear"
    """linear: the peak is learning_rate × global batch / 256; none: learning_rate as written."""
    minimum_learning_rate: float = Field(1e-6, ge=0)
    """Where the cosine ends (not scaled)."""
    warmup_epochs: float = Field(0, ge=0)
    """Epochs of linear warm-up from 0."""
    weight_decay: float = Field(0.04, ge=0)
    """Weight decay at the start. Biases and one-dimensional parameters have none."""
    weight_decay_end: float = Field(0.4, ge=0)
    """Weight decay at the end of the cosine."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    clip: float = Field(3.0, ge=0)
    """Largest gradient norm; 0: no clipping."""
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Clip each parameter's gradient by its own norm (published) or all by the global norm."""


class TeacherSection(Section):
    momentum: float = Field(0.996, ge=0, le=1)
    """Momentum of the teacher's moving average at step 0."""
    momentum_end: float = Field(1.0, ge=0, le=1)
    """Where the momentum's cosine ends."""


class TrainSection(Section):
    epochs: float = Field(100, gt=0)
    """Length of training in passes over the data."""
    steps: int = Field(0, ge=0)
    """Length in steps; 0: given by the epochs. Schedules span the whole length either way."""
    stop_at_step: int = Field(0, ge=0)
    """End this session early at that step (schedules unchanged); 0: at the end. Resuming continues from there."""
    global_batch: int = Field(1024, ge=1)
    """Images of one optimizer step over all devices."""
    device_batch: int = Field(0, ge=0)
    """Most images a device takes at once; the rest follows by gradient accumulation. 0: as many as the step needs."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 from compute capability 8, fp16 with loss scaling on older GPUs, fp32 on the CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    cuda_graph: bool = False
    """Record the whole step once as a CUDA graph and replay it: no launches from Python, for steps so short that the host cannot keep up.
    One process on a GPU, with optimizer.name adamw_with_teacher."""


class ParallelSection(Section):
    strategy: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """auto: none in one process, DistributedDataParallel in several; fsdp2: parameters, gradients and optimizer sharded over all ranks, a
    transformer block at a time, for networks that one device does not hold."""
    timeout_seconds: float = Field(600, gt=0)
    """After this long without an answer from a rank the others end and say which."""
    checksum_every_steps: int = Field(200, ge=1)
    """Steps between comparisons of memory and weights across ranks (before every checkpoint in any case)."""


class EvaluationSection(Section):
    train: str = ""
    """Labelled images that k-NN compares with; empty: no evaluation. `demo` names the generated set."""
    test: str = ""
    """Labelled images that k-NN classifies."""
    every_epochs: float = Field(10, ge=0)
    """Epochs between evaluations during training; 0: only before and after."""
    image_size: int = Field(0, ge=0)
    """Side of the evaluated images, pixels; 0: that of the global crops."""
    ks: tuple[int, ...] = (10, 20, 100, 200)
    """Numbers of neighbours."""
    temperature: float = Field(0.07, gt=0)
    """Temperature of the votes, exp(similarity / temperature)."""
    max_train_images: int = Field(0, ge=0)
    """Evaluate on a fixed random subset of the labelled training images; 0: all."""


class LoggingSection(Section):
    every_steps: int = Field(20, ge=1)
    """Steps between logged lines (the only host synchronisations of the loop)."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str = ""
    """Weights & Biases project; empty: not used. Needs wandb installed."""


class CheckpointSection(Section):
    every_steps: int = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(2, ge=1)
    """How many of the newest checkpoints are kept."""
    keep_every_steps: int = Field(0, ge=0)
    """Checkpoints whose step is a multiple of this are kept for good, as is the best by k-NN; 0: none besides."""


class Config(Section):
    """A whole run."""

    run: RunSection = RunSection()
    data: DataSection = DataSection()
    crops: CropsSection = CropsSection()
    model: ModelSection = ModelSection()
    objective: ObjectiveSection = ObjectiveSection()
    optimizer: OptimizerSection = OptimizerSection()
    teacher: TeacherSection = TeacherSection()
    train: TrainSection = TrainSection()
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection = EvaluationSection()
    logging: LoggingSection = LoggingSection()
    checkpoint: CheckpointSection = CheckpointSection()

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Config:
        objective, train, evaluation = self.objective, self.train, self.evaluation
        if objective.block_size > objective.memory_size:
            raise ValueError(
                f"objective.block_size is {objective.block_size}, larger than objective.memory_size {objective.memory_size}: "
                f"there would be no block. Choose a block of at most the memory."
            )
        if objective.memory_size < train.global_batch:
            raise ValueError(
                f"objective.memory_size is {objective.memory_size}, smaller than train.global_batch {train.global_batch}: one step's "
                f"embeddings would not fit. Choose a memory of at least the batch (the published one holds 65536)."
            )
        if bool(evaluation.train) != bool(evaluation.test):
            missing = "test" if evaluation.train else "train"
            raise ValueError(
                f"evaluation.{missing} is empty: k-NN needs labelled images to compare with and to classify. Set both, or neither."
            )
        for name in ("global_scale", "local_scale", "blur_sigma"):
            low, high = getattr(self.crops, name)
            if not 0 < low <= high:
                raise ValueError(f"crops.{name} is ({low}, {high}); it takes two positive numbers, the smaller first.")
        return self


def recipe_names() -> list[str]:
    return sorted(p.name.removesuffix(".yaml") for p in resources.files("massl_fast.recipes").iterdir() if p.name.endswith(".yaml"))


def _recipe_text(recipe: str) -> tuple[str, str]:
    """(name, YAML text) of a shipped recipe's name or a file's path."""
    if recipe in recipe_names():
        return recipe, resources.files("massl_fast.recipes").joinpath(f"{recipe}.yaml").read_text(encoding="utf-8")
    path = Path(recipe)
    if path.is_file():
        return path.stem, path.read_text(encoding="utf-8")
    near = difflib.get_close_matches(recipe, recipe_names(), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise ValueError(f"There is no recipe '{recipe}'.{hint} Shipped recipes: {', '.join(recipe_names())}; or give the path of a YAML file.")


def parse_overrides(arguments: list[str]) -> dict[str, dict[str, Any]]:
    """``["--train.steps", "10", "--model.compile=true"]`` → ``{"train": {"steps": 10}, "model": {"compile": True}}``."""
    overrides: dict[str, dict[str, Any]] = {}
    position = 0
    while position < len(arguments):
        key, equals, value = arguments[position].partition("=")
        position += 1
        if not key.startswith("--") or key.count(".") != 1:
            raise ValueError(f"'{key}' is not a setting. Settings are written --section.key VALUE, for example --train.steps 100.")
        if not equals:
            if position == len(arguments):
                raise ValueError(f"{key} has no value. Settings are written --section.key VALUE.")
            value = arguments[position]
            position += 1
        section, name = key[2:].replace("-", "_").split(".")
        try:
            overrides.setdefault(section, {})[name] = yaml.safe_load(value) if value else ""
        except yaml.YAMLError as error:
            raise ValueError(f"The value of {key}, '{value}', is not valid YAML: {error}") from None
    return overrides


def load_config(recipe: str, overrides: list[str] = ()) -> Config:
    """The recipe's settings with the command line's on top, validated.

    Raises ValueError naming every key that is unknown, of the wrong type or out of range, with the choices.
    """
    name, text = _recipe_text(recipe)
    settings = _mapping_of(text, f"Recipe {recipe}")
    for section, values in parse_overrides(list(overrides)).items():
        if not isinstance(settings.setdefault(section, {}), dict):
            raise ValueError(f"Recipe {recipe}: {section} holds no keys; it must be a section of settings.")
        settings[section].update(values)
    config = validated(settings, f"Recipe {name}")
    if not config.run.folder:
        config.run.folder = f"runs/{name}"
    return config


def read_config(path: Path) -> Config:
    """The resolved configuration that a run wrote."""
    return validated(_mapping_of(Path(path).read_text(encoding="utf-8"), str(path)), str(path))


def write_config(config: Config, path: Path) -> None:
    path.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True), encoding="utf-8")


def validated(settings: dict[str, Any], origin: str) -> Config:
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise ValueError("\n".join(_sentence(problem) for problem in error.errors()) + f"\n({origin})") from None


def _mapping_of(text: str, origin: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{origin} must be a mapping of sections to settings; found {type(settings).__name__}.")
    return settings


def _sentence(problem: dict[str, Any]) -> str:
    """One pydantic problem as a sentence that names the key, what was found and what would do."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        choices = list(Config.model_fields if len(location) == 1 else Config.model_fields[location[0]].annotation.model_fields)
        near = difflib.get_close_matches(location[-1], choices, n=1)
        elsewhere = [f"{s}.{location[-1]}" for s, f in Config.model_fields.items() if location[-1] in f.annotation.model_fields]
        hint = f" Did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f" Did you mean {elsewhere[0]}?" if elsewhere else ""
        return (
            f"There is no setting {key}.{hint} {'Sections' if len(location) == 1 else f'Settings of {location[0]}'}: {', '.join(choices)}."
        )
    if problem["type"] == "value_error":
        return f"{key + ': ' if key else ''}{problem['ctx']['error']}"
    return f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}."


def describe_settings() -> str:
    """All settings with defaults and meaning, for ``massl-fast train --help``."""
    lines = []
    for section, field in Config.model_fields.items():
        lines.append(f"\n{section}:")
        for name, setting in field.annotation.model_fields.items():
            kind = (
                str(setting.annotation).replace("typing.", "") if not isinstance(setting.annotation, type) else setting.annotation.__name__
            )
            kind = kind.replace("Literal", "one of ")
            lines.append(f"  --{section}.{name} ({kind}, default {setting.default!r})")
            lines += textwrap.wrap(setting.description, width=114, initial_indent=6 * " ", subsequent_indent=6 * " ")
    return "\n".join(lines)
