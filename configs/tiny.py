"""The built-in world from nothing, on two CPU cores.

    python -m pgrpo_jax.train

A small decoder is warmed up on reasonings of mixed quality, a reward model of the same size learns
to rank reasonings from optimised-degraded pairs, and P-GRPO trains the policy against both. The
README holds the figures that this command prints.
"""

from pgrpo_jax.config import (
    Architecture,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    ModelConfig,
    Optimizer,
    PairsConfig,
    RewardsConfig,
    RewardTrainingConfig,
    RolloutConfig,
    SFTConfig,
    UpdateConfig,
)


def config() -> Config:
    """Everything from seed 0; no download, no file."""
    model = ModelConfig(
        architecture=Architecture(
            vocab_size=128, width=96, layers=3, heads=4, kv_heads=2, head_dim=24, mlp=256
        )
    )
    return Config(
        policy=model,
        reward_model=model,
        workdir="runs/tiny",
        data=DataConfig(max_prompt_length=64),
        sft=SFTConfig(steps=600),
        pairs=PairsConfig(problems=2000),
        reward_training=RewardTrainingConfig(steps=300, max_length=192),
        rollout=RolloutConfig(prompts_per_step=16, max_completion_length=128, prompt_buckets=(64,)),
        rewards=RewardsConfig(thinking_max_length=192, shadow_fraction=0.25),
        update=UpdateConfig(steps=80, optimizer=Optimizer(learning_rate=2e-4)),
        evaluation=EvaluationConfig(every_steps=20),
        judge=JudgeConfig(timeout_s=2.0, memory_mb=256),
    )
