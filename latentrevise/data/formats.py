"""Trajectories as the data sets that trainers read.

    trl-sft    prompt, completion, input_ids, completion_mask   TRL SFTTrainer; takes the ids as they are
    trl-pref   prompt, chosen, rejected                         TRL DPOTrainer and its kin; rejected: a failed rollout
    trl-step-pref  the same, cut at one fork: the branch that was verified against the failed one nearest to it
    trl-groups     prompt, answer, prompt_ids, completions, masks, outcomes, recovered    ``train groups``: GRPO on them
    messages   messages                                         chat fine-tuning, most tools
    verl-sft   messages                                         verl's SFT data set, parquet
    verl-rl    data_source, prompt, ability, reward_model, extra_info      verl's RL data set, parquet, one row a prompt
    prefix-rl  prompt, answer, prompt_ids, kept, stage          RL from prefixes of the trajectory, the longest first
    rl         prompt, answer, label, metadata                  TRL GRPOTrainer, slime, OpenRLHF; one row a prompt

prime-rl, slime and OpenRLHF fine-tune on ``messages``; OpenRLHF's DPO reads the columns of ``trl-pref``.

What is trained follows the trajectory's rendering: with ``argmax`` and ``original`` the prefix is in the completion;
with ``continuation`` it belongs to the prompt, which no trainer puts into its loss. Every row names its trajectory.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from latentrevise.data.boundary import Boundary
from latentrevise.data.records import (
    Prompt,
    Rollout,
    Trajectory,
    decoded,
    shared_head,
)
from latentrevise.errors import ConfigError, InputError
from latentrevise.verify.patterns import AnswerPattern

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
Conversations = Mapping[str, Sequence[Row]]
"""The messages of each prompt, by its id: ``Prompt.conversation``."""


def sft_rows(
    trajectories: Iterable[Trajectory], tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> list[Row]:
    """TRL SFT: text for the reader, ``input_ids`` and ``completion_mask`` (1: in the loss) for the trainer.

    A trajectory that ended by itself gets the end-of-sequence token, in the loss; one that ended in a string of
    ``stop`` was cut by the sampler and does not.
    """
    return [
        {
            **sft_row(*_split(t), tokenizer, ended=t.finish_reason == "stop" and not _in_stop(t.completion, stop)),
            **_origin(t),
        }
        for t in trajectories
    ]


def sft_row(
    context: Sequence[int], completion: Sequence[int], tokenizer: PreTrainedTokenizerBase, *, ended: bool
) -> Row:
    """One row of ``sft_rows``: ``context`` is given, ``completion`` is learned, and its end if it ended by itself."""
    end = [tokenizer.eos_token_id] if ended and tokenizer.eos_token_id is not None else []
    return {
        "prompt": _prompt_text(context, tokenizer),
        "completion": decoded(tokenizer, completion),
        "input_ids": [*context, *completion, *end],
        "completion_mask": [0] * len(context) + [1] * (len(completion) + len(end)),
    }


def rollout_row(
    context: Sequence[int], rollout: Rollout, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()
) -> Row:
    """An ordinary rollout behind its prompt, in the form of ``sft_rows``."""
    ended = rollout.finish_reason == "stop" and not _in_stop(rollout.completion, stop)
    return {
        **sft_row(context, rollout.completion_ids, tokenizer, ended=ended),
        "prompt_id": rollout.prompt_id,
        "sample_id": rollout.sample_id,
        "strategy": "ordinary",
        "prefix_rendering": "original",
    }


def preference_rows(
    trajectories: Iterable[Trajectory], rollouts: Iterable[Rollout], tokenizer: PreTrainedTokenizerBase
) -> list[Row]:
    """TRL preferences: the trajectory against the failed rollout that it was revised from, or else the prompt's first.

    Only rollouts verified wrong are rejected, never unknown ones. Raises InputError for a prompt without one.
    """
    failed: dict[str, dict[str, Rollout]] = {}
    for rollout in rollouts:
        if rollout.verdict == "wrong":
            failed.setdefault(rollout.prompt_id, {})[rollout.sample_id] = rollout
    rows = []
    for t in trajectories:
        candidates = failed.get(t.prompt_id, {})
        if not candidates:
            raise InputError(
                f"prompt {t.prompt_id} has no rollout verified wrong to prefer {t.sample_id} to; export trl-sft"
            )
        worse = candidates.get(t.parent_sample_id or "", next(iter(candidates.values())))
        context, completion = _split(t)
        skipped = len(t.prefix_ids) if t.prefix_rendering == "continuation" else 0
        rows.append(
            {
                "prompt": _prompt_text(context, tokenizer),
                "chosen": decoded(tokenizer, completion),
                "rejected": decoded(tokenizer, worse.completion_ids[skipped:]),
                **_origin(t),
                "rejected_sample_id": worse.sample_id,
            }
        )
    return rows


def step_preference_rows(
    trajectories: Iterable[Trajectory],
    failed: Iterable[tuple[str, str, Sequence[int]]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Row]:
    """TRL preferences at one fork (the pairs of arXiv 2406.14532): ``prompt`` goes on to where the branches part.

    failed: ``(prompt id, sample id, ids)`` of branches verified wrong: whole completions, prefix included. Rejected is
    the one that shares the most tokens with the trajectory; a trajectory that shares none with any, or that is the
    beginning of one, or the other way round, is no fork and left out. Raises InputError where none is left.
    """
    branches: dict[str, list[tuple[str, Sequence[int]]]] = {}
    for prompt_id, sample_id, ids in failed:
        branches.setdefault(prompt_id, []).append((sample_id, ids))
    rows, seen = [], 0
    for t in trajectories:
        seen += 1
        ids = (*t.plain_prefix_ids, *t.completion_ids)
        given = len(t.plain_prefix_ids) if t.prefix_rendering == "continuation" else 0
        forks = [(shared_head(ids, own), name, own) for name, own in branches.get(t.prompt_id, ())]
        forks = [f for f in forks if given <= f[0] < min(len(ids), len(f[2])) and f[0]]
        if not forks:
            continue
        at, name, worse = max(forks, key=lambda fork: fork[0])
        rows.append(
            {
                "prompt": _prompt_text((*t.prompt_ids, *ids[:at]), tokenizer),
                "chosen": decoded(tokenizer, ids[at:]),
                "rejected": decoded(tokenizer, worse[at:]),
                **_origin(t),
                "rejected_sample_id": name,
                "shared_tokens": at,
            }
        )
    if not rows:
        raise InputError(
            f"none of {seen} trajectories parts from a failed branch behind a shared token; export trl-pref"
        )
    return rows


def group_rows(
    trajectories: Iterable[Trajectory],
    rollouts: Iterable[Rollout],
    prompts: Iterable[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    stop: Sequence[str] = (),
    size: int | None = None,
) -> list[Row]:
    """Whole groups to train on without sampling, one row a prompt: its decided rollouts, of a zero-hit one the first
    trajectory in place of the longest. Undecided rollouts are left out; so are groups of fewer rows than
    ``size`` (None: than the others).

    completions: ids, the end among them. masks: 1 where a token is learned. outcomes: 1.0 or 0.0. recovered: booleans.
    """
    first = {t.prompt_id: t for t in _one_a_prompt(trajectories)}
    by_prompt: dict[str, list[Rollout]] = {}
    for r in rollouts:
        if r.verdict != "unknown":
            by_prompt.setdefault(r.prompt_id, []).append(r)
    size = max(map(len, by_prompt.values()), default=0) if size is None else size
    rows = []
    for prompt in prompts:
        own = by_prompt.get(prompt.id, [])
        if len(own) < size:
            continue
        outcomes = [float(r.verdict == "correct") for r in own]
        made = [rollout_row(prompt.ids, r, tokenizer, stop) for r in own]
        recovered = [False] * len(own)
        if not any(outcomes) and (t := first.get(prompt.id)) is not None:
            at = max(range(len(own)), key=lambda i: len(own[i].completion_ids))
            made[at], outcomes[at], recovered[at] = sft_rows([t], tokenizer, stop)[0], 1.0, True
        skip = len(prompt.ids)
        rows.append(
            {
                "prompt": _prompt_text(prompt.ids, tokenizer),
                "answer": prompt.answer,
                "prompt_id": prompt.id,
                "prompt_ids": list(prompt.ids),
                "completions": [row["input_ids"][skip:] for row in made],
                "masks": [row["completion_mask"][skip:] for row in made],
                "outcomes": outcomes,
                "recovered": recovered,
            }
        )
    return rows


def message_rows(
    trajectories: Iterable[Trajectory], conversations: Conversations, tokenizer: PreTrainedTokenizerBase
) -> list[Row]:
    """The prompt's messages and the assistant's. Raises ConfigError for the ``continuation`` rendering: it needs a
    mask."""
    rows = []
    for t in trajectories:
        if t.prefix_rendering == "continuation" and t.plain_prefix_ids:
            raise ConfigError(
                f"trajectory {t.sample_id}: its prefix must stay out of the loss, which messages cannot say; export"
                " trl-sft, or recover with rendering=argmax"
            )
        reply = decoded(tokenizer, (*t.plain_prefix_ids, *t.completion_ids))
        messages = [*conversations[t.prompt_id], {"role": "assistant", "content": reply}]
        rows.append({"messages": messages, **_origin(t)})
    return rows


def verl_rl_rows(
    trajectories: Iterable[Trajectory],
    conversations: Conversations,
    tokenizer: PreTrainedTokenizerBase,
    first: int = 0,
) -> list[Row]:
    """verl's RL rows, one a recovered prompt, numbered from ``first``; ``extra_info.target`` is its first trajectory,
    for off-policy mixing.

    ``data_source`` is ``latentrevise``: verl picks the reward function by it, so give it a custom one.
    """
    return [
        {
            "data_source": "latentrevise",
            "prompt": list(conversations[t.prompt_id]),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": t.answer},
            "extra_info": {
                "split": "train",
                "index": index,
                "target": decoded(tokenizer, (*t.plain_prefix_ids, *t.completion_ids)),
                **_origin(t),
            },
        }
        for index, t in enumerate(_one_a_prompt(trajectories), first)
    ]


def rl_rows(trajectories: Iterable[Trajectory], conversations: Conversations) -> list[Row]:
    """The recovered prompts for RL, one row each, the prompt as messages.

    The gold stands twice: TRL hands ``answer`` to reward functions; slime and OpenRLHF are told the name of a column
    (``--label-key label``, ``--data.label_key label``). slime keeps ``metadata`` on its samples.
    """
    return [
        {
            "prompt": list(conversations[t.prompt_id]),
            "answer": t.answer,
            "label": t.answer,
            "metadata": _origin(t),
        }
        for t in _one_a_prompt(trajectories)
    ]


_KEPT = (0.75, 0.5, 0.25, 0.0)  # of a trajectory's reasoning, stage by stage; our own decision
STAGES = len(_KEPT)


def prefix_rows(
    trajectories: Iterable[Trajectory],
    tokenizer: PreTrainedTokenizerBase,
    boundary: Boundary | None,
    pattern: AnswerPattern,
) -> list[Row]:
    """Starts for RL from a recovered prompt's first trajectory, as prompts that end within it: all prompts' longest
    ones, then shorter ones, then the prompts alone.

    On-policy RL behind prefixes of a solution that the policy found (PrefixRL, arXiv 2601.18795), as a curriculum that
    drops steps from the end (EvoCoT, arXiv 2508.07809): read the rows in order, or by ``stage``. ``prompt_ids`` end
    with ``kept`` tokens of the trajectory, cut behind the nearest ``boundary`` and before the
    answer; a prompt's equal starts are one.
    """
    places = {}
    for t in _one_a_prompt(trajectories):
        ids = (*t.plain_prefix_ids, *t.completion_ids)
        answer = pattern.find(decoded(tokenizer, ids))
        before = len(ids)
        if answer is not None:
            before = bisect_right(range(len(ids)), answer.start, key=lambda n, i=ids: len(decoded(tokenizer, i[:n])))  # type: ignore[misc]
        ends = [] if boundary is None else [end for end in boundary.ends(ids) if end < before]
        places[t.prompt_id] = t, ids, before - 1, [0, *ends] if ends else range(before)
    rows: dict[tuple[str, int], Row] = {}
    for stage, share in enumerate(_KEPT):
        for t, ids, most, cuts in places.values():
            kept = min(cuts, key=lambda end, aim=share * most: (abs(end - aim), end)) if share else 0  # type: ignore[misc]
            start = (*t.prompt_ids, *ids[:kept])
            row = {"prompt": _prompt_text(start, tokenizer), "answer": t.answer, "prompt_ids": list(start)}
            rows.setdefault((t.prompt_id, kept), {**row, "kept": kept, "stage": stage, **_origin(t)})
    return list(rows.values())


FORMATS = ("trl-sft", "trl-pref", "trl-step-pref", "trl-groups", "messages", "verl-sft", "verl-rl", "prefix-rl", "rl")


def _one_a_prompt(trajectories: Iterable[Trajectory]) -> list[Trajectory]:
    """The first trajectory of each prompt."""
    first: dict[str, Trajectory] = {}
    for t in trajectories:
        first.setdefault(t.prompt_id, t)
    return list(first.values())


def _in_stop(text: str, stop: Sequence[str]) -> bool:
    return any(s in text[-len(s) - 8 :] for s in stop)


def _split(t: Trajectory) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that are given, and those that are learned."""
    if t.prefix_rendering == "continuation":
        return (*t.prompt_ids, *t.plain_prefix_ids), t.completion_ids
    return t.prompt_ids, (*t.plain_prefix_ids, *t.completion_ids)


def _origin(t: Trajectory) -> Row:
    return {
        "prompt_id": t.prompt_id,
        "sample_id": t.sample_id,
        "strategy": t.strategy,
        "prefix_rendering": t.prefix_rendering,
    }


def _prompt_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The prompt with its chat marks, less the tokens that the tokenizer would put before it once more."""
    automatic = tokenizer("").input_ids
    if automatic and list(ids[: len(automatic)]) == automatic:
        ids = ids[len(automatic) :]
    return str(tokenizer.decode(list(ids)))
