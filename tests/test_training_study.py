"""The training study: pooling by hand-made cells, the rows of its arms, and one tiny study through its command."""

import json

import pytest

from benchmarks import harness, training
from benchmarks.__main__ import main
from benchmarks.training_plan import ARMS, PUBLISHED, RLVR_RIVALS, SFT_RIVALS
from benchmarks.training_tables import comparison
from latentrevise.demo import check, get_family, make_prompts, model_dir
from latentrevise.errors import RunError
from latentrevise.model.loading import load_model


def cell(arm, scores, kind="sft", order=0, **more):
    return {"kind": kind, "arm": arm, "prompts": 0, "order": order, "scores": scores, **more}


def test_cells_are_pooled_prompt_by_prompt():
    cells = [
        cell("ordinary", {"a": [8, 0, 0], "b": [8, 4, 4]}, different=4),
        cell("pivot", {"a": [8, 4, 2], "b": [8, 8, 4]}, different=3, valid_rows=2),
        cell("pivot", {"a": [8, 8, 4], "b": [8, 8, 8]}, order=1, different=3, valid_rows=1),
        cell("grpo", {"a": [8, 0, 0], "b": [8, 8, 8]}, kind="rlvr", zero_hit=[1.0, 0.5]),
    ]
    pooled = training.pool(cells, {"a", "z"})
    assert (pooled["hard"], pooled["solved"]) == (1, 1)
    pivot = pooled["arms"]["pivot"]
    assert pivot["rates"]["hard pass@1"][0] == pytest.approx(0.75)
    assert pivot["rates"]["hard pass@8"][0] == pytest.approx(1.0)
    assert pivot["rates"]["hard valid@1"][0] == pytest.approx(0.375)
    assert pivot["rates"]["solved valid@1 gain"][0] == pytest.approx(0.75 - 0.5)
    assert pivot["runs"] == [0.25, 0.5]
    assert pivot["means"] == {"different": 3, "valid_rows": 1.5}
    assert pooled["arms"]["grpo"]["zero_hit"] == [1.0, 0.5]
    assert pooled["arms"]["smuggled"]["rates"] == {}
    lines = training.table("rule", pooled, training.QUICK).splitlines()
    assert lines[5].startswith("| sft `ordinary` | 4 of 8 rows | 0.0 [0.0, 0.0] | - | 0.0 | 0.0 [0.0, 0.0]")
    assert any(line.startswith("| sft `pivot` | 3 of 8 rows (1.5 valid) | 37.5 [37.5, 37.5] | 37.5") for line in lines)
    assert any(line.startswith("| rlvr `grpo` | zero-hit 100 → 50 |") for line in lines)
    document = {"families": {"rule": pooled, "chain": pooled}, "cells": {"done": 4}}
    assert "| rlvr `grpo` | 0.0 [0.0, 0.0]; -; 100.0 | 0.0 [0.0, 0.0]; -; 100.0 |" in training.brief(document)


def test_the_papers_comparison_has_the_families_with_all_of_its_arms():
    def pooled(arms):
        kinds = {arm: kind for kind, own in ARMS.items() for arm in own}
        cells = [cell(arm, {"a": [8, 2 if arm == "latent" else 0, 0]}, kinds[arm], different=1) for arm in arms]
        return training.pool([*cells, cell("ordinary", {"a": [8, 1, 0]}, different=1)], {"a"})

    document = {"families": {"rule": pooled(PUBLISHED), "chain": pooled(["start", "grpo"])}}
    *_, head, _, start, grpo, _, dapo, _, sft, _ = comparison(document).splitlines()
    assert head == "| training | paper, 1.5B | paper, 8B | rule: pass@1 / pass@8 | gain of pass@1 | valid@1 |"
    assert start == "| start `start` | 16.05 / 46.67 | 18.24 / 64.36 | 0.0 / 0.0 | - | 0.0 |"
    assert grpo == "| rlvr `grpo` | 14.65 / 44.84 | 19.43 / 62.75 | 0.0 / 0.0 | - | 0.0 |"
    assert dapo.startswith("| rlvr `dapo` | - | - | 0.0 / 0.0 | +0.0 (p 1) |")
    assert sft == "| sft `latent` | 17.62 / 50.50 | 21.26 / 64.46 | 25.0 / 100.0 | +12.5 (p 1) | 0.0 |"
    assert comparison({"families": {"chain": pooled(["start", "grpo"])}}) == ""


def test_a_paired_test():
    assert training.sign_flip([0.0] * 5) == 1.0
    assert training.sign_flip([0.1] * 12) < 0.01
    assert training.sign_flip([0.1, -0.1] * 6) > 0.5


