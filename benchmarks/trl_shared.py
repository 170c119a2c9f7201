"""What both of TRL's trainers need here: a tokenizer, which they ask for and read nothing with, and
a training step without their loop around it."""

import tokenizers
import torch
import transformers

from benchmarks import checkpoints, workers


def tokenizer():
    """Of words that are numbers."""
    words = {str(i): i for i in range(checkpoints.VOCABULARY)}
    model = tokenizers.models.WordLevel(words, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="0", eos_token="0"
    )


def ready(trainer):
    """The trainer as its own loop would have it before a step."""
    trainer.create_optimizer_and_scheduler(1000)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    return trainer


def step(trainer, inputs):
    """A worker's answer after one step: loss, gradient, clipping, AdamW."""

    def whole():
        loss = trainer.training_step(trainer.model, inputs, None)
        norm = torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        return float(loss), float(norm)

    (loss, norm), figures = workers.timed(whole)
    return figures | {"loss": loss, "grad_norm": norm}
