"""Rows of files to prompts, padded rows and endless batches."""

import gzip
import json
import pathlib

import chat_tokenizer
import jax
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax import data, tokenizer, types
from pgrpo_jax.config import DataConfig

MBPP = str(pathlib.Path(__file__).parent / "data/problems/mbpp.jsonl")
OWN = tokenizer.WorldTokenizer(("a", "b", "c", "\n", "<think>\n"))
A, B, C, LINE, THINK, STOP = 2, 3, 4, 5, 6, 1
ROWS = [{"prompt": "Add.", "tests": {"inputs": [str(i)], "outputs": ["1"]}} for i in range(5)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tokenizer.load(chat_tokenizer.save(tmp_path_factory.mktemp("chat")))


def problem(statement: str) -> types.Problem:
    return types.Problem(statement, statement, types.Tests("assert", code=("f()",)))


# --- rows


def write(path: pathlib.Path, rows: list[dict]) -> str:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        text = "\n".join(map(json.dumps, rows)).encode()
        path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["t.jsonl", "t.jsonl.gz", "t.parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = write(tmp_path / name, ROWS)
    assert data.read_rows(path) == ROWS
    assert data.read_rows(path, limit=2) == ROWS[:2]
    assert [p.tests.inputs for p in data.load_problems(path, "train", 3)] == [
        ("0",),
        ("1",),
        ("2",),
    ]


def test_a_datasets_folder_gives_its_split(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "train.jsonl", ROWS)
    write(folder / "test.jsonl", ROWS[3:])
    assert data.read_rows(str(folder), "test") == ROWS[3:]
    assert data.read_rows(str(folder), "train", limit=2) == ROWS[:2]


def test_what_is_no_row_is_refused_with_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"prompt": "Add."}\n\n{"prompt"\n')
    with pytest.raises(ValueError, match=r"t.jsonl, line 3 is not JSON"):
        data.read_rows(str(path))
    path.write_text("[1]\n")
    with pytest.raises(ValueError, match=r"t.jsonl, line 1 must be an object"):
        data.read_rows(str(path))
    path.write_text("\n")
    with pytest.raises(ValueError, match="has no rows"):
        data.read_rows(str(path))


def test_a_malformed_problem_names_its_file_and_row(tmp_path):
    path = write(tmp_path / "t.jsonl", [ROWS[0], {"prompt": "Add.", "tests": "{"}])
    with pytest.raises(ValueError, match=r"t.jsonl, row 1, column 'tests'"):
        data.load_problems(path, "train", 0)


# --- prompts


def test_a_prompt_asks_for_the_format_unless_told_otherwise(chat):
    pool = data.load_problems(MBPP, "train", 2)
    kept, dropped = data.prompts(
        pool, chat, DataConfig(prefill="<think>\n", max_prompt_length=4096)
    )
    assert dropped == 0 and [p.problem for p in kept] == pool
    assert kept[0].ids.dtype == np.int32
    text = chat.decode(kept[0].ids)
    assert "</think>\n<answer>\n" in text and pool[0].statement in text
    assert text.endswith("assistant\n<think>\n")
    own = DataConfig(system_prompt="Be brief.", max_prompt_length=4096)
    ((prompt, _), _) = data.prompts(pool, chat, own)
    assert "Be brief." in chat.decode(prompt.ids) and "<answer>" not in chat.decode(prompt.ids)


def test_prompts_too_long_are_dropped_aloud_or_refused(caplog):
    pool = [problem("a"), problem("aaaa"), problem("ab")]
    limit = DataConfig(max_prompt_length=3)
    kept, dropped = data.prompts(pool, OWN, limit)
    assert [list(p.ids) for p in kept] == [[A, LINE], [A, B, LINE]] and dropped == 1
    assert "left out 1 of 3 prompts: over 3 tokens" in caplog.text
    with pytest.raises(
        ValueError, match="problem aaaa has 5 tokens, more than max_prompt_length=3"
    ):
        data.prompts(pool, OWN, DataConfig(max_prompt_length=3, overlong="refuse"))
    with pytest.raises(ValueError, match="none of 1 prompts"):
        data.prompts(pool[1:2], OWN, limit)


# --- supervised rows


def test_sft_rows_learn_the_completion_and_its_stop_token_only():
    rows = [{"prompt": "ab", "completion": "c"}, {"prompt": "a", "completion": "bcb"}]
    examples = data.sft_examples(rows, OWN, DataConfig(), 0)
    batch = examples.batch
    np.testing.assert_array_equal(
        batch.ids_BT, [[A, B, LINE, C, STOP, 0], [A, LINE, B, C, B, STOP]]
    )
    np.testing.assert_array_equal(batch.segments_BT, [[1] * 5 + [0], [1] * 6])
    np.testing.assert_array_equal(batch.positions_BT, [range(6)] * 2)
    np.testing.assert_array_equal(batch.loss_BT, [[0, 0, 0, 1, 1, 0], [0, 0, 1, 1, 1, 1]])
    assert batch.ids_BT.dtype == np.int32 and batch.loss_BT.dtype == bool


def test_sft_does_not_repeat_what_the_prompt_opened():
    row = {"prompt": "a", "completion": "<think>\nb"}
    batch = data.sft_examples([row], OWN, DataConfig(prefill="<think>\n"), 0).batch
    np.testing.assert_array_equal(batch.ids_BT, [[A, LINE, THINK, B, STOP]])
    np.testing.assert_array_equal(batch.loss_BT, [[0, 0, 0, 1, 1]])


def test_rows_too_long_are_left_out_and_counted_and_the_others_keep_their_columns(caplog):
    rows = [{"prompt": "a", "completion": "b" * n, "n": n} for n in (1, 5, 2)]
    examples = data.sft_examples(rows, OWN, DataConfig(), 6)
    assert examples.batch.ids_BT.shape == (2, 6) and examples.dropped == 1
    assert [row["n"] for row in examples.rows] == [1, 2]
    assert "left out 1 of 3 rows" in caplog.text
    pairs = [{"prompt": "a", "chosen": "b" * n, "rejected": "c", "n": n} for n in (1, 5, 2)]
    examples = data.pair_examples(pairs, OWN, 6)
    assert [row["n"] for row in examples.rows] == [1, 2] and examples.dropped == 1


def test_a_pair_is_what_the_reward_model_reads_of_either_side():
    rows = [
        {"prompt": "a", "chosen": "b", "rejected": "cc", "margin": 0.5},
        {"prompt": "a", "chosen": "bcb", "rejected": "c", "margin": None},
    ]
    batch = data.pair_examples(rows, OWN, 0).batch
    for side, ids, segments in (
        ("chosen", batch.chosen_ids_CT, batch.chosen_segments_CT),
        ("rejected", batch.rejected_ids_CT, batch.rejected_segments_CT),
    ):
        for i, row in enumerate(rows):
            wanted = OWN.reward_ids("a", row[side])
            assert list(ids[i][segments[i] > 0]) == wanted and ids.shape == (2, 7)
    np.testing.assert_array_equal(batch.margin_C, np.float32([0.5, 0]))
    assert batch.valid_C.all()


def test_messages_and_text_make_the_same_rows(chat):
    asked = [{"role": "user", "content": "Add."}]
    good, bad = ([{"role": "assistant", "content": text}] for text in ("Right.", "Wrong."))
    text = {"prompt": "Add.", "chosen": "Right.", "rejected": "Wrong."}
    explicit = {"prompt": asked, "chosen": good, "rejected": bad}
    implicit = {"chosen": asked + good, "rejected": asked + bad}
    one, *others = (data.pair_examples([row], chat, 0).batch for row in (text, explicit, implicit))
    jax.tree.map(np.testing.assert_array_equal, one, others[0])
    jax.tree.map(np.testing.assert_array_equal, one, others[1])
    rows = [{"prompt": "Add.", "completion": "Right."}, {"prompt": asked, "completion": good}]
    ids_BT = data.sft_examples(rows, chat, DataConfig(), 0).batch.ids_BT
    np.testing.assert_array_equal(ids_BT[0], ids_BT[1])


def test_a_row_without_a_column_is_refused_by_number():
    with pytest.raises(ValueError, match="row 1 has no column 'completion'; it has prompt"):
        data.sft_examples(
            [{"prompt": "a", "completion": "b"}, {"prompt": "a"}], OWN, DataConfig(), 0
        )
    with pytest.raises(ValueError, match="row 0, column 'chosen': wanted text or a list"):
        data.pair_examples([{"prompt": "a", "chosen": 3, "rejected": "b"}], OWN, 0)


# --- batches


def flat(stream: data.Batches, count: int) -> list:
    return [item for _ in range(count) for item in next(stream)]


def test_each_epoch_holds_every_row_once_in_an_order_of_its_own():
    rows = flat(data.batches(range(12), 4, seed=0), 9)
    epochs = [rows[i : i + 12] for i in (0, 12, 24)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3


def test_another_seed_shares_no_epoch():
    """A shuffle seeded by seed + epoch would give seed 1 the second epoch of seed 0."""
    first, second = (flat(data.batches(range(12), 12, seed), 4) for seed in (0, 1))
    epochs = [[tuple(r[i : i + 12]) for i in range(0, 48, 12)] for r in (first, second)]
    assert not set(epochs[0]) & set(epochs[1])


@settings(deadline=None, max_examples=15)
@given(
    length=st.integers(1, 9),
    size=st.integers(1, 4),
    done=st.integers(0, 9),
    ahead=st.integers(0, 9),
)
def test_a_restored_iterator_continues_with_exactly_the_same_rows(length, size, done, ahead):
    """Mid-epoch and across the epoch's end; rows past the saved place leave no trace."""
    straight = data.batches(range(length), size, seed=3)
    flat(straight, done)
    state = json.loads(json.dumps(straight.get_state()))
    wanted = flat(straight, 9)
    resumed = data.batches(range(length), size, seed=3)
    flat(resumed, ahead)
    resumed.set_state(state)
    assert flat(resumed, 9) == wanted


def test_processes_share_the_batches_that_one_would_take(monkeypatch):
    rows = [{"prompt": "a", "completion": "b" * n} for n in range(7)]
    examples = data.sft_examples(rows, OWN, DataConfig(), 0)
    alone, prompts = data.example_batches(examples, 4, seed=0), data.batches(range(7), 4, seed=0)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    shares = []
    for process in (0, 1):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        shares.append(data.example_batches(examples, 4, seed=0))
        assert next(data.batches(range(7), 4, seed=0)) == next(prompts)  # of which each has all
        prompts.set_state(data.batches(range(7), 4, seed=0).get_state())
    for _ in range(5):
        left, right, whole = (
            next(share).segments_BT.sum(axis=1).tolist() for share in (*shares, alone)
        )
        assert len(left) == len(right) == 2
        assert sorted(left + right) == sorted(whole)
    assert shares[0].get_state() == alone.get_state()  # so a run may resume on other hosts
    with pytest.raises(ValueError, match="batch size 3 must be a multiple of 2 processes"):
        data.example_batches(examples, 3, seed=0)


def test_example_batches_are_rows_of_the_whole_table_and_resume():
    rows = [{"prompt": "a", "completion": "b" * n} for n in range(1, 6)]
    examples = data.sft_examples(rows, OWN, DataConfig(), 0)
    stream = data.example_batches(examples, 2, seed=0)
    state = stream.get_state()
    lengths = [n for _ in range(5) for n in next(stream).segments_BT.sum(axis=1)]
    assert sorted(lengths) == sorted(2 * list(examples.batch.segments_BT.sum(axis=1)))
    stream.set_state(state)
    assert list(next(stream).segments_BT.sum(axis=1)) == lengths[:2]
