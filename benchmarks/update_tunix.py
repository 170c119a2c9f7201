"""Tunix's GRPO step as a worker of `benchmarks.update`; runs where google-tunix is. Usage:
python -m benchmarks.update_tunix CHECKPOINT"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.rl import algo_core
from tunix.rl.grpo import grpo_learner
from tunix.sft import peft_trainer

from benchmarks import rollout_tunix, workers

model, _, mesh = rollout_tunix.load(sys.argv[1])
settings = grpo_learner.GRPOConfig(num_generations=8, beta=0.0, epsilon=0.2)
settings.epsilon_high, settings.temperature = 0.28, 1.0
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6, weight_decay=0.0))
trainer = peft_trainer.PeftTrainer(
    model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=10**9)
)


def loss(model, train_example):
    """As Tunix's GRPO learner calls it."""
    return algo_core.grpo_loss_fn(model, train_example, algo_config=settings, pad_id=0, eos_id=-1)


trainer.with_loss_fn(loss, has_aux=True)
trainer.with_gen_model_input_fn(lambda example: {"train_example": example})


def padded(rows, kind):
    """Rows of numbers, zeros behind them."""
    out = np.zeros((len(rows), max(map(len, rows))), kind)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return jnp.array(out)


def answer(job):
    """One step: loss, gradient, clipping, AdamW."""
    prompt_ids = padded(job["prompts"], np.int32)
    example = grpo_learner.TrainExample(
        prompt_ids=prompt_ids,
        prompt_mask=jnp.ones_like(prompt_ids),
        completion_ids=padded(job["completions"], np.int32),
        completion_mask=padded([[1] * len(c) for c in job["completions"]], np.int32),
        advantages=jnp.array(job["advantages"], jnp.float32),
        ref_per_token_logps=None,
        old_per_token_logps=padded(job["old_logps"], np.float32),
    )
    with mesh:
        step, _ = trainer.jit_train_and_eval_step()

        def whole():
            value, _, norm = step(example)
            return jax.block_until_ready((value, norm, nnx.state(model)))

        (value, norm, _), figures = workers.timed(whole)
    return figures | {"loss": float(value), "grad_norm": float(norm)}


if __name__ == "__main__":
    workers.serve(answer, sys.stdin, sys.stdout)
