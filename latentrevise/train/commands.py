"""``latentrevise train sft`` and ``latentrevise train rlvr``."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentrevise.errors import ConfigError, InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from latentrevise.data.prompts import PromptSettings
    from latentrevise.data.records import Prompt

app = typer.Typer(no_args_is_help=True)

Out = Annotated[Path, typer.Option(help="Folder of the training run; taken up at its last checkpoint.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="One setting, key=value (mix=0.5, trainer.learning_rate=1e-5); may be repeated."),
]
Dtype = Annotated[
    str, typer.Option(help="Of the weights that are trained; with a GPU the trainer computes in bfloat16.")
]


@app.callback()
def train() -> None:
    """Train on what was recovered, with TRL (extra: train)."""
    if missing := [name for name in ("trl", "peft", "datasets") if find_spec(name) is None]:
        raise ConfigError(f"{', '.join(missing)} not installed; in a clone of the repository: pip install '.[train]'")


@app.command()
def sft(
    run: Annotated[Path, typer.Option(help="A finished recovery.")],
    out: Out,
    model: Annotated[str | None, typer.Option(help="Directory or hub id; the run's own model if left out.")] = None,
    config: ConfigFile = None,
    settings: Set = None,
    dtype: Dtype = "float32",
) -> None:
    """Fine-tune on a run's trajectories, mixed with its ordinary correct rollouts."""
    from latentrevise.config import load_config
    from latentrevise.train.sft import SFTSettings, sft_dataset, train_sft

    chosen = load_config(SFTSettings, config, settings or [])
    name = model or _model_of(run)
    policy, tokenizer = _loaded(name, dtype)
    rows = sft_dataset(run, chosen, tokenizer)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["strategy"]] = counts.get(row["strategy"], 0) + 1
    typer.echo(f"{len(rows)} rows: {', '.join(f'{n} {strategy}' for strategy, n in sorted(counts.items()))}")
    _begin(out, "sft", chosen, [name, [row["input_ids"] for row in rows]])
    train_sft(policy, tokenizer, rows, out, chosen, _judging(chosen, policy, tokenizer))
    typer.echo(f"trained model in {out / 'model'}")


@app.command()
def rlvr(
    model: Annotated[str, typer.Option(help="Directory or hub id of a causal LM of transformers.")],
    prompts: Annotated[Path, typer.Option(help="JSONL, JSON, parquet or CSV with a prompt and an answer in each row.")],
    out: Out,
    config: ConfigFile = None,
    settings: Set = None,
    dtype: Dtype = "float32",
) -> None:
    """Reinforcement learning on verified answers, with zero-hit groups repaired as they occur."""
    from trl import GRPOConfig

    from latentrevise.config import load_config
    from latentrevise.train.rlvr import RLVRSettings, train_rlvr

    chosen = load_config(RLVRSettings, config, settings or [])
    policy, tokenizer = _loaded(model, dtype)
    new = chosen.trainer.get("max_completion_length", GRPOConfig.max_completion_length) or 0  # null: no limit
    problems = _prompts(prompts, chosen, policy, tokenizer, new)
    _begin(out, "rlvr", chosen, [model, [[p.id, *p.ids] for p in problems]])
    train_rlvr(policy, tokenizer, problems, out, chosen, _judging(chosen, policy, tokenizer))
    typer.echo(f"trained model in {out / 'model'}")


def _begin(out: Path, kind: str, settings: Any, data: Any) -> None:
    from latentrevise.train.settings import begin

    begin(out, kind, settings, data)


def _loaded(name: str, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """On the CPU: the trainer places the model, on as many devices as there are."""
    from latentrevise.model.loading import load_model

    return load_model(name, dtype=dtype, device="cpu")


def _model_of(run: Path) -> str:
    from latentrevise.recovery.rundir import RunDirectory

    return str(RunDirectory(run).read_header()["model"]["path"])


def _judging(settings: Any, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts that are sampled at each evaluation, read as ``evaluation`` says."""
    if settings.eval_prompts is None:
        return []
    how = settings.evaluation
    return _prompts(settings.eval_prompts, how, model, tokenizer, how.max_new_tokens)


def _prompts(
    path: str | Path,
    settings: PromptSettings,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    new: int,
) -> list[Prompt]:
    """The usable prompts of a file, with room for ``new`` tokens behind each; how many are not is said."""
    from latentrevise.model.loading import position_limit

    limit = position_limit(model)
    found, errors = settings.load(path, tokenizer, None if limit is None else limit - new)
    for error in errors[:3]:
        typer.echo(f"{path}, row {error.row} left out ({error.reason}): {error.message}", err=True)
    if len(errors) > 3:
        typer.echo(f"{path}: {len(errors)} rows left out", err=True)
    if not found:
        raise InputError(f"{path}: no usable prompt among {len(errors)} rows")
    return found
