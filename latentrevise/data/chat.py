"""From a prompt's cell to token ids: messages as they come, the chat template and the beginning of sequence once."""

from __future__ import annotations

import ast
import inspect
import json
import re
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from latentrevise.data.tables import BadRow
from latentrevise.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chat = Literal["auto", "always", "never"]
Content = str | list[dict[str, Any]]

_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*['"](?:role|content)['"]\s*:""")
_PROBE = "8b1f2e"  # stands for a user's message where the template's own text is looked at


def content_of(value: Any, column: str) -> Content:
    """A cell as text or as messages ``{"role", "content", ...}``; messages come as lists, or as JSON text.

    Raises BadRow for a cell that is empty or neither.
    """
    value = [value] if isinstance(value, dict) and "role" in value else value
    if isinstance(value, str):
        value = _as_messages(value, column) or value
    if value is None or value in ("", []):
        raise BadRow("empty-prompt", f"column {column!r} is empty; give a text or messages")
    if not isinstance(value, str):
        value = [_message(item, column) for item in value] if isinstance(value, list) else [_message(value, column)]
        if value[-1]["role"] == "assistant":
            raise BadRow("bad-messages", f"column {column!r} ends with the assistant's message; end it with the user's")
    if not text_of(value).strip():
        raise BadRow("empty-prompt", f"column {column!r} holds only white space; give a text or messages")
    return value


def text_of(content: Content) -> str:
    """What a reader sees."""
    return content if isinstance(content, str) else "\n".join(message["content"] for message in content)


def _as_messages(text: str, column: str) -> list[Any] | None:
    """Messages that a cell holds as JSON, or as Python prints them (a CSV file written by pandas).

    Raises BadRow for what begins like messages and cannot be read: as a question it would be asked silently.
    """
    if not text.lstrip().startswith(("[", "{")):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):  # TypeError: ``{[1, 2]}``
            continue
        value = [value] if isinstance(value, dict) else value
        if (
            isinstance(value, list)
            and value
            and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
        ):
            return value
    if _LIKE_MESSAGES.match(text):
        raise BadRow(
            "bad-messages", f"column {column!r} begins like messages but is not JSON; write it with json.dumps"
        )
    return None


def _message(value: Any, column: str) -> dict[str, Any]:
    if isinstance(value, dict) and isinstance(value.get("role"), str):
        content = value.get("content")
        if (
            isinstance(content, list)
            and content
            and all(isinstance(p, dict) and p.get("type") == "text" for p in content)
        ):
            content = "".join(str(part.get("text", "")) for part in content)
        if isinstance(content, str):
            # A table has every key in every row: what is None in this message was not there.
            return {**{key: item for key, item in value.items() if item is not None}, "content": content}
    told = f"column {column!r} holds neither text nor messages; give each a role and a text content"
    raise BadRow("bad-messages", told)


