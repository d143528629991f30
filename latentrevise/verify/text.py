"""One spelling for everything that says the same: what stands around an answer goes, LaTeX and Unicode become plain.

Nothing here reads a value. Two answers with the same ``plain`` text are equal whatever they mean.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from types import MappingProxyType

LONGEST = 2000
"""Characters of an answer that are read; a longer one is only compared as text."""

_CHARACTERS = {
    "−": "-", "‐": "-", "‑": "-", "‒": "-", "–": "-", "×": r"\times ", "⋅": r"\cdot ", "·": r"\cdot ",
    "∙": r"\cdot ", "÷": "/", "⁄": "/", "∕": "/", "≤": r"\leq ", "≥": r"\geq ", "⩽": r"\leq ", "⩾": r"\geq ",
    "≠": r"\neq ", "≡": r"\equiv ", "≈": r"\approx ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta ", "α": r"\alpha ",
    "β": r"\beta ", "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "φ": r"\phi ", "ω": r"\omega ", "σ": r"\sigma ",
    "Δ": r"\Delta ", "°": r"\degree ", "º": r"\degree ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ",
    "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "±": r"\pm ",
    "∓": r"\mp ", "…": r"\ldots ", "⋯": r"\ldots ", "∖": r"\setminus ", "→": r"\to ",
    "∠": r"\angle ", "△": r"\triangle ",
    "′": "'", "’": "'", "“": '"', "”": '"', "⟨": r"\langle ", "⟩": r"\rangle ", "\u00a0": " ", "\u2009": r"\,",
    "\u202f": r"\,", "\u2007": " ", "\u2008": " ", "\u200a": r"\,", "\u3000": " ", "⌊": r"\lfloor ",
    "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∧": r"\land ", "∨": r"\lor ", "√": "\u221a",
}  # fmt: skip
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_FRACTIONS = re.findall(r"\S+", "¼ ½ ¾ ⅐ ⅑ ⅒ ⅓ ⅔ ⅕ ⅖ ⅗ ⅘ ⅙ ⅚ ⅛ ⅜ ⅝ ⅞")
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₙ", "0123456789+-n", strict=True))
_NO_WIDTH = dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u2061\u2062\u00ad"))

_WORD = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "leqslant": "leq",
    "geqslant": "geq", "le": "leq", "ge": "geq", "ne": "neq", "dots": "ldots", "cdots": "ldots", "dotsc": "ldots",
    "varnothing": "emptyset", "backslash": "setminus", "rightarrow": "to", "lbrace": "{", "rbrace": "}", "mid": "|",
    "vert": "|", "lvert": "|", "rvert": "|", "wedge": "land", "vee": "lor", "textrm": "text", "mathrm": "text",
    "mbox": "text", "textsf": "text", "mathsf": "text", "textit": "text", "mathit": "text", "operatorname": "text",
    "textnormal": "text", "hbox": "text", "textup": "text", "texttt": "text", "mathtt": "text", "rm": "text",
    "ast": "cdot", "times": "cdot", "textdegree": "degree", "arg": "arg", "lbrack": "[", "rbrack": "]",
    "thickspace": ";", "thinspace": ",", "colon": ":", "overarc": "overarc", "iff": "iff", "gt": ">", "lt": "<",
    "textdollar": "$", "percent": "%", "Reals": "mathbb{R}", "R": "mathbb{R}", "reals": "mathbb{R}", "infin": "infty",
}  # fmt: skip
_LITERAL = {"|", "[", "]", ":", ">", "<"}  # of the above: no command any more
_DROPPED = re.compile(
    r"\\(?:(?:left|right)(?![A-Za-z])\.?|(?:[bB]igg?[lrm]?|displaystyle|textstyle|[lL]arge|LARGE|[hH]uge|small|bf|it|limits|nolimits|null)(?![A-Za-z])|"
    r"phantom\s*\{[^{}]*\}|hspace\*?\s*\{[^{}]*\})"
)
_SPACE = re.compile(r"\\(?:[,;:! ]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~|[\s]+")
# What may separate thousands where LaTeX is written; a plain space may only where nothing else stands (see forms).
_THOUSANDS = re.compile(
    r"(?<![\d.])(\d{1,3})((?:(?:\{,\}(?:\\!)?|,\\!|\\!,|\\[,;: ]|~|\{\\,\}|\{\\ \}|')\d{3})+)(?!\d)"
)
_STYLED = re.compile(
    r"\\(?:textbf|mathbf|boldsymbol|bm|bf|underline|mathnormal|mathcal|emph|textcolor\{\w+\}|color\{\w+\})\s*\{"
)
_DELIMITED = (
    (r"\(", r"\)"), (r"\[", r"\]"), ("$$", "$$"), ("$", "$"), ("**", "**"), ("__", "__"), ("`", "`"), ('"', '"'),
    ("''", "''"), ("*", "*"),
)  # fmt: skip


def closing(text: str, opening: int, known: Mapping[int, int] = MappingProxyType({})) -> int | None:
    """Where the brace that opens at ``opening`` is closed, ``\\{`` and ``\\}`` aside; None if it is not. known: pairs
    inside, which are not looked through again."""
    depth, found = 0, _BRACE.search(text, opening)
    while found is not None:
        at = found.start()
        if at in known:
            at = known[at]
        elif len(found[0]) == 1:
            depth += 1 if found[0] == "{" else -1
            if depth == 0:
                return at
        else:
            at += 1
        found = _BRACE.search(text, at + 1)
    return None


def normal(text: str) -> str:
    """The answer in the spelling that ``forms.read`` knows."""
    text = unwrapped(_characters(text).replace("\\\\", r"\newline ").strip())
    text = re.sub(r"\\[dt]?frac(?=\d|\s+\d|\\)", r"\\frac ", text)
    text = _THOUSANDS.sub(lambda m: m[1] + re.sub(r"\D", "", m[2]), text)
    text = text.replace("{,}", ",")
    text = re.sub(r"\\not\s*=|!=|=\s*/\s*=", r"\\neq ", text)
    text = text.replace("<=", r"\leq ").replace(">=", r"\geq ")
    text = re.sub(r"\\text\s*\{\s*([eE])\s*\}(?=[+-]?\d)", r"\1", text)
    text = re.sub(r"\\([A-Za-z]+)", lambda m: _renamed(m[1]), text)
    text = _DROPPED.sub(" ", text)
    text = _unstyled(text)
    text = re.sub(
        r"([(\[])\s*\\begin\{array\}\s*\{[^{}]*\}(.*?)\\end\{array\}\s*[)\]]", r"\\begin{pmatrix}\2\\end{pmatrix}", text
    )
    text = re.sub(r"\\text\s+(?=[A-Za-z])", "", text)
    text = re.sub(
        r"\^\s*\{?\s*\\circ\s*\}?|\^\s*\{?\s*\\degree\s*\}?|\\degree(?![A-Za-z])|\\circ(?![A-Za-z])", r"\\degree ", text
    )
    text = _SPACE.sub(" ", text).strip()
    text = re.sub(r"(?<!\\)%", r"\\%", text)
    text = re.sub(r"(?<![\\.])\.\.\.+", r"\\ldots ", text)
    text = text.replace(r"\{ \}", r"\emptyset ").replace(r"\{\}", r"\emptyset ")
    text = re.sub(r"^(?:\\text\{ ?)?(?i:(?:the )?(?:final )?answer(?: is)?) ?: ?(\})? ?", "", _arguments(text))
    return unwrapped(" ".join(text.split()))


def plain(text: str) -> str:
    """The normal text without what only spaces it: what is compared where a form is not understood."""
    text = normal(text)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\([A-Za-z]+) (?=[A-Za-z])", r"\\\1\0", text)
    text = re.sub(r"\s*([^\w\s])\s*", r"\1", " ".join(text.split()))
    text = re.sub(r"(?<=\d) (?=[A-Za-z])|(?<=[A-Za-z]) (?=\d)", "", text)
    text = re.sub(r"([\^_])\{(\w)\}", r"\1\2", text)
    return text.strip().replace("\0", " ")


def _characters(text: str) -> str:
    out: list[str] = []
    i = 0
    text = text.translate(_NO_WIDTH)
    while i < len(text):
        c = text[i]
        for table, mark in ((_SUPERSCRIPTS, "^"), (_SUBSCRIPTS, "_")):
            if c in table:
                j = i
                while j < len(text) and text[j] in table:
                    j += 1
                out.append(mark + "{" + "".join(table[x] for x in text[i:j]) + "}")
                break
        else:
            j = i + 1
            if c in _FRACTIONS:
                top, bottom = unicodedata.normalize("NFKC", c).split("\u2044")
                out.append(rf"\frac{{{top}}}{{{bottom}}}")
            elif c in _CHARACTERS and c != "\u221a":
                out.append(_CHARACTERS[c])
            elif c == "\u221a":
                out.append(r"\sqrt")
            elif c in "∛∜":
                out.append(r"\sqrt[3]" if c == "∛" else r"\sqrt[4]")
            elif ord(c) > 127:
                out.append(unicodedata.normalize("NFKC", c))
            else:
                out.append(c)
        i = j
    return "".join(out)


def _renamed(name: str) -> str:
    new = _WORD.get(name, name)
    if new in _LITERAL:
        return new
    return f"\\{new}"


def unwrapped(text: str) -> str:
    """Without what stands around all of it: mathematics signs, a box, bold, quotes, a full stop."""
    before = None
    while before != text:
        before, text = text, text.strip()
        for opening, end in _DELIMITED:
            inner = text[len(opening) : len(text) - len(end)]
            around = len(text) > len(opening + end) and text.startswith(opening) and text.endswith(end)
            if around and opening not in inner and end not in inner and not inner.endswith("\\"):
                text = inner.strip()
        if text.count("**") == 1:  # a line in bold, its beginning cut
            text = text.removesuffix("**").removeprefix("**")
        box = re.match(r"\\(?:boxed|fbox|framebox)\s*(?=\{)", text)
        if box and closing(text, box.end()) == len(text) - 1:
            text = text[box.end() + 1 : -1]
        if (
            text.startswith("{")
            and closing(text, 0) == len(text) - 1
            and re.search(r"[=\\^_+\-*/]|^\{\w*\}$", text)
            and "," not in text
        ):
            text = text[1:-1]
        # A full stop or comma ends a sentence; three dots go on, and "\," or "\." are something else.
        text = re.sub(r"(?<![.\\])\s*[.,;:]+$" if not text.endswith("..") else r"(?!)", "", text)
        # One dollar sign too many: an amount in front of a number, a torn formula elsewhere.
        signs = re.findall(r"(?<!\\)\$", text)
        if signs:
            money = len(signs) == 1 and re.match(r"-?\$\s*[\d.]", text)
            text = re.sub(r"(?<!\\)\$", r"\\$" if money else "", text)
    return text


def _unstyled(text: str) -> str:
    """Bold and coloured parts as what they hold."""
    for _ in range(20):
        found = _STYLED.search(text)
        if found is None:
            return text
        end = closing(text, found.end() - 1)
        if end is None:
            return text
        inner = text[found.end() : end]
        # Bold words are words still.
        words = re.fullmatch(r"\s*\(?[A-Za-z][A-Za-z .)]*\s*", inner) and len(inner.strip()) > 1
        text = text[: found.start()] + (rf"\text{{{inner}}}" if words else f" {inner} ") + text[end + 1 :]
    return text


def _arguments(text: str) -> str:
    """Braces around every argument that TeX lets go without: ``\\frac12``, ``\\sqrt2``, ``x^10``, ``\\mathbb R``."""
    text = re.sub(r"\\mathbb\s*([A-Z])", r"\\mathbb{\1}", text)
    text = re.sub(r"\\mathbb\s*\{\s*([A-Z])\s*\}", r"\\mathbb{\1}", text)
    text = re.sub(r"(\\(?:frac|binom|sqrt|text|overline))\s+(?=[{\[])", r"\1", text)
    single = r"\s*(?:(\d)|([A-Za-z])|(\\(?:pi|infty|theta|alpha|beta)(?![A-Za-z])))"
    for name in ("frac", "binom"):
        text = re.sub(rf"\\{name}{single}", rf"\\{name}{{\1\2\3}}", text)
        group = r"\{(?:[^{}]|\{[^{}]*\})*\}"
        text = re.sub(rf"\\{name}({group}){single}", rf"\\{name}\1{{\2\3\4}}", text)
        text = re.sub(rf"(\\{name}{group})\s+(?=\{{)", r"\1", text)
    text = re.sub(r"(?<![A-Za-z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}", text)
    text = re.sub(r"(\\sqrt\[\d\])\s*(\d+|[A-Za-z])", r"\1{\2}", text)
    text = re.sub(r"\\sqrt\s*(\d+(?:\.\d+)?|[A-Za-z]|\\pi(?![A-Za-z]))", r"\\sqrt{\1}", text)
    text = re.sub(r"\*\*", "^", text)
    text = re.sub(r"\^\s*([+-]?\d+)", r"^{\1}", text)
    return re.sub(r"\^\s*\(([^()]*)\)", r"^{\1}", text)
