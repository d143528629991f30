"""Parts of a text that stand outside of all brackets."""

from __future__ import annotations

import re


def split(text: str, separators: str) -> list[str]:
    """Parts of the text between separators (a regular expression) outside of all brackets."""
    parts, depth, start, i = [], 0, 0, 0
    pattern = re.compile(separators)
    while i < len(text):
        if depth == 0 and (found := pattern.match(text, i)) and found.end() > i:
            parts.append(text[start:i])
            start = i = found.end()
            continue
        two = text[i : i + 2]
        if two in (r"\{", r"\}"):
            depth += 1 if two == r"\{" else -1
            i += 2
            continue
        if text.startswith(r"\langle", i) or text.startswith(r"\begin", i):
            depth += 1
        elif text.startswith(r"\rangle", i) or text.startswith(r"\end", i):
            depth -= 1
        depth += (text[i] in "([{") - (text[i] in ")]}")
        i += 1
    return [part.strip() for part in [*parts, text[start:]]]


def balanced(text: str) -> bool:
    depth = 0
    for c in re.sub(r"\\[{}]", lambda m: m[0][1], text):
        depth += (c in "([{") - (c in ")]}")
        if depth < 0:
            return False
    return depth == 0
