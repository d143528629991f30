"""A run directory: what a recovery has done so far, in files that are either whole or absent.

Work is cut into parts of ``config.chunk`` prompts. A part is written once, atomically, and never changed; resuming
means computing the parts that are not there. Since a part's result depends on its own prompts and on the settings
alone, a run that was killed and resumed ends with the same rows as one that was not.

Layout: ``run.json`` (settings, model, versions), ``prompts.parquet``, ``errors.jsonl``, ``rollouts/``,
``targets.parquet`` (the zero-hit prompts and their wrong targets), ``control.json`` (samples of the equal-compute
control),
``starts/``, ``samples/`` and ``verdicts/`` with a folder for each arm, and the results ``trajectories.parquet``,
``atoms.safetensors``, ``metrics.json`` (and ``gate.json``, where it was measured). An evaluation has ``rollouts/``,
``scores/`` and its metrics. ``plan/`` says which parts each stage has; while several processes are at work ``leases/``
says on what; ``aside/`` says which parts were given up, and why.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentrevise.config import to_dict
from latentrevise.data.leftovers import sweep
from latentrevise.data.records import Prompt, RowError, write_records
from latentrevise.data.storage import read_jsonl, read_signed, stable_hash, write_jsonl, write_signed
from latentrevise.errors import InputError, LatentReviseError, ModelError, RunError
from latentrevise.recovery.leases import Leases

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from latentrevise.engines import Engine

FORMAT = 1
# What may differ between a run and its resumption: it changes no row. A model is known by its weights, not its place,
# the data of an evaluation by its rows, and so are prompts: their file's hash only spares reading it again.
_VOLATILE = ("created", "versions", "model.path", "data.name", "source")


class RunDirectory:
    """Paths and state of one run. It begins when its prompts are there: before, nothing was computed."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).expanduser()
        self._alone = False  # whether this process holds it, and no other

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

    def read_errors(self) -> list[dict[str, Any]]:
        """The rows that were left out, see ``RowError``. Raises InputError."""
        return read_jsonl(self.errors, signed=True)

    def read_gate(self) -> dict[str, Any]:
        return read_signed(self.gate, "delete it and run `latentrevise audit` again")

    def read_control(self) -> dict[str, Any]:
        return read_signed(self.control, "delete it and run again; nothing else is lost")

    def read_plan(self, path: Path) -> dict[str, Any]:
        return read_signed(path, "delete it: the stage writes it anew when it is run")

    @property
    def report(self) -> Path:
        return self.path / "report"

    @property
    def targets(self) -> Path:
        return self.path / "targets.parquet"

    @property
    def control(self) -> Path:
        return self.path / "control.json"

    @property
    def leases(self) -> Path:
        return self.path / "leases"

    def plan(self, stage: str, of: str = "") -> Path:
        """The parts that a stage has of an arm or a round, with their sizes in prompts; it is as old as the stage."""
        return self.path / "plan" / stage / f"{of or 'all'}.json"

    def aside(self, stage: str, index: int, arm: str = "") -> Path:
        """What is known of a part that was given up; where this is, the part counts as absent."""
        return self.path / "aside" / stage / arm / f"part-{index:05d}.json"

    def part(self, stage: str, index: int, arm: str = "") -> Path:
        return self.path / stage / arm / f"part-{index:05d}.parquet"

    def parts(self, stage: str, arm: str = "") -> list[Path]:
        return [self.part(stage, index, arm) for index in sorted(self.there(stage, arm))]

    def there(self, stage: str, arm: str = "") -> set[int]:
        """Which parts of a stage are done, by one look at their folder."""
        return _numbers(self.path / stage / arm, ".parquet")

    def given_up(self, stage: str, arm: str = "") -> set[int]:
        """Which parts of a stage were given up."""
        return _numbers(self.path / "aside" / stage / arm, ".json")

    def read_header(self) -> dict[str, Any]:
        if not self.header.is_file():
            raise RunError(
                f"{self.path} holds no run (there is no run.json); start one with `latentrevise mine` or"
                " `latentrevise recover`"
            )
        header = read_signed(self.header, "restore it or start a new run elsewhere")
        if header.get("format") != FORMAT:
            raise RunError(
                f"{self.header} is of format {header.get('format')!r}, this version reads {FORMAT}; use the version"
                " that wrote it"
            )
        if "config_hash" in header and stable_hash(header.get("config")) != header["config_hash"]:
            raise RunError(
                f"{self.header}: its settings are not those that were written (their hash differs); restore it or start"
                " a new run elsewhere"
            )
        return header

    def check(self, header: dict[str, Any]) -> bool:
        """Make the directory, or look at the run in it; True when there is one to take up.

        Raises RunError when it has other settings or another model, or when the directory can't be made. A model is
        known by its weights: where they lie in another place now, the run notes it. More strategies behind those that
        it has are no other settings, see ``extend``.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(
                f"output directory {self.path} can't be made ({error}); choose another with --out"
            ) from error
        if self.header.exists() and self.prompts.exists():
            old, new = self.read_header(), _complete(header)
            allowed = ("config.strategies", "config_hash") if _added(old, new) else ()
            changed = sorted(_differences(old, new, allowed=allowed))
            if changed:
                raise RunError(
                    f"{self.path} holds a run with other settings ({'; '.join(changed)}); resume it with its own"
                    " settings, or choose another --out"
                )
            if old["model"]["path"] != new["model"]["path"]:
                write_signed(self.header, old | {"model": new["model"]})
            return True
        # What a start that came to no prompt leaves behind is in nobody's way.
        own = (self.header.name, self.errors.name, self.prompts.name)
        strangers = [p.name for p in self.path.iterdir() if not p.name.startswith(".") and p.name not in own]
        if strangers:
            raise RunError(
                f"{self.path} is not empty ({', '.join(sorted(strangers)[:3])}) and holds no run; choose an empty"
                " or new --out"
            )
        return False

    def extend(self, header: dict[str, Any]) -> None:
        """Take strategies into the run that were added behind its own: what there is stays, but for what was gathered
        from all of them. Raises RunError where other processes may be at work on it."""
        if not self.header.exists():  # it has not begun
            return
        old, new = self.read_header(), _complete(header)
        if not _added(old, new):
            return
        if not self._alone:
            raise RunError(
                f"{self.path}: strategies are added by one process that holds the run alone; run `latentrevise mine`"
                " with these settings and without --shard first"
            )
        for gathered in (self.metrics, self.trajectories, self.atoms, self.control):
            gathered.unlink(missing_ok=True)
        write_signed(self.header, old | {name: new[name] for name in ("config", "config_hash")})

    def discard(self, arm: str) -> None:
        """Drop what there is of an arm, the last stage first."""
        for stage in ("verdicts", "samples", "starts"):
            if (self.path / stage / arm).exists():
                shutil.rmtree(self.path / stage / arm)

    def begin(self, header: dict[str, Any], prompts: Iterable[Prompt], errors: Sequence[RowError]) -> None:
        """Write what a run starts from: the prompts, and when the last was given the rows left out and the header.
        Raises InputError without any."""

        def and_the_rest() -> Iterator[Prompt]:
            some = False
            for prompt in prompts:
                some = True
                yield prompt
            write_jsonl(self.errors, errors, signed=True)
            if not some:
                raise InputError(f"no usable prompt among {len(errors)} rows; the reasons are in {self.errors}")
            write_signed(self.header, _complete(header))

        write_records(self.prompts, and_the_rest(), Prompt)  # there last: a run without them has not begun

    @contextmanager
    def locked(self, *, shared: bool = False) -> Iterator[None]:
        """Hold the run for this process, or ``shared`` with others that do the same; the lock goes with the process,
        however it ends.

        Who holds it alone sweeps what killed processes left: half-written files, leases. An error that nobody foresaw
        gets a note of what is kept.
        """
        with self._lock(".lock", (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB):
            if not shared:
                sweep(self.path, below=True)
                Leases(self.leases, 0.0).sweep()
                (self.path / ".once").unlink(missing_ok=True)
            self._alone = not shared
            try:
                yield
            except LatentReviseError:
                raise
            except Exception as error:
                error.add_note(f"{self.path} keeps {self.kept()}; the same command goes on from there.")
                raise
            finally:
                self._alone = False

    @contextmanager
    def once(self) -> Iterator[None]:
        """For one process at a time, others wait: between the look whether a file that all share is there and its
        writing."""
        path = self.path / ".once"
        while True:
            with self._lock(path.name, fcntl.LOCK_EX) as file:
                try:
                    if not os.path.samestat(path.stat(), os.fstat(file)):
                        continue
                except FileNotFoundError:
                    continue  # what it waited for is gone; another may hold a new one
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return

    @contextmanager
    def _lock(self, name: str, kind: int) -> Iterator[int]:
        held = ExitStack()
        try:
            file = held.enter_context((self.path / name).open("a+"))
            fcntl.flock(file, kind)
        except BlockingIOError as error:
            raise RunError(
                f"another process works on {self.path}; wait for it, choose another --out, or begin all of them with"
                " --shard to work on one run together"
            ) from error
        except OSError as error:
            raise RunError(
                f"{self.path / name} cannot be locked ({error.strerror or error}); the run directory must be writable"
                " and its file system must have locks"
            ) from error
        with held:
            yield file.fileno()

    def kept(self) -> str:
        """What was computed, in words."""
        stages = ("rollouts", "starts", "samples", "verdicts", "scores")
        counts = {stage: len(list((self.path / stage).rglob("part-*.parquet"))) for stage in stages}
        parts = [f"{n} parts of {stage}" for stage, n in counts.items() if n]
        return ", ".join(["its prompts" if self.prompts.exists() else "nothing yet", *parts])


def _numbers(folder: Path, suffix: str) -> set[int]:
    names = os.listdir(folder) if folder.is_dir() else ()
    return {int(n[5 : -len(suffix)]) for n in names if n.startswith("part-") and n.endswith(suffix)}


def _complete(header: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps({"format": FORMAT, **header})))


def other_prompts(
    read: Sequence[Prompt],
    left_out: Iterable[RowError],
    stored: Sequence[Prompt],
    stored_out: Iterable[Mapping[str, Any]],
) -> bool:
    """Whether other prompts were read than a run has, by what stood in the rows.

    Their ids are not compared: a chat template may print today's date. Where a row is left out one time and not the
    next, since its gold takes long to parse or its template grew, that is no difference.
    """
    doubtful = {e.id for e in left_out} | {
        row["id"] for row in stored_out if row["reason"] in ("unparsable-answer", "over-long-prompt")
    }

    def rows(prompts: Iterable[Prompt]) -> Iterator[Prompt]:
        return (replace(p, ids=()) for p in prompts if p.id not in doubtful)

    return any(a != b for a, b in zip_longest(rows(read), rows(stored)))


def _added(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a run's strategies are the first of those asked for now, and there are more."""
    before, now = (header["config"].get("strategies", []) for header in (old, new))
    return len(now) > len(before) and now[: len(before)] == before


