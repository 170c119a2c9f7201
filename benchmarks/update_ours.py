"""Our GRPO step as a worker of `benchmarks.update`.

python -m benchmarks.update_ours CHECKPOINT
"""

import pathlib
import sys
from typing import Any

import jax
import numpy as np

from benchmarks import workers
from pgrpo_jax import allocator, optimizer, sharding, types, update
from pgrpo_jax import config as c
from pgrpo_jax.models import load

PROMPT, LONGEST = 64, 128  # tokens
ROWS = {"nano": 8, "small": 4}  # of the longest sequence, computed at once
LOGPROB_MB = 4  # of logits at one time: what the processor's caches hold


class Answers:
    """One training state; the batch's rewards make the advantages that the job holds."""

    def __init__(self, checkpoint: str):
        self._mesh = sharding.make_mesh(c.MeshConfig())
        self._arch, params = load.load_policy(checkpoint, c.Compute(), self._mesh)
        # Layers one after the other: a loop over them keeps what they saved in one array, and cuts
        # it out again entry by entry.
        compute = c.Compute(logprob_mb=LOGPROB_MB, scan_unroll=self._arch.layers)
        model = c.ModelConfig(architecture=self._arch, compute=compute)
        self._cfg = c.Config(
            policy=model,
            reward_model=model,
            data=c.DataConfig(max_prompt_length=PROMPT),
            rollout=c.RolloutConfig(max_completion_length=LONGEST, prompt_buckets=(PROMPT,)),
            update=c.UpdateConfig(
                steps=1000,
                loss_type="sequence",
                micro_batch_size=ROWS[pathlib.Path(checkpoint).name],
            ),
        )
        tx = optimizer.build(self._cfg.update.optimizer, 1000)
        self._update = update.compile_update(self._cfg, self._arch, self._mesh)
        self._state = optimizer.init_state(params, tx, self._mesh)

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        batch = self._batch(job)
        (self._state, values, _), figures = workers.timed(
            lambda: jax.block_until_ready(self._update(self._state, batch))
        )
        return figures | {n: float(values[n]) for n in ("loss", "grad_norm", "update/padding")}

    def _batch(self, job: dict[str, Any]) -> update.UpdateBatch:
        tests = types.Tests(kind="assert", code=("assert True",))
        completions = [
            types.Completion(
                problem=types.Problem("", "", tests),
                prompt_ids=np.array(prompt, np.int32),
                ids=np.array(ids, np.int32),
                logps=np.array(logps, np.float32),
                truncated=False,
                group=0,
                sample=0,
            )
            for prompt, ids, logps in zip(
                job["prompts"], job["completions"], job["old_logps"], strict=True
            )
        ]
        plan = update.plan(self._cfg, self._mesh, completions)
        rows, micro_batches = update.packed(completions, plan)
        B = len(completions)
        return update.UpdateBatch(
            rows=rows,
            micro_batches=micro_batches,
            r_format_B=np.zeros(B, np.float32),
            r_outcome_B=np.array(job["rewards"], np.float32),
            r_thinking_B=np.zeros(B, np.float32),
            r_extra_B=np.zeros(B, np.float32),
            valid_B=np.ones(B, bool),
            truncated_B=np.zeros(B, bool),
        )


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as every command of ours does
    workers.serve(Answers(sys.argv[1]), sys.stdin, sys.stdout)
