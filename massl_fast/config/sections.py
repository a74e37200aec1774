"""The sections of a run's settings that every objective shares: one model per concern, one docstring per field.

Upper bounds are far beyond what any machine runs; they keep a slip of the keyboard from ending in an overflow.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, SerializeAsAny, ValidationInfo, field_validator

from massl_fast.registry import Registry

if TYPE_CHECKING:
    Plain = Any  # whoever takes it knows what it takes
else:
    Plain = JsonValue

LARGEST_COUNT = 10**12
"""Steps, images."""
LARGEST_SIZE = 2**20
"""Whatever has a size in a network."""

LONGEST_PATH, LONGEST_FILE_NAME = 4095, 255
"""Bytes, of Linux."""

Pixels = Annotated[int, Field(le=2**14)]
Epochs = Annotated[float, Field(ge=0, le=1e7)]
Steps = Annotated[int, Field(ge=0, le=LARGEST_COUNT)]
Share = Annotated[float, Field(ge=0, le=1)]
Jitter = Annotated[float, Field(ge=0, le=100)]
Hue = Annotated[float, Field(ge=0, le=0.5)]
Sigma = Annotated[float, Field(le=1000)]
Deviation = Annotated[float, Field(ge=1e-6, le=1e6)]
Beta = Annotated[float, Field(ge=0, lt=1)]
Neighbours = Annotated[int, Field(ge=1, le=LARGEST_COUNT)]
Temperature = Annotated[float, Field(ge=1e-6, le=1e6)]
Width = Annotated[int, Field(le=LARGEST_SIZE)]


def _possible_path(text: str) -> str:
    """``text``, if a file may have that name at all; what the file system has is for those to say who open it."""
    encoded = os.fsencode(text)
    if b"\0" in encoded:
        raise ValueError("it holds a zero byte, which no path has. Remove it.")
    if len(encoded) > LONGEST_PATH or max(map(len, encoded.split(b"/"))) > LONGEST_FILE_NAME:
        raise ValueError(
            f"it is too long for a path: {LONGEST_PATH} bytes are possible, {LONGEST_FILE_NAME} between two slashes. Name a shorter one."
        )
    return text


PathText = Annotated[str, AfterValidator(_possible_path)]


class Section(BaseModel):
    """A group of settings. Unknown keys, infinities and what is not a number are errors."""

    model_config = ConfigDict(
        extra="forbid",
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        validate_default=True,
        allow_inf_nan=False,
        str_max_length=LONGEST_PATH,
    )


LOADERS: Registry[type[Section]] = Registry("data.loader", {"auto": Section, "torchvision": Section, "dali": Section})
"""Loaders by name, each with the model of data.loader_settings."""


def register_loader_settings(name: str, model: type[Section] = Section) -> None:
    """Make ``name`` a choice of data.loader and ``model`` its data.loader_settings; raises ValueError where the name is taken."""
    LOADERS.add(name, model)


class RunSection(Section):
    folder: PathText = ""
    """Where config, metrics, checkpoints and the report go. Empty: runs/<recipe name>."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of weights, data order, augmentation, drop path and partitions."""
    resume: Literal["auto", "must", "never"] = "auto"
    """auto: continue from the folder's last checkpoint if there is one; must: fail without one;
    never: move an old run aside and start over."""
    init_from: PathText = ""
    """Checkpoint (a massl-fast folder or a published .pth) whose backbone student and teacher start from. Empty: random weights."""
    plugins: tuple[PathText, ...] = ()
    """Python files that register objectives, evaluations or loaders of your own, run when the settings are read."""

    @field_validator("plugins", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class DataSection(Section):
    train: PathText = ""
    """Training images: a folder of class folders, a folder of images, WebDataset tars (path/train-{000..003}.tar), Parquet files,
    or `demo` (generated on first use)."""
    loader: str = "auto"
    """Which loader decodes and augments: auto, torchvision, dali or one that a plugin registers. auto: DALI where it imports and feeds a
    GPU, torchvision otherwise; the start of a run says which and why."""
    loader_settings: SerializeAsAny[Section] = Section()
    """Settings of a loader that a plugin registers, --data.loader_settings.KEY VALUE; the other loaders have none."""
    num_workers: int = Field(-1, ge=-1, le=4096)
    """Loader processes (torchvision) or threads (DALI) per rank. -1: the cores that the rank may use, those that it shares divided among
    the ranks of the host, one kept for the step."""
    bad_files: PathText = ""
    """List written by `massl-fast data check`; the files it names as unreadable are left out from the start. Empty: none."""
    max_bad_percent: float = Field(5.0, ge=0, le=100)
    """Share of unreadable images above which a run ends. Below it they are named in bad_files.txt and replaced."""
    decode: Literal["cpu", "mixed"] = "mixed"
    """DALI only: JPEG decoding on the CPU or on the GPU with a share of hardware decoding. Without a GPU it is cpu, and the run says so."""
    augment: Literal["cpu", "gpu"] = "gpu"
    """DALI only: where crops are augmented. Without a GPU it is cpu, and the run says so."""

    @field_validator("loader")
    @classmethod
    def _is_registered(cls, name: str) -> str:
        LOADERS.chosen(name)
        return name

    @field_validator("loader_settings", mode="before")
    @classmethod
    def _of_the_named_loader(cls, value: Any, info: ValidationInfo) -> Any:
        return LOADERS[info.data["loader"]].model_validate(value) if isinstance(value, dict) and "loader" in info.data else value


class CropsSection(Section):
    global_size: Pixels = Field(224, ge=8)
    """Side of the 2 global crops, pixels."""
    local_size: Pixels = Field(96, ge=8)
    """Side of the local crops, pixels."""
    num_local: int = Field(10, ge=0, le=1000)
    """Local crops per image; they pass through the student only."""
    global_scale: tuple[Share, Share] = (0.32, 1.0)
    """Area of a global crop as a share of the image, smallest and largest."""
    local_scale: tuple[Share, Share] = (0.05, 0.32)
    """Area of a local crop as a share of the image, smallest and largest."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """How crops are resized, antialiased either way: bicubic (MaSSL, CARP, DINO, iBOT) or bilinear (MoCo v3)."""
    flip_probability: Share = 0.5
    """Probability of a horizontal flip."""
    jitter: tuple[Jitter, Jitter, Jitter, Hue] = (0.4, 0.4, 0.2, 0.1)
    """Strength of brightness, contrast, saturation and hue jitter."""
    jitter_probability: Share = 0.8
    """Probability that a crop is colour-jittered."""
    grayscale_probability: Share = 0.2
    """Probability that a crop turns grey."""
    blur_probability: tuple[Share, Share, Share] = (1.0, 0.1, 0.5)
    """Probability of Gaussian blur for the first global, the second global and the local crops."""
    blur_sigma: tuple[Sigma, Sigma] = (0.1, 2.0)
    """Standard deviation of the blur, pixels, smallest and largest."""
    solarize_probability: tuple[Share, Share, Share] = (0.0, 0.2, 0.0)
    """Probability of solarization for the first global, the second global and the local crops."""
    mean: tuple[Share, Share, Share] = (0.485, 0.456, 0.406)
    """Subtracted from each channel (range 0 to 1)."""
    std: tuple[Deviation, Deviation, Deviation] = (0.229, 0.224, 0.225)
    """Each channel is divided by this."""


class ModelSection(Section):
    architecture: str = "vit_small_patch16_224"
    """Any timm vision transformer, or any timm network with pooled features."""
    model_args: dict[str, Plain] = {}
    """Further arguments of timm.create_model, as a mapping, {depth: 4, embed_dim: 192}, or one at a time, --model.model_args.depth 4."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth of the student (the teacher has none)."""
    head_hidden_dim: Width = Field(2048, ge=1)
    """Width of the projection head's hidden layers."""
    head_layers: int = Field(3, ge=1, le=1000)
    """Linear layers in the projection head."""
    embedding_dim: Width = Field(256, ge=2)
    """Width of the embeddings (and of the memory)."""
    position_embedding: Literal["learned", "sin-cos"] = "learned"
    """learned: timm's; sin-cos: fixed two-dimensional sine and cosine waves (MoCo v3), for transformers with a class token or none."""
    crops_pass: Literal["auto", "packed", "separate"] = "auto"
    """packed: one pass over the tokens of all crops; separate: one pass per crop size. auto: packed where the network allows it."""
    attention: Literal["auto", "varlen", "per_size"] = "auto"
    """varlen: one call of PyTorch's varlen_attn for the tokens of all crops; per_size: one call of its fused attention per crop size. auto:
    varlen where PyTorch (2.10 or newer) has it, the GPU (compute capability 8.0 or newer) computes in 16 bits and a trial at the start
    succeeds; the start of a run says which and why."""
    compile: bool = False
    """torch.compile the transformer blocks."""
    recompute: Literal["nothing", "pointwise", "blocks"] = "nothing"
    """What the student's backward pass computes again instead of keeping it. pointwise: norms, activations and concatenations, no matrix
    product (by estimate a third less memory for a tenth more time); blocks: all but each block's input (less than a third of the memory, a
    quarter more time). docs/performance.md has the figures."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Format of the tokens between transformer blocks when train.precision is bf16. With bf16 a step moves a quarter fewer bytes and rounds
    more; docs/performance.md has the figures. There is no fp16: it ends at 65504, and tokens add up over the blocks."""

    @field_validator("model_args")
    @classmethod
    def _sizes_are_possible(cls, arguments: dict[str, Plain]) -> dict[str, Plain]:
        for name, value in arguments.items():
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and abs(number) > LARGEST_SIZE:
                    raise ValueError(f"{name} is {number:.6g}; no network has sizes beyond {LARGEST_SIZE}.")
        return arguments


class OptimizerSection(Section):
    name: Literal["adamw", "adamw_with_teacher", "adamw_apex", "sgd", "lars"] = "adamw"
    """For transformers adamw (PyTorch's fused one), adamw_with_teacher (the same step, the teacher's and clipping in one kernel that
    touches each byte once; GPUs of compute capability 8.0 or newer, whole weights) or adamw_apex (apex's FusedAdam, if built); sgd and
    lars for convolutional networks."""
    learning_rate: float = Field(5e-4, gt=0, le=1e6)
    """Peak learning rate, for a global batch of 256 if it scales with the batch."""
    learning_rate_scaling: Literal["linear", "none"] = "linear"
    """linear: the peak is learning_rate × global batch / 256; none: learning_rate as written."""
    minimum_learning_rate: float = Field(1e-6, ge=0, le=1e6)
    """Where the cosine ends (not scaled)."""
    warmup_epochs: Epochs = 0
    """Epochs of linear warm-up from 0."""
    weight_decay: float = Field(0.04, ge=0, le=1e6)
    """Weight decay at the start. See optimizer.decayed for what it acts on."""
    weight_decay_end: float = Field(0.4, ge=0, le=1e6)
    """Weight decay at the end of the cosine."""
    decayed: Literal["matrices", "all"] = "matrices"
    """What weight decay acts on: all but biases and one-dimensional parameters, or everything (as published for MoCo v3)."""
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    """AdamW's averaging coefficients."""
    momentum: float = Field(0.9, ge=0, lt=1)
    """Momentum of sgd and lars."""
    clip: float = Field(3.0, ge=0, le=1e9)
    """Largest gradient norm; 0: no clipping."""
    clip_mode: Literal["parameter", "global"] = "parameter"
    """Clip each parameter's gradient by its own norm (published) or all by the global norm."""


class TeacherSection(Section):
    momentum: Share = 0.996
    """Momentum of the teacher's moving average at step 0."""
    momentum_end: Share = 1.0
    """Where the momentum's cosine ends."""
    moves: Literal["after_student", "before_student"] = "after_student"
    """after_student: towards the weights that the optimizer's step has just made; before_student: towards those that the step began with
    (CARP's published code)."""


class TrainSection(Section):
    epochs: Epochs = Field(100, gt=0)
    """Length of training in passes over the data."""
    steps: Steps = 0
    """Length in steps; 0: given by the epochs. Schedules span the whole length either way."""
    stop_at_step: Steps = 0
    """End this session early at that step (schedules unchanged); 0: at the end. Resuming continues from there."""
    global_batch: int = Field(1024, ge=1, lt=2**31)
    """Images of one optimizer step over all devices."""
    micro_batch: int = Field(0, ge=0, lt=2**31)
    """Most images a device takes at once; the rest follows by gradient accumulation. 0: as many as the step needs."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 from compute capability 8, fp16 with loss scaling on older GPUs, fp32 on the CPU."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    cpu_products: Literal["auto", "onednn", "blas"] = "auto"
    """Library of linear layers in fp32 on a CPU. onednn: faster where MKL leaves AVX-512 unused, with other roundings; blas: PyTorch's own
    choice. auto: onednn on processors with AVX-512 that are not Intel's; the start of a run says which and why."""
    cuda_graph: bool = False
    """Record the whole step once as a CUDA graph and replay it. Python then launches no kernels, which helps where steps are so short
    that the host cannot keep up. It needs a GPU and optimizer.name adamw_with_teacher; several processes record a graph between every
    two exchanges."""


class ParallelSection(Section):
    strategy: Literal["auto", "none", "ddp", "fsdp2"] = "auto"
    """auto: none in one process, DistributedDataParallel in several; fsdp2: parameters, gradients and optimizer sharded over all ranks, a
    transformer block at a time, for networks that one device does not hold."""
    gradients: Literal["auto", "overlapped", "flat"] = "auto"
    """How replicas exchange gradients. overlapped: DistributedDataParallel's buckets, while the backward pass computes, which a slow
    network needs; flat: one buffer after it, which recorded steps need. auto: flat with train.cuda_graph, overlapped otherwise."""
    timeout_seconds: float = Field(600, gt=0, le=1e7)
    """Seconds without an answer from a rank after which the others end and name it."""
    checksum_every_steps: Steps = Field(200, ge=1)
    """Steps between comparisons of memory and weights across ranks (before every checkpoint in any case)."""


class EvaluationSection(Section):
    train: PathText = ""
    """Labelled images that k-NN compares with; empty: no evaluation. `demo` names the generated set."""
    test: PathText = ""
    """Labelled images that k-NN classifies."""
    every_epochs: Epochs = 10
    """Epochs between evaluations during training; 0: only before and after."""
    image_size: Pixels = Field(0, ge=0)
    """Side of the evaluated images, pixels; 0: that of the global crops."""
    ks: tuple[Neighbours, ...] = Field((10, 20, 100, 200), min_length=1, max_length=100)
    """Numbers of neighbours."""
    temperature: Temperature = 0.07
    """Temperature of the votes, exp(similarity / temperature)."""
    max_train_images: int = Field(0, ge=0, le=LARGEST_COUNT)
    """Evaluate on a fixed random subset of the labelled training images; 0: all."""
    protocols: tuple[str, ...] = ("knn",)
    """Evaluations that are run, by their names in `massl-fast eval`, such as [knn, linear]."""
    settings: dict[str, dict[str, Plain]] = {}
    """Settings of evaluations by name, as a YAML mapping: {linear: {epochs: 10}}. Settings that are left out are as above."""
    best_metric: str = ""
    """Key in metrics.jsonl of the figure by which the best checkpoint is kept, such as linear_teacher_chosen_percent, rankme or lidar.
    Empty: the teacher's headline of the first evaluation (k-NN at k = 20)."""
    rank_measures: bool = False
    """Log RankMe and LiDAR, which need no labels, of the features of the last micro-batch at every logged line."""


class LoggingSection(Section):
    every_steps: Steps = Field(20, ge=1)
    """Steps between logged lines (the only host synchronisations of the loop)."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""
    wandb: str = ""
    """Weights & Biases project; empty: none. It needs wandb (pip install 'massl-fast[wandb]')."""


class CheckpointSection(Section):
    every_steps: Steps = Field(1000, ge=1)
    """Steps between checkpoints."""
    keep_last: int = Field(2, ge=1, le=LARGEST_COUNT)
    """How many of the newest checkpoints are kept."""
    keep_every_steps: Steps = 0
    """Checkpoints whose step is a multiple of this are kept for good, as is the best by k-NN; 0: none besides."""