@pytest.mark.slow
@pytest.mark.timeout(1200)  # under a minute on an idle core; several training runs in two spawned processes
def test_a_tiny_study_runs_and_is_taken_up_again(tmp_path, capsys):
    command = ["training", "--quick", "--jobs", "1", "--out", str(tmp_path)]
    assert main(command) == 0
    study = json.loads((tmp_path / "training.json").read_text())
    assert sum(study["commits"].values()) == study["cells"]["done"]
    assert harness.NOT_RECORDED not in study["commits"]
    arms = study["families"]["rule"]["arms"]
    assert set(arms) == {"start", *training.SFT, *training.RLVR}
    assert "| sft `pivot` |" in capsys.readouterr().out
    assert (tmp_path / "training.png").stat().st_size > 10_000
    cells = {path: json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()}
    assert {c["rows"] for c in cells.values() if c["kind"] == "sft" and c["different"]} == {16}
    sampled = [c for c in cells.values() if c["kind"] == "rlvr" and not training.RLVR[c["arm"]].distill]
    assert all(len(c["zero_hit"]) == 2 for c in sampled)
    groups = {c["arm"]: c["group"] for c in sampled}
    assert (groups["grpo"], groups["grpo n=16"]) == (8, 16)
    for arm, what in training.RLVR.items():
        if what.equal_to:  # as many rollouts more as the repair's passes would have been
            (paid,) = [c for c in sampled if c["arm"] == what.equal_to]
            more = paid["repair_passes"] / paid["sampled_tokens"] / 4
            assert groups[arm] == round(8 * (1 + more)) > 8
    assert arms["grpo + pivot"]["means"]["recovered_rows"] > arms["grpo"]["means"]["recovered_rows"] == 0

    # Of an arm's rows half are ordinary and correct; its own are what its name says.
    prompts = make_prompts(get_family("rule"), training.QUICK.mined, split="train", seed=0)
    answers = {p["prompt"]: p["answer"] for p in prompts}
    _, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    for arm, valid in (("smuggled", {False}), ("pivot", {True, False})):
        made = training.Cell("rule", "sft", arm, 0, 0)
        rows, counts = training.rows_of(made, tokenizer, tmp_path, training.QUICK)
        assert [row["strategy"] == "ordinary" for row in rows] == [True] * 8 + [False] * 8
        found = [check(row["prompt"], "", row["completion"], answers[row["prompt"]]) for row in rows]
        assert all(d.correct for d in found)
        assert {d.valid for d in found[8:]} <= valid
        assert len({tuple(row["input_ids"]) for row in rows[8:]}) == counts["different"]

    # A cell that is missing is made again, to the same scores; the others are left alone.
    gone = next(path for path, c in cells.items() if c["arm"] == "smuggled")
    gone.unlink()
    times = {path: path.stat().st_mtime_ns for path in cells if path != gone}
    assert main(command) == 0
    assert json.loads(gone.read_text())["scores"] == cells[gone]["scores"]
    assert times == {path: path.stat().st_mtime_ns for path in times}
    again = json.loads((tmp_path / "training.json").read_text())
    assert again["families"]["rule"]["arms"]["pivot"] == arms["pivot"]

    # The rivals are added to a study that was begun without them, and nothing of it is made again.
    assert main([*command, "--rivals"]) == 0
    assert times == {path: path.stat().st_mtime_ns for path in times}
    added = {path: json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir() if path not in cells}
    assert {c["arm"] for c in added.values()} == {*SFT_RIVALS, *RLVR_RIVALS}
    more = json.loads((tmp_path / "training.json").read_text())["families"]["rule"]["arms"]
    assert set(more) == {*arms, *SFT_RIVALS, *RLVR_RIVALS}
    path, made = next((path, c) for path, c in added.items() if c["arm"] == "grpo + self-hint")
    path.write_text(json.dumps(made | {"defined": made["defined"] | {"loss": "sign"}}))
    with pytest.raises(RunError, match="another definition"):
        training.run(training.Cell("rule", "rlvr", "grpo + self-hint", 0, 0), tmp_path, training.QUICK)
    # Starts: from the longest to the prompts alone.
    made = training.Cell("rule", "rlvr", "prefix-rl", 0, 0)
    starts = training.starts(made, "pivot", tokenizer, tmp_path, training.QUICK)
    assert len(starts) == training.QUICK.rl_steps * training.QUICK.rl_groups
    assert all(start.text.startswith(tuple(answers)) for start in starts)
    assert len(starts[0].ids) > len(starts[-1].ids)
    assert starts[-1].text in answers


def test_other_sizes_need_another_folder(tmp_path):
    training.begin(tmp_path, "training study", training.Sizes(), training.plan())
    (tmp_path / "cells").mkdir()  # something was computed
    with pytest.raises(RunError, match="other settings"):
        main(["training", "--quick", "--out", str(tmp_path)])
