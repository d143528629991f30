"""Where a completion says its answer: in a box, behind ``Answer:`` or ``####``, or by an expression of one's own."""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass

from latentrevise.errors import ConfigError
from latentrevise.verify.text import closing

BOXED = "boxed"


@dataclass(frozen=True)
class _Known:
    """expression: its group is the answer. template: the text in front of an answer when it is scored. instruction:
    asks a model for it."""

    expression: str
    template: str
    instruction: str


_KNOWN = {
    # The template of arXiv 2606.29938, which puts the answer behind it as it is.
    BOXED: _Known(
        "",
        "Based on my current reasoning process, the final answer is ",
        "put your final answer within \\boxed{}",
    ),
    "answer-line": _Known(
        r"(?im)^[ \t>*_#]*(?:the[ \t]+)?(?:final[ \t]+)?answer[ \t*_]*:[ \t*_]*(\S.*?)[ \t]*$",
        "\n\nAnswer: ",
        "end with a line of the form `Answer: ` and the final answer",
    ),
    "gsm8k": _Known(
        r"(?m)####[ \t]*(\S.*?)[ \t]*$", "\n#### ", "end with a line of the form `#### ` and the final answer"
    ),
    "the-answer-is": _Known(
        r"(?im)\bthe[ \t]+(?:final[ \t]+|correct[ \t]+)?answer[ \t]+is(?:[ \t]*:[ \t]*|[ \t]+)(\S.*?)[ \t]*"
        r"(?:[.!](?=\s)|$)",
        "\n\nThe answer is ",
        "end with a sentence of the form `The answer is ` and the final answer",
    ),
}
NAMES = tuple(_KNOWN)


def way_of_answering(template: str) -> str:
    """How to give an answer, in words, from the template that a run scores answers under."""
    named = [k.template.strip() for name, k in _KNOWN.items() if name != BOXED]
    return f"behind `{template.strip()}`" if template.strip() in named else "in \\boxed{}"


@dataclass(frozen=True)
class Found:
    """The answer as it stands in the completion, and where what introduces it begins."""

    answer: str
    start: int


class AnswerPattern:
    """name: one of NAMES, or a regular expression whose only group (or all of it) is the answer; its last match counts.

    Raises ConfigError for an expression that cannot be compiled or has several groups.
    """

    def __init__(self, name: str = BOXED) -> None:
        self.name = name
        known = _KNOWN.get(name)
        if name == BOXED:
            return
        try:
            self._expression = re.compile(known.expression if known else name)
        except re.error as error:
            raise ConfigError(
                f"answer_pattern = {name!r}: no regular expression ({error}), and none of {', '.join(NAMES)}; mend it"
            ) from error
        if not known and (self._expression.groups > 1 or not re.search(r"[^\w-]", name)):
            raise ConfigError(
                f"answer_pattern = {name!r}: it is none of {', '.join(NAMES)}; give one of these, or a regular"
                " expression with one group, the answer (write others as (?:...))"
            )

    def find(self, completion: str) -> Found | None:
        """The last answer of a completion; None without one, or where the last box is not closed."""
        if self.name == BOXED:
            return _boxed(completion)
        found = deque(self._expression.finditer(completion), maxlen=1)
        if not found:
            return None
        last = found[0]
        return Found((last[last.lastindex or 0] or "").strip(), last.start())

    def template(self, chosen: str | None = None) -> str:
        """The text between a derivation and its answer: the chosen one, or the pattern's own.

        Raises ConfigError where an answer behind it would not be found, or where there is none of its own.
        """
        known = _KNOWN.get(self.name)
        if chosen is None:
            if known is None:
                raise ConfigError(
                    f"answer_pattern = {self.name!r} says where an answer stands, not what is written in front of it;"
                    " give answer_template, such as 'Answer: '"
                )
            return known.template
        # What closes a box, or an expression of one's own, is not known here: any text may stand in front of those.
        found = self.find(f"so it is 7{chosen}12")
        if known is not None and self.name != BOXED and (found is None or found.answer != "12"):
            raise ConfigError(
                f"answer_template = {chosen!r}: an answer behind it is not found by answer_pattern = {self.name!r};"
                " make them fit"
            )
        return chosen

    @property
    def instruction(self) -> str | None:
        """What asks a model for an answer of this form; None for an expression of one's own."""
        known = _KNOWN.get(self.name)
        return known.instruction if known else None


def last_boxed(text: str) -> str | None:
    """The content of the last box; None without one, or where it is not closed: it takes back those before it.

    ``\\boxed {5}``, ``\\boxed5`` and ``\\fbox{5}`` are boxes too. Boxes side by side hold the parts of one answer:
    ``$x=\\boxed{1}$ and $y=\\boxed{2}$`` is ``x=1, y=2``.
    """
    found = _boxed(text)
    return None if found is None else found.answer


_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![A-Za-z])\s*(?:(\{)|([+-]?\d[\d.,/]*|[A-Za-z](?![A-Za-z])))")
_BETWEEN = re.compile(
    r"(?:[\s$.,;]|\\[()\[\],;: ]|\\q?quad|and|or|\\text\s*\{\s*(?:and|or)\s*,?\s*\}|&|\\\\){1,30}"
    r"([A-Za-z](?:_\{?\w+\}?)?\s*=\s*)?\$?\s*"
)
_NAME = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=\s*\$?\s*$")
_PARTS = 12


def _boxed(text: str) -> Found | None:
    boxes: list[tuple[int, int, slice]] = []  # start, end, where the content is; the last one first
    before, pairs = len(text), dict[int, int]()
    while len(boxes) < _PARTS and (start := max(text.rfind(rf"\{name}", 0, before) for name in _BOX_NAMES)) >= 0:
        before = start
        found = _BOX.match(text, start)
        if found is None:  # a word about boxes
            continue
        if found[1]:
            end = closing(text, found.end() - 1, pairs)
            if end is None:
                if not boxes:
                    return None
                break
            pairs[found.end() - 1] = end
            if boxes and end > boxes[-1][0]:  # a box in a box
                boxes[-1:] = []
            box = (start, end + 1, slice(found.end(), end))
        else:
            box = (start, found.end(), slice(found.start(2), found.start(2) + len(found[2].rstrip(".,"))))
        if boxes and not _joined(text[box[1] : boxes[-1][0]]):
            break
        boxes.append(box)
    if not boxes:
        return None
    boxes.reverse()
    contents = [text[content].strip() for _, _, content in boxes]
    if len(boxes) == 1 or "" in contents:
        return Found(contents[-1], boxes[-1][0])
    if len(set(contents)) == 1:
        return Found(contents[0], boxes[0][0])
    names = [_NAME.search(text, max(0, start - 20), start) for start, _, _ in boxes]
    if all(names):
        contents = [f"{name[1]}={content}" for name, content in zip(names, contents, strict=True) if name]
    return Found(", ".join(contents), boxes[0][0])


_BOX_NAMES = ("boxed", "fbox", "framebox")


def _joined(between: str) -> bool:
    """Whether only a comma, ``and`` or a name stands between two boxes."""
    if len(between) > 40 or "\n\n" in between:
        return False
    return bool(_BETWEEN.fullmatch(between)) and bool(re.search(r"[,;&]|and|or|quad|=|\\\\", between))
