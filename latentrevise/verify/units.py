"""Units of measurement behind a number: everyday ones and those of physics, exactly convertible.

A unit is a factor and powers of bases. A noun that is no unit (eggs) is a base of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Unit:
    """``factor`` times the product of bases to their powers."""

    factor: Fraction
    powers: frozenset[tuple[str, int]]

    @property
    def bases(self) -> dict[str, int]:
        return dict(self.powers)


_PLAIN: dict[str, tuple[str, str]] = {
    # names: (factor, bases)
    "m meter metre": ("1", "m"),
    "in inch inches": ("0.0254", "m"),
    "ft foot feet": ("0.3048", "m"),
    "yd yard": ("0.9144", "m"),
    "mi mile": ("1609.344", "m"),
    "s sec second": ("1", "s"),
    "min minute": ("60", "s"),
    "h hr hour": ("3600", "s"),
    "day": ("86400", "s"),
    "wk week": ("604800", "s"),
    "month": ("1", "month"),
    "yr year": ("12", "month"),
    "decade": ("120", "month"),
    "century centuries": ("1200", "month"),
    "g gram gramme": ("0.001", "kg"),
    "lb pound": ("0.45359237", "kg"),
    "oz ounce": ("0.028349523125", "kg"),
    "tonne": ("1000", "kg"),
    "L l liter litre": ("0.001", "m m m"),
    "gal gallon": ("1", "gallon"),
    "qt quart": ("0.25", "gallon"),
    "pt pint": ("0.125", "gallon"),
    "cup": ("0.0625", "gallon"),
    "acre": ("1", "acre"),
    "ha hectare": ("10000", "m m"),
    "mph": ("0.44704", "m -s"),
    "kph kmh kmph": ("5/18", "m -s"),
    "N newton": ("1", "kg m -s -s"),
    "J joule": ("1", "kg m m -s -s"),
    "W watt": ("1", "kg m m -s -s -s"),
    "Pa pascal": ("1", "kg -m -s -s"),
    "Hz hertz": ("1", "-s"),
    "A amp ampere": ("1", "A"),
    "C coulomb": ("1", "A s"),
    "V volt": ("1", "kg m m -s -s -s -A"),
    "ohm Omega": ("1", "kg m m -s -s -s -A -A"),
    "T tesla": ("1", "kg -s -s -A"),
    "K kelvin": ("1", "K"),
    "mol mole": ("1", "mol"),
    "eV electronvolt": ("1", "eV"),
    "cal calorie": ("1", "cal"),
    "byte B": ("1", "byte"),
    "bit": ("1", "bit"),
    "degree deg": ("1", "degree"),
    "rad radian": ("1", "rad"),
    "percent": ("1", "percent"),
    "dollar USD usd buck": ("1", "usd"),
    "cent penny pennies": ("0.01", "usd"),
    "nickel": ("1", "nickel"),
    "euro EUR eur": ("1", "eur"),
    "GBP gbp": ("1", "gbp"),
    "yen JPY": ("1", "jpy"),
    "rupee Rs INR": ("1", "inr"),
    "yuan CNY RMB": ("1", "cny"),
    "th st nd rd": ("1", "ordinal"),
}
_PREFIXES = {"k": "1000", "M": "1000000", "G": "1000000000", "c": "0.01", "d": "0.1", "m": "0.001", "n": "1e-9"}
_PREFIXES |= {r"\mu ": "1e-6", "u": "1e-6", "p": "1e-12"}
_LONG = {"kilo": "1000", "mega": "1e6", "giga": "1e9", "centi": "0.01", "deci": "0.1", "milli": "0.001"}
_LONG |= {"micro": "1e-6", "nano": "1e-9"}
_PREFIXED = re.findall(r"\S+", "m s g L l N J W Pa Hz A V mol eV cal ohm byte B bit C T K")
_LONG_PREFIXED = re.findall(
    r"\S+",
    "meter metre second gram gramme liter litre newton joule watt pascal hertz amp ampere volt mole calorie ohm byte"
    " bit coulomb tesla electronvolt",
)

SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_NO_NOUNS = frozenset(
    re.findall(
        r"\S+",
        "and or not than more less least most at about approximately approx nearly almost roughly only to"
        " from minus plus times over under by of out half third thirds quarter quarters fourth fourths fifth"
        " fifths sixth sixths seventh eighth eighths ninth tenth tenths hundredth hundredths thousandth"
        " thousandths squared cubed factorial mod modulo base if when where for is are was were the an no none"
        " infinity true false wrong right correct with without but negative positive pi root sqrt sin cos tan"
        " log ln exp max min hundreds thousands millions dozens score pair except unless either neither both"
        " then else since because remainder am pm equals equal power double triple twice one two three four"
        " five six seven eight nine ten eleven twelve zero other otherwise maybe unknown",
    )
)


def _table() -> dict[str, Unit]:
    table = {}
    for names, (factor, bases) in _PLAIN.items():
        counts: Counter[str] = Counter()
        for base in bases.split():
            counts[base.lstrip("-")] += -1 if base.startswith("-") else 1
        unit = Unit(Fraction(factor), frozenset(counts.items()))
        for name in names.split():
            table[name] = unit
            for prefixes, allowed in ((_PREFIXES, _PREFIXED), (_LONG, _LONG_PREFIXED)):
                for prefix, scale in prefixes.items() if name in allowed else ():
                    table.setdefault(prefix + name, Unit(unit.factor * Fraction(scale), unit.powers))
    # What a prefix would make of other units.
    table["min"], table["ft"], table["cal"] = table["minute"], table["foot"], table["calorie"]
    return table


UNITS = _table()
DEGREE, RADIAN, PERCENT, DOLLAR = UNITS["degree"], UNITS["radian"], UNITS["percent"], UNITS["dollar"]
CURRENCIES = {r"\$": DOLLAR, "$": DOLLAR, "€": UNITS["euro"], "£": UNITS["GBP"], "¥": UNITS["yen"], "₹": UNITS["rupee"]}


def read_unit(text: str) -> Unit | None:
    """What stands behind a number, as a unit; None where it is none (``or 3``, ``is wrong``).

    text: normal, its ``\\text`` braces gone.
    """
    text = text.replace(r"\degree", " degree ").replace(r"\cdot", " ").replace(r"\%", " percent ").strip(" .")
    text = re.sub(r"\bper cent\b", "percent", text)
    text = re.sub(r"(?<=[A-Za-z])([23])(?![\w.])", r"^\1", text)  # cm2
    text = re.sub(r"(?<=[a-z])\.(?=\s|$)", "", text)  # sq. ft.
    if text in CURRENCIES:
        return CURRENCIES[text]
    parts = re.split(r"\s*/\s*|\s+per\s+|^per\s+|\s+an?\s+(?=[a-z])", text)
    factor, powers, nouns = Fraction(1), Counter[str](), 0
    for place, part in enumerate(parts):
        sign, power = (-1 if place else 1), 1
        words = re.findall(r"\\mu [A-Za-z]+|\\Omega|[A-Za-z]+|\^\{-?\d\}|\^-?\d|\S", part)
        if not words and (place or len(parts) == 1):
            return None
        last: tuple[Unit, int] | None = None
        for word in words:
            if re.fullmatch(r"\^\{?-?\d\}?|squared|cubed", word):
                if last is None:
                    return None
                count = {"squared": 2, "cubed": 3}.get(word) or int(word.strip("^{}"))
                factor *= last[0].factor ** (last[1] * (count - 1))
                for base, own in last[0].powers:
                    powers[base] += own * last[1] * (count - 1)
                last = None
                continue
            if word.lower() in ("square", "sq", "cubic", "cu"):
                power = 2 if word.lower().startswith("s") else 3
                continue
            unit = _unit(word)
            if unit is None:
                return None
            nouns += word not in UNITS
            last = (unit, sign * power)
            factor *= unit.factor ** (sign * power)
            for base, own in unit.powers:
                powers[base] += own * sign * power
            power = 1
    if nouns > 3 or powers["percent"] not in (0, 1) or (powers["percent"] and len(powers) > 1):
        return None
    return Unit(factor, frozenset((base, power) for base, power in _temperatures(powers).items() if power))


def _unit(word: str) -> Unit | None:
    if word.lstrip("\\") in UNITS:
        return UNITS[word.lstrip("\\")]
    # Symbols are spelled one way; words may have capitals and an s.
    lower = word.lower()
    if lower in _NO_NOUNS or lower in SCALES:
        return None
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in UNITS and len(name) > 2:
            return UNITS[name]
    if word in ("F",):
        return Unit(Fraction(1), frozenset({("F", 1)}))
    if len(word) < 3 or not re.fullmatch(r"[A-Z]?[a-z]+", word):
        return None
    name = lower[:-3] + "y" if lower.endswith("ies") else lower.removesuffix("s")
    return Unit(Fraction(1), frozenset({(name, 1)}))


def _temperatures(powers: Counter[str]) -> dict[str, int]:
    """``degree C`` and ``degree F`` are no products."""
    found = dict(powers)
    if found.get("degree") == 1:
        if found.get("A") == 1 and found.get("s") == 1 and len(found) == 3:
            return {"celsius": 1}
        for name, base in (("F", "fahrenheit"), ("fahrenheit", "fahrenheit"), ("celsiu", "celsius"), ("K", "K")):
            if found.get(name) == 1 and len(found) == 2:
                return {base: 1}
    if list(found) == ["celsiu"]:
        return {"celsius": found["celsiu"]}
    return found
