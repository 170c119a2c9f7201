"""The one tree of settings. Every default lives here; every value is checked when it is made."""

import dataclasses
import types
import typing
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number. `above` is not reached, `least` and `most` are."""

    least: float | None = None
    above: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        bounds = [("at least", self.least), ("above", self.above), ("at most", self.most)]
        return " and ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


Positive = Annotated[int, Range(least=1)]
Count = Annotated[int, Range(least=0)]
PositiveFloat = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Fraction = Annotated[float, Range(least=0, most=1)]
Dimension = Literal["accuracy", "rigor", "coherence"]
Attention = Literal["auto", "pallas", "cudnn", "blocked", "reference"]
Tier = Literal["auto", "namespaces", "landlock"]


def require(truth: bool, sentence: str) -> None:
    """Raises ValueError with `sentence` unless `truth`."""
    if not truth:
        raise ValueError(sentence)


def _check(name: str, value: Any, hint: Any) -> None:
    """Raises ValueError, naming `name`, unless `value` is what the annotation `hint` says."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        _check(name, value, arguments[0])
        require(value in arguments[1], f"{name} must be {arguments[1]}, got {value!r}")
    elif origin is Literal:
        known = ", ".join(map(repr, arguments))
        require(value in arguments, f"{name} must be one of {known}, got {value!r}")
    elif origin is tuple:
        require(isinstance(value, tuple), f"{name} must be a tuple, got {value!r}")
        for i, entry in enumerate(value):
            _check(f"{name}[{i}]", entry, arguments[0])
    elif origin is types.UnionType:
        if value is not None:
            _check(name, value, arguments[0])
    else:
        accepted = (int, float) if hint is float else hint
        truth = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
        require(truth, f"{name} must be of type {hint.__name__}, got {value!r}")


class Settings:
    """Checks each field against its annotation; subclasses add what relates two fields."""

    def __post_init__(self):
        for name, hint in typing.get_type_hints(type(self), include_extras=True).items():
            _check(f"{type(self).__name__}.{name}", getattr(self, name), hint)


@dataclasses.dataclass(frozen=True)
class RopeScaling(Settings):
    """Llama 3's frequency scaling of rotary angles."""

    factor: PositiveFloat = 8.0
    low_freq_factor: PositiveFloat = 1.0
    high_freq_factor: PositiveFloat = 4.0
    original_max_position: Positive = 8192


@dataclasses.dataclass(frozen=True)
class Architecture(Settings):
    """The shape of a decoder: enough for Qwen2, Qwen2.5, Qwen3 and Llama 3."""

    vocab_size: Positive
    width: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    mlp: Positive
    rope_theta: PositiveFloat = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: PositiveFloat = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    tied_embeddings: bool = True

    def __post_init__(self):
        super().__post_init__()
        require(
            self.heads % self.kv_heads == 0,
            f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}",
        )
        sentence = f"head_dim must be even for rotary angles, got {self.head_dim}"
        require(self.head_dim % 2 == 0, sentence)


@dataclasses.dataclass(frozen=True)
class Compute(Settings):
    """How a decoder is computed. None of it changes what is computed, but for rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: Positive = 1  # layers a turn of the loop; on CPUs all of them are quicker
    attention: Attention = "auto"  # auto: by the platform
    logprob_mb: Positive = 64  # float32 logits that exist at one time, over all devices


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """A Hugging Face folder or hub id to start from, or an architecture to start from nothing.

    With both, the checkpoint must be of the architecture, and what looks at shapes alone, as
    `compile` does, does not fetch it.
    """

    checkpoint: str = ""
    architecture: Architecture | None = None
    compute: Compute = Compute()

    def __post_init__(self):
        super().__post_init__()
        require(
            bool(self.checkpoint) or self.architecture is not None,
            "a model needs a `checkpoint` (a Hugging Face folder or hub id) or an `architecture`, "
            "got neither",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Where problems come from and how they become prompts."""

    train: str = "world"  # "world", a .jsonl or .parquet file, or a `datasets` id
    evaluation: str = "world"
    train_split: str = "train"  # of a `datasets` id
    evaluation_split: str = "test"
    train_limit: Count = 0  # 0: all problems
    evaluation_limit: Count = 0
    tokenizer: str = "world"  # "world", or a Hugging Face folder or hub id
    system_prompt: str = ""  # "" takes the built-in one that asks for <think> and <answer>
    prefill: str = ""  # text the assistant's turn begins with, such as "<think>\n"
    max_prompt_length: Positive = 1024  # tokens
    overlong: Literal["drop", "refuse"] = "drop"


@dataclasses.dataclass(frozen=True)
class WorldConfig(Settings):
    """The built-in world: how many problems, and the mixture of reasonings of the warm-up."""

    train_problems: Positive = 4000
    heldout_problems: Positive = 384


