"""Qwen2.5-Coder-7B-Instruct as policy and as reward model, with the defaults of arXiv 2508.05170.

    python -m pgrpo_jax.train --config qwen2_5_coder_7b \
        --data.train train.jsonl --data.evaluation test.jsonl --reward-training.data pairs.jsonl

128 prompts x 8 completions a step, 4,096 tokens at most, AdamW at 1e-6, clip 0.2 / 0.28, no KL.
`train.jsonl` and `test.jsonl` hold problems with tests in one of the dialects that the README lists
(the paper trains on DeepCoder-Preview's family, about 24 thousand problems, so 190 steps are one
epoch); `pairs.jsonl` holds preference pairs of reasonings (`prompt`, `chosen`, `rejected`), and the
reward model begins as a copy of the policy with a new head.

Hardware: a TPU v5p slice of 16 chips (v5p-32). Over all chips, parameters, gradient and AdamW's
moments take 122 GB in float32, the reward model 15 GB and the key/value cache of 128 completions
34 GB in bfloat16, of 1,520 GB. The TPU compiler says what another slice makes of it:
`python -m pgrpo_jax.compile --config qwen2_5_coder_7b --topology v5p:2x2x2`.
This configuration has not been run on hardware: neither its time nor its result is known. The paper
reports the result of its own run, a mean of 58.5 % where outcome-only GRPO has 54.9 %.
"""

from pgrpo_jax.config import (
    Architecture,
    Compute,
    Config,
    DataConfig,
    EvaluationConfig,
    JudgeConfig,
    MeshConfig,
    ModelConfig,
    Optimizer,
    RewardsConfig,
    RewardTrainingConfig,
    RolloutConfig,
    UpdateConfig,
)

CHECKPOINT = "Qwen/Qwen2.5-Coder-7B-Instruct"
ARCHITECTURE = Architecture(
    vocab_size=152064,
    width=3584,
    layers=28,
    heads=28,
    kv_heads=4,
    head_dim=128,
    mlp=18944,
    tied_embeddings=False,
)


def config() -> Config:
    """The paper's published settings, and our choice where it published none."""
    model = ModelConfig(
        checkpoint=CHECKPOINT,
        architecture=ARCHITECTURE,
        compute=Compute(dtype="bfloat16", remat="full", logprob_mb=40_000),
    )
    return Config(
        policy=model,
        reward_model=model,
        workdir="runs/qwen2_5_coder_7b",
        data=DataConfig(
            train="train.jsonl",
            evaluation="test.jsonl",
            tokenizer=CHECKPOINT,
            max_prompt_length=2048,
        ),
        reward_training=RewardTrainingConfig(
            steps=1000,
            batch_size=32,
            trunk="policy",
            max_length=6144,
            data="pairs.jsonl",
            optimizer=Optimizer(learning_rate=2e-6, warmup_steps=50, schedule="cosine"),
        ),
        rollout=RolloutConfig(
            prompts_per_step=128,
            num_generations=8,
            max_completion_length=4096,
            prompt_buckets=(512, 1024, 2048),
            batch_size=128,
        ),
        rewards=RewardsConfig(thinking_max_length=6144, shadow_fraction=0.05),
        update=UpdateConfig(
            steps=190,
            micro_batch_size=32,
            epsilon=0.2,
            epsilon_high=0.28,
            optimizer=Optimizer(learning_rate=1e-6),
        ),
        evaluation=EvaluationConfig(every_steps=20),
        judge=JudgeConfig(timeout_s=6.0),
        mesh=MeshConfig(tensor=4),
    )
