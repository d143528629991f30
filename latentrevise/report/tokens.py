"""Token ids as text, for the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class TokenTexts:
    """Token ids as text. Without a tokenizer the ids themselves are shown, and ``problem`` says why."""

    tokenizer: Any | None
    problem: str = ""

    @classmethod
    def load(cls, path: str) -> TokenTexts:
        """The tokenizer of the model directory ``path``; nothing is fetched and no remote code is run."""
        if not path or not Path(path).is_dir():
            return cls(None, f"the model directory {path!r} named in run.json is not on this machine")
        from transformers import AutoTokenizer  # takes seconds to import

        try:
            return cls(AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
        except Exception as error:  # a damaged tokenizer.json raises a bare Exception
            return cls(None, f"the tokenizer in {path} could not be loaded ({type(error).__name__}: {error})")

    def piece(self, token: int) -> str:
        """One token, its white space made visible."""
        if self.tokenizer is None:
            return f"#{token}"
        text = self.tokenizer.decode([token], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if not text or "\ufffd" in text:  # part of a multi-byte character
            text = self.tokenizer.convert_ids_to_tokens(token) or f"#{token}"
        return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")

    def text(self, tokens: Sequence[int]) -> str:
        """A token sequence as text; as ids where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(f"#{token}" for token in tokens)
        return self.tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False)
