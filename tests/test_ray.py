"""Ray workers: the rows of one process, through deaths of workers, and without a part that kills them."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.chaos import content
from latentrevise import RecoverConfig, recover
from latentrevise.cli import app
from latentrevise.engines import HFEngine
from latentrevise.errors import ConfigError, InputError, RunError
from latentrevise.recovery import ray_workers
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.ray_workers import RayWorkers
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.recovery.settings import RayConfig, RoundsConfig
from latentrevise.recovery.stages import Mine, Part
from tests.tiny import tiny_model, tiny_tokenizer

ray = pytest.importorskip("ray", reason="ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # each worker imports torch
ROWS = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(6)]
CONFIG = RecoverConfig(
    rollouts=1,
    samples=2,
    continuations=RoundsConfig(rounds=2),
    max_new_tokens=4,
    strategies=("latent", "resample"),
    chunk=1,
    chat="never",
)
POISON = "4+4="  # its part kills whoever mines it


class Deadly(HFEngine):
    """Kills its process at POISON, always, and once at another prompt."""

    def generate(self, requests, *args, **kwargs):
        own = [tiny_tokenizer().decode(list(r.ids or ())) for r in requests]
        once = Path(os.environ["LATENTREVISE_TEST_ONCE"])
        if POISON in own or ("1+1=" in own and not once.exists()):
            if "1+1=" in own:
                once.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(requests, *args, **kwargs)


Deadly.__name__ = "HFEngine"  # of the run's header


@pytest.fixture(scope="module")
def cluster():
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:
        if "timed out during startup" not in str(error):
            raise
        pytest.skip(f"this machine is too busy for a Ray node, which has 30 s to start: {error}")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    recover(tiny_model(), tiny_tokenizer(), ROWS, CONFIG, out)
    return content(out)


def rows_without(found, prompt):
    """The rows of each folder but those of one prompt."""
    rows = {}
    for name, own in found.items():
        if name.endswith(".parquet") and "/" in name:
            rows.setdefault(name.rpartition("/")[0], []).extend(row for row in own if row["prompt_id"] != prompt)
    return rows


def test_workers_die_and_all_other_rows_are_those_of_one_process(tmp_path, cluster, alone):
    """One worker dies once, and is replaced; one part kills each that runs it, and is set aside."""

    def load():
        os.environ |= {"LATENTREVISE_TEST_ONCE": str(tmp_path / "once")}
        return tiny_model(), tiny_tokenizer(), Deadly(tiny_model(), tiny_tokenizer())

    scheduler, config = RayWorkers("local", 2, load), replace(CONFIG, deaths=2)
    run = Recovery(tiny_model(), tiny_tokenizer(), config, tmp_path / "run", progress=False, scheduler=scheduler)
    metrics = run.recover(ROWS).metrics
    assert (tmp_path / "once").exists(), "no worker died, so this test shows nothing"
    (note,) = metrics["set_aside"]
    assert (note["stage"], note["part"], len(note["reasons"])) == ("mine", 4, 2)
    assert "died" in note["reasons"][0]
    assert metrics["prompts"] == 5
    assert rows_without(content(tmp_path / "run"), None) == rows_without(alone, note["prompts"][0])
    assert ray.is_initialized(), "whoever began it ends it"


class Broken(HFEngine):
    def generate(self, *args, **kwargs):
        raise InputError("request 0: of no use")


Broken.__name__ = "HFEngine"


def test_what_goes_wrong_in_a_worker_is_told(tmp_path, cluster):
    def load():
        return tiny_model(), tiny_tokenizer(), Broken(tiny_model())

    scheduler = RayWorkers("local", 1, load)
    run = Recovery(tiny_model(), tiny_tokenizer(), CONFIG, tmp_path, progress=False, scheduler=scheduler)
    with pytest.raises(InputError, match=r"^request 0: of no use$"):
        run.recover(ROWS)


def test_misuse_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers, "_PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(ray_workers, "_WAIT_SECONDS", 0.01)
    with pytest.raises(RunError, match=r"rollouts/part-00000\.parquet, and it is not here; give a --out"):
        RayWorkers("local", 1)._await_file(RunDirectory(tmp_path), Mine(), Part(0, range(1)))
    with pytest.raises(ConfigError, match="at least 1"):
        RayWorkers("local", 0)
    with pytest.raises(ConfigError, match=r"ray\.resources\.GPU = '1'"):
        RayConfig(resources={"GPU": "1"})
    with pytest.raises(ConfigError, match="an engine cannot be sent"):
        recover(tiny_model(), tiny_tokenizer(), ROWS, CONFIG, tmp_path, engine=HFEngine(tiny_model()), ray="local")
    words = ["recover", "--model", "m", "--prompts", "p", "--out", "o", "--shard", "0/2", "--ray", "local"]
    assert "choose one" in str(CliRunner().invoke(app, words).exception)
