"""Text to token ids and back, behind one protocol: Hugging Face's tokenizers and the world's own.

Ids are carried end to end: what was sampled is what is trained on, and text is decoded only for the
sandbox, the reward model and the eye.
"""

import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import transformers

from pgrpo_jax import world

WORLD_FILE = "world_pieces.json"
_OPENED = re.compile(r"<think>\s*\Z")
_MARKER = "the answer stands here"


class Tokenizer(Protocol):
    """`stop_ids[0]` ends an answer in training; sampling ends at any of them.

    `pad_id` may equal a stop id (a tokenizer without a pad token gives its end-of-text): padding is
    known by its segment, 0, and never by its id.
    """

    vocab_size: int
    pad_id: int
    stop_ids: tuple[int, ...]

    def encode(self, text: str) -> list[int]:
        """Ids of plain text, with nothing put around it."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; padding, stop and other special tokens are dropped."""
        ...

    def opening(self, prefill: str) -> str:
        """Text of the assistant's turn that the prompt already holds."""
        ...

    def prompt_ids(self, statement: str, system_prompt: str, prefill: str) -> list[int]:
        """Ids that an answer follows; a `system_prompt` of "" is none."""
        ...

    def answer_ids(self, text: str) -> list[int]:
        """Ids of an answer and its stop token."""
        ...

    def reward_ids(self, statement: str, reasoning: str) -> list[int]:
        """What the reward model reads, in training and scoring; the last id ends the reasoning."""
        ...

    def save(self, folder: str | pathlib.Path) -> None:
        """Writes what `load(folder)` reads."""
        ...


def load(name: str) -> Tokenizer:
    """The tokenizer "world", of a folder that `save` wrote, of a Hugging Face folder or hub id."""
    if name == "world":
        return WorldTokenizer(world.PIECES)
    file = pathlib.Path(name) / WORLD_FILE
    if file.is_file():
        return WorldTokenizer(json.loads(file.read_text()))
    return HuggingFaceTokenizer(name)


