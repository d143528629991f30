"""The command line: every step of a recovery, the whole of it, and what surrounds it."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentrevise.cli import settings, training
from latentrevise.cli.options import (
    Begun,
    Dtype,
    Exported,
    Jsonl,
    Out,
    Placed,
    Prompts,
    Quiet,
    Resumed,
    Workers,
    expanded,
    grouped,
    place,
)
from latentrevise.errors import ConfigError, LatentReviseError

if TYPE_CHECKING:
    from latentrevise.engines import Engine, VLLMConfig
    from latentrevise.recovery.pipeline import Recovery
    from latentrevise.recovery.settings import RecoverConfig

ALONE = Workers()
SET_ASIDE = 3
"""Exit code of a run that is finished but for parts over which too many processes died."""
_RESUMED = ("recover", "collect", "mine", "revise", "continue", "verify", "audit", "eval", "train", "demo")

app = typer.Typer(
    help="Recover zero-hit prompts: revise failed reasoning in embedding space, continue, verify (arXiv 2606.29938).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def command(name: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A command of the app, with its groups of options."""
    return lambda function: app.command(name)(grouped(function))


def _version(asked: bool) -> None:
    if asked:
        from latentrevise import __version__

        typer.echo(f"latentrevise {__version__}")
        raise typer.Exit


@app.callback()
def latentrevise(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@command()
def recover(chosen: Begun, prompts: Prompts, out: Out, by: Workers, jsonl: Jsonl = False) -> None:
    """Mine, revise, continue, verify: the whole job. Prints the table, writes the trajectories, metrics and report."""
    recovery = _begun(chosen, out, by)
    _run(recovery, partial(recovery.work, prompts), jsonl)


@command()
def mine(chosen: Begun, prompts: Prompts, out: Out, by: Workers) -> None:
    """Sample and verify rollouts; find the prompts that no rollout solves. Starts a run that the next steps take up."""
    with (recovery := _begun(chosen, out, by)).session():
        recovery.mine(prompts)
        typer.echo(f"{len(recovery.job.targets)} of {len(recovery.prompts)} prompts are zero-hit")


@command()
def revise(run: Resumed, by: Workers) -> None:
    """Let every strategy of a mined run propose its prefixes."""
    with (recovery := _resumed(run, by)).session():
        recovery.revise()


@command("continue")
def continue_(run: Resumed, by: Workers) -> None:
    """Sample continuations from the proposed prefixes, and the equal-compute control."""
    with (recovery := _resumed(run, by)).session():
        recovery.sample()


@command()
def verify(run: Resumed, by: Workers, jsonl: Jsonl = False) -> None:
    """Judge the continuations, gather what the guards admit, print the table and write the report."""
    recovery = _resumed(run, by)
    _run(recovery, recovery.verify, jsonl)


@command()
def collect(run: Resumed, jsonl: Jsonl = False) -> None:
    """Finish a run that several processes worked on: gather what the guards admit, print the table, write the report,
    sweep what killed processes left."""
    _run(_resumed(run), lambda: None, jsonl)


@command()
def plan(
    chosen: Begun,
    prompts: Prompts,
    sample: Annotated[
        int | None, typer.Option(help="Prompts to measure, spread over all; one part (`chunk`) if left out.")
    ] = None,
    workers: Annotated[int, typer.Option(help="Say how long so many workers take.", min=1)] = 1,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="HOURS",
            help="Hours (12h) or minutes (90m) that the run may take: also propose settings that fit. All that is"
            " printed is then a file for --config.",
        ),
    ] = None,
) -> None:
    """Say what a recovery will take before it is begun: some of its prompts are run to the end, and thrown away."""
    import tempfile

    from latentrevise.recovery.budget import hours_of, proposal_text, propose
    from latentrevise.recovery.estimate import estimate_text, expected, sampled

    hours = None if budget is None else hours_of(budget)  # a wrong one is told before anything is loaded
    with tempfile.TemporaryDirectory(prefix="latentrevise-plan-") as place:
        measured, left_out = sampled(_begun(chosen, Path(place) / "run"), prompts, sample)
    text = estimate_text(expected(measured, measured.config), left_out, workers)
    typer.echo(text if hours is None else "".join(f"# {line}\n" for line in text.splitlines()) + "#")
    if hours is not None:
        typer.echo(proposal_text(propose(measured, hours, workers), hours, workers))


