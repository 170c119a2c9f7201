"""The built-in world from nothing, on two CPU cores.

    python -m pgrpo_jax.train

A small decoder is warmed up on reasonings of mixed quality, a reward model of the same size learns
to rank reasonings from optimised-degraded pairs, and P-GRPO trains the policy against both. The
README holds the figures that this command prints.
"""

from pgrpo_jax.config import (
    Architecture,
    Compute,
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
    WorldConfig,
)


def config() -> Config:
    """Everything from seed 0; no download, no file."""
    # Fewer, wider heads learn sooner which constant belongs to which operation.
    model = ModelConfig(
        architecture=Architecture(
            vocab_size=76, width=64, layers=4, heads=2, kv_heads=2, head_dim=32, mlp=192
        ),
        compute=Compute(scan_unroll=4),
    )
    return Config(
        policy=model,
        reward_model=model,
        workdir="runs/tiny",
        data=DataConfig(max_prompt_length=28),
        world=WorldConfig(train_problems=12000, heldout_problems=384),
        sft=SFTConfig(
            steps=1200,
            batch_size=32,
            optimizer=Optimizer(
                learning_rate=4e-3, warmup_steps=50, schedule="cosine", b2=0.98, weight_decay=0.3
            ),
        ),
        pairs=PairsConfig(problems=5000),
        reward_training=RewardTrainingConfig(
            steps=800,
            batch_size=32,
            max_length=60,
            trunk="policy",
            optimizer=Optimizer(
                learning_rate=1e-3, warmup_steps=30, schedule="cosine", b2=0.98, weight_decay=0.01
            ),
        ),
        rollout=RolloutConfig(prompts_per_step=16, max_completion_length=52, prompt_buckets=(28,)),
        rewards=RewardsConfig(thinking_max_length=60, shadow_fraction=0.25),
        update=UpdateConfig(
            steps=180,
            optimizer=Optimizer(learning_rate=2e-4, warmup_steps=20, schedule="cosine"),
        ),
        evaluation=EvaluationConfig(every_steps=60),
        judge=JudgeConfig(timeout_s=2.0, memory_mb=256),
    )
