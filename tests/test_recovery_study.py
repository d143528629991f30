"""The recovery study: pooling over runs by hand-made figures, and one tiny study through its command."""

import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import (
    checkers,
    gate,
    guards,
    harness,
    iterates,
    recovery,
    recovery_strata,
    recovery_tables,
    training,
    training_tables,
)
from benchmarks.__main__ import folder, main
from benchmarks.step_checkers import check_step
from latentrevise.data.records import Rollout, Verdict, write_records
from latentrevise.data.storage import write_json, write_signed
from latentrevise.demo import get_family, make_prompts
from latentrevise.demo.joint import JointFamily
from latentrevise.errors import ConfigError, InputError
from latentrevise.recovery.guards import bootstrap_mean, wilson
from latentrevise.recovery.rundir import RunDirectory
from latentrevise.strategies.pair import PairConfig


def arm(*, recovered, valid, wrong, passes, control, wanted=8):
    resampling = {"valid_rate": [control, 0, 1], "recovered_rate": [control, 0, 1], "wanted": wanted, "samples": 8}
    return {
        "recovered": recovered,
        "valid": valid,
        "wrong_target_rate": wrong,
        "compute": {"per_prompt": passes},
        "seconds": 1.0,
        "control": resampling,
        "control_seconds": resampling | {"valid_rate": [control / 2, 0, 1], "wanted": 8},
        "admitted": 3,
        "admitted_valid": 2,
    }


def metrics(zero_hit, **changes):
    curve = [{"samples": k, "tokens": 10.0 * k, "valid_rate": [0.1 * k], "recovered_rate": [0.2 * k]} for k in (1, 2)]
    return {"zero_hit": zero_hit, "arms": {"pivot": arm(**changes)}, "control_curve": curve}


def test_runs_are_pooled_by_their_zero_hit_prompts():
    first = metrics(30, recovered=20, valid=15, wrong=[0.2, 0, 1], passes=100.0, control=0.1)
    second = metrics(10, recovered=4, valid=1, wrong=[0.4, 0, 1], passes=300.0, control=0.3, wanted=9)
    units = [(recovery.Unit("rule", 0, 0, 40), first), (recovery.Unit("rule", 1, 0, 40), second)]
    pooled = recovery.pool(units, ["pivot"])
    row = pooled["strategies"]["pivot"]
    assert (pooled["mined"], pooled["zero_hit"]) == (80, 40)
    assert row["valid"] == wilson(16, 40)
    assert row["answer"] == wilson(24, 40)
    assert row["valid_by_model"] == {0: 0.5, 1: 0.1}
    assert row["passes"] == pytest.approx((30 * 100 + 10 * 300) / 40)
    assert row["equal_compute"]["valid"] == pytest.approx(wilson(30 * 0.1 + 10 * 0.3, 40))
    assert row["equal_compute"]["short_of_rollouts"] == 1
    assert row["equal_seconds"]["valid"] == pytest.approx(wilson(15 * 0.1 + 5 * 0.3, 40))
    assert row["equal_seconds"]["short_of_rollouts"] == 0
    assert row["seconds"] == pytest.approx(2 / 40)
    assert row["ratio"] == pytest.approx(0.4 / 0.15)
    assert row["selectivity"] == pytest.approx(0.6 / ((30 * 0.2 + 10 * 0.4) / 40))
    assert [point["passes"] for point in pooled["resampling"]] == [10.0, 20.0]
    assert "| `pivot` | 40.0 [26, 55] | 50 / 10 |" in recovery_tables.table("rule", pooled)
    beyond = {"pivot": {"answer": wilson(2, 4), "valid": wilson(1, 4)}}
    whole = recovery_tables.table(
        "rule", pooled | {"strata": {"rollouts": 9, "prompts": {"beyond": 4}, "beyond": beyond}}
    )
    assert "| beyond 9 further rollouts (4): right, valid % | admitted (valid) |" in whole
    assert whole.endswith("| 50, 25 | 6 (4) |")
    document = {"name": "recovery", "families": {"rule": pooled, "pair": pooled}, "units": units}
    cell = "40 [26, 55]; 15; 60; 25"
    assert f"| `pivot` | {cell} | {cell} |" in recovery_tables.brief(document)