@app.command()
def status(
    run: Annotated[Path, typer.Argument(help="A run directory.", parser=expanded, metavar="RUN")],
    metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Its numbers as OpenMetrics text, for a collector.")
    ] = False,
) -> None:
    """Say what a run is at, while any processes work on it: stages, rates, time left, who holds what, what was given
    up."""
    from latentrevise.recovery.status import open_metrics
    from latentrevise.recovery.status import status as told

    typer.echo(open_metrics(run) if metrics else told(run))


@command()
def audit(
    chosen: Begun,
    prompts: Prompts,
    out: Out,
    gate_only: Annotated[
        bool, typer.Option("--gate-only", help="Stop after the gate: it needs the mined rollouts alone.")
    ] = False,
) -> None:
    """Say what recovery is worth on these prompts: which strategy before compute is spent, then what the answers of
    each are worth, and what the guards turn away. Takes up a run of `recover`, and `recover` takes up one of these."""
    from rich.console import Console

    from latentrevise.report.audits import audit_table, gate_text, guard_table

    console, recovery = Console(), _begun(chosen, out)
    with recovery.session():
        recovery.mine(prompts)
        typer.echo(gate_text(recovery.gate()))
        if gate_only:
            return
        recovery.revise()
        recovery.sample()
        recovery.verify()
        recovered = recovery.collect()
    console.print(audit_table(recovered.metrics))
    guards = guard_table(recovered.metrics)
    if guards is None:
        typer.echo("guards: not measured, for no derivation was checked; name a checker, or audit a checkable family")
    else:
        console.print(guards)
    _finish(recovered, jsonl=False)


@command()
def export(
    run: Annotated[Path, place("A finished run directory.")],
    to: Annotated[
        str,
        typer.Option(
            help="trl-sft, trl-pref, trl-step-pref, trl-groups, messages, verl-sft, verl-rl, prefix-rl or rl."
        ),
    ],
    out: Exported,
    model: Annotated[
        str | None, typer.Option(help="Where the run's model (or its tokenizer) is now, if not where it was.")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="Only the trajectories of this strategy.")] = None,
    valid_only: Annotated[bool, typer.Option("--valid-only", help="Only those with a derivation found valid.")] = False,
) -> None:
    """Write a run's trajectories as a trainer's data set."""
    from latentrevise.data.export import export_run
    from latentrevise.model.loading import load_tokenizer
    from latentrevise.recovery.rundir import RunDirectory, where_it_is

    tokenizer = load_tokenizer(model or where_it_is(RunDirectory(run).read_header(), run))
    count = export_run(run, to, out, strategy=strategy, valid_only=valid_only, tokenizer=tokenizer)
    typer.echo(f"{count} rows in {out}")


@command()
def merge(
    adapter: Annotated[Path, place("Directory of a LoRA adapter, such as `train sft` leaves in OUT/model.")],
    out: Annotated[Path, place("Directory of the merged model; a new or an empty one.")],
    base: Annotated[str | None, typer.Option(help="The model it belongs to, if not where it was trained.")] = None,
    dtype: Dtype = "auto",
) -> None:
    """Merge an adapter into its base model and write both, with the tokenizer, as one model directory."""
    from latentrevise.model.loading import merge_adapter

    typer.echo(f"merged model in {merge_adapter(adapter, out, base=base, dtype=dtype)}")


@command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(help="One or more finished run directories.", parser=expanded, metavar="RUNS...")
    ],
    out: Annotated[Path | None, place("Folder of the report; RUN/report if left out.")] = None,
) -> None:
    """Write the report of finished runs: one self-contained HTML file, and PNG figures beside it."""
    from latentrevise.report import write_report

    typer.echo(write_report(runs, out or runs[0] / "report"))


