"""The settings of a training run: frozen, checked when constructed, and nothing but values.

Anything unknown, of the wrong type or contradictory is refused with a `ConfigError` that names the key and what is
allowed. What depends on the number of ranks is settled by `resolve`, still before anything is started.
"""

import math
from dataclasses import dataclass, field

__all__ = [
    "GMM_BACKENDS",
    "CheckpointConfig",
    "ConfigError",
    "DataConfig",
    "FaultConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Resolved",
    "TrainConfig",
    "TrainingConfig",
    "resolve",
]

GMM_BACKENDS = ("auto", "torch", "loop", "grouped_gemm")
GMM_ALIGNMENT = {"fp32": 4, "bf16": 8}  # elements in the 16 bytes that grouped_mm needs rows to be multiples of
PRECISIONS = ("fp32", "bf16")
OPTIMIZERS = ("adamw", "fused_adam", "cpu_adam")
GRADIENT_DTYPES = ("fp32", "bf16")
CHECKPOINT_MODES = ("full", "partial", "partial_by_load")
RESTORE_WORDS = ("auto", "never", "weights")
LONGEST_WARMUP = 100
WARMUP_SHARE = 10  # of the schedule's steps to one step of warm-up
SPECIAL_TOKENS = 1
BYTE_VALUES = 256


class ConfigError(ValueError):
    """A setting that cannot be used; the message names its key, its value and what is allowed."""


def _require(fact: bool, message: str) -> None:
    if not fact:
        raise ConfigError(message)


def _require_positive(section: str, **values: float) -> None:
    for key, value in values.items():
        _require(value > 0, f"{section}.{key} must be positive, given {value}")