@dataclasses.dataclass(frozen=True)
class Optimizer(Settings):
    """AdamW with linear warm-up, then constant or cosine, and clipping by global norm."""

    learning_rate: NotNegative = 1e-6
    warmup_steps: Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    b1: Fraction = 0.9
    b2: Fraction = 0.999
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: PositiveFloat = 1.0


@dataclasses.dataclass(frozen=True)
class SFTConfig(Settings):
    """Supervised warm-up. `steps = 0` skips the stage."""

    steps: Count = 0
    batch_size: Positive = 64  # rows
    max_length: Count = 0  # tokens a row; 0: the longest prompt plus the longest completion
    data: str = "world"  # "world", or a file of rows with `prompt` and `completion`
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, schedule="cosine")


@dataclasses.dataclass(frozen=True)
class PairsConfig(Settings):
    """OD preference pairs: optimised, initial and degraded reasonings. `problems = 0`: no stage."""

    problems: Count = 0
    dimensions: tuple[Dimension, ...] = ("accuracy", "rigor", "coherence")


@dataclasses.dataclass(frozen=True)
class RewardTrainingConfig(Settings):
    """Bradley-Terry training of the reward model. `steps = 0` skips the stage."""

    steps: Count = 0
    batch_size: Positive = 64  # pairs
    micro_batches: Positive = 1  # parts of a batch, whose gradients are taken one by one
    max_length: Positive = 1024  # tokens a side; longer rows are dropped and counted
    data: str = ""  # "" reads the pairs of this run; else a file of prompt, chosen, rejected
    trunk: Literal["own", "policy"] = "own"  # "policy": begin with the policy after its warm-up
    center_coefficient: NotNegative = 0.01
    evaluation_fraction: Fraction = 0.05
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, schedule="cosine")

    def __post_init__(self):
        super().__post_init__()
        require(
            self.batch_size % self.micro_batches == 0,
            f"reward_training.micro_batches={self.micro_batches} must divide "
            f"reward_training.batch_size={self.batch_size}",
        )


@dataclasses.dataclass(frozen=True)
class RolloutConfig(Settings):
    """Sampling of completions."""

    prompts_per_step: Positive = 128
    num_generations: Positive = 8
    max_completion_length: Positive = 4096  # tokens
    temperature: NotNegative = 1.0  # 0: greedy
    top_k: Count = 0  # 0: off
    top_p: Annotated[float, Range(above=0, most=1)] = 1.0
    prompt_buckets: tuple[Positive, ...] = (256, 512, 1024)  # tokens; prompts are padded to these
    batch_size: Count = 0  # slots: completions decoded together; 0: all of a step
    page_size: Positive = 64  # tokens of a page of the key/value cache
    cache_dtype: Literal["compute", "int8"] = "compute"  # int8: half of bfloat16, plain attention
    prefill_tokens: Positive = 4096  # of prompts, computed between two visits of the host
    memory_fraction: Fraction = 0.8  # of the free memory, that the cache may take
    filter_groups: Literal["none", "outcome", "reward"] = "none"  # redraw groups that are all alike
    filter_tries: Positive = 4  # times that prompts are drawn for one step, at most
    one_step_off: bool = False  # sample a step's completions before the last step's update

    def __post_init__(self):
        super().__post_init__()
        require(
            0 < len(self.prompt_buckets) == len(set(self.prompt_buckets))
            and sorted(self.prompt_buckets) == list(self.prompt_buckets),
            f"prompt_buckets must be lengths in rising order, got {self.prompt_buckets}",
        )


@dataclasses.dataclass(frozen=True)
class RewardsConfig(Settings):
    """Three terms without coefficients (arXiv 2508.05170); a user's functions are added to them."""

    functions: tuple[str, ...] = ()  # "module:function" with TRL's signature
    thinking_batch_size: Positive = 64  # (problem, reasoning) rows scored together
    thinking_max_length: Positive = 2048  # tokens
    offload: bool = False  # the reward model lies in the host's memory between uses
    shadow_fraction: Fraction = 0.0  # share of failing completions scored too, for the metrics only