class HuggingFaceTokenizer:
    """A checkpoint's tokenizer with its chat template."""

    def __init__(self, name: str):
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(name)
            if len(self._tokenizer.get_added_vocab()) == len(self._tokenizer):
                raise ValueError("a tokenizer of special tokens only")  # an empty folder's, in 5.0
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{name!r} holds no tokenizer that transformers can read; name a folder with "
                "tokenizer.json (or vocab.json, merges.txt) and tokenizer_config.json, a hub id, "
                f'or "world"; transformers said: {str(error).splitlines()[0]}'
            ) from error
        if not self._tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer of {name!r} has no chat template, so it is not known what a turn "
                "looks like; take the instruct model's tokenizer, or add a chat_template.jinja"
            )
        self.vocab_size: int = len(self._tokenizer)
        self.stop_ids = self._find_stop_ids(name)
        pad_id = self._tokenizer.pad_token_id
        self.pad_id: int = self.stop_ids[0] if pad_id is None else pad_id

    def _find_stop_ids(self, name: str) -> tuple[int, ...]:
        """What ends a turn in the chat template, then the checkpoint's other end tokens."""
        try:
            eos = transformers.GenerationConfig.from_pretrained(name).eos_token_id
        except OSError:  # the checkpoint has no such file
            eos = None
        turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARKER}]
        after = self.encode(self._render(turns, add_generation_prompt=False).split(_MARKER)[-1])
        ends = [i for i in after[:1] if i in self._tokenizer.added_tokens_decoder]
        ends += [self._tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
        found = tuple(dict.fromkeys(i for i in ends if i is not None))
        if not found:
            raise ValueError(f"the tokenizer of {name!r} has no token that ends an answer")
        return found

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        return self._tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _prompt(self, statement: str, system_prompt: str) -> str:
        messages = [{"role": "user", "content": statement}]
        if system_prompt:
            messages.insert(0, {"role": "system", "content": system_prompt})
        return self._render(messages, add_generation_prompt=True)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> str:
        # No clean-up: it takes out blanks before punctuation, which changes programs.
        return self._tokenizer.decode(
            [int(i) for i in ids], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def opening(self, prefill: str) -> str:
        opened = _OPENED.search(self._prompt("?", ""))
        if opened and "<think>" in prefill:
            raise ValueError(
                f"the chat template already opens <think> and prefill={prefill!r} opens it again; "
                "leave the prefill empty"
            )
        return (opened[0] if opened else "") + prefill

    def prompt_ids(self, statement: str, system_prompt: str, prefill: str) -> list[int]:
        return self.encode(self._prompt(statement, system_prompt) + prefill)

    def answer_ids(self, text: str) -> list[int]:
        return [*self.encode(text), self.stop_ids[0]]

    def reward_ids(self, statement: str, reasoning: str) -> list[int]:
        return self.prompt_ids(statement, "", "") + self.answer_ids(reasoning.strip())

    def save(self, folder: str | pathlib.Path) -> None:
        self._tokenizer.save_pretrained(folder)
        # Sampling parameters of the checkpoint it came from stay behind: for one, Qwen's
        # repetition penalty would make an inference server's log-probabilities differ from ours.
        transformers.GenerationConfig(
            eos_token_id=list(self.stop_ids), pad_token_id=self.pad_id
        ).save_pretrained(folder)


class WorldTokenizer:
    """Whole pieces of text as tokens: 0 is padding, 1 the end of an answer, then the pieces.

    Lossless: any text made of pieces is cut into pieces, the longest first where several ways of
    cutting lead to its end.
    """

    def __init__(self, pieces: Sequence[str]):
        if len(set(pieces)) != len(pieces) or "" in pieces:
            raise ValueError("the pieces of a world's tokenizer must be distinct and not empty")
        self.pad_id = 0
        self.stop_ids: tuple[int, ...] = (1,)
        self.vocab_size = 2 + len(pieces)
        self._pieces = tuple(pieces)
        self._ids = {piece: i for i, piece in enumerate(pieces, start=2)}
        self._longest_first = sorted(pieces, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)))

    def encode(self, text: str) -> list[int]:
        pieces = self._pattern.findall(text)
        if sum(map(len, pieces)) != len(text):  # findall steps over what it cannot match
            pieces = self._cut(text)
        return [self._ids[piece] for piece in pieces]

    def _cut(self, text: str) -> list[str]:
        """The exact cut, from the end; for texts in which a longest piece leads into a dead end."""
        piece_at: dict[int, str] = {len(text): ""}
        for start in range(len(text) - 1, -1, -1):
            for piece in self._longest_first:
                if text.startswith(piece, start) and start + len(piece) in piece_at:
                    piece_at[start] = piece
                    break
        if 0 not in piece_at:
            raise ValueError(self._complaint(text))
        pieces, start = [], 0
        while start < len(text):
            pieces.append(piece_at[start])
            start += len(piece_at[start])
        return pieces

    def _complaint(self, text: str) -> str:
        reached = {0}
        for start in range(len(text)):
            if start in reached:
                reached |= {start + len(p) for p in self._pieces if text.startswith(p, start)}
        place = max(reached)
        before, after = text[max(0, place - 20) : place], text[place : place + 20]
        return (
            f"the text cannot be cut into the world's pieces: no piece fits character {place} "
            f"(line {text.count(chr(10), 0, place) + 1}), {after!r} after {before!r}"
        )

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self._pieces[i - 2] for i in map(int, ids) if 2 <= i < self.vocab_size)

    def opening(self, prefill: str) -> str:
        return prefill

    def prompt_ids(self, statement: str, system_prompt: str, prefill: str) -> list[int]:
        """The statement, a line's end and the prefill; this world knows no `system_prompt`."""
        return self.encode(statement + "\n" + prefill)

    def answer_ids(self, text: str) -> list[int]:
        return [*self.encode(text), self.stop_ids[0]]

    def reward_ids(self, statement: str, reasoning: str) -> list[int]:
        # Only line ends are stripped: a blank may be the edge of a piece.
        return self.prompt_ids(statement, "", "") + self.answer_ids(reasoning.strip("\n") + "\n")

    def save(self, folder: str | pathlib.Path) -> None:
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._pieces, indent=0)
        (pathlib.Path(folder) / WORLD_FILE).write_text(text + "\n")
