"""Compiled programs: kept on disk from one run to the next, and counted."""

import pathlib

import jax

from pgrpo_jax import config

EVENT = "/jax/core/compile/backend_compile_duration"


def keep(cfg: config.Config) -> None:
    """Lets programs that took a second or more to compile be found again by the next run."""
    if cfg.compilation_cache:
        folder = pathlib.Path(cfg.compilation_cache).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))


class Count:
    """Programs compiled by this process, or read from the folder, since this was made.

    After the first steps it must stay: a program that is compiled later has a shape that should not
    be there.
    """

    def __init__(self) -> None:
        self.value = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration_secs: float, **_: str | int) -> None:
        self.value += event == EVENT
