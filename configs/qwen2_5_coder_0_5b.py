"""Qwen2.5-Coder-0.5B-Instruct as policy and as reward model, for one TPU v5e chip (Colab, Kaggle).

    python -m pgrpo_jax.train --config qwen2_5_coder_0_5b --reward-training.data pairs.jsonl

Trains on MBPP's train split and evaluates on its test split. `pairs.jsonl` holds preference pairs
of reasonings (`prompt`, `chosen`, `rejected`), which you bring; the reward model, which begins as a
copy of the policy with a new head, is trained on them first.

Hardware: 16 GB of device memory are meant to suffice: parameters, gradient and AdamW's moments are
8 GB in float32, the reward model 2 GB, the key/value cache of 64 completions 1.2 GB in bfloat16.
`python -m pgrpo_jax.compile --config qwen2_5_coder_0_5b --topology v5e:1x1` asks the TPU compiler.
On the eight chips of Kaggle (v5e:2x4) set `--update.micro-batch-size 32` and
`--policy.compute.logprob-mb 5120`: logits of eight times as many tokens, an eighth on each chip.
This configuration has not been run on hardware: neither its time nor its result is known.
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
    RewardsConfig,
    RewardTrainingConfig,
    RolloutConfig,
    UpdateConfig,
)

CHECKPOINT = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
ARCHITECTURE = Architecture(
    vocab_size=151936, width=896, layers=24, heads=14, kv_heads=2, head_dim=64, mlp=4864
)


def config() -> Config:
    """16 prompts x 8 completions a step, of 1,024 tokens at most."""
    model = ModelConfig(
        checkpoint=CHECKPOINT,
        architecture=ARCHITECTURE,
        compute=Compute(dtype="bfloat16", remat="full", logprob_mb=640),
    )
    return Config(
        policy=model,
        reward_model=model,
        workdir="runs/qwen2_5_coder_0_5b",
        data=DataConfig(
            train="google-research-datasets/mbpp",
            evaluation="google-research-datasets/mbpp",
            tokenizer=CHECKPOINT,
            max_prompt_length=512,
        ),
        reward_training=RewardTrainingConfig(
            steps=500,
            batch_size=8,
            trunk="policy",
            data="pairs.jsonl",
            optimizer=Optimizer(learning_rate=1e-5, warmup_steps=20, schedule="cosine"),
        ),
        rollout=RolloutConfig(
            prompts_per_step=16,
            max_completion_length=1024,
            prompt_buckets=(256, 512),
            batch_size=64,
        ),
        rewards=RewardsConfig(
            thinking_batch_size=16, thinking_max_length=1536, shadow_fraction=0.1
        ),
        update=UpdateConfig(steps=100, micro_batch_size=4),
        evaluation=EvaluationConfig(every_steps=25),
        judge=JudgeConfig(),
    )
