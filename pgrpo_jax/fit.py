"""The loop of the supervised stages: it resumes, shows its progress, and leaves its output whole or
not at all."""

import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils

from pgrpo_jax import checkpoint, config, hosts, interrupt, metrics, progress, sharding
from pgrpo_jax.data import Batches
from pgrpo_jax.optimizer import TrainState
from pgrpo_jax.tokenizer import Tokenizer

Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]


class Interrupted(SystemExit):
    """The user asked for an end; a checkpoint was saved, and the same command continues."""

    def __init__(self, stage: str, step: int, steps: int):
        super().__init__(130)
        self.stage, self.step, self.steps = stage, step, steps

    def __str__(self) -> str:
        where = f"{self.stage} stopped at step {self.step} of {self.steps}"
        return f"{where}; the same command continues from there"


def abstract(state: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state, for a restore."""
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def fit(
    cfg: config.Config,
    stage: str,
    steps: int,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    step: Step,
    batches: Batches,
    measure: Callable[[TrainState], dict[str, float]] | None = None,
) -> TrainState:
    """Takes `steps` steps of `step`, from the stage's newest checkpoint if there is one.

    `measure` is called on the last state; what it returns stands in the stage's last row.

    Raises:
      Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    folder = pathlib.Path(cfg.workdir) / stage
    logging = cfg.logging
    with (
        checkpoint.Checkpoints(folder, logging.checkpoints_kept) as checkpoints,
        interrupt.delayed() as stop,
    ):
        restored = checkpoints.restore(abstract(state))
        done = 0
        if restored is not None:
            done, state, extra = restored
            batches.set_state(extra["batches"])
        log = metrics.Log(
            cfg.workdir,
            stage,
            first_step=done,
            primary=jax.process_index() == 0,
            wandb_project=logging.wandb_project,
        )
        with log, progress.bar(stage, steps, done) as advance:

            def write(i: int, values: dict[str, Any]) -> None:
                log.metrics(i, values)
                advance(loss=float(values["loss"]))

            begin, previous = time.perf_counter(), None
            for i in range(done, steps):
                batch = next(batches)
                state, values = step(state, sharding.put_rows(mesh, batch))
                if previous is not None:  # one step late: the device works on this one meanwhile
                    write(i - 1, previous)
                now = time.perf_counter()
                tokens = sum(hosts.gather(count_tokens(batch)))
                previous = values | {
                    "time/step_s": now - begin,
                    "tokens": tokens,
                    "tokens_per_s": tokens / (now - begin),
                }
                begin = now
                last = i + 1 == steps
                saving = stop.requested or (i + 1) % logging.checkpoint_every_steps == 0
                if saving or last:
                    write(i, previous | (measure(state) if measure and last else {}))
                    previous = None
                if saving and not last:
                    checkpoints.save(i + 1, state, {"batches": batches.get_state()})
                if stop.requested and not last:
                    checkpoints.wait()
                    raise Interrupted(stage, i + 1, steps)
    return state


def count_tokens(batch: Any) -> int:
    """Real tokens of a supervised batch: those with a segment."""
    fields = {path[-1].name: x for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    return sum(int((x > 0).sum()) for name, x in fields.items() if "segments" in name)


def publish(folder: pathlib.Path, words: Tokenizer, save: Callable[[str], None]) -> None:
    """Lets every process `save` into a folder aside, which then takes the place of `folder`,
    checkpoints and all."""
    aside, primary = folder.with_name(folder.name + ".new"), jax.process_index() == 0
    if primary:
        shutil.rmtree(aside, ignore_errors=True)
    save(str(aside))
    if primary:
        words.save(aside)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(aside, folder)
    multihost_utils.sync_global_devices(f"published {folder.name}")
