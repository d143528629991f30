"""Forms that regular expressions settle: numbers in every spelling, times, dates, ratios, scores, cycles, residues."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_LARGEST = 4000  # digits of a number that is computed with


@dataclass(frozen=True)
class Number:
    """Exact. digits: significant ones where it was written as a decimal that goes on behind the point, else 0."""

    value: Fraction
    digits: int = 0


@dataclass(frozen=True)
class Literal:
    """Something that equals its own kind with the same key, and nothing else: words, dates, ratios, scores, cycles."""

    kind: str
    key: tuple[object, ...]


@dataclass(frozen=True)
class Time:
    """minutes: since midnight. half: said with a.m. or p.m."""

    minutes: int
    half: bool


@dataclass(frozen=True)
class Residue:
    """``value`` modulo ``modulus``, both integers; as it was written, not reduced."""

    value: int
    modulus: int
    variable: str | None


PlainForm = Number | Literal | Time | Residue

NUMERAL = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d*)?|\.\d+)"
_SIGN = r"[+-]?\s*"
_POWER = r"\s*(?:\\cdot|x|\*)\s*10\s*\^\s*\{?\s*([+-]?\s*\d+)\s*\}?"


def read_plain(text: str) -> PlainForm | None:
    """The form of a normal text, where it is one of these."""
    for reader in (number, _empty, _time, _date, _hyphens, _ratio, _cycle, _based, _residue):
        found = reader(text)
        if found is not None:
            return found
    return None


def number(text: str) -> Number | None:
    """A number in any spelling: 1,234.50  1 000  1.2e3  1.2 x 10^3  1/2  1 1/2  0.\\overline{3}  seventeen."""
    text = text.strip()
    if text.startswith("(") and text.endswith(")") and re.fullmatch(r"\(\s*-?[\d.,]+\s*\)", text):
        text = text[1:-1].strip()
    sign = -1 if text.startswith("-") else 1
    body = text[1:].strip() if text[:1] in ("+", "-") else text
    for reader in (_decimal, _spaced, _scientific, _fraction, _repeating):
        found = reader(body)
        if found is not None:
            return Number(sign * found.value, found.digits)
    return _spelled(text.lower())


def _decimal(text: str) -> Number | None:
    if not re.fullmatch(rf"{NUMERAL}|\d{{1,2}}(?:,\d{{2}})+,\d{{3}}(?:\.\d+)?", text) or len(text) > _LARGEST:
        return None
    text = text.replace(",", "")
    whole, point, places = text.partition(".")
    digits = len((whole + places).lstrip("0")) if places else 0
    return Number(Fraction(f"{whole or '0'}{point if places else ''}{places}"), digits)


def _spaced(text: str) -> Number | None:
    """Thousands with spaces, where nothing else stands: 12 345 678."""
    return _decimal(text.replace(" ", "")) if re.fullmatch(r"[1-9]\d{0,2}(?: \d{3})+(?:\.\d+)?", text) else None


def _scientific(text: str) -> Number | None:
    found = re.fullmatch(rf"({NUMERAL})(?:{_POWER}|\s*[eE]\s*([+-]?\d+))", text)
    power_only = re.fullmatch(r"10\s*\^\s*\{?\s*([+-]?\s*\d+)\s*\}?", text)
    if found:
        mantissa, power = _decimal(found[1]), found[2] or found[3]
    elif power_only:
        mantissa, power = Number(Fraction(1)), power_only[1]
    else:
        return None
    power = power.replace(" ", "")
    if mantissa is None or len(power) > 5 or abs(int(power)) > _LARGEST:
        return None
    return Number(mantissa.value * Fraction(10) ** int(power), mantissa.digits)


def _fraction(text: str) -> Number | None:
    integer = r"-?\s*\d+(?:\.\d+)?"
    tex = rf"\\frac\s*\{{\s*({integer}|-?{NUMERAL})\s*\}}\s*\{{\s*({integer}|-?{NUMERAL})\s*\}}"
    found = re.fullmatch(tex, text) or re.fullmatch(rf"({NUMERAL})\s*/\s*({NUMERAL})", text)
    if found:
        top, bottom = (Fraction(re.sub(r"[\s,]", "", part)) for part in found.groups())
        return Number(top / bottom) if bottom and len(text) < _LARGEST else None
    # Mixed: the fraction is proper, otherwise it may be a product.
    found = re.fullmatch(r"(\d+)\s*\\frac\{(\d+)\}\{(\d+)\}", text)
    found = found or re.fullmatch(r"(\d+)(?:\s+|\s*\+\s*|\s+and\s+|-)(\d+)\s*/\s*(\d+)", text)
    if not found or len(text) > _LARGEST:
        return None
    whole, above, below = (int(part) for part in found.groups())
    return Number(whole + Fraction(above, below)) if 0 < above < below else None


def _repeating(text: str) -> Number | None:
    found = re.fullmatch(r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{?\s*(\d+)\s*\}?", text)
    found = found or re.fullmatch(r"(\d*)\.()\((\d+)\)", text)
    found = found or re.fullmatch(r"(\d*)\.(\d*?)(?:(\d)\3{2,})\s*\\ldots", text)
    if not found or len(text) > 200:
        return None
    whole, start, again = found.groups()
    shift = 10 ** len(start)
    tail = Fraction(int(again), shift * (10 ** len(again) - 1))
    return Number(Fraction(int(whole or 0)) + Fraction(int(start or 0), shift) + tail)


_ONES = re.findall(
    r"\S+",
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen"
    " eighteen nineteen",
)
_TENS = re.findall(r"\S+", "twenty thirty forty fifty sixty seventy eighty ninety")


def _spelled(text: str) -> Number | None:
    words = re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).replace("-", " ").split()
    if not words or len(words) > 9:
        return None
    total = group = 0
    last = 0
    for i, word in enumerate(words):
        value = _ONES.index(word) if word in _ONES else 20 + 10 * _TENS.index(word) if word in _TENS else None
        if value is not None:
            if last and not (last >= 20 and value < 10 and value):
                return None
            group, last = group + value, value or 1
        elif word == "hundred" and 0 < group < 10:
            group, last = group * 100, 0
        elif word in ("thousand", "million") and group:
            total, group, last = (total + group) * (1000 if word == "thousand" else 10**6), 0, 0
        elif word != "and" or not i or i == len(words) - 1 or last:
            return None
    return Number(Fraction(total + group))


def flat(text: str) -> str:
    """Without the braces of ``\\text``."""
    return " ".join(re.sub(r"\\text\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r" \1 ", text).split())


def _empty(text: str) -> Literal | None:
    return Literal("empty", ()) if text.strip() == r"\emptyset" else None


def _time(text: str) -> Time | Literal | None:
    bare = flat(text)
    found = re.fullmatch(r"(\d{1,2})(?:\s*:\s*(\d{2}))?\s*(?:([aApP])\s*\.?\s*[mM]\s*\.?|(noon|midnight))", bare)
    if found:
        hour, minute = int(found[1]), int(found[2] or 0)
        if not 1 <= hour <= 12 or minute > 59:
            return None
        late = found[3] in ("p", "P") if found[3] else found[4] == "noon"
        return Time((hour % 12 + 12 * late) * 60 + minute, True)
    if bare.lower() in ("noon", "midnight"):
        return Time(720 if bare.lower() == "noon" else 0, True)
    # 3:10 may be a ratio as well; a leading zero or an hour above the other number says little more.
    found = re.fullmatch(r"(\d{1,2})\s*:\s*([0-5]\d)", bare)
    if found and int(found[1]) < 24:
        return Time(int(found[1]) * 60 + int(found[2]), False)
    found = re.fullmatch(r"(\d{1,2}):([0-5]\d):([0-5]\d)", bare)
    return Literal("clock", tuple(map(int, found.groups()))) if found else None


_MONTHS = re.findall(r"\S+", "january february march april may june july august september october november december")


def _date(text: str) -> Literal | None:
    bare = flat(text)
    found = re.fullmatch(r"(\d{4})\s*[-/.]\s*(\d{1,2})\s*[-/.]\s*(\d{1,2})", bare)
    if found:
        return _day(int(found[1]), int(found[2]), int(found[3]))
    words = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\^\{(?:st|nd|rd|th)\}|\bof\b|\bthe\b|,", " ", bare).split()
    weekday = r"(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
    if words and re.fullmatch(weekday, words[0].lower()):
        words = words[1:]
    if len(words) not in (2, 3):
        return None
    month = [i for i, word in enumerate(words[:2]) if _month(word)]
    rest = [word for i, word in enumerate(words) if i not in month]
    if len(month) != 1 or not all(re.fullmatch(r"\d{1,4}", word) for word in rest):
        return None
    if len(rest) == 1 and len(rest[0]) == 4:
        return Literal("month", (int(rest[0]), _month(words[month[0]])))
    return _day(int(rest[1]) if len(rest) == 2 else 0, _month(words[month[0]]), int(rest[0]))


def _month(word: str) -> int:
    name = word.lower().rstrip(".")
    for i, month in enumerate(_MONTHS, 1):
        if name in (month, month[:3]) or (name == "sept" and i == 9):
            return i
    return 0


def _day(year: int, month: int, day: int) -> Literal | None:
    return Literal("date", (year, month, day)) if 1 <= month <= 12 and 1 <= day <= 31 else None


def _hyphens(text: str) -> Literal | None:
    """A score, a range, a telephone number: digits with hyphens, which is no difference here. 1/2/2024 likewise."""
    found = re.fullmatch(r"\d+(?:\s*-\s*\d+)+|\d+(?:\s*/\s*\d+){2,}", text)
    return Literal("digits", (re.sub(r"\s", "", text),)) if found else None


def _ratio(text: str) -> Literal | None:
    bare = flat(text)
    if not re.fullmatch(rf"{NUMERAL}(?:\s*(?::|\bto\b)\s*{NUMERAL})+", bare):
        return None
    parts = [_decimal(part.strip()) for part in re.split(r":|\bto\b", bare)]
    values = [part.value for part in parts if part is not None]
    if len(values) < len(parts) or not any(values):
        return None
    unit = next(value for value in values if value)
    return Literal("ratio", tuple(value / unit for value in values))


def _cycle(text: str) -> Literal | None:
    """Permutations as cycles of numbers: (1 2 3)(4 5)."""
    if not re.fullmatch(r"(?:\(\s*\d+(?:\s+\d+)+\s*\)\s*)+", text) or len(text) > 400:
        return None
    cycles = [[int(n) for n in part.split()] for part in re.findall(r"\(([^()]*)\)", text)]
    bare = [n for cycle in cycles for n in cycle]
    if len(set(bare)) < len(bare):
        return Literal("cycles", (" ".join(text.split()),))
    return Literal("cycle", tuple(sorted((a, b) for c in cycles for a, b in zip(c, [*c[1:], c[0]], strict=True))))


_BASES = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10}
_BASES |= {"twelve": 12, "sixteen": 16, "eleven": 11}


def _based(text: str) -> Number | None:
    bare = re.sub(r"\s", "", flat(text))
    found = re.fullmatch(
        r"\(?(-?)([0-9A-Z]+)\)?(?:_(?:\{\(?(?:base)?(\w+)\)?\}|(\d{1,2}))|\(?(?:in)?base(\w+?)\)?)", bare
    )
    if not found or not re.search(r"\d", found[2]) or bare.count("(") != bare.count(")"):
        return None
    name = found[3] or found[4] or found[5]
    base = int(name) if name.isdigit() else _BASES.get(name, 0)
    digits = [int(c, 36) for c in found[2]]
    if not 2 <= base <= 36 or max(digits) >= base or len(digits) > 1000:
        return None
    return Number(Fraction((-1 if found[1] else 1) * int(found[2], base)))


def _residue(text: str) -> Residue | None:
    bare = flat(text)
    found = re.fullmatch(
        r"(?:(\\?[A-Za-z]+(?:_\{?\w\}?)?)\s*(?:\\equiv|=)\s*)?(-?\s*\d{1,50})\s*"
        r"(?:\\pmod\s*\{?\s*(\d{1,50})\s*\}?|\(?\s*\\?[bp]?mod(?:ulo)?\s*\{?\s*(\d{1,50})\s*\}?\s*\)?)",
        bare,
    )
    if not found or not int(found[3] or found[4]):
        return None
    return Residue(int(found[2].replace(" ", "")), int(found[3] or found[4]), found[1])


# Each word and what stands in front of it are taken whole: a long text has countless ways to be parted otherwise.
_WORDS = re.compile(r"[^\W_]++(?:(?>['.,]?[ \-/']?\s?)[^\W_]++)*+")
_FOLDED = frozenset(
    re.findall(
        r"\S+",
        "yes no true false none never always east west north south even odd neither both",
    )
)


def words(text: str) -> Literal | None:
    """Names and words, numbers in them or not (Plan 2); up to eight. They equal the same words."""
    marked = bool(re.search(r"\\text\s*\{[^{}]*[A-Za-z]", text))
    bare = flat(text)
    row = re.fullmatch(rf"-?{NUMERAL}(?: -?{NUMERAL})+", bare)
    if row:
        return Literal("row", tuple(n.value for part in bare.split() if (n := number(part)) is not None))
    bare = bare.strip(" .!\"'")
    if re.fullmatch(r"[A-Z](?: [A-Z])+|[a-z](?: [a-z]){2,}", text):
        return Literal("words", tuple(text.split()))  # an order of letters
    if not _WORDS.fullmatch(bare) or len(bare.split()) > 8:
        return None
    letters = re.findall(r"[^\W\d_]+", bare)
    if not letters or not (marked or max(map(len, letters)) > 1) or bare in ("e", "i", "x"):
        return None
    if not marked and re.search(r"\d", bare) and (max(map(len, letters)) < 3 or not re.search(r"\s", bare)):
        return None  # 2xy
    if not marked and re.fullmatch(r"[xyz]{2,3}", bare):
        return None  # a product
    said = re.sub(r"(?i)^(?:an?|the) (?=\w{2})", "", bare)
    return Literal("words", tuple(_folded(word) for word in said.split()))


def _folded(word: str) -> str:
    """Monday and monday are one word, ABC and abc are not."""
    if word.lower() in _FOLDED:
        return word.lower()
    return word.lower() if len(word) > 2 and word == word.capitalize() else word
