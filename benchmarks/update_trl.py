"""TRL's GRPO step as a worker of `benchmarks.update`; runs where trl and torch are. Usage:
python -m benchmarks.update_trl CHECKPOINT"""

import sys
import tempfile

import datasets
import torch
import transformers
import trl

from benchmarks import trl_shared, workers


class OneBatch(trl.GRPOTrainer):
    """A trainer whose completions are given."""

    def _prepare_inputs(self, inputs):
        return inputs


def trainer(checkpoint, rows):
    """As `benchmarks.update_ours`: float32, AdamW at 1e-6, clipping at 1, no KL."""
    arguments = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        use_bias_correction_kl=False,
        loss_type="grpo",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        per_device_train_batch_size=rows,
        num_generations=8,
        report_to=[],
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    prompts = datasets.Dataset.from_dict({"prompt": ["1"] * rows})
    made = OneBatch(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=prompts,
        processing_class=trl_shared.tokenizer(),
    )
    return trl_shared.ready(made)


def padded(rows, left):
    """Ids and mask of rows of several lengths."""
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    for i, row in enumerate(rows):
        place = slice(length - len(row), None) if left else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask.long()


def padded_numbers(rows):
    """Rows of numbers, zeros behind them."""
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


trainers: dict[int, OneBatch] = {}


def answer(job):
    """One step on a job's batch."""
    rows = len(job["prompts"])
    if rows not in trainers:
        trainers[rows] = trainer(sys.argv[1], rows)
    made = trainers[rows]
    prompt_ids, prompt_mask = padded(job["prompts"], left=True)
    completion_ids, completion_mask = padded(job["completions"], left=False)
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids,
        "completion_mask": completion_mask,
        "advantages": torch.tensor(job["advantages"]),
        "old_per_token_logps": padded_numbers(job["old_logps"]),
        "num_items_in_batch": completion_mask.sum(),
    }
    return trl_shared.step(made, inputs)


workers.serve(answer, sys.stdin, sys.stdout)
