"""From the text of a completion to its reasoning, its program, and whether it kept the format.

The format is `<think> reasoning </think> <answer> code </answer>`, each tag once, in that order
(arXiv 2508.05170).
"""

import dataclasses
import re
import textwrap

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_FORMAT = re.compile(r"\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_FENCE = re.compile(r"[ \t]*(`{3,})([^`]*)")
_BLANK_LINES = re.compile(r"\A(?:[ \t\r]*\n)+")


@dataclasses.dataclass(frozen=True)
class Parsed:
    """The parts of a completion; "" stands for a part that is not there.

    `well_formed` is the format reward R_f: the format and nothing else but blanks around it, with
    neither part empty.
    """

    reasoning: str
    program: str
    well_formed: bool


def parse(text: str, prefill: str = "") -> Parsed:
    """Parts of a completion whose turn the prompt began with `prefill` (such as `<think>`).

    The reasoning goes from the first `<think>` (or the start) to the last `</think>` (or the end).
    The program is the last `<answer>` after it, or else the last fenced block after it; in an
    answer with fences it is the last of these. A `<think>` that stays open leaves no program: what
    follows it is a draft. Never raises.
    """
    whole = prefill + text
    before, closed, visible = whole.rpartition("</think>")
    if not closed:
        before, opened, draft = whole.partition("<think>")
        reasoning, visible = (draft, "") if opened else ("", whole)
    else:
        start, opened, inside = before.partition("<think>")
        reasoning = inside if opened else start
    program = "" if "<think>" in visible else _program(visible)
    kept = all(whole.count(tag) == 1 for tag in TAGS) and _FORMAT.fullmatch(whole)
    reasoning = reasoning.strip("\n")  # blanks stay: in the built-in world they are part of tokens
    return Parsed(reasoning, program, bool(kept and reasoning.strip() and program))


def _program(visible: str) -> str:
    """The program in text that holds no reasoning."""
    end = visible.rfind("</answer>")
    start = visible.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return _unindent(_last_fenced(visible) or "")
    answer = visible[start + len("<answer>") : end]
    fenced = _last_fenced(answer)
    return _unindent(answer if fenced is None else fenced)


def _last_fenced(text: str) -> str | None:
    """Inside of the last closed code fence (CommonMark 0.31, section 4.5); None if there is none.

    A scan by lines and not one regular expression, which takes quadratic time on many open fences.
    """
    last: str | None = None
    fence, lines = "", list[str]()
    for line in text.split("\n"):
        mark = _FENCE.fullmatch(line)
        if fence and mark and len(mark[1]) >= len(fence) and not mark[2].strip():
            last, fence = "\n".join(lines), ""
        elif fence:
            lines.append(line)
        elif mark:
            fence, lines = mark[1], []
    return last


def _unindent(code: str) -> str:
    """Code without blanks around it and without an indent that all of its lines share."""
    code = _BLANK_LINES.sub("", code)
    # Only where it is needed: dedent also empties lines of blanks, which may stand in a string.
    return (textwrap.dedent(code) if code[:1].isspace() else code).strip()
