"""A tokenizer for TRL's trainers, which ask for one and read nothing with it here."""

import tokenizers
import transformers

from benchmarks import checkpoints


def tokenizer():
    """Of words that are numbers."""
    words = {str(i): i for i in range(checkpoints.VOCABULARY)}
    model = tokenizers.models.WordLevel(words, unk_token="0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(model), pad_token="0", eos_token="0"
    )
