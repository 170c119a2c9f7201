"""Both kinds of tokenizer behind the one protocol."""

import pathlib

import chat_tokenizer
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from pgrpo_jax import tokenizer, world

QWEN = pathlib.Path(__file__).parents[2] / "shared/data/qwen_tokenizer/qwen2.5"
PIECES = ("ab", "abc", "cd", "a ", " a", "\n", "a", "<think>\n", "b")


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    return tokenizer.load(chat_tokenizer.save(tmp_path_factory.mktemp("chat")))


@pytest.fixture(scope="module")
def qwen():
    if not QWEN.is_dir():
        pytest.skip(f"no folder {QWEN}")
    return tokenizer.load(str(QWEN))


def test_a_prompt_is_the_chat_template_with_the_prefill_at_its_end(chat):
    ids = chat.prompt_ids("Add one.", "Be brief.", "<think>\n")
    assert ids == chat.encode(
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAdd one.<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n"
    )
    assert "system" not in chat.decode(chat.prompt_ids("Add one.", "", ""))


def test_an_answer_ends_with_the_token_that_ends_a_turn(chat):
    turn_end = chat.encode("<|im_end|>")
    assert len(turn_end) == 1 and chat.stop_ids == (turn_end[0],)
    ids = chat.answer_ids("print(1)")
    assert ids[-1] == turn_end[0] and chat.decode(ids) == "print(1)"


def test_the_turns_end_comes_from_the_template_and_not_from_eos(tmp_path):
    template = chat_tokenizer.TEMPLATE.replace("<|im_end|>", "<|endoftext|>")
    other = tokenizer.load(chat_tokenizer.save(tmp_path, template))
    assert other.stop_ids == tuple(other.encode("<|endoftext|><|im_end|>"))


def test_generation_config_adds_stop_ids(tmp_path):
    folder = chat_tokenizer.save(tmp_path)
    transformers.GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    assert tokenizer.load(folder).stop_ids == (2, 0)


def test_pad_may_be_a_stop_id_and_is_never_text(tmp_path):
    folder = chat_tokenizer.save(tmp_path)
    transformers.GenerationConfig(eos_token_id=[2, 0]).save_pretrained(folder)
    loaded = tokenizer.load(folder)
    assert loaded.pad_id == 0 and loaded.pad_id in loaded.stop_ids
    assert loaded.decode([*loaded.answer_ids("a , b"), loaded.pad_id, loaded.pad_id]) == "a , b"


def test_a_saved_tokenizer_loads_as_the_same(chat, tmp_path):
    for name, one in (("chat", chat), ("world", tokenizer.load("world"))):
        one.save(tmp_path / name)
        again = tokenizer.load(str(tmp_path / name))
        assert type(again) is type(one)
        assert (again.stop_ids, again.pad_id) == (one.stop_ids, one.pad_id)
        assert again.vocab_size == one.vocab_size
        statement = "x is a list.\nsort it.\n"
        assert again.prompt_ids(statement, "", "") == one.prompt_ids(statement, "", "")


@settings(deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_chat_text_comes_back_from_its_ids_unchanged(chat, text):
    assert chat.decode(chat.encode(text)) == text


def test_a_template_that_opens_think_is_known_and_not_opened_twice(tmp_path):
    template = chat_tokenizer.TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n{%")
    opens = tokenizer.load(chat_tokenizer.save(tmp_path, template))
    assert opens.opening("") == "<think>\n"
    with pytest.raises(ValueError, match="already opens <think>"):
        opens.opening("<think>\n")


def test_a_template_that_opens_nothing_leaves_the_prefill_as_the_opening(chat):
    assert chat.opening("<think>\n") == "<think>\n"


def test_a_tokenizer_without_a_chat_template_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no chat template"):
        tokenizer.load(chat_tokenizer.save(tmp_path, template=""))


@pytest.mark.parametrize("name", ["an empty folder", "no such folder or hub id"])
def test_a_name_without_a_tokenizer_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tmp_path / name
    if name == "an empty folder":
        folder.mkdir()
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read; name a"):
        tokenizer.load(str(folder))


def test_the_reward_model_reads_statement_and_reasoning_up_to_the_turns_end(chat):
    ids = chat.reward_ids("Add one.", "\n First add. \n")
    assert ids == chat.encode(
        "<|im_start|>user\nAdd one.<|im_end|>\n<|im_start|>assistant\nFirst add.<|im_end|>"
    )


def test_qwen_has_its_ids_and_its_template(qwen):
    assert qwen.encode("Hello, world!") == [9707, 11, 1879, 0]
    assert qwen.stop_ids[0] == 151645 and qwen.pad_id == 151643
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
    assert qwen.prompt_ids("U", "S", "") == qwen.encode(text)


def test_ids_that_only_pad_qwens_embedding_decode_to_nothing(qwen):
    assert qwen.vocab_size == 151665
    assert qwen.decode([9707, 151935, 11, qwen.stop_ids[0]]) == "Hello,"


def test_the_worlds_layout_is_the_statement_a_line_end_and_the_prefill():
    own = tokenizer.WorldTokenizer(PIECES)
    assert own.decode(own.prompt_ids("abc", "not for this world", "<think>\n")) == "abc\n<think>\n"
    assert own.answer_ids("abc") == [3, 1]
    assert own.reward_ids("ab", "\na a \n") == [2, 7, 5, 5, 7, 1]


def test_the_longest_piece_wins_unless_it_leads_nowhere():
    own = tokenizer.WorldTokenizer(PIECES)
    assert own.encode("abc") == [3]
    assert own.encode("abcd") == [2, 4]  # "abc" would leave "d"


@settings(deadline=None)
@given(st.lists(st.sampled_from(PIECES)))
def test_whatever_is_made_of_pieces_comes_back_unchanged(pieces):
    own, text = tokenizer.WorldTokenizer(PIECES), "".join(pieces)
    ids = own.encode(text)
    assert own.decode(ids) == text
    assert all(2 <= i < own.vocab_size for i in ids)
    assert own.decode([0, *ids, 1, 0]) == text


def test_text_that_cannot_be_cut_is_refused_with_its_place():
    own = tokenizer.WorldTokenizer(PIECES)
    with pytest.raises(ValueError, match=r"no piece fits character 4 \(line 2\), 'dog' after"):
        own.encode("abc\ndog")
    with pytest.raises(ValueError, match="distinct"):
        tokenizer.WorldTokenizer(("a", "a"))


def test_the_built_in_world_is_written_in_its_own_pieces():
    loaded = tokenizer.load("world")
    pool = world.problems("train", 50, seed=0)
    rows = [*world.sft_rows(pool, 200, seed=0)]
    assert {loaded.decode(loaded.encode(p.statement)) == p.statement for p in pool} == {True}
    for row in rows:
        assert loaded.decode(loaded.answer_ids(row["completion"])) == row["completion"]
    for pair in world.pair_rows(pool, world.DIMENSIONS, seed=0):
        ids = loaded.reward_ids(pair["prompt"], pair["chosen"])
        assert loaded.decode(ids) == pair["prompt"] + "\n" + pair["chosen"].strip("\n") + "\n"
