"""The benchmark of a step's cost: ratios by hand, and one round through its command."""

import json

import pytest

from benchmarks import rlvr_cost
from benchmarks.__main__ import main


def part(seconds, mib, **parts):
    return {"seconds": seconds, "mib": mib, "parts": parts, "zero_hit/frac_groups": 0.5, "time/revise_s": 0.0}


def test_ratios_are_of_the_same_round():
    rounds = [
        {"n8": part(1.0, 10.0), "n8 + repair": part(1.5, 11.0, propose=0.4), "n16": part(2.0, 20.0)},
        {"n8": part(10.0, 10.0), "n8 + repair": part(12.0, 10.0, propose=1.6), "n16": part(18.0, 16.0)},
    ]
    arms = rlvr_cost.summary(rounds)["arms"]
    assert arms["n8 + repair"]["time_ratio"][0] == pytest.approx(1.35)
    assert arms["n8 + repair"]["memory_ratio"][0] == pytest.approx(1.05)
    assert arms["n8 + repair"]["parts"] == {"propose": pytest.approx(1.0)}
    assert arms["n16"]["time_ratio"][0] == pytest.approx(1.9)
    line = rlvr_cost.table("rule", rlvr_cost.summary(rounds)).splitlines()[5]
    assert line.startswith("| n8 + repair | 6.75 | 10 | 0.50 | 1.35 [1.20, 1.50] | 1.05 [1.00, 1.10] | 1.24, 1.03 |")


@pytest.mark.slow
def test_one_round_through_the_command(tmp_path):
    words = ["rlvr_cost", "--rounds", "1", "--seeds", "0", "--families", "rule", "--cost-prompts", "2"]
    assert main([*words, "--json", str(tmp_path / "cost.json")]) == 0
    found = json.loads((tmp_path / "cost.json").read_text())
    arms = found["families"]["rule"]["arms"]
    assert set(arms) == set(rlvr_cost.ARMS)
    assert set(arms["n8 + repair"]["parts"]) == {"propose", "sampled", "judged"}
    assert not arms["n16"]["parts"]
    assert found["commit"]
