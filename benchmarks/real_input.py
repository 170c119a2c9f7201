"""Three steps on real input: a Hugging Face checkpoint, the Qwen2.5 tokenizer, MBPP and its tests.

    python -m benchmarks.real_input --tokenizer FOLDER --problems mbpp.jsonl

Writes a small random Qwen2 checkpoint with `transformers` (needs the extra `parity`), prints the
training command, runs it, and prints what its steps logged. A random policy earns next to nothing,
and that is what must come out: the point is that every real part runs.
"""

import dataclasses
import pathlib
import subprocess
import sys

import rich.console
import rich.table
import tyro

from pgrpo_jax import metrics

SHOWN = (
    "reward",
    "rewards/format/mean",
    "rewards/outcome/mean",
    "judge/fail",
    "judge/error",
    "judge/infra",
    "completions/mean_length",
    "mismatch_max",
    "time/step_s",
)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Trains a small random Qwen2 on real problems."""

    tokenizer: pathlib.Path  # a Hugging Face folder of Qwen2.5's tokenizer
    problems: pathlib.Path  # a JSONL or parquet file of problems with tests
    workdir: pathlib.Path = pathlib.Path("runs/real_input")
    steps: int = 3


def main(arguments: Arguments) -> None:
    """The checkpoint, the run, the table."""
    checkpoint = arguments.workdir / "checkpoint"
    if not checkpoint.exists():
        write_checkpoint(checkpoint)
    words = command(arguments, checkpoint)
    console = rich.console.Console(width=160)
    console.print(" ".join(words), highlight=False)
    subprocess.run([sys.executable, *words[1:]], check=True)
    table = rich.table.Table("step", *SHOWN)
    for row in metrics.read_rows(arguments.workdir / "run" / "metrics.jsonl"):
        if row["stage"] == "grpo":
            table.add_row(str(row["step"]), *(f"{row[name]:.3g}" for name in SHOWN))
    console.print(table)
    kept = list(metrics.read_rows(arguments.workdir / "run" / "completions.jsonl"))
    console.print(f"{len(kept)} completions of {len({r['problem_id'] for r in kept})} problems")


def write_checkpoint(folder: pathlib.Path) -> None:
    """A Qwen2 of 20 million random parameters, nearly all of them the vocabulary's."""
    import torch
    import transformers

    torch.manual_seed(0)
    shape = transformers.Qwen2Config(
        vocab_size=151936,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    transformers.Qwen2ForCausalLM(shape).save_pretrained(folder)


def command(arguments: Arguments, checkpoint: pathlib.Path) -> list[str]:
    """The training command: the built-in configuration of the 0.5B model, made small."""
    options = {
        "config": "qwen2_5_coder_0_5b",
        "workdir": arguments.workdir / "run",
        "policy.checkpoint": checkpoint,
        "reward-model.checkpoint": checkpoint,
        "data.tokenizer": arguments.tokenizer,
        "data.train": arguments.problems,
        "data.evaluation": arguments.problems,
        "data.evaluation-limit": 8,
        "reward-training.steps": 0,
        "rollout.prompts-per-step": 4,
        "rollout.num-generations": 4,
        "rollout.max-completion-length": 64,
        "rollout.batch-size": 16,
        "update.steps": arguments.steps,
        "update.micro-batch-size": 4,
    }
    # A CPU multiplies bfloat16 on one core only.
    options |= {f"{model}.compute.dtype": "float32" for model in ("policy", "reward-model")}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["python", "-m", "pgrpo_jax.train", *words]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
