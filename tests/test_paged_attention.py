"""The paged decode kernels, interpreted, against the reference; and the TPU compiler's word."""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_topology
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from pgrpo_jax.kernels import paged_attention
from pgrpo_jax.kernels.paged_kernel import FLOOR, Blocks

LAYERS = 2


def draw(seed, lengths, *, K=2, group=3, S=16, H=64, M=3, dtype="float32"):
    """(q, k, v, pages, layer, table, lengths); every slot has pages of its own, in no order."""
    rng = np.random.default_rng(seed)
    B = len(lengths)
    X = B * M + 2
    q = jnp.array(rng.standard_normal((B, K * group, H)), dtype)
    k, v = (jnp.array(rng.standard_normal((B, K, H)), dtype) for _ in "kv")
    pages = jnp.array(rng.standard_normal((LAYERS, X, K, S, 2 * H)), dtype)
    table = jnp.array(rng.permutation(X)[: B * M].reshape(B, M), jnp.int32)
    return q, k, v, pages, jnp.int32(1), table, jnp.array(lengths, jnp.int32)


@functools.cache
def kernels(blocks, interpret=True):
    """Both kernels, interpreted; compiled once for each shape."""
    options = {"blocks": blocks, "interpret": interpret}
    read = jax.jit(functools.partial(paged_attention.attend, **options))
    return read, jax.jit(functools.partial(paged_attention.attend_write, **options))


def assert_both_agree(case, blocks, tolerance, interpret=True):
    q, k, v, pages, layer, table, lengths = case
    read, write = kernels(blocks, interpret)
    wanted = paged_attention.reference(q, pages, layer, table, lengths)
    assert_close(read(q, pages, layer, table, lengths), wanted, tolerance)
    *wanted, wanted_pages = paged_attention.reference_write(q, k, v, pages, layer, table, lengths)
    *got, got_pages = write(q, k, v, pages, layer, table, lengths)
    assert_close(got, wanted, tolerance)
    np.testing.assert_array_equal(got_pages, wanted_pages)


def assert_close(got, wanted, tolerance):
    """Outputs to `tolerance`; lse, of numbers up to 10, to a few float32 roundings of these."""
    np.testing.assert_allclose(np.float32(got[0]), np.float32(wanted[0]), atol=tolerance)
    np.testing.assert_allclose(got[1], wanted[1], atol=5e-6)


