"""A program is counted when it is compiled, and found again by the next process."""

import subprocess
import sys

import jax
import numpy as np

from pgrpo_jax import compilation

PROGRAM = """
import sys, types, jax, jax.numpy as jnp
from pgrpo_jax import compilation
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
compilation.keep(types.SimpleNamespace(compilation_cache=sys.argv[1]))
hits = []
jax.monitoring.register_event_listener(
    lambda event, **_: hits.append(event) if event == "/jax/compilation_cache/cache_hits" else None
)
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
print(len(hits))
"""


def test_each_new_shape_counts_once():
    count = compilation.Count()
    program = jax.jit(lambda x: x + 1)
    for length in (3, 4, 3, 4):
        program(np.ones(length))
    assert count.value == 2


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    def hits() -> int:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    assert hits() == 0
    assert hits() > 0
