"""Checkpoints of a run: the device state, sharded, and what the host has to remember beside it."""

import os
import pathlib
from typing import Any, Self, TypeAlias

import jax
import orbax.checkpoint as ocp

State: TypeAlias = Any  # a pytree of jax.Array


class Checkpoints:
    """The checkpoints in `workdir`/checkpoints, of which the newest `kept` stay.

    A checkpoint appears under its step only when it is whole: one that a kill or a full disk cut
    short is never picked up. Every process calls every method; process 0 writes `extra`.
    """

    def __init__(self, workdir: str | os.PathLike[str], kept: int):
        policy = ocp.checkpoint_managers.LatestN(n=kept)
        self._folder = pathlib.Path(workdir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("state", "extra"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, cleanup_tmp_directories=True
            ),
        )

    def save(self, step: int, state: State, extra: dict[str, Any]) -> None:
        """Copies `state` to the host and writes in the background; `state` may be donated at once.

        `step` is the number of steps done. `extra` is JSON: the data iterator's state, the resolved
        configuration, whatever the loop needs. A step already saved is left as it is. An error of
        an earlier background write is raised here, or by `wait`.
        """
        if step in self._manager.all_steps():
            return
        host = {"extra": extra, "leaves": _leaves(state)}
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), extra=ocp.args.JsonSave(host)
        )
        self._manager.save(step, args=arguments, force=True)

    def restore(self, abstract_state: State) -> tuple[int, State, dict[str, Any]] | None:
        """The newest (step, state, extra), None if there is none.

        `abstract_state` is the state as `jax.ShapeDtypeStruct`s with shardings; the arrays come
        back in those, whatever mesh they were saved from.

        Raises:
          ValueError: the checkpoint is of another architecture or optimiser.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        only_extra = ocp.args.Composite(extra=ocp.args.JsonRestore())
        host = self._manager.restore(step, args=only_extra)["extra"]
        self._refuse_other_state(step, host["leaves"], _leaves(abstract_state))
        arguments = ocp.args.Composite(state=ocp.args.StandardRestore(abstract_state))
        state = self._manager.restore(step, args=arguments)["state"]
        return step, state, host["extra"]

    def wait(self) -> None:
        """Returns when the last save is on disk; raises what it raised."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and ends the background threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _refuse_other_state(
        self, step: int, saved: dict[str, list[Any]], wanted: dict[str, list[Any]]
    ) -> None:
        if saved == wanted:
            return
        # The shortest path is the parameter's own, not one of its moments in the optimiser's state.
        different = [name for name in saved | wanted if saved.get(name) != wanted.get(name)]
        name = min(different, key=len)
        raise ValueError(
            f"the checkpoint of step {step} in {self._folder} is of another architecture or "
            f"optimiser: {name} is {_words(saved.get(name))} there and {_words(wanted.get(name))} "
            f"in this run ({len(different)} arrays differ); use the configuration it was saved "
            "with, or another workdir"
        )


def _leaves(state: State) -> dict[str, list[Any]]:
    """Path to [shape, dtype] of every array, as JSON gives it back."""
    paths = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)]
        for path, x in paths
    }


def _words(leaf: list[Any] | None) -> str:
    return "absent" if leaf is None else f"{leaf[1]}{leaf[0]}"
