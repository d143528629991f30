"""The command line: every step of a recovery, the whole of it, and what surrounds it."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from latentrevise.errors import ConfigError, LatentReviseError
from latentrevise.train import commands as training

if TYPE_CHECKING:
    from latentrevise.engines import Engine, VLLMConfig
    from latentrevise.recovery.pipeline import Recovery

app = typer.Typer(
    help="Recover zero-hit prompts: revise failed reasoning in embedding space, continue, verify (arXiv 2606.29938).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Out = Annotated[Path, typer.Option(help="Run directory; taken up where it stopped if it holds this run.")]
Model = Annotated[str, typer.Option(help="Directory or hub id of a causal LM of transformers.")]
Prompts = Annotated[Path, typer.Option(help="JSONL, JSON, parquet or CSV with a prompt and an answer in each row.")]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file of settings.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="One setting, key=value (latent.steps=20); may be repeated.")
]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as the weights are stored.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; if left out the first GPU, or else the CPU.")]
Sampler = Annotated[str, typer.Option("--engine", help="Where samples come from: hf, the model itself, or vllm.")]
Jsonl = Annotated[bool, typer.Option("--jsonl", help="Write trajectories.jsonl beside the parquet file.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bars.")]


@app.command()
def recover(
    model: Model,
    prompts: Prompts,
    out: Out,
    config: ConfigFile = None,
    settings: Set = None,
    engine: Sampler = "hf",
    dtype: Dtype = "auto",
    device: Device = None,
    jsonl: Jsonl = False,
    quiet: Quiet = False,
) -> None:
    """Mine, revise, continue, verify: the whole job. Prints the table, writes the trajectories, metrics and report."""
    _finish(_recovery(model, out, config, settings, engine, dtype, device, quiet).recover(prompts), jsonl)


@app.command()
def mine(
    model: Model,
    prompts: Prompts,
    out: Out,
    config: ConfigFile = None,
    settings: Set = None,
    engine: Sampler = "hf",
    dtype: Dtype = "auto",
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Sample and verify rollouts; find the prompts that no rollout solves. Starts a run that the next steps take up."""
    recovery = _recovery(model, out, config, settings, engine, dtype, device, quiet)
    with recovery.session():
        recovery.mine(prompts)
        typer.echo(f"{len(recovery.cases())} of {len(recovery.prompts)} prompts are zero-hit")


@app.command()
def revise(out: Out, dtype: Dtype = "auto", device: Device = None, quiet: Quiet = False) -> None:
    """Let every strategy of a mined run propose its prefixes."""
    with (recovery := _resumed(out, dtype, device, quiet)).session():
        recovery.revise()


@app.command("continue")
def continue_(out: Out, dtype: Dtype = "auto", device: Device = None, quiet: Quiet = False) -> None:
    """Sample continuations from the proposed prefixes, and the equal-compute control."""
    with (recovery := _resumed(out, dtype, device, quiet)).session():
        recovery.sample()


@app.command()
def verify(
    out: Out,
    dtype: Dtype = "auto",
    device: Device = None,
    jsonl: Jsonl = False,
    quiet: Quiet = False,
) -> None:
    """Judge the continuations, gather what the guards admit, print the table and write the report."""
    with (recovery := _resumed(out, dtype, device, quiet)).session():
        recovery.verify()
        recovered = recovery.collect()
    _finish(recovered, jsonl)


