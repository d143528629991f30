"""Supervised fine-tuning on recovered trajectories, or on rows of a file: TRL's SFTTrainer with its log-probs from
``linear_logprob``.

What a row learns is its *rendering* (docs/training.md): the revised prefix as text and in the loss
(``argmax``), the failed prefix in the loss (``original``), or the revised prefix as context only (``continuation``).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from latentrevise.data.chat import Chat, Templater, content_of
from latentrevise.data.formats import Row, rollout_row, sft_row, sft_rows
from latentrevise.data.records import (
    PrefixRendering,
    Prompt,
    Rollout,
    Start,
    Trajectory,
    original_prefix,
    read_records,
    row_seed,
)
from latentrevise.data.tables import BadRow, plain_row, read_rows
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.evaluate import EvalConfig, Evaluates
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.train.logprob import METRICS, add_linear_logprob
from latentrevise.train.settings import (
    LoraSettings,
    check_evaluation,
    ready_tokenizer,
    refusals,
    run_training,
    trl_arguments,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SFTSettings:
    """Settings of ``latentrevise train sft``.

    strategies: only the trajectories of these (none named: all). valid_only: only those with a derivation found valid.
    rendering: ``argmax``, ``original`` or ``continuation``. per_prompt: at most so many trajectories of a prompt (0:
    all). mix: ordinary correct rollouts of the same run for each recovered row, spread over its solved prompts.
    chat: whether the prompts of a file of rows go through the chat template. chat_template_kwargs: what that is given
    besides. lora: see LoraSettings. holdout: rows kept from training for the loss at each evaluation of the trainer
    (``trainer.eval_strategy``). eval_prompts: a file of prompts and answers on which the policy is sampled besides;
    evaluation: how. trainer: arguments of TRL's SFTConfig as they are (``packing``, ``learning_rate``, ...); rows are
    cut to ``max_length`` only if it is given. seed: of choosing rows.
    """

    strategies: tuple[str, ...] = ()
    valid_only: bool = False
    rendering: PrefixRendering = "argmax"
    per_prompt: int = 0
    mix: float = 1.0
    chat: Chat = "auto"
    chat_template_kwargs: dict = field(default_factory=dict)  # type: ignore[type-arg]  # whatever a template reads
    lora: LoraSettings = field(default_factory=LoraSettings)
    holdout: int = 0
    eval_prompts: str | None = None
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    trainer: dict = field(default_factory=dict)  # type: ignore[type-arg]  # any argument of TRL's
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("mix", "per_prompt", "holdout"):
            if getattr(self, name) < 0:
                raise ConfigError(f"SFTSettings.{name} = {getattr(self, name)!r}: it may not be negative")


class LinearSFTTrainer(Evaluates, SFTTrainer):
    """TRL's SFTTrainer, its log-probs from ``linear_logprob``; ``Evaluates`` samples prompts at each evaluation.

    Arguments, losses (``nll``, ``dft``), packing, adapters and checkpoints are TRL's.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        add_linear_logprob(self._base, metrics=METRICS)


