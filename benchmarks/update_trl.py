"""TRL's GRPO step as a worker of `benchmarks.update`; runs where trl and torch are. Usage:
python -m benchmarks.update_trl CHECKPOINT"""

import resource
import sys
import tempfile
import time

import datasets
import torch
import transformers
import trl

from benchmarks import trl_words, workers


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
        processing_class=trl_words.tokenizer(),
    )
    made.create_optimizer_and_scheduler(1000)
    made.current_gradient_accumulation_steps = 1
    made.model.train()
    return made


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
    """One step: loss, gradient, clipping, AdamW."""
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
    begin, cpu_begin = time.perf_counter(), time.process_time()
    loss = made.training_step(made.model, inputs, None)
    norm = torch.nn.utils.clip_grad_norm_(made.model.parameters(), 1.0)
    made.optimizer.step()
    made.optimizer.zero_grad()
    seconds, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "seconds": seconds,
        "cpu_s": cpu_s,
        "loss": float(loss),
        "grad_norm": float(norm),
        "peak_mb": peak_mb,
    }


workers.serve(answer, sys.stdin, sys.stdout)
