"""Mining in rounds: a prompt that is solved is drawn no further, and everything else is as if it had been."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest

from benchmarks import budgets, rejection
from latentrevise import RecoverConfig
from latentrevise.data.records import Prompt, Rollout, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.errors import ConfigError, RunError
from latentrevise.model.loading import load_model
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.settings import RoundsConfig
from latentrevise.recovery.status import stages
from tests.tiny import tiny_model

PROMPTS, ROLLOUTS = 20, 5


@pytest.fixture(scope="module")
def chain():
    family = get_family("chain")
    return family, *load_model(model_dir("chain"), dtype="float32", device="cpu")


def recovery(chain, out, **changes):
    family, model, tokenizer = chain
    config = replace(demo_config(family), rollouts=ROLLOUTS, chunk=8, strategies=("resample",), samples=1, **changes)
    return Recovery(model, tokenizer, config, out, progress=False)


def prompts(chain):
    return make_prompts(chain[0], PROMPTS, split="develop", seed=3)


@pytest.fixture(scope="module")
def whole(chain, tmp_path_factory):
    run = recovery(chain, tmp_path_factory.mktemp("whole") / "out")
    run.mine(prompts(chain))
    return run


def plain(row):
    return replace(row, sampling_logprobs=None)


def rows(run):
    return {r.sample_id: r for own in run.rollouts().values() for r in own}


@pytest.mark.parametrize("stop", [1, 2])
def test_rounds_draw_the_same_rollouts_and_find_the_same_zero_hit_prompts(chain, whole, tmp_path, stop):
    run = recovery(chain, tmp_path / "out", mine=RoundsConfig(rounds=3, stop_after_correct=stop))
    run.mine(prompts(chain))
    full, own = whole.rollouts(), run.rollouts()
    assert list(own) == list(full)
    counts = Counter()
    for name, rollouts in full.items():
        # Rounds of 1, 2 and 2: by hand, where this prompt stops.
        correct = [r.verdict == "correct" for r in rollouts]
        count = next((n for n in (1, 3) if sum(correct[:n]) >= stop), 5)
        # Batches of other sizes round log-probs otherwise; nothing else may differ.
        assert [plain(r) for r in own[name]] == [plain(r) for r in rollouts[:count]]
        counts[count] += 1
    assert len(counts) == 4 - stop, "some prompts should stop after each round in which they can"
    assert [case.prompt.id for case in run.cases()] == [case.prompt.id for case in whole.cases()]
    assert 0 < len(run.cases()) < PROMPTS
    files = read_records(run.run.path / "rollouts", Rollout)
    assert len(files) == sum(n * k for n, k in counts.items())
    (status,) = stages(run.run)
    drawn = PROMPTS + (PROMPTS - counts[1]) + counts[5]
    assert (status.name, status.prompts) == ("mine", (drawn, drawn))


def test_a_run_that_stopped_between_rounds_goes_on(chain, whole, tmp_path):
    config = {"mine": RoundsConfig(rounds=3)}
    run = recovery(chain, tmp_path / "whole", **config)
    run.mine(prompts(chain))
    expected = rows(run)
    parts = run.run.parts("rollouts")
    later = [path for path in parts if int(path.stem[5:]) >= 3]
    assert len(later) > 2, "each round has parts of its own"
    later[1].unlink()
    stopped = recovery(chain, tmp_path / "whole", **config)
    with pytest.raises(RunError, match=r"of round 2 are mined; finish with `latentrevise mine`"):
        stopped.rollouts()
    kept = {path: path.stat().st_mtime_ns for path in parts if path.exists()}
    stopped.mine(prompts(chain))
    assert rows(stopped) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    # A first part that is mined late moves nothing between the parts of the rounds that are there.
    shutil.copytree(tmp_path / "whole", tmp_path / "late")
    late = recovery(chain, tmp_path / "late", **config)
    for path in late.run.parts("rollouts")[::3]:
        path.unlink()
    late.mine(None)
    assert rows(late) == expected


def test_a_prompt_of_which_a_round_was_given_up_is_not_called_zero_hit(chain, whole, tmp_path):
    config = {"mine": RoundsConfig(rounds=3)}
    run = recovery(chain, tmp_path / "out", **config)
    run.mine(prompts(chain))
    last = run.run.parts("rollouts")[-1]
    kept = run.run.part("rollouts", int(last.stem[5:]) % run.job.chunks)  # all prompts of its chunk
    lost = {r.prompt_id for r in read_records(kept, Rollout)}
    zero_hit = {case.prompt.id for case in whole.cases()}
    assert lost & zero_hit
    place = run.run.aside("rollouts", int(last.stem[5:]))
    place.parent.mkdir(parents=True)
    place.write_text("{}")
    again = recovery(chain, tmp_path / "out", **config)
    assert again.rollouts().keys() == run.rollouts().keys() - lost
    assert {case.prompt.id for case in again.cases()} == zero_hit - lost


def test_samples_of_several_calls_are_those_of_one():
    engine, params = HFEngine(tiny_model()), SamplingParams(n=5, max_new_tokens=8, seed=3)
    whole = engine.generate([Request((1, 7, 9)), Request((1, 8), seed=11)], params)
    for first, n in ((0, 2), (2, 3)):
        part = engine.generate(
            [Request((1, 7, 9), first=first), Request((1, 8), seed=11, first=first)], replace(params, n=n)
        )
        assert [[c.ids for c in own] for own in part] == [[c.ids for c in own[first : first + n]] for own in whole]


@pytest.mark.parametrize(("name", "samples"), [("mine", "rollouts"), ("continuations", "samples")])
def test_settings_that_cannot_be_are_refused(name, samples):
    with pytest.raises(ConfigError, match=rf"{name}\.rounds = 3: 2 {samples} cannot be drawn in more rounds"):
        RecoverConfig(**{name: RoundsConfig(rounds=3), samples: 2})
    with pytest.raises(ConfigError, match=r"stop_after_correct = 0: it must be at least 1"):
        RoundsConfig(stop_after_correct=0)


def mined(*correct):
    """Rollouts of three tokens and an end, by whether they are correct."""
    return [
        Rollout("p", f"p/{i}", (5, 6, 7), "", None, "correct" if c else "wrong", "stop", ())
        for i, c in enumerate(correct)
    ]


def test_the_table_of_budgets_counts_by_hand():
    prompts = [Prompt(name, name, (1, 2), "1") for name in ("easy", "late", "never")]
    rollouts = {
        "easy": mined(1, 0, 0, 0, 1, 0, 0, 0),
        "late": mined(0, 0, 0, 1, 0, 0, 0, 0),
        "never": mined(*[0] * 8),
    }
    assert [budgets.drawn(rollouts[p.id], 6, 2) for p in prompts] == [2, 4, 6]
    uniform, rounds = budgets.bill(prompts, rollouts, 6, 6), budgets.bill(prompts, rollouts, 6, 2)
    assert uniform["passes"] == (18 * 4 + 3 * 2) / 3
    assert rounds["passes"] == (12 * 4 + 6 * 2) / 3
    assert uniform["solved"] == rounds["solved"]
    assert rounds["solved"][0] == 2 / 3


def test_the_table_of_strategies_is_that_of_runs(chain, whole, tmp_path, monkeypatch):
    """``strategies_compared`` holds the bill of rounds against a run's own."""
    monkeypatch.setattr(budgets, "SAMPLES", (4,))
    monkeypatch.setattr(budgets, "MOST_SAMPLES", (4, 6))
    monkeypatch.setattr(budgets, "ROLLOUTS", ROLLOUTS)
    found = budgets.strategies_compared(whole, prompts(chain), tmp_path, 2)
    saved = 0
    for (row,) in found.values():
        uniform, rounds, equal = row["uniform"], row["rounds"], row["equal_compute"]
        assert (uniform["samples"], uniform["read_again"]) == (4, 0)
        assert rounds["recovered"] == uniform["recovered"]
        assert uniform["prompts"] == len(whole.cases())
        assert equal["passes"] <= uniform["passes"]
        saved += uniform["passes"] - rounds["passes"]
    assert saved > 0
    assert f"| resample | 4 | {found['resample'][0]['uniform']['recovered'][0]:.0%} [" in budgets.strategies_text(found)


def test_early_rejection_is_charged_by_hand():
    good = rejection.Watched("a", 20, True, ((5, -1.0), (10, -2.0)), look=3)
    bad = rejection.Watched("a", 30, False, ((5, -9.0), (12, -9.0)), look=3)
    other = rejection.Watched("b", 10, False, ((5, -0.5),), look=3)
    assert rejection.chosen([good, bad], 0, 0.0) == {0: -1.0}
    assert rejection.chosen([good, bad], None, 0.0) == {0: -1.0, 1: -2.0}
    assert rejection.spent(good, {0: -1.0, 1: -2.0}) == (26, False)
    assert rejection.spent(bad, {1: -2.0}) == (15, True)
    assert rejection.spent(other, {1: -2.0}) == (10, False)
    found = rejection.judged([([good, bad, other], {0: -1.0})])
    assert found["saved"] == 1 - (23 + 8 + 13) / 60
    assert (found["lost"], found["yield"]) == (0.0, pytest.approx(60 / 44))
