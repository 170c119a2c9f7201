"""summary.json: what a run came to, computed from its own metrics.jsonl."""

import pathlib
from typing import Any

from pgrpo_jax import config, metrics

NOT_METRICS = ("step", "stage")


def write(cfg: config.Config) -> dict[str, Any]:
    """Reads the rows of the run's folder, writes summary.json there and returns what it holds.

    Raises:
      ValueError: the run has no evaluation yet.
    """
    folder = pathlib.Path(cfg.workdir)
    rows = list(metrics.read_rows(folder / "metrics.jsonl"))
    tests = [row for row in rows if row["stage"] == "evaluate"]
    if not tests:
        raise ValueError(f"{folder}/metrics.jsonl has no row of stage 'evaluate': train first")
    before, after = tests[0], tests[-1]
    trained = [row for row in rows if row["stage"] == "grpo"]
    found: dict[str, Any] = {
        "config_name": folder.name,
        "seed": cfg.seed,
        "pass@1": {"before": _passes(before), "after": _passes(after)},
        "phases": phases(rows),
        "final_metrics": _values(trained[-1]) if trained else {},
    }
    name = "eval/oracle/perfect_of_passing"
    if before.get(name) is not None and after.get(name) is not None:
        found["oracle_perfect_of_passing"] = {"before": before[name], "after": after[name]}
    metrics.write_json(folder / "summary.json", found)
    return found


def _passes(row: dict[str, Any]) -> dict[str, Any]:
    n = int(row["eval/n"])

    def share(value: float) -> dict[str, float]:
        low, high = metrics.wilson_interval(value * n, n)
        return {"value": value, "low": low, "high": high, "n": n}

    return {"sampled": share(row["eval/pass@1"]), "greedy": share(row["eval/pass@1_greedy"])}


def phases(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of each stage, tokens and tokens a second; `grpo` also by what its steps did."""
    found: dict[str, dict[str, float]] = {}
    for row in rows:
        stage = found.setdefault(row["stage"], {"seconds": 0.0, "tokens": 0.0})
        stage["seconds"] += row.get("time/step_s") or 0.0
        stage["tokens"] += row.get("tokens") or 0.0
        if row["stage"] != "grpo":
            continue
        for name, value in row.items():
            if name.startswith("time/") and name != "time/step_s":
                part = "grpo/" + name.removeprefix("time/").removesuffix("_s")
                found.setdefault(part, {"seconds": 0.0, "tokens": 0.0})["seconds"] += value
                found[part]["tokens"] += row["tokens"]
    for stage in found.values():
        stage["tokens_per_s"] = stage["tokens"] / max(stage["seconds"], 1e-9)
    return found


def _values(row: dict[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in row.items() if name not in NOT_METRICS}
