"""What a strategy asks the policy in words, and what the policy writes when asked.

A template stands in the place of the question, behind the same messages and through the same chat template. Whatever
its places are filled with is put in as it is: a question that holds ``{answer}`` itself stays one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from latentrevise.data.records import decoded
from latentrevise.engines import Request
from latentrevise.engines.base import stops_text
from latentrevise.errors import ConfigError
from latentrevise.model.compute import Compute
from latentrevise.strategies.base import Tools, Work
from latentrevise.verify.patterns import way_of_answering

_PLACE = re.compile(r"\{(\w+)\}")


def check_places(config: Any, setting: str, *places: str) -> None:
    """Raises ConfigError where a template of a strategy's settings lacks one of its places."""
    template = getattr(config, setting)
    for place in places:
        if f"{{{place}}}" not in template:
            raise ConfigError(f"{type(config).__name__}.{setting} = {template!r}: put {{{place}}} where it belongs")


def ask(tools: Tools, item: Work, setting: str, template: str, **places: str) -> tuple[int, ...]:
    """The ids of a template in the place of the question.

    ``{prompt}`` becomes the question (of a conversation the last message), ``{form}`` the way of answering that belongs
    to the run's answer template, the others what ``places`` says. setting: the template's name, for the ConfigError
    that is raised where the tokenizer does not know a word of it: a model that reads the words of its task alone has to
    be asked in those.
    """
    tokenizer, prompt = tools.tokenizer, item.prompt
    form = way_of_answering(str(tokenizer.decode(list(item.template_ids))))
    _check_words(tools, setting, _PLACE.sub(" ", template.replace("{form}", form)))
    *before, last = prompt.conversation
    filled = {"form": form, **places, "prompt": last["content"]}
    text = _PLACE.sub(lambda place: filled.get(place[1], place[0]), template)
    if not prompt.messages and prompt.ids == tuple(tokenizer.encode(prompt.text)):
        return tuple(tokenizer.encode(text))
    # The question went through the chat template, so what is asked instead does, behind the same messages.
    messages = [*before, {**last, "content": text}]
    encoded: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, **tools.chat_template_kwargs
    )
    return tuple(encoded["input_ids"])


def _check_words(tools: Tools, setting: str, text: str) -> None:
    unknown = tools.tokenizer.unk_token_id
    if unknown is None or unknown not in tools.tokenizer.encode(text, add_special_tokens=False):
        return
    encode = tools.tokenizer.encode
    words = [word for word in dict.fromkeys(text.split()) if unknown in encode(word, add_special_tokens=False)]
    raise ConfigError(
        f"{setting}: the model's tokenizer has no token for {', '.join(words[:5])}, so it can't be asked this; give a"
        " template in words that it knows (for a model of one task: a worked example's form), or leave the strategy out"
    )


@dataclass(frozen=True)
class Written:
    """One text that the policy wrote: ``ids`` without the end-of-sequence token, ``text`` without special tokens."""

    ids: tuple[int, ...]
    text: str
    ended: bool


def write(
    tools: Tools,
    contexts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    n: int = 1,
    greedy: bool = False,
    max_tokens: int | None = None,
    stop: tuple[str, ...] = (),
    stop_pattern: str | None = None,
    cached: bool = False,
) -> tuple[list[list[Written]], list[Compute]]:
    """``n`` texts behind each context as the run samples (greedy: the likeliest one), and what each context took.

    max_tokens, stop, stop_pattern: where a text ends beside where the run's samples do. cached: the contexts have been
    run before. A context that fills all of the model's positions gets no text.
    """
    most = min(max_tokens or tools.sampling.max_new_tokens, tools.sampling.max_new_tokens)
    shared = replace(tools.sampling, n=n, stop=(*tools.sampling.stop, *stop), stop_pattern=stop_pattern, logprobs=False)
    if greedy:
        shared = replace(shared, temperature=0.0)
    served = [i for i, context in enumerate(contexts) if tools.left(len(context)) > 0]
    requests = [Request(tuple(contexts[i]), seed=seeds[i]) for i in served]
    params = [replace(shared, max_new_tokens=min(most, tools.left(len(contexts[i])))) for i in served]
    texts: list[list[Written]] = [[] for _ in contexts]
    computes = [Compute() for _ in contexts]
    for i, completions in zip(served, tools.engine.generate(requests, params) if served else (), strict=True):
        computes[i] = Compute(forward=0 if cached else len(contexts[i]))
        for completion in completions:
            text = decoded(tools.tokenizer, completion.ids)
            ended = completion.finish_reason == "stop"
            texts[i].append(Written(completion.ids, text, ended))
            # The token that ended it, where it is none of the ids, was decoded too.
            in_text = stops_text(shared, text)
            computes[i].decoded += len(completion.ids) + (ended and not in_text)
    return texts, computes
