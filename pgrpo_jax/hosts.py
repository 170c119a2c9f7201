"""What the processes of one run tell each other beside the programs: small values, as JSON.

Every process must call these functions, in the same order. With one process nothing is sent.
"""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def join(count: int) -> None:
    """Makes one run of `count` processes, one a host, each of which was started with the same
    command. Must be called before anything else asks jax for devices; again, it does nothing.

    Raises:
      ValueError: another number of processes came together.
    """
    if count == 1:
        return
    if not jax.distributed.is_initialized():
        jax.distributed.initialize()  # finds the others where a TPU slice or SLURM names them
    if jax.process_count() != count:
        raise ValueError(
            f"mesh.hosts is {count}, but {jax.process_count()} processes came together; set it to "
            "the number of hosts of the slice, and start the command on each of them"
        )


def gather(value: Any) -> list[Any]:
    """Every process's value, in the order of processes."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(text.size))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: text.size] = text
    texts = multihost_utils.process_allgather(padded)
    return [
        json.loads(row[:size].tobytes()) for row, size in zip(texts, lengths.ravel(), strict=True)
    ]


def mean(values: dict[str, float]) -> dict[str, float]:
    """Each value's mean over the processes that have it."""
    every = gather(values)
    names = sorted({name for one in every for name in one})
    columns = {name: [one[name] for one in every if name in one] for name in names}
    return {name: sum(column) / len(column) for name, column in columns.items()}


def share(count: int) -> range:
    """Which of `count` things are this process's; the shares stand in the order of processes.

    Raises:
      ValueError: there are fewer things than processes.
    """
    process, processes = jax.process_index(), jax.process_count()
    if count < processes:
        raise ValueError(f"{count} prompts a step leave some of {processes} processes without one")
    return range(count * process // processes, count * (process + 1) // processes)
