"""Tunix's sampler as a worker of `benchmarks.rollout`; runs where google-tunix is. Usage:
python -m benchmarks.rollout_tunix CHECKPOINT"""

import json
import pathlib
import sys
import time

import jax
import numpy as np
from tunix.generate import sampler
from tunix.models.qwen2 import model, params

from benchmarks import workers

LONGEST = 4096  # tokens of prompt and completion


class Ids:
    """A tokenizer of texts that are numbers with blanks between."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(map(str, ids))

    def bos_id(self):
        return None

    def eos_id(self):
        return -1

    def pad_id(self):
        return 0


def load(folder):
    cfg = json.loads((pathlib.Path(folder) / "config.json").read_text())
    heads = cfg["num_attention_heads"]
    settings = model.ModelConfig(
        num_layers=cfg["num_hidden_layers"],
        vocab_size=cfg["vocab_size"],
        embed_dim=cfg["hidden_size"],
        hidden_dim=cfg["intermediate_size"],
        num_heads=heads,
        head_dim=cfg["hidden_size"] // heads,
        num_kv_heads=cfg["num_key_value_heads"],
        rope_theta=cfg["rope_parameters"]["rope_theta"],
        norm_eps=cfg["rms_norm_eps"],
        use_tied_embedding=True,
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    with mesh:
        return params.create_model_from_safe_tensors(str(folder), settings, mesh), settings, mesh


def answer(job):
    """Static batches of `slots` completions; each is written until its longest has ended."""
    length = len(job["prompts"][0])
    size = length + max(job["limits"])
    if size not in samplers:  # the cache fits the job: a longer one is read for nothing
        cache = sampler.CacheConfig(
            size, settings.num_layers, settings.num_kv_heads, settings.head_dim
        )
        samplers[size] = sampler.Sampler(transformer, Ids(), cache)
    texts = [" ".join(map(str, prompt)) for prompt in job["prompts"]]
    begin, tokens = time.perf_counter(), 0
    with mesh:
        for start in range(0, len(texts), job["slots"]):
            some = slice(start, start + job["slots"])
            # One length for all batches: another would be compiled anew.
            samplers[size](
                texts[some],
                max_generation_steps=max(job["limits"]),
                max_prompt_length=length,
                eos_tokens=[-1],
                temperature=1.0,
                top_p=1.0,
                seed=start,
            )
            tokens += sum(job["limits"][some])
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": tokens,
        "peak_mb": workers.resident_mb(),
    }


if __name__ == "__main__":
    transformer, settings, mesh = load(sys.argv[1])
    samplers: dict[int, sampler.Sampler] = {}
    workers.serve(answer, sys.stdin, sys.stdout)
