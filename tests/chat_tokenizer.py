"""A small real chat tokenizer for tests: byte-level BPE, Qwen's end tokens and template."""

import pathlib

import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "<think>\nFirst add one to x, then print it.\n</think>\n<answer>\nprint(x + 1)\n</answer>\n",
    "def f(x):\n    return x\n\nfor i in range(10):\n    print(i)\n",
    "Write a function that returns the sum of two numbers. Read the input from stdin.",
]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save(folder: pathlib.Path, template: str = TEMPLATE) -> str:
    """Trains the tokenizer, writes it as a Hugging Face folder, returns the folder's name."""
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet)
    core.train_from_iterator(CORPUS, trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        chat_template=template,
    )
    fast.save_pretrained(folder)
    return str(folder)