def sft_dataset(run: str | os.PathLike[str], settings: SFTSettings, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a finished run that are trained on: the chosen trajectories, rendered, and the ordinary rollouts.

    Raises InputError if no trajectory is left or the run holds none.
    """
    directory = RunDirectory(run)
    config = directory.read_header()["config"]
    if not directory.trajectories.is_file():
        raise InputError(f"{directory.path}: no trajectories.parquet in it; finish the run first")
    found = read_records(directory.trajectories, Trajectory)
    unknown = set(settings.strategies) - {t.strategy for t in found}
    if unknown:
        raise InputError(
            f"{directory.path} has no trajectory of {', '.join(sorted(unknown))}; leave it out, or recover"
        )
    chosen = [
        t
        for t in found
        if (not settings.strategies or t.strategy in settings.strategies)
        and (t.valid is True or not settings.valid_only)
    ]
    if settings.per_prompt:
        chosen = _per_prompt(chosen, settings.per_prompt)
    if not chosen:
        raise InputError(
            f"{directory.path}: none of its {len(found)} trajectories is left"
            f" ({sum(t.valid is True for t in found)} valid); relax strategies or valid_only, or recover more prompts"
        )
    stop = config.get("stop", ())
    rows = sft_rows(rendered(chosen, settings.rendering, directory), tokenizer, stop)
    wanted = round(settings.mix * len(rows))
    prompts = {p.id: p for p in read_records(directory.prompts, Prompt)}
    ordinary = ordinary_rollouts(read_records(directory.path / "rollouts", Rollout), wanted, settings.seed)
    if len(ordinary) < wanted:
        log.warning("the run has only %d ordinary correct rollouts of the %d asked for", len(ordinary), wanted)
    rows += [rollout_row(prompts[r.prompt_id].ids, r, tokenizer, stop) for r in ordinary]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    return [rows[i] for i in order]


def file_dataset(path: str | os.PathLike[str], settings: SFTSettings, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """The rows of a file to train on, in its order: ``prompt`` (text or messages, through the tokenizer's chat template
    as ``settings.chat`` says) is given, ``completion`` (text) and the end-of-sequence token are learned.

    Raises ConfigError for settings that choose among a run's rows, InputError at the first row that cannot be used.
    """
    unread = [f.name for f in fields(SFTSettings) if f.name in _OF_A_RUN and getattr(settings, f.name) != f.default]
    if unread:
        raise ConfigError(f"{', '.join(unread)}: chosen among the rows of a run; leave it out beside --rows")
    templater = Templater(tokenizer, settings.chat, settings.chat_template_kwargs, "")
    rows = []
    for number, row in read_rows(path):
        try:
            cells = plain_row(row)
            if isinstance(cells, BadRow):
                raise cells
            completion = cells.get("completion")
            if not isinstance(completion, str) or not completion:
                raise BadRow("no-completion", "column 'completion' is no text; give each row a prompt and a completion")
            context = templater.encode(content_of(cells.get("prompt"), "prompt"))
        except BadRow as error:
            raise InputError(f"{path}, row {number}: {error} ({error.reason})") from error
        learned = tokenizer.encode(completion, add_special_tokens=False)
        rows.append({**sft_row(context, learned, tokenizer, ended=True), "strategy": "given"})
    if not rows:
        raise InputError(f"{path} is empty; give at least one row with a prompt and a completion")
    return rows


_OF_A_RUN = ("strategies", "valid_only", "rendering", "per_prompt", "mix")


def rendered(trajectories: Iterable[Trajectory], rendering: PrefixRendering, run: RunDirectory) -> list[Trajectory]:
    """The trajectories with another text for their prefix than the one the run recorded.

    The plain tokens of a revision stand in the run's starts, so any rendering can be had from any run. Their
    ``plain_logprobs`` are of the recorded one and are dropped where it changes.
    """
    starts: dict[str, Start] = {}
    out = []
    for t in trajectories:
        if t.prefix_rendering == rendering:
            out.append(t)
            continue
        if t.start_id not in starts:
            starts.update(
                {s.start_id: s for part in run.parts("starts", t.strategy) for s in read_records(part, Start)}
            )
        plain = starts[t.start_id].plain_ids
        if rendering == "original":
            plain = original_prefix(t.prefix_ids, plain)
        same = {t.prefix_rendering, rendering} == {"argmax", "continuation"}
        logprobs = t.plain_logprobs if same else None
        out.append(replace(t, plain_prefix_ids=plain, prefix_rendering=rendering, plain_logprobs=logprobs))
    return out


def ordinary_rollouts(rollouts: Sequence[Rollout], count: int, seed: int) -> list[Rollout]:
    """``count`` correct rollouts, or all there are: one of each solved prompt before the second of any."""
    by_prompt: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        if rollout.verdict == "correct":
            by_prompt.setdefault(rollout.prompt_id, []).append(rollout)
    order = sorted(by_prompt, key=lambda name: row_seed(seed, "mix", name))
    rounds = max(map(len, by_prompt.values()), default=0)
    spread = [by_prompt[name][i] for i in range(rounds) for name in order if i < len(by_prompt[name])]
    return spread[:count]


def train_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    out: str | os.PathLike[str],
    settings: SFTSettings,
    eval_prompts: Sequence[Prompt] = (),
) -> LinearSFTTrainer:
    """Fine-tune on rows with ``input_ids`` and ``completion_mask``; resumed from ``out`` where it holds a checkpoint.

    The trained model, or its adapter, is left in ``out/model``. Raises ConfigError for settings that TRL refuses or
    that do not go together, ModelError for a model whose logits are not understood.
    """
    # TRL cuts rows to 1024 tokens without a word, and their answers with them. Packed rows need some length.
    lengths = [len(row["input_ids"]) for row in rows]
    longest = max([SFTConfig.max_length or 0, *lengths]) if settings.trainer.get("packing") else None
    # Without being told, TRL looks at the mask only beside text columns, and would train on the prompts too.
    arguments = trl_arguments(
        SFTConfig, out, settings.trainer, completion_only_loss=True, seed=settings.seed, max_length=longest
    )
    cut = sum(length > (arguments.max_length or length) for length in lengths)
    if cut:
        log.warning("%d of %d rows are longer than trainer.max_length = %d: cut", cut, len(rows), arguments.max_length)
    if len(rows) <= settings.holdout:
        raise ConfigError(f"holdout = {settings.holdout} leaves none of {len(rows)} rows to train on; lower it")
    if arguments.eval_strategy != "no" and not settings.holdout:
        raise ConfigError("trainer.eval_strategy needs rows to evaluate the loss on; set holdout to their number")
    check_evaluation(arguments, eval_prompts)
    data = Dataset.from_list([{key: list(row[key]) for key in ("input_ids", "completion_mask")} for row in rows])
    first = len(rows) - settings.holdout
    with refusals():
        trainer = LinearSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=data.select(range(first)),
            eval_dataset=data.select(range(first, len(rows))) if settings.holdout else None,
            processing_class=ready_tokenizer(tokenizer),
            peft_config=settings.lora.peft(),
        )
    trainer.sample_at_evaluation(eval_prompts, settings.evaluation)
    run_training(trainer, Path(out))
    return trainer


def _per_prompt(trajectories: Sequence[Trajectory], most: int) -> list[Trajectory]:
    seen: dict[str, int] = {}
    kept = []
    for t in trajectories:
        seen[t.prompt_id] = seen.get(t.prompt_id, 0) + 1
        if seen[t.prompt_id] <= most:
            kept.append(t)
    return kept