@dataclasses.dataclass(frozen=True)
class UpdateConfig(Settings):
    """One P-GRPO step."""

    steps: Count = 0
    gate: Literal["posterior", "additive", "outcome", "process"] = "posterior"
    thinking_weight: NotNegative = 1.0  # coefficient of R_t; arXiv 2508.05170 has none
    advantage: Literal["group", "group_no_std", "batch_std", "decoupled"] = "group"
    std_floor: NotNegative = 0.2
    loss_type: Literal["token", "sequence", "constant"] = "token"
    kl: Literal["none", "k3"] = "none"
    beta: NotNegative = 0.0
    epsilon: PositiveFloat = 0.2
    epsilon_high: PositiveFloat = 0.28
    num_iterations: Positive = 1
    micro_batch_size: Positive = 8  # packed rows a gradient is taken over at one time
    mask_truncated_completions: bool = False
    importance_cap: NotNegative = 0.0  # truncated importance sampling; 0: off
    optimizer: Optimizer = Optimizer()

    def __post_init__(self):
        super().__post_init__()
        require(
            (self.kl == "none") == (self.beta == 0.0),
            f"`kl` and `beta` must agree: kl={self.kl!r} with beta={self.beta}; "
            "set kl='k3' and beta > 0, or kl='none' and beta=0",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig(Settings):
    """pass@1 on held-out problems: `samples` a problem at `temperature`, and greedy."""

    samples: Positive = 1
    temperature: NotNegative = 1.0  # 0: greedy
    every_steps: Count = 0  # during training; 0: only before and after


@dataclasses.dataclass(frozen=True)
class JudgeConfig(Settings):
    """Limits of the programs that are judged, and how sure the judge has to be of itself."""

    workers: Count = 0  # programs at one time; 0: the machine's cores but those left to JAX
    timeout_s: PositiveFloat = 4.0  # CPU seconds a test
    program_timeout_s: PositiveFloat = 60.0  # CPU seconds of all tests of a program
    memory_mb: Positive = 1024
    output_kb: Positive = 1024
    queue: Positive = 4096  # programs that wait; then whoever hands in another waits as well
    tier: Tier = "auto"  # auto: the stronger here
    allow_unsafe: bool = False  # run programs even where no jail holds
    accept_weak: bool = False  # passes that the program could have made up count
    canary_every_steps: Count = 50  # known-bad programs are judged, and must not pass; 0: never


@dataclasses.dataclass(frozen=True)
class MeshConfig(Settings):
    """Devices by axis; -1 takes what is left. With several hosts the same command runs on each."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    hosts: Positive = 1

    def __post_init__(self):
        super().__post_init__()
        axes = (self.data, self.fsdp, self.tensor)
        require(
            all(n == -1 or n > 0 for n in axes) and axes.count(-1) <= 1,
            f"each axis of the mesh counts devices, and one may be -1, got data={self.data}, "
            f"fsdp={self.fsdp}, tensor={self.tensor}",
        )


@dataclasses.dataclass(frozen=True)
class LoggingConfig(Settings):
    """Where metrics go beside `metrics.jsonl` and TensorBoard, and how often state is saved."""

    checkpoint_every_steps: Count = 50
    checkpoints_kept: Positive = 2
    wandb_project: str = ""  # "": off
    timeline_step: Count = 0  # the P-GRPO step, from 1, whose timeline is written; 0: none


@dataclasses.dataclass(frozen=True)
class Config(Settings):
    """One run."""

    policy: ModelConfig
    reward_model: ModelConfig
    seed: Count = 0
    workdir: str = "runs/tiny"
    compilation_cache: str = "~/.cache/pgrpo_jax"  # compiled programs of earlier runs; "": none
    data: DataConfig = DataConfig()
    world: WorldConfig = WorldConfig()
    sft: SFTConfig = SFTConfig()
    pairs: PairsConfig = PairsConfig()
    reward_training: RewardTrainingConfig = RewardTrainingConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: RewardsConfig = RewardsConfig()
    update: UpdateConfig = UpdateConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    judge: JudgeConfig = JudgeConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        super().__post_init__()
        require(
            self.data.max_prompt_length <= self.rollout.prompt_buckets[-1],
            f"a prompt of data.max_prompt_length={self.data.max_prompt_length} tokens does not fit "
            f"the longest of rollout.prompt_buckets={self.rollout.prompt_buckets}; add a bucket or "
            "lower the limit",
        )
        if self.update.steps > 0:
            self._check_that_training_can_learn()

    def _check_that_training_can_learn(self) -> None:
        rollout = self.rollout
        require(
            rollout.num_generations > 1,
            "rollout.num_generations must be at least 2 to train: a group of one has no advantage",
        )
        require(
            rollout.temperature > 0 and rollout.top_k == 0 and rollout.top_p == 1,
            "training samples from the whole distribution, whose log-probabilities it uses: set "
            "rollout.temperature > 0, rollout.top_k = 0 and rollout.top_p = 1, got "
            f"{rollout.temperature}, {rollout.top_k} and {rollout.top_p}",
        )
        if rollout.one_step_off:
            require(
                self.update.importance_cap > 0 and rollout.filter_groups == "none",
                "rollout.one_step_off samples with the parameters of the step before, which needs "
                "update.importance_cap > 0 as a correction, and cannot wait for outcomes to filter "
                "groups by: set rollout.filter_groups = 'none'; got "
                f"{self.update.importance_cap} and {rollout.filter_groups!r}",
            )
