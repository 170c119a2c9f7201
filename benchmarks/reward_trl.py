"""TRL's Bradley-Terry step as a worker of `benchmarks.update`; runs where trl and torch are. Usage:
python -m benchmarks.reward_trl CHECKPOINT"""

import sys
import tempfile

import datasets
import torch
import transformers
import trl

from benchmarks import trl_shared, workers


def trainer(job):
    """As `benchmarks.reward_ours`: float32, AdamW at 1e-6, clipping at 1, the same first head."""
    arguments = trl.RewardConfig(
        output_dir=tempfile.mkdtemp(),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        center_rewards_coefficient=0.01,
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        per_device_train_batch_size=len(job["chosen"]),
        report_to=[],
    )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        sys.argv[1], num_labels=1, dtype=torch.float32
    )
    with torch.no_grad():
        model.score.weight[0] = torch.tensor(job["head"])
    pairs = datasets.Dataset.from_dict({"chosen": ["1"] * 2, "rejected": ["2"] * 2})
    made = trl.RewardTrainer(
        model=model, args=arguments, train_dataset=pairs, processing_class=trl_shared.tokenizer()
    )
    return trl_shared.ready(made)


made = None


def answer(job):
    """One step on a job's batch."""
    global made
    made = made or trainer(job)
    ids = torch.tensor(job["chosen"] + job["rejected"])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return trl_shared.step(made, inputs)


workers.serve(answer, sys.stdin, sys.stdout)