@command()
def demo(
    out: Annotated[Path, place("Folder for the runs and the report.")] = Path("latentrevise-demo"),
    prompts: Annotated[int, typer.Option(help="Prompts to mine in each family.")] = 192,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Compare the strategies on two bundled task families with tiny models; offline, on a CPU, in a few minutes."""
    from latentrevise.demo.run import run_demo

    run_demo(out, prompts=prompts, seed=seed, progress=not quiet)


app.add_typer(training.app, name="train")


@command("eval")
def evaluate(
    chosen: Begun,
    data: Annotated[str, typer.Option(help="A benchmark (math-500, aime24, aime25, amc23, ...) or a file of prompts.")],
    out: Out,
    source: Annotated[Path | None, place("A local copy of the benchmark, in place of the hub.")] = None,
) -> None:
    """pass@1 and pass@k with bootstrap intervals, on a benchmark or on prompts of your own."""
    from latentrevise.recovery.evaluate import EvalRunConfig, evaluate_run

    config = chosen.load(EvalRunConfig)
    policy, tokenizer, sampler = _loaded(chosen.model, chosen.engine, config.vllm, chosen.dtype, chosen.device)
    found = evaluate_run(policy, tokenizer, data, config, out, source=source, engine=sampler, progress=not chosen.quiet)
    for name, value in found.items():
        if isinstance(value, list):
            typer.echo(f"{name}: {value[0]:.4f}  [{value[1]:.4f}, {value[2]:.4f}]")
    typer.echo(f"{found['prompts']} prompts, {found['left_out']} left out; {out / 'metrics.json'}")


@app.command()
def doctor(
    run: Annotated[Path | None, typer.Option(help="A mined run: what its failures are, what to change.")] = None,
) -> None:
    """Say what is installed, what this machine can run, and which kernel implementation would serve each op."""
    if run is not None:
        from latentrevise.recovery.diagnosis import run_diagnosis

        typer.echo(run_diagnosis(run))
        return
    from latentrevise.doctor import diagnosis

    typer.echo(diagnosis())


@command()
def config(
    of: Annotated[str, typer.Argument(help=f"Whose: {', '.join(settings.GROUPS)}.")] = "recover",
    schema: Annotated[bool, typer.Option("--schema", help="As a JSON schema, for editors.")] = False,
) -> None:
    """Print a command's settings with their defaults, as YAML that --config reads."""
    import json

    cls = settings.settings_of(of)
    if schema:
        typer.echo(json.dumps(settings.json_schema(cls, of), indent=2))
    else:
        typer.echo(settings.commented_yaml(cls), nl=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run a benchmark by name (none: list them); all words go to `python -m benchmarks`. Needs the source tree."""
    import subprocess

    root = Path(__file__).resolve().parent.parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ConfigError(
            "the benchmarks are not part of the installed package; clone the repository, `pip install -e .` in it, and"
            " run this, or `make bench`, from there"
        )
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-P", "-m", "benchmarks", *context.args]  # nothing of the working directory
    raise typer.Exit(subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, check=False).returncode)


def _begun(chosen: Begun, out: Path, by: Workers = ALONE) -> Recovery:
    from latentrevise.recovery.settings import RecoverConfig

    config = chosen.load(RecoverConfig)
    return _recovery(config, chosen.model, chosen.engine, chosen.dtype, chosen, out, by)


def _resumed(run: Resumed, by: Workers = ALONE) -> Recovery:
    from latentrevise.config import from_dict
    from latentrevise.recovery.rundir import RunDirectory, where_it_is
    from latentrevise.recovery.settings import RecoverConfig

    header = RunDirectory(run.out).read_header()
    config = from_dict(RecoverConfig, header["config"])
    dtype = header["model"]["dtype"] if run.dtype == "auto" else run.dtype
    model = run.model or where_it_is(header, run.out)
    return _recovery(config, model, header["engine"], dtype, run, run.out, by)


def _recovery(
    config: RecoverConfig, model: str, engine: str, dtype: str, placed: Placed, out: Path, by: Workers
) -> Recovery:
    """A run with its model loaded; a driver of Ray workers keeps its own on the CPU and leaves GPUs to them."""
    from latentrevise.recovery.pipeline import Recovery

    where = str(Path(model).absolute()) if Path(model).exists() else model  # a worker may stand in another folder
    scheduler = by.scheduler(partial(_loaded, where, engine, config.vllm, dtype, placed.device))
    device = placed.device if by.ray is None else "cpu"
    policy, tokenizer, sampler = _loaded(model, engine, config.vllm, dtype, device)
    shown: Any = "json" if by.log_json else not placed.quiet
    return Recovery(policy, tokenizer, config, out, engine=sampler, progress=shown, scheduler=scheduler)


def _loaded(model: str, engine: str, vllm: VLLMConfig, dtype: str, device: str | None) -> tuple[Any, Any, Engine]:
    """A model, its tokenizer, and what samples from it."""
    from latentrevise.engines import engine_factory
    from latentrevise.model.loading import load_model

    make = engine_factory(engine)  # a wrong name is told before anything is loaded
    policy, tokenizer = load_model(model, dtype=dtype, device=device)
    return policy, tokenizer, make(policy, tokenizer, vllm)


def _run(recovery: Recovery, work: Callable[[], None], jsonl: bool) -> None:
    """Work, and then the end of the run, where that is this process's."""
    with recovery.session():
        work()
        recovered = recovery.collect() if recovery.scheduler.finishes else None
    if recovered is None:
        typer.echo(f"every part is there; finish with `latentrevise collect --out {recovery.run.path}`")
    else:
        _finish(recovered, jsonl)


def _finish(recovered: Any, jsonl: bool) -> None:
    from rich.console import Console

    from latentrevise.data.storage import write_jsonl
    from latentrevise.report import console_table, write_report

    Console().print(console_table(recovered.metrics))
    if jsonl:
        write_jsonl(recovered.out / "trajectories.jsonl", recovered.trajectories)
    typer.echo(f"{len(recovered.trajectories)} trajectories in {recovered.out / 'trajectories.parquet'}")
    if recovered.metrics["zero_hit"]:
        typer.echo(f"report: {write_report([recovered.out], recovered.out / 'report')}")
    else:
        typer.echo("no prompt is zero-hit, so there was nothing to recover: use harder prompts, or mine fewer rollouts")
    if aside := recovered.metrics["set_aside"]:
        from latentrevise.recovery.stages import described

        for note in aside:
            typer.echo(f"set aside: {described(note)}: {'; '.join(note['reasons'])}", err=True)
        raise typer.Exit(SET_ASIDE)


def main() -> None:
    """Entry point: an error of ours is one line on stderr and exit code 1, Ctrl-C one line and 130; anything else is a
    traceback, with what to do about it."""
    try:
        logging.basicConfig(level=_log_level(), format="%(levelname)s %(message)s")
        app()
    except LatentReviseError as error:
        typer.echo(f"latentrevise: {error}", err=True)
        sys.exit(1)
    except SystemExit as ended:  # Typer makes one of Ctrl-C
        if ended.code == 130:
            begun = sys.argv[1] if len(sys.argv) > 1 else ""
            told = "the same command goes on from here" if begun in _RESUMED else "nothing was begun that could be lost"
            typer.echo(f"latentrevise: interrupted; {told}", err=True)
        raise
    except Exception as error:
        error.add_note(
            "This error was not foreseen: please report it, with this traceback, the command and what `latentrevise"
            " doctor` prints."
        )
        raise


def _log_level() -> str:
    level = os.environ.get("LATENTREVISE_LOG_LEVEL", "WARNING").upper()
    if level not in (known := logging.getLevelNamesMapping()):
        raise ConfigError(f"LATENTREVISE_LOG_LEVEL = {level!r}: choose one of {', '.join(known).lower()}")
    return level
