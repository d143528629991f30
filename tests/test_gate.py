"""The gate's figures from branches whose worth is known, and measured on bundled models by the command."""

import dataclasses
import json

import numpy as np
import pytest

from latentrevise.config import to_dict
from latentrevise.data.storage import write_jsonl
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.errors import ConfigError
from latentrevise.recovery.gate import CHARGED, FREE, GateConfig, _recommended, _verdict
from latentrevise.recovery.guards import auc, bootstrap_mean
from latentrevise.strategies.candidates import Fork
from tests.commands import command


def test_auc_counts_pairs():
    assert auc([3.0, 1.0], [2.0, 1.0]) == pytest.approx((1 + 1 + 0 + 0.5) / 4)
    with pytest.raises(ConfigError, match="at least one"):
        auc([], [1.0])


def test_bootstrap_intervals_cover():
    generator = np.random.default_rng(0)
    covered = 0
    for i in range(200):
        _, low, high = bootstrap_mean(generator.random(60) < 0.3, 300, seed=i)
        covered += low <= 0.3 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_bootstrap_of_a_constant_is_the_constant_and_of_others_holds_the_mean():
    assert bootstrap_mean([0.7] * 5) == pytest.approx((0.7, 0.7, 0.7))
    mean, low, high = bootstrap_mean([0.0, 1.0] * 20)
    assert mean == 0.5
    assert 0.3 < low < 0.4
    assert 0.6 < high < 0.7
    assert bootstrap_mean([]) == (0.0, 0.0, 1.0)


def fork(value, mass):
    return Fork(None, 0, 0, -1.0, 0.5, mass, value)


def test_the_auc_is_within_prompts_and_leaves_out_prompts_of_one_kind():
    # Between prompts the values are worth nothing: what fails in the second scores above what succeeds in the first.
    first = [(fork(-3.0, -5.0), True), (fork(-4.0, -1.0), False), (fork(-5.0, -2.0), False)]
    second = [(fork(-1.0, -9.0), True), (fork(-2.0, -1.0), False)]
    failed = [(fork(-0.1, -1.0), False)]
    found = _verdict([first, second, failed], 3, 2, scoring=2.0, continuing=20.0, checked=False)
    assert found["auc"]["value"] == [1.0, 1.0, 1.0]
    assert found["auc"]["prior"] == [0.0, 0.0, 0.0]
    assert found["auc"]["posterior"][0] == pytest.approx((0.0 + 0.0) / 2)
    assert (found["prompts"], found["prompts_with_both"], found["branches"]) == (3, 2, 6)
    assert found["break_even"] == pytest.approx((FREE + CHARGED) / 2)
    assert found["recommended"] == []
    assert "mine more rollouts" in found["reason"]


def test_what_is_recommended():
    assert _recommended([0.99, 0.97, 1.0], 0.95, 30, False)[0] == ["pivot"]
    assert _recommended([0.77, 0.7, 0.84], 0.95, 30, False)[0] == ["branch-mass"]
    assert _recommended([0.94, 0.9, 0.97], 0.95, 30, False)[0] == ["pivot", "branch-mass"]
    assert _recommended([0.99, 0.97, 1.0], 0.95, 30, True)[0] == ["pivot-checked"]
    assert _recommended([0.94, 0.9, 0.97], 0.95, 30, True)[0] == ["pivot-checked", "branch-checked"]
    assert _recommended([0.77, 0.7, 0.84], 0.95, 30, True)[0] == ["branch-checked"]
    assert _verdict([], 0, 0, 0.0, 0.0, False)["recommended"] == []
    with pytest.raises(ConfigError, match="forks"):
        GateConfig(forks=0)


@pytest.mark.slow
def test_the_command_measures_the_gate_and_audits_the_run(tmp_path):
    family = get_family("rule")
    write_jsonl(tmp_path / "prompts.jsonl", make_prompts(family, 24, split="develop", seed=31))
    config = dataclasses.replace(
        demo_config(family),
        strategies=("pivot",),
        rollouts=6,
        samples=4,
        equal_compute=False,
        gate=GateConfig(prompts=4, forks=8),
    )
    (tmp_path / "config.yaml").write_text(json.dumps(to_dict(config)))
    words = ["audit", "--model", model_dir("rule"), "--prompts", tmp_path / "prompts.jsonl", "--out", tmp_path / "out"]
    words += ["--config", tmp_path / "config.yaml", "--dtype", "float32", "--device", "cpu", "--quiet"]

    def call(*more):
        found = command(*words, *more)
        assert found.returncode == 0, found.stderr
        return found.stdout

    first = call("--gate-only")
    assert "implicit value: 4 solved prompts" in first
    gate = json.loads((tmp_path / "out" / "gate.json").read_text())
    assert 0 < gate["successes"] < gate["branches"] <= 32
    assert gate["scoring_tokens"] > 0
    assert gate["continuation_tokens"] > 0
    assert not (tmp_path / "out" / "metrics.json").exists()
    whole = call()
    assert whole.startswith(first.rstrip())
    assert "unfounded-answer alone" in whole
    assert "Implicit-value gate" in (tmp_path / "out" / "report" / "report.html").read_text()
