"""A run directory: what a recovery has done so far, in files that are either whole or absent.

Work is cut into parts of ``config.chunk`` prompts. A part is written once, atomically, and never changed; resuming
means computing the parts that are not there. Since a part's result depends on its own prompts and on the settings
alone, a run that was killed and resumed ends with the same rows as one that was not.

Layout: ``run.json`` (settings, model, versions), ``prompts.parquet``, ``errors.jsonl``, ``rollouts/``, then
``starts/``, ``samples/`` and ``verdicts/`` with a folder for each arm, and the results ``trajectories.parquet``,
``atoms.safetensors``, ``metrics.json`` (and ``gate.json``, where it was measured). An evaluation has ``rollouts/``,
``scores/`` and its metrics.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrevise.config import config_hash, to_dict
from latentrevise.data.records import write_json
from latentrevise.errors import RunError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from latentrevise.engines import Engine

FORMAT = 1
# What may differ between a run and its resumption: it changes no row. A model is known by its weights, not its place,
# and the data of an evaluation by its rows.
_VOLATILE = ("created", "versions", "model.path", "data.name")


class RunDirectory:
    """Paths and state of one run. Nothing is created before ``begin``."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def header(self) -> Path:
        return self.path / "run.json"

    @property
    def prompts(self) -> Path:
        return self.path / "prompts.parquet"

    @property
    def errors(self) -> Path:
        return self.path / "errors.jsonl"

    @property
    def trajectories(self) -> Path:
        return self.path / "trajectories.parquet"

    @property
    def atoms(self) -> Path:
        return self.path / "atoms.safetensors"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def gate(self) -> Path:
        return self.path / "gate.json"

    @property
    def report(self) -> Path:
        return self.path / "report"

    def part(self, stage: str, index: int, arm: str = "") -> Path:
        return self.path / stage / arm / f"part-{index:05d}.parquet"

    def parts(self, stage: str, arm: str = "") -> list[Path]:
        return sorted((self.path / stage / arm).glob("part-?????.parquet"))

    def read_header(self) -> dict[str, Any]:
        if not self.header.is_file():
            raise RunError(
                f"{self.path} holds no run (there is no run.json); start one with `latentrevise mine` or"
                " `latentrevise recover`"
            )
        try:
            header = json.loads(self.header.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.header} can't be read ({error}); restore it or start a new run elsewhere") from error
        if header.get("format") != FORMAT:
            raise RunError(
                f"{self.header} is of format {header.get('format')!r}, this version reads {FORMAT}; use the version"
                " that wrote it"
            )
        return header

    def begin(self, header: dict[str, Any]) -> bool:
        """Create the directory, or take up the run in it; True when there was one.

        Raises RunError when the run there has other settings or another model, or when the directory can't be written.
        """
        header = json.loads(json.dumps({"format": FORMAT, **header}))
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output directory {self.path} can't be made ({error}); choose another with --out"
            ) from error
        if self.header.exists():
            changed = sorted(_differences(self.read_header(), header))
            if changed:
                raise RunError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}); resume it with its own"
                    " settings, or"
                    " choose another --out"
                )
            return True
        strangers = [p.name for p in self.path.iterdir() if not p.name.startswith(".")]
        if strangers:
            raise RunError(
                f"{self.path} is not empty ({', '.join(sorted(strangers)[:3])}) and holds no run; choose an empty"
                " or new --out"
            )
        write_json(self.header, header)
        return False

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; the lock goes with the process, however it ends."""
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise RunError(f"another process works on {self.path}; wait for it, or choose another --out") from error
            yield


def _differences(old: dict[str, Any], new: dict[str, Any], path: str = "") -> Iterator[str]:
    for key in old.keys() | new.keys():
        name = f"{path}{key}"
        if name in _VOLATILE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.")
        elif a != b:
            yield f"{name}: {a!r} there, {b!r} now"


def run_header(model: PreTrainedModel, config: Any, engine: Engine) -> dict[str, Any]:
    """What ``run.json`` says of a run: settings, engine, model, versions."""
    import torch
    import transformers

    from latentrevise import __version__

    return {
        "config": to_dict(config),
        "config_hash": config_hash(config),
        "engine": type(engine).__name__,
        "model": {
            "path": str(model.config._name_or_path),
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": _fingerprint(model),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "latentrevise": __version__,
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _fingerprint(model: PreTrainedModel) -> str:
    """Tells one model from another: names, shapes and 64 values spread over each parameter."""
    import torch

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        spread = torch.linspace(0, len(flat) - 1, min(64, len(flat))).long().to(flat.device)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[spread].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