def _require_choice(key: str, value: object, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{key} must be one of {', '.join(allowed)}, given {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    layers: int = 4
    width: int = 256
    heads: int = 4
    dense_hidden: int = 768
    moe_layers: str | tuple[int, ...] = "odd"  # all, odd, none, or a list of layer indices from 0
    experts: int = 16
    top_k: int = 2
    expert_hidden: int = 768
    balance_loss: float = 0.01
    z_loss: float = 0.001
    tied_embeddings: bool = True
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    gmm: str = "auto"
    ep_size: int | None = None  # None: the largest that divides both the experts and the ranks
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive("model", layers=self.layers, width=self.width, heads=self.heads, experts=self.experts)
        _require_positive("model", dense_hidden=self.dense_hidden, expert_hidden=self.expert_hidden, top_k=self.top_k)
        _require_positive("model", rope_theta=self.rope_theta, norm_eps=self.norm_eps, init_std=self.init_std)
        _require(self.balance_loss >= 0, f"model.balance_loss must not be negative, given {self.balance_loss}")
        _require(self.z_loss >= 0, f"model.z_loss must not be negative, given {self.z_loss}")
        _require(
            self.width % (2 * self.heads) == 0,
            f"model.width must be a multiple of 2 * model.heads = {2 * self.heads}, given {self.width}",
        )
        _require(
            self.top_k <= self.experts,
            f"model.top_k must be at most model.experts = {self.experts}, given {self.top_k}",
        )
        _require_choice("model.gmm", self.gmm, GMM_BACKENDS)
        _require(
            self.ep_size is None or (self.ep_size > 0 and self.experts % self.ep_size == 0),
            f"model.ep_size must divide model.experts = {self.experts}, given {self.ep_size}",
        )
        if isinstance(self.moe_layers, str):
            _require(
                self.moe_layers in ("all", "odd", "none"),
                f"model.moe_layers must be all, odd, none or a list of layer indices, given {self.moe_layers}",
            )
        outside = [layer for layer in self.moe_layer_indices() if not 0 <= layer < self.layers]
        _require(not outside, f"model.moe_layers must lie in 0..{self.layers - 1}, given {outside}")

    def moe_layer_indices(self) -> tuple[int, ...]:
        """Return the sorted indices of the layers that have experts."""
        match self.moe_layers:
            case "all":
                return tuple(range(self.layers))
            case "odd":
                return tuple(range(1, self.layers, 2))
            case "none":
                return ()
            case _:
                return tuple(sorted({int(layer) for layer in self.moe_layers}))


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    corpus: tuple[str, ...] = ()  # fsspec paths of .txt and .jsonl files; none: Python's standard library
    max_mb: float = 8.0  # of text, in corpus order; 0: all
    tokenizer_mb: float = 4.0  # of text to train the tokenizer on; 0: all
    vocab_size: int = 4096
    sequence_length: int = 256
    seed: int = 0
    cache: str = ""  # folder of tokenizers and token files; empty: moc_train in the user's cache folder

    def __post_init__(self) -> None:
        _require_positive("data", sequence_length=self.sequence_length)
        smallest = BYTE_VALUES + SPECIAL_TOKENS
        _require(
            self.vocab_size >= smallest,
            f"data.vocab_size must be at least {smallest} (every byte and the end token), given {self.vocab_size}",
        )
        for key, value in (("max_mb", self.max_mb), ("tokenizer_mb", self.tokenizer_mb)):
            _require(value >= 0, f"data.{key} must not be negative, given {value}")
        for path in self.corpus:
            _require(
                path.endswith((".txt", ".jsonl")),
                f"data.corpus paths must end in .txt or .jsonl, given {path}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    steps: int = 200
    micro_batch: int = 4  # sequences per rank and forward pass
    accumulation: int | None = None  # forward passes per step; None: from global_batch, else 1
    global_batch: int | None = None  # sequences per step; None: micro_batch * ranks * accumulation
    precision: str = "fp32"
    zero_stage: int = 2
    gradient_clipping: float = 1.0  # 0: none
    gradient_dtype: str | None = None  # of accumulated gradients; fp32 with bf16 and zero_stage 1: BF16_Optimizer
    threads: int = 0  # per rank, on CPU; 0: the machine's cores over its ranks
    deterministic: bool = True

    def __post_init__(self) -> None:
        _require_positive("training", steps=self.steps, micro_batch=self.micro_batch)
        if self.accumulation is not None:
            _require_positive("training", accumulation=self.accumulation)
        if self.global_batch is not None:
            _require_positive("training", global_batch=self.global_batch)
        _require_choice("training.precision", self.precision, PRECISIONS)
        _require(self.zero_stage in (1, 2), f"training.zero_stage must be 1 or 2, given {self.zero_stage}")
        _require(
            self.gradient_clipping >= 0,
            f"training.gradient_clipping must not be negative, given {self.gradient_clipping}",
        )
        _require(self.threads >= 0, f"training.threads must not be negative, given {self.threads}")
        if self.gradient_dtype is not None:
            _require_choice("training.gradient_dtype", self.gradient_dtype, GRADIENT_DTYPES)
            _require(
                self.precision == "bf16" or self.gradient_dtype == "fp32",
                f"training.gradient_dtype must be fp32 or null with training.precision fp32,"
                f" given {self.gradient_dtype}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    kind: str = "adamw"  # torch's AdamW; fused_adam and cpu_adam are DeepSpeed's
    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None  # None: a tenth of the schedule, at most 100
    decay_steps: int | None = None  # end of the cosine; None: training.steps
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        _require_choice("optimizer.kind", self.kind, OPTIMIZERS)
        _require_positive("optimizer", lr=self.lr, eps=self.eps)
        for key, value in (("beta1", self.beta1), ("beta2", self.beta2), ("min_lr_ratio", self.min_lr_ratio)):
            _require(0 <= value <= 1, f"optimizer.{key} must lie in 0..1, given {value}")
        for key, number in (("warmup_steps", self.warmup_steps or 0), ("weight_decay", self.weight_decay)):
            _require(number >= 0, f"optimizer.{key} must not be negative, given {number}")
        if self.decay_steps is not None:
            _require_positive("optimizer", decay_steps=self.decay_steps)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    """What goes to moc; a null is moc's own default."""

    enabled: bool = True
    storage: str = ""  # empty: $MOC_STORAGE, which `moc run -r` sets, else checkpoints/
    restore: str | int = "auto"  # auto, never, weights or a step
    run_id: str | None = None
    snapshot_every: int | None = None
    persist_every: int | None = None
    mode: str | None = None
    k_snapshot: int | None = None
    k_persist: int | None = None
    versions: int | None = None
    replicas: int | None = None
    keep_last: int | None = None
    keep_every: int | None = None
    memory_budget_bytes: int | None = None
    timeout_s: float | None = None
    plt_limit: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.restore, str):
            _require(
                self.restore in RESTORE_WORDS,
                f"checkpoint.restore must be {', '.join(RESTORE_WORDS)} or a step, given {self.restore}",
            )
        else:
            _require(self.restore >= 0, f"checkpoint.restore must be a step from 0, given {self.restore}")
        if self.mode is not None:
            _require_choice("checkpoint.mode", self.mode, CHECKPOINT_MODES)
        if self.mode in (None, "full"):
            for key, value in (("k_snapshot", self.k_snapshot), ("k_persist", self.k_persist)):
                _require(value is None, f"checkpoint.{key} must be null in mode full, given {value}")
        elif self.k_snapshot is not None:
            _require(
                self.k_persist is not None and self.k_persist <= self.k_snapshot,
                f"checkpoint.k_persist must be at most checkpoint.k_snapshot = {self.k_snapshot},"
                f" given {self.k_persist}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    folder: str = "logs"
    every: int = 10  # steps between progress lines where there is no terminal
    tensorboard: bool = True
    deepspeed: str = "warning"  # least severe message of DeepSpeed that is shown

    def __post_init__(self) -> None:
        _require_positive("logging", every=self.every)
        _require_choice("logging.deepspeed", self.deepspeed, ("debug", "info", "warning", "error"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultConfig:
    """A rehearsal: this rank kills itself with SIGKILL inside this step, in the first incarnation only."""

    kill_rank: int | None = None
    kill_step: int | None = None

    def __post_init__(self) -> None:
        _require(
            (self.kill_rank is None) == (self.kill_step is None),
            f"faults.kill_rank and faults.kill_step go together, given {self.kill_rank} and {self.kill_step}",
        )
        if self.kill_rank is not None and self.kill_step is not None:
            _require(self.kill_rank >= 0, f"faults.kill_rank must be a rank from 0, given {self.kill_rank}")
            _require(self.kill_step > 0, f"faults.kill_step must be a step from 1, given {self.kill_step}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """Everything that a run is given."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    faults: FaultConfig = field(default_factory=FaultConfig)

    def __post_init__(self) -> None:
        unit = GMM_ALIGNMENT[self.training.precision]
        for key, value in (("width", self.model.width), ("expert_hidden", self.model.expert_hidden)):
            _require(
                self.model.gmm != "torch" or value % unit == 0,
                f"model.{key} must be a multiple of {unit} with model.gmm torch and training.precision"
                f" {self.training.precision}, given {value}",
            )
        _require(
            self.model.gmm != "grouped_gemm" or self.training.precision == "bf16",
            f"model.gmm grouped_gemm needs training.precision bf16, given {self.training.precision}",
        )
        _require(
            self.warmup_steps() < self.decay_steps(),
            f"optimizer.warmup_steps must be less than {self.decay_steps()}, the end of the schedule,"
            f" given {self.optimizer.warmup_steps}",
        )
        for key, k in (("k_snapshot", self.checkpoint.k_snapshot), ("k_persist", self.checkpoint.k_persist)):
            _require(
                k is None or 1 <= k <= self.model.experts,
                f"checkpoint.{key} must be null or lie in 1..model.experts = {self.model.experts}, given {k}",
            )
        if self.faults.kill_step is not None:
            _require(
                self.faults.kill_step <= self.training.steps,
                f"faults.kill_step must be at most training.steps = {self.training.steps},"
                f" given {self.faults.kill_step}",
            )

    def decay_steps(self) -> int:
        """Return the step at which the learning rate reaches its minimum."""
        return self.optimizer.decay_steps or self.training.steps

    def warmup_steps(self) -> int:
        """Return the steps over which the learning rate rises."""
        if self.optimizer.warmup_steps is not None:
            return self.optimizer.warmup_steps
        return min(LONGEST_WARMUP, self.decay_steps() // WARMUP_SHARE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolved:
    """What follows from a configuration and the number of ranks."""

    world_size: int
    ep_size: int
    accumulation: int
    global_batch: int


def resolve(config: TrainConfig, world_size: int) -> Resolved:
    """Return the sizes of this run on `world_size` ranks; raise ConfigError where they do not fit together."""
    model, training, faults = config.model, config.training, config.faults
    ep_size = model.ep_size or math.gcd(model.experts, world_size)
    _require(
        world_size % ep_size == 0,
        f"model.ep_size must divide the number of ranks = {world_size}, given {model.ep_size}",
    )
    _require(
        faults.kill_rank is None or faults.kill_rank < world_size,
        f"faults.kill_rank must be less than the number of ranks = {world_size}, given {faults.kill_rank}",
    )
    forward = training.micro_batch * world_size
    accumulation = training.accumulation or 1
    if training.global_batch is not None:
        _require(
            training.global_batch % forward == 0,
            f"training.global_batch must be a multiple of training.micro_batch * ranks = {forward},"
            f" given {training.global_batch}",
        )
        accumulation = training.global_batch // forward
        _require(
            training.accumulation in (None, accumulation),
            f"training.accumulation must be null or {accumulation} with training.global_batch ="
            f" {training.global_batch} on {world_size} ranks, given {training.accumulation}",
        )
    return Resolved(
        world_size=world_size, ep_size=ep_size, accumulation=accumulation, global_batch=forward * accumulation
    )