def test_guards_are_chosen_on_one_set_of_prompts_and_measured_on_the_others(tmp_path):
    """On the first set a threshold separates all; on the second a valid sample lies below it, an invalid one above."""
    rows = {
        0: [(-0.1 * i, True) for i in range(8)] + [(-2.0 - i, False) for i in range(8)],
        1: [(-0.1, True), (-0.2, True), (-0.3, True), (-5.0, True), (-0.1, False), (-9.0, False)],
    }
    units = [recovery.Unit("rule", 0, seed, 8) for seed in rows]
    for unit in units:
        found = [
            Verdict(f"{i}", "start", "p", "1", "correct", True, False, valid, [], None, None, {"plain": plain})
            for i, (plain, valid) in enumerate(rows[unit.seed])
        ]
        wrong = Verdict("x", "start", "p", "2", "wrong", False, False, False, [], None, None, {"plain": 0.0})
        write_records(RunDirectory(tmp_path / unit.name).part("verdicts", 0, "pivot"), [*found, wrong])
        write_records(RunDirectory(tmp_path / unit.name).part("verdicts", 0, "pivot@wrong"), [wrong])
    (point,) = recovery.guards(units, tmp_path)
    assert point["thresholds"] == {"implausible": pytest.approx(-0.7)}
    assert point["kept"] == wilson(3, 4)
    assert point["contamination"] == wilson(1, 4)
    assert recovery.guards(units[:1], tmp_path) == []


def test_a_combination_of_guards_is_found_and_measured_elsewhere():
    """``plain`` parts all invalid but one, ``used`` that one, ``length`` none; on the other set one valid is lost."""

    def samples(*rows):
        return [({"plain": plain, "used": used, "length": 9.0}, valid) for plain, used, valid in rows]

    good, bad = [(-0.1 * i, 1.0, True) for i in range(20)], [(-5.0, 1.0, False)] * 6
    chosen_on = samples(*good, *bad, (-0.5, 0.2, False))
    others = samples(*good[:11], (-4.0, 1.0, True), (-5.0, 1.0, False), (-0.5, 0.9, False), (-0.5, 1.0, False))
    found = guards.measure(chosen_on, others)
    assert (found["valid"], found["invalid"], found["in_sample"]) == (12, 3, False)
    together = found["together"]["0.95"]
    assert together["thresholds"] == {"implausible": pytest.approx(-1.9), "unused-fact": 1.0}
    assert together["kept"] == wilson(11, 12)
    assert together["let_through"] == wilson(1, 3)
    assert together["contamination"] == wilson(1, 12)
    assert found["none"]["contamination"] == wilson(3, 15)
    assert found["auc"]["length"] == 0.5
    few = guards.measure(chosen_on, others[:3])
    assert (few["in_sample"], few["valid"], few["invalid"]) == (True, 23, 7)
    text = guards.tables({"families": {"rule": few}})
    assert "| rule (23, 7, chosen on the same) | the defaults |" in text
    assert "`implausible` -1.9 `unused-fact` 1 (for 95 % kept)" in text
    with pytest.raises(InputError, match="no finished run"):
        guards.main(argparse.Namespace(runs=[Path("nowhere-m0-p0")]))


def test_the_checkers_benchmark_counts_what_is_kept_and_caught():
    rows = list(checkers.own(3))[:30]
    found = checkers.measure([*rows, replace(rows[0], answer="-7")])
    assert found["alone"]["kept"] == found["against"]["kept"] == wilson(30, 31)
    assert found["alone"]["turned_away"] == {"answer_not_derived": 1}
    assert found["against"]["pasted"] == found["against"]["flipped"] == wilson(30, 30)
    assert found["alone"]["dropped"][0] <= found["against"]["dropped"][0]


