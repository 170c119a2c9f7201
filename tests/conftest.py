"""Eight CPU devices, quick compilation and no silent broadcasting, for every test.

The environment must be set before anything imports jax, and holds for processes that tests start.
Optimised machine code is worth less here than the time to make it: the compiler flags change no
result. Tests compile the same programs over and over; those of one process share them, while it
runs.
"""

import os
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    )
)
_programs = tempfile.TemporaryDirectory(prefix="pgrpo_jax_programs_")
os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax  # noqa: E402  (see above)

jax.config.update("jax_numpy_rank_promotion", "raise")
