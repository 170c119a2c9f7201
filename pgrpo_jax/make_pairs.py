"""OD preference pairs: reasonings optimised and degraded along accuracy, rigor and coherence (arXiv
2508.05170, section 3.1).

    python -m pgrpo_jax.make_pairs --config tiny

Leaves `pairs.jsonl` in the run's folder, rows that TRL's RewardTrainer reads too, and is skipped
when that is there. The built-in world optimises and degrades by rule.
"""

import collections
import json
import os
import random

import jax
import rich.console

from pgrpo_jax import cli, config, rng, start, world


@start.stage
def run(cfg: config.Config) -> None:
    """The whole stage."""
    out = start.folder(cfg, start.PAIRS)
    if not cfg.pairs.problems or out.is_file() or jax.process_index():
        return
    config.require(
        cfg.data.train == "world",
        f"make_pairs knows how to degrade reasonings of the built-in world only, and data.train is "
        f"{cfg.data.train!r}: name a file of pairs in reward_training.data and set "
        "pairs.problems to 0",
    )
    pool = start.problems(cfg, "train")[: cfg.pairs.problems]
    rows = list(world.pair_rows(pool, cfg.pairs.dimensions, cfg.seed))
    # Shuffled by problem, so that the pairs held out of the training share no problem with it.
    order = {problem.id: i for i, problem in enumerate(pool)}
    places = list(range(len(pool)))
    random.Random(rng.integer(cfg.seed, "pairs")).shuffle(places)
    rows.sort(key=lambda row: places[order[row["problem_id"]]])
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_suffix(".new")
    aside.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(aside, out)
    kinds = collections.Counter(row["kind"] for row in rows)
    words = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    rich.console.Console(stderr=True).print(f"make_pairs  {words}", highlight=False)


if __name__ == "__main__":
    cli.run(run, __doc__)
