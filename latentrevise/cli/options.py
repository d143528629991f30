"""Options that commands share, each written once: a dataclass of them is one parameter of a command."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentrevise.errors import ConfigError

if TYPE_CHECKING:
    from latentrevise.recovery.schedule import Scheduler


def expanded(path: str) -> Path:
    """A path with ``~`` resolved: a shell leaves it alone behind ``=``."""
    return Path(path).expanduser()


def located(text: str) -> str:
    """A path, or a URL as it stands."""
    return text if "://" in text else str(expanded(text))


def place(help: str, *names: str) -> Any:
    """An option that takes a path."""
    return typer.Option(*names, help=help, parser=expanded, metavar="PATH")


Out = Annotated[Path, place("Run directory; taken up where it stopped if it holds this run.")]
Prompts = Annotated[
    str,
    typer.Option(
        help="JSONL, JSON, CSV, TSV or parquet (or a folder of such files) with a prompt and an answer in each row.",
        parser=located,
        metavar="PATH or URL",
    ),
]
Exported = Annotated[
    str, typer.Option("--out", help="File to write: .jsonl or .parquet.", parser=located, metavar="PATH or URL")
]
Model = Annotated[str, typer.Option(help="Directory or hub id of a causal LM or a LoRA adapter, or a GGUF file.")]
Jsonl = Annotated[bool, typer.Option("--jsonl", help="Write trajectories.jsonl beside the parquet file.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]
ConfigFile = Annotated[Path | None, place("YAML file of settings, or the name of a preset.", "--config")]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="One setting, key=value (latent.steps=20, trainer.learning_rate=1e-5); may be repeated."
    ),
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]
SampledBy = Annotated[str, typer.Option("--engine", help="Where samples come from: hf, the model itself, or vllm.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; if left out the first GPU, or else the CPU.")]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """``--config`` and ``--set``."""

    config: ConfigFile = None
    settings: Set = None

    def load(self, cls: type[Any]) -> Any:
        """The settings as a ``cls``."""
        from latentrevise.config import load_config

        return load_config(cls, self.config, self.settings or [])


@dataclass(frozen=True, kw_only=True)
class Placed:
    """How a model is loaded, and whether bars are shown."""

    dtype: Dtype = "auto"
    device: Device = None
    quiet: Quiet = False


@dataclass(frozen=True, kw_only=True)
class Begun(Placed, Settings):
    """A model with the settings of what it is begun with, and what samples from it."""

    model: Model
    engine: SampledBy = "hf"


@dataclass(frozen=True, kw_only=True)
class Resumed(Placed):
    """A run that was begun, with the model it was begun with."""

    out: Out
    model: Annotated[
        str | None, typer.Option(help="Where the run's model is now, if not where it was when the run began.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Who does the work, and how it is told."""

    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Work on this run together with other processes, as the I-th of about N, counted from 0; any number"
            " may join or leave, and `collect` finishes.",
        ),
    ] = None

    ray: Annotated[
        str | None,
        typer.Option(
            metavar="local|auto|ADDRESS",
            help="Work with Ray actors: on this machine, on the cluster it belongs to, or on the one at an address"
            " (extra: ray).",
        ),
    ] = None
    workers: Annotated[int, typer.Option(help="Ray actors; each with a model of its own, see ray.resources.")] = 1
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Progress as JSON lines on standard error, every few seconds.")
    ] = False

    def scheduler(self, load: Callable[[], tuple[Any, Any, Any]]) -> Scheduler:
        """load: makes model, tokenizer and engine in another process. Raises ConfigError for a shard that is none."""
        from latentrevise.recovery.ray_workers import RayWorkers
        from latentrevise.recovery.schedule import Alone, Joint

        if self.ray is not None and self.shard is not None:
            raise ConfigError("--ray and --shard are two ways to share the work; choose one")
        if self.ray is None and self.workers != 1:
            raise ConfigError("--workers are Ray's; say which cluster with --ray, or share the work with --shard")
        if self.ray is not None:
            return RayWorkers(self.ray, self.workers, load)
        if self.shard is None:
            return Alone()
        index, slash, count = self.shard.partition("/")
        if not (slash and index.isdecimal() and count.isdecimal()):
            raise ConfigError(f"--shard {self.shard!r}: write it as I/N, such as 0/4 to 3/4")
        return Joint(int(index), int(count))


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose parameters that are dataclasses are given as their fields, each an option."""
    hints = typing.get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(hint) and isinstance(hint, type)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))
            continue
        own = typing.get_type_hints(groups[name], include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is MISSING else f.default,
                annotation=own[f.name],
            )
            for f in fields(groups[name])
        ]

    parameters.sort(key=lambda p: p.default is not inspect.Parameter.empty)  # what must be given comes first

    @functools.wraps(command)
    def call(**values: Any) -> Any:
        built = {name: group(**{f.name: values.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        return command(**built, **values)

    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    return call
