"""The two checkpoints that the benchmarks load, made by `transformers` with random weights.

    python -m benchmarks.checkpoints FOLDER

Leaves FOLDER/nano and FOLDER/small: Qwen2, 4,096 words, tied embeddings, float32.
"""

import argparse
import pathlib
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "nano": {
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 384,
    },
    "small": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "intermediate_size": 1408,
    },
}
VOCABULARY = 4096


def make(folder: pathlib.Path) -> None:
    """Writes the checkpoints that are not there yet; where they are, `torch` need not be."""
    missing = {n: s for n, s in SIZES.items() if not (folder / n / "config.json").is_file()}
    if not missing:
        return
    import torch
    import transformers

    for name, size in missing.items():
        torch.manual_seed(0)
        settings = transformers.Qwen2Config(
            vocab_size=VOCABULARY,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            bos_token_id=None,
            eos_token_id=0,
            pad_token_id=0,
            **size,
        )
        transformers.Qwen2ForCausalLM(settings).float().save_pretrained(folder / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=pathlib.Path)
    make(parser.parse_args().folder)
