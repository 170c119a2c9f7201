"""Our engine as a worker of `benchmarks.rollout`.

python -m benchmarks.rollout_ours CHECKPOINT
"""

import sys
import time
from typing import Any

import numpy as np

from benchmarks import workers
from pgrpo_jax import allocator, sharding, types
from pgrpo_jax.config import Compute, MeshConfig, RolloutConfig
from pgrpo_jax.data import Prompt
from pgrpo_jax.models import load
from pgrpo_jax.rollout import Engine


class Answers:
    """Engines by shape of job: what is compiled for one is kept."""

    def __init__(self, checkpoint: str):
        self._mesh = sharding.make_mesh(MeshConfig())
        self._arch, self._params = load.load_policy(checkpoint, Compute(), self._mesh)
        self._engines: dict[tuple[int, ...], Engine] = {}

    def __call__(self, job: dict[str, Any]) -> dict[str, Any]:
        """`group` consecutive prompts are the same, and are samples of one."""
        group, ids = job["group"], np.array(job["prompts"], np.int32)
        shape = job["slots"], ids.shape[1], max(job["limits"]), group
        if shape not in self._engines:
            cfg = RolloutConfig(
                num_generations=group,
                max_completion_length=shape[2],
                prompt_buckets=(shape[1],),
                batch_size=job["slots"],
            )
            self._engines[shape] = Engine(cfg, self._arch, Compute(), self._mesh, stop_ids=())
        engine = self._engines[shape]
        begin = time.perf_counter()
        tokens = sum(len(c.ids) for c in self._generate(engine, ids, job["limits"], group))
        seconds = time.perf_counter() - begin
        return {
            "seconds": seconds,
            "tokens": tokens,
            "peak_mb": workers.resident_mb(),
            **engine.statistics.metrics(),
        }

    def _generate(self, engine: Engine, ids: np.ndarray, limits: list[int], group: int):
        tests = types.Tests(kind="assert", code=("assert True",))
        prompts = [
            Prompt(types.Problem(str(i), "", tests), ids[i]) for i in range(0, len(ids), group)
        ]
        limits_PG = np.array(limits).reshape(-1, group)
        return engine.generate(self._params, prompts, group, 0, 0, limits_PG=limits_PG)


if __name__ == "__main__":
    allocator.keep_freed_memory()  # as every command of ours does
    workers.serve(Answers(sys.argv[1]), sys.stdin, sys.stdout)
