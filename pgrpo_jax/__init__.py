"""P-GRPO for code models on TPUs, in JAX (arXiv 2508.05170).

Axes stand in names, capitals after the last underscore, in memory order (`logp_BT`, `rewards_PG`):

    B samples (rows)        T query time, tokens    D width            L layers
    P prompts               S key time, cache       N query heads      V vocabulary
    G samples of a prompt   C pairs                 K key/value heads  F mlp width
    1 a kept axis           X pages of the cache    H head dimension
    A micro-batches         R rows of several sequences, or pieces of prompts
    O owners of a page      M pages of a slot       E several axes as one
"""

import pathlib

# A checkout keeps `models/`, `kernels/` and `configs/` beside this folder; a wheel keeps them
# inside it.
_root = pathlib.Path(__file__).resolve().parent.parent
if (_root / "setup.cfg").is_file():
    __path__.append(str(_root))
