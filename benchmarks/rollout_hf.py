"""Hugging Face `generate` as a worker of `benchmarks.rollout`; runs where transformers and torch
are. Usage: python -m benchmarks.rollout_hf CHECKPOINT"""

import sys
import time

import torch
import transformers

from benchmarks import workers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()


@torch.inference_mode()
def answer(job):
    """Static batches of `slots` completions; each is written until its longest has ended."""
    begin, tokens = time.perf_counter(), 0
    for start in range(0, len(job["prompts"]), job["slots"]):
        some = slice(start, start + job["slots"])
        ids = torch.tensor(job["prompts"][some])
        limits = job["limits"][some]
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max(limits),
            min_new_tokens=max(limits),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            pad_token_id=0,
            eos_token_id=None,
        )
        tokens += sum(limits)
    return {
        "seconds": time.perf_counter() - begin,
        "tokens": tokens,
        "peak_mb": workers.resident_mb(),
    }


workers.serve(answer, sys.stdin, sys.stdout)
