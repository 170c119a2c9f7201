"""What a program has to compute, by formula, and the least time that takes on a slice.

The compiler's own count (`cost_analysis`) takes a scan's body once and sees nothing inside a
kernel. Counted are multiplications and additions of matrix products, attention over the causal
half, as in PaLM (arXiv 2204.02311, appendix B); norms, rotary angles and the optimizer are left
out.
"""

import dataclasses

from pgrpo_jax.config import Architecture, Compute
from pgrpo_jax.topology import Chip

ASSUMPTIONS = (
    "seconds are a lower bound: matrix products at the chip's bfloat16 peak, HBM and links at "
    "their published rates, all three at the same time, nothing waits for the host",
    "a collective uses two links of each chip, those of one axis of the torus",
    "HBM bytes are the operands and results of the compiled program's instructions, those of loops "
    "times their trips; a kernel's operands count once and whole: all pages of the cache are read",
    "completions all reach the length limit and are all read by the reward model",
    "the vocabulary's chunks are passed over for the tokens of prompts; of any other conditional "
    "the branch runs that moves the most",
    "MFU is model FLOPs (recomputation not counted) over peak in that time: an upper bound",
)


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of one execution over all devices: of the model, and with what is computed twice."""

    model: float
    executed: float


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that each resource of the slice needs for one execution; the longest bounds it."""

    compute_s: float
    hbm_s: float
    links_s: float
    mfu: float

    @property
    def seconds(self) -> float:
        return max(self.compute_s, self.hbm_s, self.links_s)


def estimate(work: Work, hbm_bytes: float, link_bytes: float, chip: Chip, chips: int) -> Estimate:
    """Of a program that moves so many bytes in and out of each chip's HBM and into each chip."""
    times = (
        work.executed / (chips * chip.flops_per_s),
        hbm_bytes / chip.hbm_bytes_per_s,
        link_bytes / (2 * chip.link_bytes_per_s),
    )
    return Estimate(*times, mfu=work.model / (chips * chip.flops_per_s) / max(times))


def layers(arch: Architecture, tokens: int) -> float:
    """FLOPs of the layers' projections, forward."""
    attention = arch.width * arch.head_dim * (2 * arch.heads + 2 * arch.kv_heads)
    return 2.0 * tokens * arch.layers * (attention + 3 * arch.width * arch.mlp)


def attention(arch: Architecture, pairs: float) -> float:
    """FLOPs of scores and weighted sums over `pairs` of a query and a key, forward."""
    return 4.0 * pairs * arch.layers * arch.heads * arch.head_dim


def unembedding(arch: Architecture, tokens: int) -> float:
    """FLOPs of the logits, forward."""
    return 2.0 * tokens * arch.width * arch.vocab_size


@dataclasses.dataclass(frozen=True)
class Load:
    """What a pass reads: tokens, pairs of one and another that it attends, and the tokens that meet
    the vocabulary."""

    tokens: int
    pairs: float
    predicted: int


def rows(count: int, length: int, predicted: int = 0) -> Load:
    """`count` sequences of `length` tokens, of each of which `predicted` meet the vocabulary."""
    return Load(count * length, count * length * (length + 1) / 2, count * predicted)


def completions(prompts: int, each: int, prompt: int, drawn: int) -> Load:
    """`each` completions of `drawn` tokens for each prompt, which is read once but for its last
    token."""
    alone, again = rows(prompts * each, prompt + drawn, drawn), prompts * (each - 1)
    spared = rows(again, prompt - 1)
    return Load(alone.tokens - spared.tokens, alone.pairs - spared.pairs, alone.predicted)


def forward(arch: Architecture, load: Load) -> Work:
    """Every layer, and the logits of the tokens that meet the vocabulary."""
    flops = layers(arch, load.tokens) + attention(arch, load.pairs)
    flops += unembedding(arch, load.predicted)
    return Work(flops, flops)


def training(arch: Architecture, compute: Compute, load: Load) -> Work:
    """Forward and backward. Chunked logits are always made twice; the layers as `remat` says."""
    once, attended = forward(arch, load).model, attention(arch, load.pairs)
    again = {
        "none": 0.0,
        "dots": attended,  # products with a batch axis on both sides are not kept
        "full": layers(arch, load.tokens) + attended,
    }[compute.remat]
    again += unembedding(arch, load.predicted)
    return Work(3 * once, 3 * once + again)


def prefill(arch: Architecture, count: int, piece: int, prompt: int) -> Work:
    """The mean of the pieces, `piece` tokens of each row, that make up prompts of `prompt`."""
    before = attention(arch, count * piece * max(prompt - piece, 0) / 2)
    flops = forward(arch, rows(count, piece)).model + before
    return Work(flops, flops)


def decoding(arch: Architecture, rows: int, tokens: int, context: float, pairs: int) -> Work:
    """`tokens` more in each row, which attend to `context` tokens in the mean. In fact `pairs` of a
    query and a key are computed for each of them."""
    dense = layers(arch, rows * tokens) + unembedding(arch, rows * tokens)
    return Work(
        dense + attention(arch, rows * tokens * context),
        dense + attention(arch, float(tokens) * pairs),
    )
