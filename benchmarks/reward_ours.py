"""Our Bradley-Terry step as a worker of `benchmarks.update`.

python -m benchmarks.reward_ours CHECKPOINT
"""

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import workers
from pgrpo_jax import allocator, data, optimizer, sharding, supervised
from pgrpo_jax import config as c
from pgrpo_jax.models import load

MICRO_BATCHES = 4


class Answers:
    """One training state, begun with a checkpoint's trunk and the first job's head."""

    def __init__(self, checkpoint: str):
        self._mesh = sharding.make_mesh(c.MeshConfig())
        self._arch, self._trunk = load.load_policy(checkpoint, c.Compute(), self._mesh)
        self._state: optimizer.TrainState | None = None

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        state = self._state or self._begin(job)
        batch = sharding.put_rows(self._mesh, _batch(job))
        (self._state, values), figures = workers.timed(
            lambda: jax.block_until_ready(self._step(state, batch))
        )
        return figures | {n: float(values[n]) for n in ("loss", "grad_norm")}

    def _begin(self, job: dict[str, Any]) -> optimizer.TrainState:
        # Layers one after the other, as in `update_ours`.
        compute = c.Compute(scan_unroll=self._arch.layers)
        model = c.ModelConfig(architecture=self._arch, compute=compute)
        settings = c.RewardTrainingConfig(
            steps=1000,
            batch_size=len(job["chosen"]),
            micro_batches=MICRO_BATCHES,
            max_length=len(job["chosen"][0]),
            optimizer=c.Optimizer(),
        )
        cfg = c.Config(policy=model, reward_model=model, reward_training=settings)
        head = {"kernel": jnp.array(job["head"], jnp.float32)[:, None]}
        tx = optimizer.build(settings.optimizer, settings.steps)
        self._step = supervised.compile_reward_update(cfg, self._arch, self._mesh)
        return optimizer.init_state({"trunk": self._trunk, "score": head}, tx, self._mesh)


def _batch(job: dict[str, Any]) -> data.PairBatch:
    sides = {}
    for side in ("chosen", "rejected"):
        ids_CT = np.array(job[side], np.int32)
        columns_CT = np.broadcast_to(np.arange(ids_CT.shape[1], dtype=np.int32), ids_CT.shape)
        sides[f"{side}_ids_CT"], sides[f"{side}_positions_CT"] = ids_CT, columns_CT
        sides[f"{side}_segments_CT"] = np.ones_like(ids_CT)
    C = len(job["chosen"])
    return data.PairBatch(margin_C=np.zeros(C, np.float32), valid_C=np.ones(C, bool), **sides)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as every command of ours does
    workers.serve(Answers(sys.argv[1]), sys.stdin, sys.stdout)
