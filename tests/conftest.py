"""Eight CPU devices, quick compilation and no silent broadcasting, for every test.

The flags must be set before anything imports jax. Optimised machine code is worth less here than
the time to make it: the two compiler flags halve the suite's time and change no result.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
)

import jax  # noqa: E402  (see above)

jax.config.update("jax_numpy_rank_promotion", "raise")
