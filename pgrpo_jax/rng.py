"""Random keys as functions of (seed, purpose, step): none is stored, so a resumed run draws the
same."""

import zlib

import jax


def key(seed: int, purpose: str, step: int = 0) -> jax.Array:
    """The key of one purpose at one step. crc32, because Python's `hash` differs between
    processes."""
    base = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(base, step)


def integer(seed: int, purpose: str, step: int = 0) -> int:
    """The same for host-side generators, a seed below 2**32."""
    return zlib.crc32(f"{seed}/{purpose}/{step}".encode())
