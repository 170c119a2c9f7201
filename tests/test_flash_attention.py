"""The flash kernels, interpreted, against their reference; and the TPU compiler's word on them."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology
from hypothesis import strategies as st

from pgrpo_jax.kernels import flash_attention, flash_blocks
from pgrpo_jax.kernels.flash_blocks import BlockSizes

SMALL = BlockSizes(span=512, queries=256, keys=256, part=128, tile=128)
TINY = BlockSizes(span=128, queries=128, keys=128, part=128, tile=128)
COARSE = BlockSizes(span=512, queries=512, keys=512, part=256, tile=256)


def flash(*arrays, **options):
    options = {"forward": SMALL, "backward": SMALL} | options
    return flash_attention.flash_attention(*arrays, interpret=True, **options)


def with_gradients(function, q, k, v, dout):
    """(out, dq, dk, dv), float32."""

    @jax.jit
    def run(q, k, v, dout):
        out, pull = jax.vjp(function, q, k, v)
        return out, *pull(dout)

    return [np.asarray(x.astype(jnp.float32)) for x in run(q, k, v, dout)]


def draw(seed, B, T, N, K, H, dtype="float32"):
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    return [jnp.array(rng.standard_normal((B, T, n, H)), dtype) for n in (N, K, K, N)]


def continued(segments_BT, seed):
    """prefixes_BT: each segment continues one of a lower number, or none."""
    numbers = np.random.default_rng(seed).integers(0, np.maximum(np.arange(6), 1))
    return jnp.array(numbers)[segments_BT]


def packed(seed, B, T):
    """Rows of up to five segments in order, with padding on either side or none."""
    rng = np.random.default_rng(seed)
    rows = np.zeros((B, T), np.int32)
    for row in rows:
        left, right = rng.integers(0, T // 3 + 1, 2) * rng.integers(0, 2, 2)
        row[left : T - right] = 1 + np.sort(rng.integers(0, 5, T - left - right))
    return jnp.array(rows)


@hypothesis.settings(max_examples=8, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    seed=st.integers(0, 2**16),
    tokens=st.integers(1, 600),
    heads=st.sampled_from([(1, 1), (2, 1), (3, 3), (4, 2)]),
    head_dim=st.sampled_from([16, 64, 128]),
    soft_cap=st.sampled_from([None, 3.0]),
    forward=st.sampled_from([SMALL, TINY, COARSE]),
    backward=st.sampled_from([SMALL, TINY, COARSE]),
    in_order=st.booleans(),
    shared=st.booleans(),
)
def test_the_kernel_agrees_with_its_reference_in_values_and_gradients(
    seed, tokens, heads, head_dim, soft_cap, forward, backward, in_order, shared
):
    q, k, v, dout = draw(seed, 2, tokens, *heads, head_dim)
    segments_BT = packed(seed, 2, tokens)
    if not in_order:  # nothing asks for segments to be in order, or in one piece
        segments_BT = jax.random.permutation(jax.random.key(seed), segments_BT, 1)
    rows = (segments_BT, continued(segments_BT, seed) if shared else None)
    options = {"forward": forward, "backward": backward, "soft_cap": soft_cap}
    got = with_gradients(lambda *qkv: flash(*qkv, *rows, **options), q, k, v, dout)
    want = with_gradients(
        lambda *qkv: flash_attention.reference(*qkv, *rows, soft_cap=soft_cap), q, k, v, dout
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_stays_within_its_rounding_of_a_float32_oracle(head_dim):
    arrays = draw(3, 2, 300, 4, 2, head_dim, "bfloat16")
    segments_BT = packed(3, 2, 300)
    got = with_gradients(lambda *qkv: flash(*qkv, segments_BT), *arrays)
    exact = [x.astype(jnp.float32) for x in arrays]
    want = with_gradients(lambda *qkv: flash_attention.reference(*qkv, segments_BT), *exact)
    for one, other in zip(got, want, strict=True):
        # Half an ulp is 2^-9. Weights, their gradients and the result are rounded: a sum of a few
        # hundred products of rounded factors stays below four halves of the largest value.
        assert np.abs(one - other).max() < 4 * 2**-9 * np.abs(other).max()


def test_the_reference_agrees_with_jax_nn_dot_product_attention():
    q, k, v, dout = draw(1, 2, 33, 4, 2, 16)
    segments_BT = jnp.array([[1] * 20 + [2] * 13, [3] * 33])
    same_B1TS = (segments_BT[:, :, None] == segments_BT[:, None])[:, None]
    got = with_gradients(lambda *qkv: flash_attention.reference(*qkv, segments_BT), q, k, v, dout)
    want = with_gradients(
        functools.partial(jax.nn.dot_product_attention, mask=same_B1TS, is_causal=True),
        q,
        k,
        v,
        dout,
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


def test_padding_reaches_nothing_and_gives_zeros():
    arrays = draw(5, 2, 300, 2, 1, 64)
    # The second row is padding altogether, and so is one whole block of the first.
    segments_BT = jnp.zeros((2, 300), jnp.int32).at[0, 3:120].set(1)
    is_padding = np.asarray(segments_BT == 0)
    poisoned = [jnp.where((segments_BT == 0)[:, :, None, None], 1e30, x) for x in arrays]
    sizes = {"forward": TINY, "backward": TINY}
    clean = with_gradients(lambda *qkv: flash(*qkv, segments_BT, **sizes), *arrays)
    dirty = with_gradients(lambda *qkv: flash(*qkv, segments_BT, **sizes), *poisoned)
    for one, other in zip(clean, dirty, strict=True):
        np.testing.assert_array_equal(one, other)
        assert not one[is_padding].any()


def test_a_segment_in_a_packed_row_is_what_it_is_alone():
    q, k, v, dout = draw(7, 1, 400, 2, 1, 64)
    segments_BT = jnp.repeat(jnp.array([[1, 2, 3]]), np.array([150, 37, 213]), axis=1)
    whole = with_gradients(lambda *qkv: flash(*qkv, segments_BT), q, k, v, dout)
    for begin, end in ((0, 150), (150, 187), (187, 400)):
        parts = [x[:, begin:end] for x in (q, k, v, dout)]
        ones_BT = jnp.ones((1, end - begin), jnp.int32)
        alone = with_gradients(lambda *qkv, ids=ones_BT: flash(*qkv, ids), *parts)
        for one, other in zip(whole, alone, strict=True):
            np.testing.assert_allclose(one[:, begin:end], other, rtol=2e-5, atol=2e-5)


def test_a_block_looks_at_no_pass_before_its_segments_begin():
    sizes = BlockSizes(span=1024, queries=256, keys=128, part=128, tile=128)
    # Segment 1 fills columns 0 to 299, segment 2 those to 639; the rest is padding.
    segments_BT = jnp.repeat(jnp.array([[1, 2, 0]]), np.array([300, 340, 384]), axis=1)
    first_X = flash_blocks.first_passes(segments_BT[:, None], sizes)
    # Block 0 has no passes before it. Block 1 (256 to 511) still has tokens of segment 1: it begins
    # at pass 0. Block 2 (512 to 767) is in segment 2, which begins in pass 2. Block 3 is padding:
    # one more than the 6 passes before it.
    assert first_X.tolist() == [0, 0, 2, 7]


@pytest.mark.parametrize(
    ("tokens", "want"),
    [
        (4096, (4096, 1024, 1024, 512, 256)),
        (8192, (4096, 1024, 1024, 512, 256)),
        (4100, (3072, 1024, 1024, 512, 256)),
        (1500, (1536, 768, 768, 256, 256)),
        (100, (128, 128, 128, 128, 128)),
    ],
)
def test_block_sizes_fit_the_row(tokens, want):
    fitted = BlockSizes(4096, 1024, 1024, 512, 256).fitted(tokens)
    assert fitted == BlockSizes(*want)


def test_block_sizes_refuse_what_does_not_divide():
    with pytest.raises(ValueError, match="each be a multiple of the next"):
        BlockSizes(span=1024, queries=384, keys=256)
    with pytest.raises(ValueError, match="and 128"):
        BlockSizes(tile=64)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"k": (2, 40, 3, 16), "v": (2, 40, 3, 16)}, "K dividing the 4 query heads"),
        ({"k": (2, 41, 2, 16), "v": (2, 41, 2, 16)}, "a cache needs another kernel"),
        ({"v": (2, 40, 2, 8)}, "k and v of one shape"),
        ({"q": (2, 40, 16)}, "wants q_BTNH and k_BTKH"),
        ({"segments": (2, 39)}, "integer segments"),
        ({"dtype": "float16"}, "cast them first"),
        ({"q": (2, 40, 4, 20), "k": (2, 40, 2, 20), "v": (2, 40, 2, 20)}, "multiples of 8, got 20"),
        ({"soft_cap": 0.0}, "soft_cap must be above 0"),
    ],
)
def test_what_the_kernels_cannot_do_is_refused_in_a_sentence(change, sentence):
    shapes = {"q": (2, 40, 4, 16), "k": (2, 40, 2, 16), "v": (2, 40, 2, 16), "segments": (2, 40)}
    shapes |= {name: change[name] for name in shapes if name in change}
    q, k, v = (jnp.zeros(shapes[name], change.get("dtype", "float32")) for name in "qkv")
    segments_BT = jnp.ones(shapes["segments"], jnp.int32)
    with pytest.raises(ValueError, match=sentence):
        flash(q, k, v, segments_BT, soft_cap=change.get("soft_cap"))


def cases(T=4096, B=2, N=28, K=4, H=128):
    """The forward pass, and both passes, at a model's shapes."""
    shapes = [
        *(jax.ShapeDtypeStruct((B, T, n, H), jnp.bfloat16) for n in (N, K, K)),
        jax.ShapeDtypeStruct((B, T), jnp.int32),
    ]

    def both(q, k, v, segments_BT):
        out, pull = jax.vjp(
            lambda *qkv: flash_attention.flash_attention(*qkv, segments_BT), q, k, v
        )
        return out, pull(out)

    return both, shapes


MODELS = {
    "7B": {},
    "0.5B": {"N": 14, "K": 2, "H": 64},
    "odd length": {"T": 4100, "N": 2, "K": 1},
    "long": {"T": 16384, "B": 1, "N": 2, "K": 1},
    "tiny": {"T": 88, "N": 4, "K": 4, "H": 16},
}


@pytest.mark.parametrize("model", MODELS)
def test_it_lowers_for_tpus(model):
    both, shapes = cases(**MODELS[model])
    assert tpu_topology.lower(both, *shapes).as_text().count("tpu_custom_call") == 2


@pytest.mark.tpu
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chip", tpu_topology.SLICES)
def test_it_compiles_for_tpus(chip, model):
    both, shapes = cases(**MODELS[model])
    place = tpu_topology.one_device(chip)
    compiled = tpu_topology.compile_on(place, both, *shapes)
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