# Few, since each is compiled; many lengths. The second and the last have key and value of 64 in 128
# lanes, the third a group of queries that fills more than one register, and the last more pages
# than are copied in straight-line code.
SHAPES = [
    {"K": 2, "group": 7, "S": 16, "H": 128, "M": 6},
    {"K": 1, "group": 4, "S": 48, "H": 64, "M": 2},
    {"K": 3, "group": 9, "S": 32, "H": 64, "M": 3},
    {"K": 1, "group": 2, "S": 16, "H": 64, "M": 11},
]
# Blocks of 2, 2, 1 and 9 pages of these in float32; and of one page each, on one core.
BLOCKS = [Blocks(9 * 2**13), Blocks(1, buffers=4, cores=1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_do_what_the_reference_does(shape):
    most = shape["M"] * shape["S"]
    length = st.one_of(st.integers(0, most), st.sampled_from([0, 1, most - 1, most]))

    @hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
    @hypothesis.given(
        seed=st.integers(0, 2**16),
        lengths=st.lists(length, min_size=5, max_size=5),
        blocks=st.sampled_from(BLOCKS),
    )
    def agree(seed, lengths, blocks):
        assert_both_agree(draw(seed, lengths, **shape), blocks, 2e-6)

    agree()


def test_in_bfloat16_they_differ_from_float32_by_its_rounding():
    shape = {"K": 2, "group": 7, "H": 128, "M": 4}
    q, _, _, pages, layer, table, lengths = draw(3, [64, 0, 33, 5], **shape, dtype="bfloat16")
    got, _ = kernels(Blocks(2**15), True)[0](q, pages, layer, table, lengths)
    wanted, _ = paged_attention.reference(
        q.astype(jnp.float32), pages.astype(jnp.float32), layer, table, lengths
    )
    assert got.dtype == jnp.bfloat16
    # Outputs are below 2, where bfloat16 has steps of 2^-7: half a step each for p and the output.
    assert np.abs(np.float32(got) - wanted).max() < 2**-7


@pytest.mark.parametrize(
    ("lengths", "pages", "block_bytes"),
    [([33, 0, 16, 40], 3, 1), ([0, 0, 0, 0], 3, 1), ([160, 130, 0, 150], 10, 9 * 2**13)],
)
def test_no_copy_races_with_another_or_with_its_use(lengths, pages, block_bytes, capsys):
    """Two cores; blocks of one page, so that each buffer is used again and again, or of nine."""
    if "num_cores_or_threads" not in inspect.signature(pltpu.InterpretParams).parameters:
        pytest.skip("this jax does not simulate two cores under that name")
    simulated = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    case = draw(0, lengths, K=1, group=1, M=pages)
    assert_both_agree(case, Blocks(block_bytes, buffers=2), 2e-6, simulated)
    assert "RACE DETECTED" not in capsys.readouterr().out


def test_the_reference_is_attention_over_the_slots_own_keys():
    q, _, _, pages, layer, table, lengths = draw(1, [0, 17, 48, 1, 32])
    got, lse = paged_attention.reference(q, pages, layer, table, lengths)
    assert not got[0].any() and (lse[0] == FLOOR).all()
    for b in range(1, 5):
        kv_TKI = np.concatenate([pages[1, page].swapaxes(0, 1) for page in table[b]])
        k_1TKH, v_1TKH = np.split(kv_TKI[None, : lengths[b]], 2, axis=-1)
        oracle = jax.nn.dot_product_attention(q[None, b : b + 1], k_1TKH, v_1TKH)
        np.testing.assert_allclose(got[b], oracle[0, 0], atol=1e-6)
        k_TNH = np.repeat(k_1TKH[0], 3, axis=1)
        sums = np.exp(np.einsum("NH,TNH->TN", q[b], k_TNH) / 8).sum(0)  # 8 = sqrt(64)
        np.testing.assert_allclose(lse[b], np.log(sums), atol=1e-5)


def test_stretches_of_a_slots_keys_merge_to_attention_over_all_of_them():
    q, _, _, pages, layer, table, lengths = draw(6, [0, 40, 48, 3, 20])
    read = kernels(Blocks(2**14))[0]
    first, behind = jnp.minimum(lengths, 16), jnp.maximum(lengths - 16, 0)
    parts = [read(q, pages, layer, t, n) for t, n in ((table, first), (table[:, 1:], behind))]
    wanted, _ = read(q, pages, layer, table, lengths)
    np.testing.assert_allclose(paged_attention.merged(parts), wanted, atol=2e-6)


@pytest.mark.parametrize("write", [paged_attention.reference_write, kernels(Blocks(1))[1]])
def test_token_by_token_it_is_causal_attention(write):
    """A cache that begins empty gives, after T steps, what one causal pass over T tokens gives."""
    T, K, group, H = 20, 2, 2, 64
    rng = np.random.default_rng(2)
    q = jnp.array(rng.standard_normal((2, T, K * group, H)), jnp.float32)
    k, v = (jnp.array(rng.standard_normal((2, T, K, H)), jnp.float32) for _ in "kv")
    pages, table = jnp.zeros((1, 5, K, 16, 2 * H)), jnp.array([[4, 1], [0, 3]], jnp.int32)
    steps = []
    for t in range(T):
        lengths = jnp.array([t + 1, max(t - 3, 0)], jnp.int32)  # the second starts 4 steps later
        at = np.array([t, max(t - 4, 0)])
        out, _, pages = write(q[[0, 1], at], k[[0, 1], at], v[[0, 1], at], pages, 0, table, lengths)
        steps.append(out)
    wanted = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    got = jnp.stack(steps, axis=1)
    np.testing.assert_allclose(got[0], wanted[0], atol=2e-6)
    np.testing.assert_allclose(got[1, 4:], wanted[1, : T - 4], atol=2e-6)
    assert not got[1, :4].any()


@pytest.mark.parametrize(
    "function", [paged_attention.reference, kernels(Blocks(2**14))[0]], ids=["reference", "kernel"]
)
def test_what_is_not_a_slots_own_cannot_reach_it(function):
    """Every other layer, page and position is NaN; so is what an earlier block left in a buffer."""
    q, _, _, pages, layer, table, lengths = draw(4, [33, 5, 0, 48, 17])
    wanted, _ = function(q, pages, layer, table, lengths)
    own = np.zeros(pages.shape, bool)
    for pages_of_slot, length in zip(np.array(table), np.array(lengths), strict=True):
        for t in range(length):
            own[1, pages_of_slot[t // 16], :, t % 16] = True
    poisoned = jnp.where(own, pages, jnp.nan)
    np.testing.assert_array_equal(function(q, poisoned, layer, table, lengths)[0], wanted)
    sick = jnp.where(jnp.arange(5)[:, None, None] == 3, jnp.nan, q)  # slot 3 alone
    others = np.array([0, 1, 2, 4])
    got, _ = function(sick, poisoned.at[1, table[3]].set(jnp.nan), layer, table, lengths)
    np.testing.assert_array_equal(got[others], wanted[others])


def test_a_table_that_points_nowhere_reads_what_is_there():
    """The kernel has no bounds checks of its own: what is out of bounds is put in bounds before."""
    q, _, _, pages, layer, table, lengths = draw(5, [48, 20, 7])
    read = kernels(Blocks(2**14))[0]
    X, most = pages.shape[1], table.shape[1] * 16
    wild = table.at[0, 0].set(10**6).at[1, 1].set(-5)
    tame = table.at[0, 0].set(X - 1).at[1, 1].set(0)
    got, _ = read(q, pages, jnp.int32(7), wild, lengths.at[2].set(10**6))
    wanted, _ = read(q, pages, layer, tame, lengths.at[2].set(most))
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda q, p, t, n: (q[..., :32], p[..., :64], t, n), "H a multiple of 64"),
        (lambda q, p, t, n: (q, p[..., :64], t, n), "side by side"),
        (lambda q, p, t, n: (q, p[:, :, :, :8], t, n), "a multiple of 16 positions"),
        (lambda q, p, t, n: (q[:, :5], p, t, n), "query heads N a multiple"),
        (lambda q, p, t, n: (q[0], p, t, n), r"wants q \[B, N, H\]"),
        (lambda q, p, t, n: (q, p, t[:2], n), r"want a table \[3, M\]"),
        (lambda q, p, t, n: (q, p, t, n.astype(jnp.int16)), "must be int32"),
        (lambda q, p, t, n: (q.astype(jnp.bfloat16), p, t, n), "both bfloat16 or both float32"),
    ],
)
def test_what_it_cannot_do_is_refused(change, sentence):
    q, _, _, pages, layer, table, lengths = draw(0, [1, 2, 3])
    q, pages, table, lengths = change(q, pages, table, lengths)
    with pytest.raises(ValueError, match=sentence):
        paged_attention.attend(q, pages, layer, table, lengths)


def test_a_new_token_of_another_shape_is_refused():
    q, k, v, *rest = draw(0, [1, 2, 3])
    with pytest.raises(ValueError, match=r"a new key and value a slot, both \(3, 2, 64\)"):
        paged_attention.attend_write(q, k, v[:, :1], *rest)


@pytest.mark.parametrize("wrong", [{"block_bytes": 0}, {"buffers": 1}, {"cores": 0}])
def test_blocks_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match="Blocks wants"):
        Blocks(**wrong)


