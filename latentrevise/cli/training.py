"""``latentrevise train sft`` and ``latentrevise train rlvr``."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentrevise.cli.options import Model, Prompts, SampledBy, Settings, grouped, place
from latentrevise.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latentrevise.data.prompts import PromptSettings
    from latentrevise.data.records import Prompt, RowError

app = typer.Typer(no_args_is_help=True)

Out = Annotated[Path, place("Folder of the training run; taken up at its last checkpoint.")]
Dtype = Annotated[
    str, typer.Option(help="Of the weights that are trained; with a GPU the trainer computes in bfloat16.")
]


@app.callback()
def train() -> None:
    """Train on what was recovered, with TRL (extra: train)."""
    if missing := [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} not installed; in a clone of the repository: pip install '.[train]'")


@app.command()
@grouped
def sft(
    given: Settings,
    out: Out,
    run: Annotated[Path | None, place("A finished recovery.")] = None,
    rows_of: Annotated[
        Path | None,
        place("In place of a run: JSONL, ..., parquet with a prompt and a completion in each row.", "--rows"),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the run's own model if left out.")] = None,
    dtype: Dtype = "float32",
) -> None:
    """Fine-tune on a run's trajectories, mixed with its ordinary correct rollouts, or on the rows of a file."""
    from latentrevise.train.sft import SFTSettings, file_dataset, sft_dataset, train_sft

    chosen = given.load(SFTSettings)
    if run is not None and rows_of is None:
        policy, tokenizer = _loaded(model or _model_of(run), dtype)
        rows = sft_dataset(run, chosen, tokenizer)
    elif rows_of is not None and run is None and model is not None:
        policy, tokenizer = _loaded(model, dtype)
        rows = file_dataset(rows_of, chosen, tokenizer)
    else:
        raise ConfigError("train sft: give either --run, a finished recovery, or --rows with --model")
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["strategy"]] = counts.get(row["strategy"], 0) + 1
    typer.echo(f"{len(rows)} rows: {', '.join(f'{n} {strategy}' for strategy, n in sorted(counts.items()))}")
    _begin(out, "sft", chosen, policy, [row["input_ids"] for row in rows])
    train_sft(policy, tokenizer, rows, out, chosen, _judging(chosen, policy, tokenizer))
    typer.echo(f"trained model in {out / 'model'}")


@app.command()
@grouped
def rlvr(
    given: Settings, model: Model, prompts: Prompts, out: Out, engine: SampledBy = "hf", dtype: Dtype = "float32"
) -> None:
    """Reinforcement learning on verified answers, with zero-hit groups repaired as they occur."""
    from trl import GRPOConfig

    from latentrevise.engines import HFEngine, engine_factory
    from latentrevise.train.rlvr import RLVRSettings, train_rlvr
    from latentrevise.train.settings import kept_prompts

    chosen, make = given.load(RLVRSettings), engine_factory(engine)  # a wrong name is told before anything is loaded
    policy, tokenizer = _loaded(model, dtype)
    chosen, new = _with_completions(chosen, policy, GRPOConfig.max_completion_length or 0)
    problems, errors = _prompts(prompts, chosen, policy, tokenizer, new)
    sampler = make(policy, tokenizer, chosen.vllm)
    own = None if isinstance(sampler, HFEngine) else sampler  # of the model itself TRL samples
    _begin(out, "rlvr", chosen, policy, [engine] if own else [])
    kept, judged = kept_prompts(out, problems, errors), _judging(chosen, policy, tokenizer)
    train_rlvr(policy, tokenizer, kept, out, chosen, judged, rollouts=own)
    typer.echo(f"trained model in {out / 'model'}")


@app.command()
@grouped
def groups(
    given: Settings,
    data: Annotated[Path, place("Groups as `latentrevise export --to trl-groups` writes them.")],
    model: Model,
    out: Out,
    dtype: Dtype = "float32",
) -> None:
    """GRPO over completions that are there already: nothing is sampled, verified or repaired."""
    from latentrevise.train.offline import GroupSettings, read_groups, train_groups

    chosen, found = given.load(GroupSettings), read_groups(data)
    policy, tokenizer = _loaded(model, dtype)
    _begin(out, "groups", chosen, policy, [row["completions"] for row in found])
    train_groups(policy, tokenizer, found, out, chosen, _judging(chosen, policy, tokenizer))
    typer.echo(f"trained model in {out / 'model'}")


@app.command()
@grouped
def distill(given: Settings, model: Model, prompts: Prompts, out: Out, dtype: Dtype = "float32") -> None:
    """Self-distillation with the gold answer as privileged information: OPSD or SDPO, by TRL's own trainers."""
    from latentrevise.train.distill import DistillSettings, train_distill
    from latentrevise.train.settings import kept_prompts

    chosen = given.load(DistillSettings)
    policy, tokenizer = _loaded(model, dtype)
    chosen, new = _with_completions(chosen, policy, 256)
    problems, errors = _prompts(prompts, chosen, policy, tokenizer, new)
    _begin(out, "distill", chosen, policy, [])
    train_distill(policy, tokenizer, kept_prompts(out, problems, errors), out, chosen)
    typer.echo(f"trained model in {out / 'model'}")


def _with_completions(settings: Any, model: PreTrainedModel, usual: int) -> tuple[Any, int]:
    """The settings, and the tokens of a completion: the user's own (null: no limit), or the usual number, or half of
    the model's positions where those are few."""
    from latentrevise.model.loading import position_limit

    if "max_completion_length" in settings.trainer:
        return settings, settings.trainer["max_completion_length"] or 0
    positions = position_limit(model)
    new = usual if positions is None else min(usual, max(1, positions // 2))
    return replace(settings, trainer=settings.trainer | {"max_completion_length": new}), new


def _begin(out: Path, kind: str, settings: Any, model: PreTrainedModel, data: Any) -> None:
    from latentrevise.recovery.rundir import fingerprint
    from latentrevise.train.settings import begin

    begin(out, kind, settings, [fingerprint(model), data])


def _loaded(name: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """On the CPU: the trainer places the model, on as many devices as there are."""
    from latentrevise.model.loading import load_model

    return load_model(name, dtype=dtype, device="cpu")


def _model_of(run: Path) -> str:
    from latentrevise.recovery.rundir import RunDirectory, where_it_is

    return where_it_is(RunDirectory(run).read_header(), run)


def _judging(settings: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts that are sampled at each evaluation, read as ``evaluation`` says."""
    if settings.eval_prompts is None:
        return []
    how = settings.evaluation
    return _prompts(settings.eval_prompts, how, model, tokenizer, how.max_new_tokens, "evaluation.max_new_tokens")[0]


def _prompts(
    path: str | Path,
    settings: PromptSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new: int | None,
    setting: str = "trainer.max_completion_length",
) -> tuple[list[Prompt], list[RowError]]:
    """The usable prompts of a file, with room for the ``new`` tokens of ``setting`` behind each, and the errors of the
    others, which are told."""
    from latentrevise.model.loading import position_limit

    found, errors = settings.load(path, tokenizer, position_limit(model), new, setting=setting)
    for error in errors[:3]:
        typer.echo(f"{path}, row {error.row} left out ({error.reason}): {error.message}", err=True)
    if len(errors) > 3:
        typer.echo(f"{path}: {len(errors)} rows left out", err=True)
    if not found:
        raise InputError(f"{path}: no usable prompt among {len(errors)} rows")
    return found, errors
