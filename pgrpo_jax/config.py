"""The one tree of settings. Every default lives here; every value is checked when it is made."""

import dataclasses
from typing import Literal


def require(truth: bool, sentence: str) -> None:
    """Raises ValueError with `sentence` unless `truth`."""
    if not truth:
        raise ValueError(sentence)


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3's frequency scaling of rotary angles."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The shape of a decoder: enough for Qwen2, Qwen2.5, Qwen3 and Llama 3."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float = 1e6
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    tied_embeddings: bool = True

    def __post_init__(self):
        require(
            self.heads % self.kv_heads == 0,
            f"heads must be a multiple of kv_heads, got {self.heads} and {self.kv_heads}",
        )
        require(self.head_dim % 2 == 0, f"head_dim must be even for rotary angles, got {self.head_dim}")


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a decoder is computed. None of it changes what is computed, but for rounding."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    scan_unroll: int = 1
    attention: Literal["auto", "reference"] = "auto"
    logprob_chunk: int = 1024  # tokens whose [chunk, V] logits exist at one time


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A Hugging Face folder or hub id to start from, or an architecture to start from nothing."""

    checkpoint: str = ""
    architecture: Architecture | None = None
    compute: Compute = Compute()

    def __post_init__(self):
        require(
            bool(self.checkpoint) != (self.architecture is not None),
            "a model needs either `checkpoint` (a Hugging Face folder or hub id) or `architecture`, "
            f"got checkpoint={self.checkpoint!r} and architecture={self.architecture!r}",
        )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where problems come from and how they become prompts."""

    train: str = "world"  # "world", a .jsonl or .parquet file, or a `datasets` id
    evaluation: str = "world"
    train_split: str = "train"  # of a `datasets` id
    evaluation_split: str = "test"
    train_limit: int = 0  # 0: all problems
    evaluation_limit: int = 0
    tokenizer: str = "world"  # "world", or a Hugging Face folder or hub id
    system_prompt: str = ""  # "" takes the built-in one that asks for <think> and <answer>
    prefill: str = ""  # text the assistant's turn begins with, such as "<think>\n"
    max_prompt_length: int = 1024  # tokens
    overlong: Literal["drop", "refuse"] = "drop"


@dataclasses.dataclass(frozen=True)
class WorldConfig:
    """The built-in world: how many problems, and the mixture of reasonings of the warm-up."""

    train_problems: int = 4000
    heldout_problems: int = 384


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW with linear warm-up, then constant or cosine, and clipping by global norm."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Supervised warm-up. `steps = 0` skips the stage."""

    steps: int = 0
    batch_size: int = 64  # rows
    max_length: int = 0  # tokens a row; 0: the longest prompt plus the longest completion
    data: str = "world"  # "world", or a file of rows with `prompt` and `completion`
    optimizer: Optimizer = Optimizer(learning_rate=3e-3, schedule="cosine")


@dataclasses.dataclass(frozen=True)
class PairsConfig:
    """OD preference pairs (optimised, initial, degraded reasonings). `problems = 0` skips the stage."""

    problems: int = 0
    dimensions: tuple[str, ...] = ("accuracy", "rigor", "coherence")


@dataclasses.dataclass(frozen=True)
class RewardTrainingConfig:
    """Bradley-Terry training of the reward model. `steps = 0` skips the stage."""

    steps: int = 0
    batch_size: int = 64  # pairs
    max_length: int = 1024  # tokens a side; longer rows are dropped and counted
    data: str = ""  # "" reads the pairs of this run; else a file of prompt, chosen, rejected
    center_coefficient: float = 0.01
    evaluation_fraction: float = 0.05
    optimizer: Optimizer = Optimizer(learning_rate=1e-3, schedule="cosine")


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """Sampling of completions."""

    prompts_per_step: int = 128
    num_generations: int = 8
    max_completion_length: int = 4096  # tokens
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    prompt_buckets: tuple[int, ...] = (256, 512, 1024)  # tokens; a prompt is padded to the next one
    batch_size: int = 0  # completions decoded together; 0: all of a step


@dataclasses.dataclass(frozen=True)
class RewardsConfig:
    """The three terms have no coefficients (arXiv 2508.05170); a user's functions are added to them."""

    functions: tuple[str, ...] = ()  # "module:function" with TRL's signature
    thinking_batch_size: int = 64  # (problem, reasoning) rows scored together
    thinking_max_length: int = 2048  # tokens
    shadow_fraction: float = 0.0  # share of failing completions scored too, for the metrics only


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """One P-GRPO step."""

    steps: int = 0
    gate: Literal["posterior", "additive", "outcome", "process"] = "posterior"
    advantage: Literal["group", "group_no_std", "batch_std", "decoupled"] = "group"
    std_floor: float = 0.2
    loss_type: Literal["token", "sequence", "constant"] = "token"
    kl: Literal["none", "k3"] = "none"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float = 0.28
    num_iterations: int = 1
    micro_batch_size: int = 0  # rows a gradient is taken over at one time; 0: all
    mask_truncated_completions: bool = False
    optimizer: Optimizer = Optimizer()

    def __post_init__(self):
        require(
            (self.kl == "none") == (self.beta == 0.0),
            f"`kl` and `beta` must agree: kl={self.kl!r} with beta={self.beta}; "
            "set kl='k3' and beta > 0, or kl='none' and beta=0",
        )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """pass@1 on held-out problems: `samples` a problem at `temperature`, and greedy."""

    samples: int = 1
    temperature: float = 1.0
    every_steps: int = 0  # during training; 0: only before and after


@dataclasses.dataclass(frozen=True)
class JudgeConfig:
    """Limits of the programs that are judged."""

    workers: int = 2
    timeout_s: float = 4.0  # CPU seconds a test
    memory_mb: int = 1024
    output_kb: int = 1024


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices by axis; -1 takes what is left."""

    data: int = 1
    fsdp: int = -1
    tensor: int = 1


@dataclasses.dataclass(frozen=True)
class LoggingConfig:
    """Where metrics go beside `metrics.jsonl` and TensorBoard, and how often state is saved."""

    checkpoint_every_steps: int = 50
    checkpoints_kept: int = 2
    wandb_project: str = ""  # "": off


@dataclasses.dataclass(frozen=True)
class Config:
    """One run."""

    policy: ModelConfig
    reward_model: ModelConfig
    seed: int = 0
    workdir: str = "runs/tiny"
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
