"""A completion is what its problem, its sample number and the policy say, however it was
computed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pgrpo_jax import memory, rollout, scheduler, sharding, types
from pgrpo_jax.config import Architecture, Compute, MeshConfig, RolloutConfig
from pgrpo_jax.data import Prompt
from pgrpo_jax.models import decoder, logprobs

ARCH = Architecture(
    vocab_size=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, mlp=32, qk_norm=True
)
COMPUTE = Compute()
STOPS = (3, 10)
CFG = RolloutConfig(
    prompts_per_step=4,
    num_generations=4,
    max_completion_length=37,
    temperature=0.8,
    prompt_buckets=(8, 12),
    page_size=4,
    prefill_tokens=8,
)


@functools.cache
def mesh(devices: int, tensor: int = 1):
    return sharding.make_mesh(MeshConfig(tensor=tensor), jax.devices()[:devices])


@functools.cache
def params():
    params = decoder.init(ARCH, COMPUTE, jax.random.key(1))
    params["embedding"] = 3 * params["embedding"]  # far from uniform, so that errors show in tokens
    return params


def engine(stop_ids=STOPS, mesh=mesh, **settings) -> rollout.Engine:
    settings = {**vars(CFG), **settings}
    return rollout.Engine(RolloutConfig(**settings), ARCH, COMPUTE, mesh(1), stop_ids)


def prompt(name: str, length: int) -> Prompt:
    tests = types.Tests(kind="assert", code=("assert True",))
    ids = np.random.default_rng(length).integers(6, ARCH.vocab_size, length, dtype=np.int32)
    return Prompt(types.Problem(name, name, tests), ids)


PROMPTS = [prompt(name, length) for name, length in (("a", 5), ("b", 8), ("c", 1), ("d", 3))]


@functools.cache
def shared() -> rollout.Engine:
    """One engine for the tests that need no setting of their own: it compiles once."""
    return engine()


def sampled(engine, prompts=PROMPTS, samples=4, seed=0, step=0, temperature=None, params_=None):
    """Completions by (problem, sample)."""
    completions = engine.generate(
        params() if params_ is None else params_, prompts, samples, seed, step, temperature
    )
    return {(c.problem.id, c.sample): c for c in completions}


def tokens(completions):
    return {name: c.ids.tolist() for name, c in completions.items()}


@functools.cache
def reference():
    return sampled(shared())


@functools.partial(jax.jit, static_argnames="temperature")
def full_forward(params, ids_1T, mask_1T, temperature):
    """Log-probabilities and logits of every next token, without a cache."""
    positions_1T = jnp.arange(ids_1T.shape[1])[None]
    segments_1T = mask_1T.astype(jnp.int32)
    x_1TD = decoder.forward(params, ARCH, COMPUTE, ids_1T, positions_1T, segments_1T)
    w_DV, next_1T = decoder.unembedding(params, ARCH), jnp.roll(ids_1T, -1, axis=1)
    return logprobs.logprobs(x_1TD, w_DV, next_1T, mask_1T, temperature, 1024)[0], x_1TD @ w_DV


def recomputed(completion, temperature):
    """Log-probabilities of a completion by the full forward, and the logits they come from."""
    start, end = len(completion.prompt_ids), len(completion.prompt_ids) + len(completion.ids)
    ids_1T = np.zeros((1, 64), np.int32)
    ids_1T[0, :end] = np.concatenate([completion.prompt_ids, completion.ids])
    logp_1T, logits_1TV = full_forward(params(), ids_1T, np.arange(64)[None] < end, temperature)
    return np.asarray(logp_1T[0, start - 1 : end - 1]), np.asarray(
        logits_1TV[0, start - 1 : end - 1]
    )


@pytest.mark.parametrize("rows", [1, 3])
def test_a_completion_does_not_depend_on_how_many_are_decoded_together(rows):
    assert tokens(sampled(engine(batch_size=rows), samples=1)) == {
        name: ids for name, ids in tokens(reference()).items() if name[1] == 0
    }


def test_a_completion_does_not_depend_on_its_row_or_its_neighbours():
    others = [prompt("e", 7), *PROMPTS[::-1]]
    got = tokens(sampled(shared(), others))
    assert {name: ids for name, ids in got.items() if name[0] != "e"} == tokens(reference())


def test_a_completion_does_not_depend_on_the_bucket_its_prompt_is_padded_to():
    got = tokens(sampled(shared(), [*PROMPTS[:3], prompt("long", 12)]))
    wanted = tokens(reference())
    assert all(ids == wanted[name] for name, ids in got.items() if name[0] in "abc")


def test_eight_devices_sample_the_tokens_that_one_samples():
    many = sharding.make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    split = jax.device_put(params(), sharding.shardings(params(), many))
    got = sampled(engine(mesh=lambda _: many), params_=split)
    assert tokens(got) == tokens(reference())


def test_samples_that_the_mesh_cannot_split_by_prompts_are_split_by_rows():
    # 1 prompt on 4 devices is prefilled everywhere; its 4 rows are one a device.
    got = sampled(engine(mesh=lambda _: mesh(4), batch_size=4), PROMPTS[:1])
    assert tokens(got) == {name: ids for name, ids in tokens(reference()).items() if name[0] == "a"}


def test_log_probabilities_are_those_of_the_full_forward_at_the_sampling_temperature():
    for completion in reference().values():
        logp_T, _ = recomputed(completion, CFG.temperature)
        np.testing.assert_allclose(completion.logps, logp_T, atol=1e-5)
        assert completion.logps.dtype == np.float32


def test_bfloat16_samples_have_nearly_the_log_probabilities_of_the_full_forward():
    half = Compute(dtype="bfloat16")
    made = rollout.Engine(CFG, ARCH, half, mesh(1), STOPS)
    distances = []
    for c in sampled(made).values():
        ids_1T = np.concatenate([c.prompt_ids, c.ids])[None]
        start = len(c.prompt_ids)
        segments_1T = np.pad(np.ones_like(ids_1T), ((0, 0), (0, 64 - ids_1T.shape[1])))
        ids_1T = np.pad(ids_1T, ((0, 0), (0, 64 - ids_1T.shape[1])))
        x_1TD = decoder.forward(params(), ARCH, half, ids_1T, np.arange(64)[None], segments_1T)
        w_DV, next_1T = decoder.unembedding(params(), ARCH), jnp.roll(ids_1T, -1, axis=1)
        logp_1T, _ = logprobs.logprobs(x_1TD, w_DV, next_1T, segments_1T > 0, CFG.temperature, 1024)
        recomputed_T = np.asarray(logp_1T[0, start - 1 : start - 1 + len(c.ids)])
        distances.append(np.abs(c.logps - recomputed_T))
    distances = np.concatenate(distances)
    # bfloat16 keeps 8 bits: activations of size 1 are off by 0.004, logits of size 10 by 0.04.
    assert distances.max() < 0.3 and distances.mean() < 0.02


def test_a_cache_in_int8_is_smaller_and_moves_log_probabilities_little():
    small = engine(cache_dtype="int8")
    sizes = small.sizes(8, 4)
    # A key or a value of 4 numbers: 4 bytes and a scale of 4, where there were 16.
    assert 2 * small.cache_bytes(sizes) == shared().cache_bytes(sizes)
    differences = np.concatenate(
        [c.logps - recomputed(c, CFG.temperature)[0] for c in sampled(small).values()]
    )
    assert 1e-5 < np.abs(differences).mean() < 0.02
    assert np.abs(differences).max() < 0.2


@pytest.mark.parametrize("settings", [{"batch_size": 3}, {"prompt_buckets": (24,)}])
def test_what_int8_makes_of_a_completion_does_not_depend_on_how_it_was_computed(settings):
    wanted = tokens(sampled(engine(cache_dtype="int8")))
    assert tokens(sampled(engine(cache_dtype="int8", **settings))) == wanted


def test_eight_devices_with_caches_in_int8_sample_what_one_samples():
    wanted = sampled(engine(cache_dtype="int8"))
    got = sampled(engine(cache_dtype="int8", mesh=lambda _: mesh(8, 2)))
    assert tokens(got) == tokens(wanted)


def test_greedy_takes_the_likeliest_token_and_the_log_probability_of_temperature_1():
    for completion in sampled(shared(), samples=1, temperature=0.0).values():
        logp_T, logits_TV = recomputed(completion, 1.0)
        assert completion.ids.tolist() == logits_TV.argmax(-1).tolist()
        np.testing.assert_allclose(completion.logps, logp_T, atol=1e-5)


def test_top_k_of_1_is_greedy():
    greedy = tokens(sampled(shared(), samples=1, temperature=0.0))
    assert tokens(sampled(engine(top_k=1), samples=1)) == greedy


def test_every_completion_ends_at_its_first_stop_token_or_at_the_limit():
    ends = set()
    for completion in reference().values():
        *before, last = completion.ids.tolist()
        assert not set(before) & set(STOPS)
        assert completion.truncated == (last not in STOPS)
        if completion.truncated:
            assert len(completion.ids) == CFG.max_completion_length
        ends.add(last if not completion.truncated else "limit")
        assert len(completion.ids) == len(completion.logps)
    assert ends == {*STOPS, "limit"}  # the sample shows all three


def test_a_stop_token_at_the_first_place_counts():
    completions = sampled(engine(stop_ids=tuple(range(ARCH.vocab_size)))).values()
    assert all(len(c.ids) == 1 and not c.truncated for c in completions)


def test_without_a_stop_token_everything_is_truncated():
    completions = sampled(engine(stop_ids=())).values()
    assert all(len(c.ids) == 37 and c.truncated for c in completions)


def test_a_completion_is_handed_out_while_others_are_still_written():
    visits, rows, few = [], [], engine(batch_size=4)
    for c in few.generate(params(), PROMPTS, 4, 0, 0):
        visits.append(few.statistics.visits)
        rows.append((c.group, c.sample))
    assert visits == sorted(visits) and len(set(visits)) > 1
    assert rows != sorted(rows) and len(set(rows)) == 16


def test_seed_step_and_sample_each_change_the_draw_and_nothing_else_does():
    again, other_seed, other_step = (
        tokens(sampled(shared(), seed=seed, step=step)) for seed, step in ((0, 0), (1, 0), (0, 1))
    )
    assert again == tokens(reference())
    assert other_seed != again and other_step != again and other_step != other_seed
    assert again["b", 0] != again["b", 1]


def test_a_problem_that_comes_twice_gets_further_samples():
    twice = shared().generate(params(), [PROMPTS[0], PROMPTS[0]], 2, 0, 0)
    got = {2 * c.group + c.sample: c.ids.tolist() for c in twice}
    assert got == {i: tokens(reference())["a", i] for i in range(4)}


def test_a_prompt_is_computed_once_for_all_of_its_samples():
    for samples in (1, 4):
        sampled(shared(), samples=samples)
        # All but the last token, which each sample reads for itself.
        assert shared().statistics.prompt_tokens == sum(len(p.ids) - 1 for p in PROMPTS)


def test_samples_of_a_prompt_read_the_same_pages():
    group = scheduler.Group(np.arange(9), name=0, index=0, waiting=3)
    sizes = scheduler.Sizes(3, 3, 4, prompt_pages=2, own_pages=6, prompt_table=2, own_table=2)
    plan = scheduler.Scheduler(sizes, [scheduler.Sample(group, i, i, limit=8) for i in range(3)])
    plan.admit()
    group.filled = 8
    plan.reserve(8)
    tables = scheduler.tables(sizes, plan.slots, own_pages=6)
    assert tables["prompt_owner_XO"].tolist() == [[0, 1, 2]] * 2
    # Entries are page * owners + place: pages 0 and 1 for each slot.
    assert tables["prompt_table_BM"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert tables["own_table_BM"].tolist() == [[0, 1], [2, 3], [4, 5]]


def test_prompts_computed_in_pieces_and_pages_of_any_size_give_the_same_tokens():
    prompts = [*PROMPTS, prompt("long", 12)]  # in pieces of 8 tokens, and of 4 pages of 4
    whole = engine(page_size=16, prefill_tokens=64)
    assert tokens(sampled(shared(), prompts)) == tokens(sampled(whole, prompts))


def test_a_completion_that_lost_its_pages_is_written_again_as_it_was(monkeypatch):
    few = engine()
    bytes_a_page = 2 * 2 * 2 * 4 * 4 * 4  # k and v, layers, heads, head dim, tokens, float32
    # 9 prompts of 2 pages, and 24 own pages where 16 slots of 10 pages could use 160.
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: (18 + 24) * bytes_a_page / 0.8 + 1)
    assert tokens(sampled(few)) == tokens(reference())
    assert few.statistics.preemptions > 0


def test_memory_for_less_than_one_completion_is_refused(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda mesh: (18 + 4) * 512 / 0.8 + 1)
    with pytest.raises(ValueError, match="4 pages of 4 tokens fit .* one completion needs 10"):
        sampled(engine())


def test_a_completion_can_have_a_limit_of_its_own():
    limits_PG = np.arange(1, 17).reshape(4, 4)
    for c in shared().generate(params(), PROMPTS, 4, 0, 0, limits_PG=limits_PG):
        whole = tokens(reference())[c.problem.id, c.sample]
        assert c.ids.tolist() == whole[: limits_PG[c.group, c.sample]]


def test_free_slots_are_filled_while_others_still_decode():
    prompts = [*PROMPTS, *(prompt(f"more {i}", 3) for i in range(6))]
    limits_P1 = np.array([37] + 9 * [2])[:, None]
    four = engine(batch_size=4, stop_ids=(), prefill_tokens=64)
    ended = [c.group for c in four.generate(params(), prompts, 1, 0, 0, limits_PG=limits_P1)]
    assert ended[-1] == 0  # ten completions on four slots, and the first to begin ends last


def test_no_slots_draw_while_many_wait_for_their_prompts():
    one_at_a_time = engine(batch_size=4, stop_ids=(), prefill_tokens=1)
    sampled(one_at_a_time, samples=1)
    assert one_at_a_time.statistics.live_slots == one_at_a_time.statistics.all_slots > 0


def test_the_last_completions_are_decoded_in_fewer_slots():
    slots = engine(stop_ids=())
    limits_PG = np.full((4, 4), 2)
    limits_PG[3, 1] = 37
    lengths = [len(c.ids) for c in slots.generate(params(), PROMPTS, 4, 0, 0, limits_PG=limits_PG)]
    assert sorted(lengths) == sorted(limits_PG.ravel())
    assert slots.statistics.all_slots == 2 * 16 + 35 * 8


def test_nothing_is_compiled_once_each_bucket_was_met():
    warm = [prompt("w", 12), *PROMPTS[:2]]
    for prompts in (warm, PROMPTS):
        sampled(shared(), prompts)
    compiled = []

    def listen(event: str, seconds: float, **_) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()
        assert compiled.pop() and not compiled  # the listener hears
        for n, temperature in ((1, 0.0), (2, 1.0), (4, 0.3)):
            sampled(shared(), PROMPTS[:n], temperature=temperature)
            sampled(shared(), [prompt("x", 12 - n)], seed=n, step=n)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not compiled


@pytest.mark.parametrize("length", [0, 13])
def test_a_prompt_that_fits_no_bucket_is_refused(length):
    with pytest.raises(ValueError, match=rf"problem 'z' has {length} tokens, wanted 1 to 12"):
        next(shared().generate(params(), [prompt("z", length)], 1, 0, 0))