class Templater:
    """Puts a tokenizer's chat template on prompts.

    chat: whether texts go through it (messages always do): ``auto``, when there is one. arguments: what the template
    reads beside the messages, such as ``enable_thinking``; instruction: put behind the prompt, a blank line between.
    notes: how often a prompt was taken otherwise than as a plain question, by what is said of it.

    Raises ConfigError for arguments that the template does not read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, chat: Chat, arguments: Mapping[str, Any], instruction: str
    ) -> None:
        self.tokenizer, self.chat, self.arguments, self.instruction = tokenizer, chat, dict(arguments), instruction
        self.notes: Counter[str] = Counter()
        if arguments:
            self._check_arguments()

    def asked(self, content: Content) -> Content:
        """The content with the instruction behind it, as it is put to the model."""
        if not self.instruction:
            return content
        behind = f"\n\n{self.instruction}"
        if not isinstance(content, str):
            return [*content[:-1], {**content[-1], "content": content[-1]["content"] + behind}]
        if not self._in_format(content):
            return content + behind
        end = self._around[1].strip()
        if not end or not content.rstrip().endswith(end):
            raise BadRow(
                "chat-format",
                "the prompt is in the chat format already and does not end as the template does, so there is no place"
                " for the instruction; put it into the prompts, or give messages",
            )
        gap = self._around[1][: self._around[1].index(end)]
        head, _, tail = content.rpartition(end)
        return head.removesuffix(gap) + behind + gap + end + tail

    def messages(self, content: Content) -> list[dict[str, Any]]:
        """The conversation that a prompt is; none for a text, but the user's message where a text in the chat format
        holds that alone, so that whoever puts a template on it again does so once."""
        if not isinstance(content, str):
            return content
        if not self._in_format(content):
            return []
        own, behind = self._without_bos(content).strip(), self._around[1]
        opening, end = self._opening, behind.strip()
        if not (opening and end and own.startswith(opening) and own.endswith(end) and own.count(opening) == 1):
            return []
        asked = own[len(opening) : -len(end)].removesuffix(behind[: behind.index(end)])
        found = [{"role": "user", "content": asked}]
        # A template may put a system message of its own in front.
        return found if self._apply(found, tokenize=False).strip().endswith(own) else []

    def encode(self, content: Content) -> tuple[int, ...]:
        """The ids of a prompt, template and beginning of sequence once each."""
        if isinstance(content, str):
            if self._in_format(content):
                self.notes["are in the chat format already: used as they are, without the template"] += 1
                return self._formatted(content)
            if self.chat == "never" or (self.chat == "auto" and not self.tokenizer.chat_template):
                return self._once(self.tokenizer.encode(content))
            bos = self._bos
            if bos and content.startswith(bos):
                self.notes[f"begin with {bos}, which the template writes: it is not written twice"] += 1
                content = content.removeprefix(bos)
        if not self.tokenizer.chat_template:
            raise BadRow(
                "no-chat-template",
                "the prompt needs a chat template and the tokenizer has none; give plain text, with chat=never",
            )
        messages = [{"role": "user", "content": content}] if isinstance(content, str) else [dict(m) for m in content]
        return tuple(self._apply(messages, tokenize=True)["input_ids"])

    def _apply(self, messages: list[dict[str, Any]], tokenize: bool) -> Any:
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=tokenize, return_dict=tokenize, **self.arguments
            )
        except (TemplateError, TypeError, ValueError) as error:  # templates refuse roles and orders they do not know
            raise BadRow("chat-template", f"the chat template refuses the messages ({error}); change them") from error

    @cached_property
    def _bos(self) -> str | None:
        """The text of the beginning of sequence; None where it opens turns too (SmolLM2), so that it tells nothing."""
        token = getattr(self.tokenizer, "bos_token", None)
        before, behind = self._around
        return None if token is not None and (token in behind or before.count(token) > 1) else token

    @cached_property
    def _around(self) -> tuple[str, str]:
        """What the template puts before and behind a user's message; nothing where it has no such place."""
        if not self.tokenizer.chat_template:
            return "", ""
        try:
            before, found, behind = self._apply([{"role": "user", "content": _PROBE}], tokenize=False).partition(_PROBE)
        except BadRow:
            return "", ""
        return (before, behind) if found else ("", "")

    @cached_property
    def _marks(self) -> frozenset[str]:
        """Special tokens that open a turn."""
        before, tokenizer = self._around[0], self.tokenizer
        if not before:
            return frozenset()
        known = {str(token) for token in tokenizer.get_added_vocab()} | set(tokenizer.all_special_tokens)
        ends = {self._bos, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
        return frozenset(token for token in known - ends if token.strip() and token in before)

    @cached_property
    def _opening(self) -> str:
        """What the template puts in front of a user's message, a system message of its own left out."""
        before = self._without_bos(self._around[0])
        first = next((mark for mark in self._marks if before.startswith(mark)), None)
        return before[before.rfind(first) :] if first else before[before.rstrip().rfind("\n") + 1 :]

    def _in_format(self, text: str) -> bool:
        """Whether a text holds the template's own turns already: its special tokens, or its beginning and its end."""
        if self.chat == "never":
            return False
        own = self._without_bos(text).lstrip()
        # A question about a special token holds one too, but does not begin with it.
        if own.startswith(tuple(self._marks)) or (own != text.lstrip() and any(mark in own for mark in self._marks)):
            return True
        before, opening, behind = (
            s.strip() for s in (self._without_bos(self._around[0]), self._opening, self._around[1])
        )
        return bool(opening and behind and behind in own and own.startswith((before, opening)))

    def _without_bos(self, text: str) -> str:
        return text.removeprefix(self._bos or "")

    def _formatted(self, text: str) -> tuple[int, ...]:
        """Ids of a text in the chat format, which begins as the template does."""
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        bos = self.tokenizer.bos_token_id
        begins = bool(self._bos) and self._around[0].startswith(self._bos or "")
        return (bos, *ids) if begins and bos is not None and ids[:1] != (bos,) else self._once(ids)

    def _once(self, ids: Any) -> tuple[int, ...]:
        bos = getattr(self.tokenizer, "bos_token_id", None)
        if bos is not None and tuple(ids[:2]) == (bos, bos):
            self.notes[f"begin with {self._bos}, which the tokenizer writes: it is not written twice"] += 1
            ids = ids[1:]
        return tuple(ids)

    def _check_arguments(self) -> None:
        named = "chat_template_kwargs"
        template = self.tokenizer.chat_template
        if not template:
            raise ConfigError(f"{named}: the tokenizer has no chat template that could read it; leave it out")
        ours = set(inspect.signature(self.tokenizer.apply_chat_template).parameters) | {"messages"}
        texts = list(template.values()) if isinstance(template, dict) else [template]
        for name in self.arguments:
            if name in ours - {"tools", "documents"}:
                raise ConfigError(
                    f"{named}.{name}: it is set by this package; only what the template itself reads can be"
                )
            if not any(re.search(rf"\b{re.escape(name)}\b", text) for text in texts):
                raise ConfigError(
                    f"{named}.{name}: the tokenizer's chat template does not read it, so it would be ignored"
                )