def _differences(
    old: dict[str, Any], new: dict[str, Any], path: str = "", allowed: Sequence[str] = ()
) -> Iterator[str]:
    for key in old.keys() | new.keys():
        name = f"{path}{key}"
        if name in _VOLATILE or name in allowed:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{name}.", allowed)
        elif a != b:
            yield f"{name}: {a!r} there, {b!r} now"


def run_header(model: PreTrainedModel, config: Any, engine: Engine) -> dict[str, Any]:
    """What ``run.json`` says of a run: settings, engine, model, versions."""
    import torch
    import transformers

    from latentrevise import __version__

    elsewhere = getattr(config, "ELSEWHERE", ())
    settings = {name: value for name, value in to_dict(config).items() if name not in elsewhere}
    return {
        "config": settings,
        "config_hash": stable_hash(settings),
        "engine": type(engine).__name__,
        "model": {
            "path": known_place(model),
            "class": type(model).__name__,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(p.numel() for p in model.parameters()),
            "fingerprint": fingerprint(model),
            **({"weights": "dequantised from GGUF"} if known_place(model).endswith(".gguf") else {}),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "latentrevise": __version__,
        },
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def known_place(model: PreTrainedModel) -> str:
    """Where a model was loaded from: a directory in full, or a hub id."""
    name = str(model.config._name_or_path)
    return str(Path(name).resolve()) if name and Path(name).is_dir() else name


def where_it_is(header: dict[str, Any], run: Path) -> str:
    """The place of a run's model. Raises RunError where it is gone, and says how to name another."""
    from latentrevise.model.loading import model_place

    path = str(header["model"]["path"])
    try:
        return model_place(path)
    except ModelError as error:
        raise RunError(f"{run}: its model is not where it was ({error}); name its place with --model") from error


def fingerprint(model: PreTrainedModel) -> str:
    """Tells one model from another: names, shapes and 64 values spread over each parameter."""
    import torch

    from latentrevise.model.loading import spread

    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        places = torch.tensor(spread(len(flat), 64), device=flat.device)
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        digest.update(flat[places].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
