"""Gold answers as data sets write them, unwrapped once, where they are read: target, guards, template and exports all
use the bare text. What is taken off is what surrounds the answer, never a part of it."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from functools import lru_cache
from typing import Any

from latentrevise.data.tables import BadRow, shown
from latentrevise.verify.verifier import last_boxed

# Where an answer stands in a nested cell: verl's reward_model, and the kinds that its forks made of it.
_INSIDE = ("ground_truth", "target", "answer", "value")
# Columns of which several answers are the parts of one, as OlympiadBench writes them.
_PARTS = "final_answer"
_NO_ANSWER = frozenset(
    (
        "proof",
        "see proof",
        "see solution",
        "none",
        "null",
        "nan",
        "n/a",
        "notfound",
        "not found",
        "no answer",
        "unknown",
    )
)
_LAYERS = 20  # that are taken off an answer
_LONGEST = 100_000  # characters of a cell that may be a list or an object
_PAIRS = (("$$", "$$"), ("\\(", "\\)"), ("\\[", "\\]"), ("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("“", "”"))
_FORMULA = r"\$(?:[^$\\]|\\.)+\$"
_FORMULAS = re.compile(rf"{_FORMULA}(?:[\s,;]*(?:and\s+)?{_FORMULA})*", re.DOTALL)
_DOLLAR = re.compile(r"(?<!\\)\$")
_SENTENCE = re.compile(
    r"^.*(?:\banswer\s*(?:is|=|:)(?:\*\*(?=\s))?[\s:]*|答案\s*(?:是|为|:|：)\s*[:：]?)\s*(?P<answer>\S.*)$",
    re.IGNORECASE | re.DOTALL,
)
_TAGS = re.compile(r"^.*<answer>(?P<answer>.*)</answer>\s*$", re.IGNORECASE | re.DOTALL)
_STOP = re.compile(r"(?<![.\s])(?<!\.[A-Za-z])[.。]$")  # a full stop, but of no ellipsis and no abbreviation
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""")
_ARRAY = re.compile(rf"\[(?:{_QUOTED.pattern})(?:\s+(?:{_QUOTED.pattern}))+\]")  # as numpy prints one
_PROSE = re.compile(r"(?<!\\)\b[A-Za-z]{2,}\s+[A-Za-z]{2,}")
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{[^{}]*\}")


def gold(row: Mapping[str, Any], column: str, named: bool) -> str:
    """The bare answer in a column of a row (plain values, see ``tables.plain``).

    named: the user chose the column, so what stands there is the answer; in a ``solution`` that was found by its name
    it must be marked (a box, ``####``, "the answer is") or stand there alone. Raises BadRow with the reason.
    """
    found = _answers(row.get(column))
    told = next((text for text in found if _says_none(text)), None)
    found = list(dict.fromkeys(text for text in found if not _says_none(text)))
    if not found:
        what = f"says {shown(told)}" if told and told.strip() else "holds no answer"
        raise BadRow("missing-answer", f"column {column!r} {what}; give the bare result")
    if len(found) > 1 and not (column == _PARTS or row.get("is_multiple_answer") is True):
        raise BadRow(
            "several-answers",
            f"column {column!r} holds {len(found)} answers ({', '.join(map(shown, found[:3]))}), and nothing says"
            " whether one of them is enough; write those that belong together as one text ('1, 2'), or keep one",
        )
    if column == "solution" and not named and not _marked(row[column]) and any(map(_is_prose, found)):
        raise BadRow("missing-answer", "the solution has no \\boxed{} answer; name a column with the bare result")
    return ", ".join(found)


@lru_cache(maxsize=1 << 14)  # files repeat their prompts, and answers repeat anyway
def unwrap(text: str) -> str:
    """The bare answer of a text: the last box, what follows ``####`` or "the answer is", without dollars, bold marks,
    quotation marks or a full stop around it."""
    before = None
    for _ in range(_LAYERS):
        if text == before:
            break
        before, text = text, text.strip()
        if (boxed := last_boxed(text)) is not None:
            text = boxed
        elif (tags := _TAGS.match(text)) is not None:
            text = tags["answer"]
        elif "####" in text:  # GSM8K: the solution, this mark, the answer
            text = text.rsplit("####", 1)[1]
        elif _FORMULAS.fullmatch(text):
            text = _DOLLAR.sub("", text)
        elif (pair := next((p for p in _PAIRS if _around(text, *p)), None)) is not None:
            text = text[len(pair[0]) : -len(pair[1])]
        elif (sentence := _SENTENCE.match(text)) is not None and _balanced(sentence["answer"]):
            text = sentence["answer"]
        else:
            text = _STOP.sub("", text)
    return text


def _answers(value: Any) -> list[str]:
    """The unwrapped answers of a cell, in order."""
    if isinstance(value, Mapping):
        return _answers(next((value[key] for key in _INSIDE if key in value), None))
    if isinstance(value, list):
        return [answer for item in value for answer in _answers(item)]
    if value is None:
        return []
    if isinstance(value, (bytes, bytearray)):
        raise BadRow("bad-text", "the answer is bytes; write the column as text")
    if isinstance(value, (float, Decimal)):
        number = Decimal(str(value))
        return [format(number, "f")] if number.is_finite() else []
    text = str(value).strip()
    nested = _nested(text)
    return [unwrap(text)] if nested is None else _answers(nested)


def _nested(text: str) -> Any:
    """What a cell of text holds as JSON or as Python prints it: texts in a list, or an answer by name. A list of bare
    numbers is an interval or a vector, and stays."""
    if text[:1] + text[-1:] not in ("[]", "{}") or len(text) > _LONGEST:
        return None
    if _ARRAY.fullmatch(text):
        text = f"[{', '.join(_QUOTED.findall(text))}]"  # to Python two texts side by side are one
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: ``{[1, 2]}``
            continue
        if isinstance(value, dict):
            return value if any(key in value for key in _INSIDE) else None
        if isinstance(value, list):
            return value if all(isinstance(item, str) for item in value) else None
    return None


@lru_cache(maxsize=1 << 14)
def _says_none(text: str) -> bool:
    """Whether a gold says that there is none; also where it is empty, or has no letter, digit or sign of a set."""
    words = " ".join(re.sub(r"\\(?:text|textbf|mathrm|mbox)\b|[{}\[\]()<>.?!,;:_\-]", " ", text).split())
    return not words or words == "NA" or words.casefold() in _NO_ANSWER  # Na is sodium


def is_solution(value: Any) -> bool:
    """Whether a cell is a text of which the answer is the marked part."""
    return isinstance(value, str) and (
        last_boxed(value) is not None or "####" in value or _TAGS.match(value) is not None
    )


def _marked(value: Any) -> bool:
    return is_solution(value) or (isinstance(value, str) and _SENTENCE.match(value) is not None)


def _is_prose(text: str) -> bool:
    return "\n" in text or _PROSE.search(re.sub(r"\\[A-Za-z]+", " ", _TEXT.sub(" ", text))) is not None


def _balanced(text: str) -> bool:
    """Whether braces are closed, so that no command was cut in two."""
    bare = re.sub(r"\\[{}]", "", text)
    return bare.count("{") == bare.count("}")


def _around(text: str, left: str, right: str) -> bool:
    """Whether one pair of marks stands around the whole text."""
    inside = text[len(left) : -len(right)]
    return len(text) > len(left) + len(right) and text.startswith(left) and text.endswith(right) and left not in inside
