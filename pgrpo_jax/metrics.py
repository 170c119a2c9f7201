"""What a run writes down, metrics.jsonl, completions.jsonl, TensorBoard, wandb, and how it is read.

A row says which step of which stage it belongs to. A stage that continues at step k drops its rows
of steps >= k before it writes them again, so a run that was killed and continued leaves the files
that a straight run leaves.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self, SupportsFloat, TextIO


@dataclasses.dataclass(frozen=True)
class CompletionRow:
    """One sampled answer as it stands in completions.jsonl.

    `verdicts` has one entry a test that ran, `tier` names the jail that they ran in. `rewards`
    holds `format`, `outcome`, `thinking` (None where the reward model was not asked) and a user's
    own terms. `length` is in tokens.
    """

    problem_id: str
    prompt: str
    completion: str
    reasoning: str
    code: str
    verdict: str
    verdicts: tuple[str, ...]
    tier: str
    rewards: Mapping[str, float | None]
    advantage: float
    length: int
    truncated: bool


class Log:
    """The files of one stage of one run. Only the primary process (index 0) writes.

    `first_step` is the number of steps already done. A checkpoint of step k promises the rows of
    the steps before k: write them first, then save it. A value that is not finite stands as null
    in the files. wandb gets one run a stage, in a group named after the run's folder.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        stage: str,
        *,
        first_step: int = 0,
        primary: bool = True,
        wandb_project: str = "",
        settings: Mapping[str, Any] | None = None,
    ):
        self._stage, self._primary, self._wandb = stage, primary, None
        if not primary:
            return
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        if wandb_project:
            self._wandb = _start_wandb(workdir.resolve(), stage, wandb_project, settings or {})
        paths = workdir / "metrics.jsonl", workdir / "completions.jsonl"
        for path in paths:
            path.touch()
            _drop_rows(path, stage, first_step)
        # Paths, not open files: another stage's log may put a new file in their place.
        self._metrics, self._completions = paths
        # Imported here, because it imports torch where that is installed: seconds for every reader.
        import tensorboardX

        self._tensorboard = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard" / stage), purge_step=first_step
        )

    def metrics(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Writes one row. Fetches what is on a device: hand over the values of the step before."""
        if not self._primary:
            return
        floats = {name: float(value) for name, value in values.items()}
        finite = {name: value for name, value in floats.items() if math.isfinite(value)}
        row = {"step": step, "stage": self._stage} | {name: finite.get(name) for name in floats}
        _append(self._metrics, [row])
        for name, value in floats.items():
            self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(floats, step=step)

    def completions(self, step: int, rows: Iterable[CompletionRow]) -> None:
        """Appends one row a completion."""
        if not self._primary:
            return
        head = {"step": step, "stage": self._stage}
        _append(self._completions, (head | dataclasses.asdict(row) for row in rows))

    def close(self) -> None:
        """Ends every file."""
        if not self._primary:
            return
        self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _append(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _start_wandb(
    workdir: pathlib.Path, stage: str, project: str, settings: Mapping[str, Any]
) -> Any:
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ImportError(
            f"logging.wandb_project is {project!r} but wandb is not installed: "
            "`pip install wandb`, or leave logging.wandb_project empty"
        ) from error
    name = f"{workdir.name}/{stage}"
    return wandb.init(
        project=project,
        group=workdir.name,
        name=name,
        # The id is a function of the folder: a continued stage goes on in its own wandb run, which
        # ignores the steps it has already seen.
        id=f"{zlib.crc32(str(workdir).encode()):08x}-{stage}",
        resume="allow",
        dir=str(workdir),
        config=dict(settings),
    )


def read_rows(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file, none without a file. A last line that a kill cut is left out."""
    for _, row in _lines(pathlib.Path(path)):
        yield row


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.exists():
        return
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith("\n"):
                return
            try:
                yield line, json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} of {path} is not JSON: {error}") from error


def _drop_rows(path: pathlib.Path, stage: str, first_step: int) -> None:
    if not path.exists():
        return
    with _replacing(path) as file:
        for line, row in _lines(path):
            if row["stage"] != stage or row["step"] < first_step:
                file.write(line)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Writes `value` so that the file is the old one or the new one, never a half."""
    with _replacing(pathlib.Path(path)) as file:
        file.write(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def _replacing(path: pathlib.Path) -> Iterator[TextIO]:
    """A text file that takes the place of `path` when its block ends without an error."""
    new = path.with_name(path.name + ".new")
    with open(new, "w", encoding="utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def wilson_interval(passed: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, 95 % by default (Wilson 1927, JASA 22:209).

    It stays inside [0, 1] and is not empty at 0 or n. It takes the n trials as independent: several
    samples of one problem are not, so with them `n` is the number of problems.
    """
    if not 0 <= passed <= n or n == 0:
        raise ValueError(
            f"an interval needs 0 <= passed <= n and n >= 1, got passed={passed}, n={n}"
        )
    share, squared = passed / n, z * z
    center = (share + squared / (2 * n)) / (1 + squared / n)
    half = z / (1 + squared / n) * math.sqrt(share * (1 - share) / n + squared / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)