def test_the_short_table_has_the_method_the_best_and_resampling():
    names = ("hint", "pivot", "latent", "gcg", "resample")
    arms = {
        name: arm(recovered=9 - i, valid=9 - 2 * i, wrong=[0.2, 0, 1], passes=100.0, control=0.1)
        for i, name in enumerate(names)
    }
    unit = (recovery.Unit("rule", 0, 0, 40), metrics(10, recovered=0, valid=0, wrong=None, passes=1.0, control=0.1))
    unit[1]["arms"] = arms
    (line,) = recovery_tables.summary({"rule": recovery.pool([unit], names)}).splitlines()[2:]
    assert line == "| rule (10) | 50 % (70 %) | `pivot` 70 % (80 %) | 10 % (10 %) |"


def test_steps_are_pooled_and_the_wrong_target_is_there_where_it_was_tried(tmp_path):
    def unit(zero_hit, right, wrong):
        step = {"right": right, "valid": 1, "wrong": wrong, "samples": 8 * zero_hit, "tokens": 80 * right, "markers": 4}
        return {"zero_hit": zero_hit, "aimed_wrong": zero_hit - 1, "steps": [step] * (iterates.STEPS + 1)}

    pooled = iterates.pool([unit(10, 4, 2), unit(6, 2, 1)])
    assert (pooled["zero_hit"], len(pooled["steps"])) == (16, iterates.STEPS + 1)
    step = pooled["steps"][10]
    assert (step["right"], step["valid"], step["wrong"]) == (wilson(6, 16), wilson(2, 16), wilson(3, 14))
    assert (step["tokens"], step["markers"]) == (480 / 128, 8 / 128)
    missing = iterates.pool([unit(10, 4, None)])["steps"][1]
    assert missing["wrong"] is None
    table = iterates.table({"families": {"rule": pooled}, "commits": {"abc": 2}})
    assert "| 10 | 38 [18, 61]; 12; 21 | 41 |" in table
    iterates.figure({"rule": pooled}, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_a_family_is_searched_for_as_many_decisions_as_it_has():
    assert recovery._pairs(get_family("rule")) == recovery._pairs(get_family("pair")) == PairConfig()
    assert recovery._pairs(get_family("pair64")).max_values == 64
    assert recovery._pairs(JointFamily("three", "EFG", rules=16)).decisions == 3


def test_a_document_without_the_markers_is_refused(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("<!-- recovery study: begin -->\nold\n<!-- recovery study: end -->\nrest")
    recovery.publish("new", page)
    assert page.read_text() == "<!-- recovery study: begin -->\nnew\n<!-- recovery study: end -->\nrest"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="needs the lines"):
        recovery.publish("new", page)


@pytest.mark.parametrize("study", [*recovery_tables.SHOWN, "training", "training-real", "gate"])
def test_the_documents_say_what_the_results_say(study):
    root = Path(recovery.__file__).parent.parent
    document = json.loads((root / f"benchmarks/results/{study}.json").read_text(encoding="utf-8"))

    def published(page, name):
        text = (root / page).read_text(encoding="utf-8")
        return text.split(f"<!-- {name} study: begin -->\n")[1].split(f"\n<!-- {name} study: end -->")[0]

    if study == "training":
        assert published("docs/training.md", study) == training.brief(document)
    elif study == "training-real":
        assert published("docs/training.md", study) == training_tables.tables(document)
    elif study == "gate":
        assert published("docs/audits.md", study) == gate.table(document)
    else:
        assert published("docs/recovery.md", study) == recovery_tables.brief(document)
    if study == "recovery":
        families = recovery_tables.shown_families(root / "benchmarks/results")
        assert published("README.md", study) == recovery_tables.summary(families)


BEFORE, OTHERS = ("gsm-before", "gsm-earlier", "gsm-rivals"), ("gsm-rivals", "gsm-others")


@pytest.mark.parametrize(
    ("strategy", "studies"),
    [
        ("pivot-checked", ("gsm-scored",)),
        ("pivot-trie", BEFORE),
        ("resample-new", (*OTHERS, "gsm-mass")),
        *((name, OTHERS) for name in ("dart", "evocot", "pivot")),
    ],
)
def test_the_page_pools_the_studies_of_word_problems(strategy, studies):
    root, prompts, sums = Path(recovery.__file__).parent.parent, 0, Counter()
    for study in studies:
        found = json.loads((root / f"benchmarks/results/{study}.json").read_text(encoding="utf-8"))["families"]["gsm"]
        row, count = found["strategies"][strategy], found["zero_hit"]
        prompts += count
        sums["seconds"] += count * row["equal_seconds"]["valid"][0]
        sums.update({name: count * row[name][0] for name in ("valid", "answer", "wrong_target")})
        sums.update({name: row[name] for name in ("admitted", "admitted_valid")})
    valid = "{:.0f} [{:.0f}, {:.0f}]".format(*(100 * v for v in wilson(sums["valid"], prompts)))
    admitted = "{admitted} ({admitted_valid})".format(**sums) if sums["admitted"] else "0"
    ratio = f"{sums['answer'] / sums['wrong_target']:.1f}"
    line = (str(prompts), valid, f"{100 * sums['seconds'] / prompts:.0f}", ratio, admitted)
    assert f"| `{strategy}` | {' | '.join(line)} |" in (root / "docs/recovery.md").read_text(encoding="utf-8")


def test_a_small_study_has_its_own_folder():
    def where(name, *words):
        flags = {flag: flag in words for flag in ("quick", "variants", "rivals")}
        families = [word for word in words if word.startswith("gsm")]
        return str(folder(name, argparse.Namespace(families=families or None, **flags)))

    assert where("recovery") == "recovery-study"
    assert where("recovery", "quick") == "recovery-quick"
    assert where("recovery", "variants") == "variants-study"
    assert where("recovery", "rivals") == "rivals-study"
    assert where("recovery", "gsm") == "gsm-study"
    assert where("recovery", "gsm7") == "gsm7-study"
    assert where("recovery", "gsm", "variants") == "gsm-variants-study"
    assert where("recovery", "gsm", "rivals") == "gsm-rivals-study"
    with pytest.raises(ConfigError, match="gsm has no study --quick"):
        where("recovery", "gsm", "quick")
    with pytest.raises(ConfigError, match="variants and rivals are studies of their own"):
        where("recovery", "variants", "rivals")
    assert where("training", "quick") == "training-quick"


def test_a_unit_knows_all_code_that_made_its_rows(tmp_path, monkeypatch):
    unit, run = recovery.Unit("rule", 0, 0, 8), RunDirectory(tmp_path / "rule-m0-p0")
    for name in ("first", "first", "second"):
        monkeypatch.setattr(harness, "commit", lambda name=name: name)
        recovery.note_commit(unit, tmp_path, ["pivot"])
        write_signed(run.header, {"format": 1, "config": {"strategies": ["pivot"]}})
    assert recovery.commits_of(unit, tmp_path) == ["first", "second"]
    write_json(run.metrics, {})
    monkeypatch.setattr(harness, "commit", lambda: "later")
    recovery.note_commit(unit, tmp_path, ["pivot"])
    assert recovery.commits_of(unit, tmp_path) == ["first", "second"], "its rows were there already"
    recovery.note_commit(unit, tmp_path, ["pivot", "resample"])
    assert recovery.commits_of(unit, tmp_path) == ["first", "second", "later"], "those of another strategy were not"
    run.metrics.unlink()
    unit.commits(tmp_path).unlink()
    recovery.note_commit(unit, tmp_path, ["pivot"])
    assert recovery.commits_of(unit, tmp_path) == [harness.NOT_RECORDED, "later"]


def test_strata_are_what_the_controls_rollouts_reach(tmp_path):
    """Two runs: `easy` is right once among the control's rollouts, `hard` and `other` never."""

    def write(run, arm, *found):
        rows = [
            Verdict(f"{i}", "s", prompt, "1", verdict, False, False, valid, [], None, None)
            for i, (prompt, verdict, valid) in enumerate(found)
        ]
        write_records(RunDirectory(tmp_path / run).part("verdicts", 0, arm), rows, Verdict)

    write("a", "resample@equal", ("easy", "wrong", False), ("easy", "correct", False), ("hard", "wrong", False))
    write("a", "pivot", ("easy", "correct", True), ("easy", "correct", True), ("hard", "correct", False))
    write("b", "resample@equal", ("other", "wrong", False))
    write("b", "pivot", ("other", "correct", True))
    found = recovery_strata.strata([tmp_path / "a", tmp_path / "b"], ["pivot"])
    assert found["rollouts"] == 1
    assert found["prompts"] == {"within": 1, "beyond": 2}
    assert found["within"]["pivot"] == {"answer": wilson(1, 1), "valid": wilson(1, 1)}
    assert found["beyond"]["pivot"] == {"answer": wilson(2, 2), "valid": wilson(1, 2)}
    assert "far" not in found["prompts"]
    rollouts = [
        Rollout(prompt, f"{prompt}/{j}", (1,), "text", "1", verdict, "stop", ())
        for prompt, verdicts in (("hard", ("wrong", "correct")), ("other", ("wrong", "wrong")))
        for j, verdict in enumerate(verdicts)
    ]
    for run, row in (("a", rollouts[:2]), ("b", rollouts[2:])):
        write_records(RunDirectory(recovery_strata.further(tmp_path / run)).part("rollouts", 0), row)
    found = recovery_strata.strata([tmp_path / "a", tmp_path / "b"], ["pivot"])
    assert (found["prompts"], found["far_rollouts"]) == ({"within": 1, "beyond": 2, "far": 1}, 3)
    assert found["far"]["pivot"] == {"answer": wilson(1, 1), "valid": wilson(1, 1)}
    assert found["beyond"]["pivot"] == {"answer": wilson(2, 2), "valid": wilson(1, 2)}
    unit = metrics(3, recovered=1, valid=1, wrong=[0.2, 0, 1], passes=100.0, control=0.1)
    pooled = recovery.pool([(recovery.Unit("gsm", 0, 0, 8), unit)], ["pivot"]) | {"strata": found}
    table = recovery_tables._by_strata(pooled | {"gains": {"pivot": {"valid": (0.25, -0.05, 0.5)}}}, ["pivot"])
    assert "| 1 rollouts fail (2): right, valid | 3 rollouts fail (1): right, valid |" in table
    assert "| +25 [-5, +50] |" in table
    assert "| 20 | 100, 50 | 100, 100 | 0.3 |" in table


def test_a_gain_is_that_over_resampling_in_the_same_seconds(tmp_path):
    """Of four fresh rollouts two are bought; `one` is right in two of them, once validly, `none` never."""

    def write(run, arm, *found):
        rows = [
            Verdict(f"{i}", "s", prompt, "1", "correct" if right else "wrong", False, False, valid, [], None, None)
            for i, (prompt, right, valid) in enumerate(found)
        ]
        write_records(run.part("verdicts", 0, arm), rows, Verdict)

    run, other = RunDirectory(tmp_path / "a"), RunDirectory(tmp_path / "b")
    fresh = [("one", True, True), ("one", True, False), *2 * [("one", False, False)], *4 * [("none", False, False)]]
    write(run, "resample@equal", *fresh)
    write(run, "pivot", ("one", True, False), ("none", True, True))
    write_json(run.metrics, {"arms": {"pivot": {"control_seconds": {"samples": 2}}}})
    write(other, "resample@equal", *3 * [("more", False, False)])
    write(other, "pivot", ("more", False, False))
    write_json(other.metrics, {"arms": {"pivot": {"control_seconds": {"samples": 3}}}})
    found = recovery_strata.gains([run.path, other.path], ["pivot"])
    assert found["pivot"]["answer"] == pytest.approx(bootstrap_mean([1 - 5 / 6, 1.0, 0.0]))
    assert found["pivot"]["valid"] == pytest.approx(bootstrap_mean([-0.5, 1.0, 0.0]))
    write_json(tmp_path / "c" / "metrics.json", {"arms": {"pivot": {"control_seconds": None}}})
    assert recovery_strata.gains([tmp_path / "c"], ["pivot"]) == {}, "no control was drawn"


def test_a_mixture_of_commits_is_said():
    assert harness.provenance("runs", {"abc": 3}) == "Commit of the runs: 3 from abc."
    mixed = harness.provenance("runs", {harness.NOT_RECORDED: 2, "abc": 1})
    assert mixed == "Commit of the runs (several, side by side in one table): 1 from abc, 2 not recorded."
    assert "/" not in harness.commit()


def test_a_part_of_a_study_is_not_published(tmp_path):
    for name in ("recovery", "training"):
        with pytest.raises(ConfigError, match="leave out --quick, --mined, or it"):
            main([name, "--quick", "--mined", "8", "--publish", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_results_do_not_say_where_they_went():
    words = ["training", "--out", "/a b", "--publish", "--json=x.json", "--json", "y.json", "--T", "16"]
    assert harness.command_line(words) == "python -m benchmarks training --publish --T 16"


def test_a_tiny_study_runs_and_is_taken_up_again(tmp_path, capsys):
    command = ["recovery", "--quick", "--mined", "8", "--jobs", "1", "--out", str(tmp_path)]
    assert main([*command, "--strategies", "pivot", "resample"]) == 0
    first = json.loads((tmp_path / "recovery.json").read_text())
    row = first["families"]["rule"]["strategies"]["pivot"]
    assert row["valid"][0] > first["families"]["rule"]["strategies"]["resample"]["valid"][0]
    assert (tmp_path / "recovery.png").stat().st_size > 10_000
    assert "| `pivot` |" in capsys.readouterr().out
    assert main([*command, "--strategies", "pivot", "resample"]) == 0
    again = json.loads((tmp_path / "recovery.json").read_text())
    assert again["families"] == first["families"]
    assert list(first["commits"].values()) == [1]
    assert harness.NOT_RECORDED not in first["commits"]


@pytest.mark.parametrize("name", ["rule", "chain", "pair"])
def test_the_studys_step_checker_holds_with_every_straight_derivation(name):
    """And not with one in which a number, or what is concluded, is another."""
    family = get_family(name)
    for row in make_prompts(family, 8, split="develop", seed=3):
        words = family.solution(family.parse(row["prompt"]))
        steps = " ".join(words[: words.index("\\boxed{") - 1]).split(" ;")[:-1]
        texts = [(" ;".join(steps[:i]) + " ;" * (i > 0), f"{step} ;") for i, step in enumerate(steps)]
        verdicts = [check_step(row["prompt"], *text) for text in texts]
        assert False not in verdicts
        assert verdicts.count(True) >= len(verdicts) / 2
        before, step = next(text for text in texts if "=" in text[1])
        *head, result, end = step.split()
        assert (
            check_step(row["prompt"], before, " ".join([*head, str((int(result) + 1) % family.modulus), end])) is False
        )
    if name != "chain":
        conclusion = next(step for step in steps if step.split()[0] == "so")
        assert check_step(row["prompt"], "", f"{conclusion} ;") is False
        assert check_step(row["prompt"], "", "wait , check A ;") is None