@app.command()
def audit(
    model: Model,
    prompts: Prompts,
    out: Out,
    config: ConfigFile = None,
    settings: Set = None,
    engine: Sampler = "hf",
    dtype: Dtype = "auto",
    device: Device = None,
    gate_only: Annotated[
        bool, typer.Option("--gate-only", help="Stop after the gate: it needs the mined rollouts alone.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Say what recovery is worth on these prompts: which strategy before compute is spent, then what the answers of
    each are worth, and what the guards turn away. Takes up a run of `recover`, and `recover` takes up one of these."""
    from rich.console import Console

    from latentrevise.report.audits import audit_table, gate_text, guard_table

    console, recovery = Console(), _recovery(model, out, config, settings, engine, dtype, device, quiet)
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


@app.command()
def export(
    run: Annotated[Path, typer.Option(help="A finished run directory.")],
    to: Annotated[str, typer.Option(help="Format: trl-sft, trl-pref, messages, verl-sft, verl-rl or rl.")],
    out: Annotated[Path, typer.Option(help="File to write: .jsonl or .parquet.")],
    strategy: Annotated[str | None, typer.Option(help="Only the trajectories of this strategy.")] = None,
    valid_only: Annotated[bool, typer.Option("--valid-only", help="Only those with a derivation found valid.")] = False,
) -> None:
    """Write a run's trajectories as a trainer's data set."""
    from latentrevise.data.exports import export_run

    count = export_run(run, to, out, strategy=strategy, valid_only=valid_only)
    typer.echo(f"{count} rows in {out}")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="One or more finished run directories.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the report; RUN/report if left out.")] = None,
) -> None:
    """Write the report of finished runs: one self-contained HTML file, and PNG figures beside it."""
    from latentrevise.report import write_report

    typer.echo(write_report(runs, out or runs[0] / "report"))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and the report.")] = Path("latentrevise-demo"),
    prompts: Annotated[int, typer.Option(help="Prompts to mine in each family.")] = 192,
    seed: Annotated[int, typer.Option(help="Seed of prompts and sampling.")] = 0,
    quiet: Quiet = False,
) -> None:
    """Compare the strategies on two bundled task families with tiny models; offline, on a CPU, in a few minutes."""
    from latentrevise.demo.run import run_demo

    run_demo(out, prompts=prompts, seed=seed, progress=not quiet)


app.add_typer(training.app, name="train")


@app.command("eval")
def evaluate(
    model: Model,
    data: Annotated[str, typer.Option(help="A benchmark (math-500, aime24, aime25, amc23, ...) or a file of prompts.")],
    out: Out,
    source: Annotated[Path | None, typer.Option(help="A local copy of the benchmark, in place of the hub.")] = None,
    config: ConfigFile = None,
    settings: Set = None,
    engine: Sampler = "hf",
    dtype: Dtype = "auto",
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """pass@1 and pass@k with bootstrap intervals, on a benchmark or on prompts of your own."""
    from latentrevise.config import load_config
    from latentrevise.recovery.evaluate import EvalRunConfig, evaluate_run

    chosen = load_config(EvalRunConfig, config, settings or [])
    policy, tokenizer, sampler = _loaded(model, engine, chosen.vllm, dtype, device)
    found = evaluate_run(policy, tokenizer, data, chosen, out, source=source, engine=sampler, progress=not quiet)
    for name, value in found.items():
        if isinstance(value, list):
            typer.echo(f"{name}: {value[0]:.4f}  [{value[1]:.4f}, {value[2]:.4f}]")
    typer.echo(f"{found['prompts']} prompts, {found['left_out']} left out; {out / 'metrics.json'}")


@app.command()
def doctor() -> None:
    """Say what is installed, what this machine can run, and which kernel implementation would serve each op."""
    from latentrevise.doctor import diagnosis

    typer.echo(diagnosis())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def bench(context: typer.Context) -> None:
    """Run a benchmark by name (none: list them); all words go to `python -m benchmarks`. Needs the source tree."""
    import subprocess

    root = Path(__file__).resolve().parent.parent
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ConfigError(
            "the benchmarks are not part of the installed package; clone the repository, `pip install -e .` in it, and"
            " run this, or `make bench`, from there"
        )
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    words = [sys.executable, "-m", "benchmarks", *context.args]
    raise typer.Exit(subprocess.run(words, env=os.environ | {"PYTHONPATH": path}, check=False).returncode)


def _recovery(
    model: str,
    out: Path,
    config: Path | None,
    settings: list[str] | None,
    engine: str,
    dtype: str,
    device: str | None,
    quiet: bool,
) -> Recovery:
    from latentrevise.config import load_config
    from latentrevise.recovery.pipeline import Recovery
    from latentrevise.recovery.settings import RecoverConfig

    chosen = load_config(RecoverConfig, config, settings or [])
    policy, tokenizer, sampler = _loaded(model, engine, chosen.vllm, dtype, device)
    return Recovery(policy, tokenizer, chosen, out, engine=sampler, progress=not quiet)


def _resumed(out: Path, dtype: str, device: str | None, quiet: bool) -> Recovery:
    from latentrevise.config import from_dict
    from latentrevise.recovery.pipeline import Recovery
    from latentrevise.recovery.rundir import RunDirectory
    from latentrevise.recovery.settings import RecoverConfig

    header = RunDirectory(out).read_header()
    stored, chosen = header["model"], from_dict(RecoverConfig, header["config"])
    dtype = stored["dtype"] if dtype == "auto" else dtype
    policy, tokenizer, sampler = _loaded(stored["path"], header["engine"], chosen.vllm, dtype, device)
    return Recovery(policy, tokenizer, chosen, out, engine=sampler, progress=not quiet)


def _loaded(model: str, engine: str, vllm: VLLMConfig, dtype: str, device: str | None) -> tuple[Any, Any, Engine]:
    """A model, its tokenizer, and what samples from it."""
    from latentrevise.engines import engine_factory
    from latentrevise.model.loading import load_model

    make = engine_factory(engine)  # a wrong name is told before anything is loaded
    policy, tokenizer = load_model(model, dtype=dtype, device=device)
    return policy, tokenizer, make(policy, tokenizer, vllm)


def _finish(recovered: Any, jsonl: bool) -> None:
    from rich.console import Console

    from latentrevise.data.records import write_jsonl
    from latentrevise.report import console_table, write_report

    Console().print(console_table(recovered.metrics))
    if jsonl:
        write_jsonl(recovered.out / "trajectories.jsonl", recovered.trajectories)
    typer.echo(f"{len(recovered.trajectories)} trajectories in {recovered.out / 'trajectories.parquet'}")
    if recovered.metrics["zero_hit"]:
        typer.echo(f"report: {write_report([recovered.out], recovered.out / 'report')}")
    else:
        typer.echo("no prompt is zero-hit, so there was nothing to recover: use harder prompts, or mine fewer rollouts")


def main() -> None:
    """Entry point: an error of ours is one line on stderr and exit code 1; anything else is a traceback."""
    logging.basicConfig(level=os.environ.get("LATENTREVISE_LOG_LEVEL", "WARNING"), format="%(levelname)s %(message)s")
    try:
        app()
    except LatentReviseError as error:
        typer.echo(f"latentrevise: {error}", err=True)
        sys.exit(1)