def shapes(B, N, K, H, S, M, dtype="bfloat16", layers=4):
    """Abstract arguments of `attend_write`."""
    ints = [(), (B, M), (B,)]
    arrays = [(B, N, H), (B, K, H), (B, K, H), (layers, B * M, K, S, 2 * H)]
    return [jax.ShapeDtypeStruct(s, dtype) for s in arrays] + [
        jax.ShapeDtypeStruct(s, jnp.int32) for s in ints
    ]


# Qwen2.5-7B whole and over four devices, Qwen2.5-0.5B, Llama 3 8B; each page size once.
MODELS = [(28, 4, 128, 128), (7, 1, 128, 64), (14, 2, 64, 16), (32, 8, 128, 256), (28, 4, 128, 16)]


@pytest.mark.parametrize(("N", "K", "H", "S"), MODELS)
def test_mosaic_lowers_both(N, K, H, S):
    q, k, v, *rest = shapes(16, N, K, H, S, 2048 // S)
    tpu_topology.lower(paged_attention.attend, q, *rest)
    tpu_topology.lower(paged_attention.attend_write, q, k, v, *rest)


def decode(q, k, v, pages, layers, table, lengths):
    """Every layer writes and attends, as a decoder's scan does."""

    def layer_step(carry, layer):
        q, pages = carry
        q, _, pages = paged_attention.attend_write(q, k, v, pages, layer, table, lengths)
        return (q, pages), None

    return jax.lax.scan(layer_step, (q, pages), layers)[0]


@pytest.mark.tpu
@pytest.mark.parametrize("chip", tpu_topology.SLICES)
def test_it_compiles_for_the_chip_and_never_copies_the_cache(chip):
    place = tpu_topology.one_device(chip)
    for N, K, H, S in MODELS:
        q, k, v, pages, layer, *rest = shapes(64, N, K, H, S, 2048 // S)
        tpu_topology.compile_on(place, paged_attention.attend, q, pages, layer, *rest)
        layers = jax.ShapeDtypeStruct((4,), jnp.int32)
        arguments = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
            for x in (q, k, v, pages, layers, *rest)
        ]
        compiled = jax.jit(decode, donate_argnums=3).lower(*arguments).compile()
        memory = compiled.memory_analysis()
        cache_bytes = pages.size * pages.dtype.itemsize
        assert memory.alias_size_in_bytes >= cache_bytes
        assert memory.temp_size_in_bytes < cache_bytes / 8
