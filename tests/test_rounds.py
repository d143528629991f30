"""Continuations in rounds: a recovered prompt is drawn no further, and what is drawn is what one round draws."""

import shutil
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from benchmarks.chaos import content
from latentrevise.data.records import Prompt, Sample, Start, Verdict, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine
from latentrevise.model.loading import load_model
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.rounds import Draw, plans, repeated
from latentrevise.recovery.schedule import Joint
from latentrevise.recovery.settings import RoundsConfig
from latentrevise.revise.revision import ReviseConfig
from latentrevise.strategies.dart import DartConfig

ARMS = ("latent", "pivot", "resample-prefix", "dart", "resample")
PROMPTS, SAMPLES = 24, 6


@pytest.fixture(scope="module")
def rule():
    return load_model(model_dir("rule"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def mined(rule, tmp_path_factory):
    """A folder of rollouts, which are the same for all runs of this page."""
    run = recovery(rule, tmp_path_factory.mktemp("mined") / "out", None)
    run.mine(make_prompts(get_family("rule"), PROMPTS, split="develop", seed=3))
    return run


def recovery(rule, out, mined, scheduler=None, engine=None, **changes):
    """A run that is mined already."""
    small = {"rollouts": 4, "samples": SAMPLES, "revised_rollouts": 2, "chunk": 8, "equal_compute_cap": 20}
    cheap = {"dart": DartConfig(cap=12), "latent": ReviseConfig(steps=1)}
    config = replace(demo_config(get_family("rule")), **{"strategies": ARMS, **small, **cheap, **changes})
    run = Recovery(*rule, config, out, progress=False, scheduler=scheduler, engine=engine)
    if mined is not None:
        run.job.take_prompts(make_prompts(get_family("rule"), PROMPTS, split="develop", seed=3))
        shutil.copytree(mined.run.path / "rollouts", run.run.path / "rollouts")
    return run


@pytest.fixture(scope="module")
def whole(rule, mined, tmp_path_factory):
    return recovery(rule, tmp_path_factory.mktemp("whole") / "out", mined).recover()


@pytest.fixture(scope="module")
def rounds(rule, mined, tmp_path_factory):
    own = RoundsConfig(rounds=4)
    return recovery(rule, tmp_path_factory.mktemp("rounds") / "out", mined, continuations=own).recover()


def samples(out, arm):
    """Of each prompt its samples in order, and whether each gives the answer that its arm aimed at."""
    found = defaultdict(list)
    verdicts = read_records(out / "verdicts" / arm, Verdict)
    for sample, verdict in zip(read_records(out / "samples" / arm, Sample), verdicts, strict=True):
        # Batches of other sizes round log-probs otherwise; nothing else may differ.
        found[sample.prompt_id].append((replace(sample, seconds=0, sampling_logprobs=None), verdict.hits_target))
    return found


def stopped(hits, stop):
    """Rounds of 1, 2, 1 and 2, by hand: where a prompt stops."""
    return next((n for n in (1, 3, 4) if sum(hits[:n]) >= stop), SAMPLES)


@pytest.mark.parametrize("stop", [1, 2])
def test_what_is_drawn_and_who_is_recovered_are_those_of_one_round(rule, mined, whole, rounds, tmp_path, stop):
    if stop > 1:
        own = RoundsConfig(rounds=4, stop_after_correct=stop)
        rounds = recovery(rule, tmp_path / "out", mined, continuations=own).recover()
    counts = Counter()
    assert "pivot@wrong" in whole.metrics["arms"]
    for arm, full in whole.metrics["arms"].items():
        if arm == "resample@equal":
            continue
        own, expected = samples(rounds.out, arm), samples(whole.out, arm)
        starts = [[replace(s, seconds=0) for s in read_records(r.out / "starts" / arm, Start)] for r in (rounds, whole)]
        assert starts[0] == starts[1]
        assert list(own) == list(expected)
        for name, rows in expected.items():
            count = len(rows) if arm == "dart" else stopped([hit for _, hit in rows], stop)
            assert own[name] == rows[:count], (arm, name)
            counts[arm.endswith("@wrong"), count] += arm != "dart"
        now = rounds.metrics["arms"][arm]
        assert (now["recovered"], now["recovered_rate"]) == (full["recovered"], full["recovered_rate"])
        assert now["samples_per_prompt"] == sum(map(len, own.values())) / now["prompts"]
        assert now["compute"]["forward"] == full["compute"]["forward"], "a prefix is cached from its first request on"
        spent = sum(
            len(row.completion_ids) + (row.finish_reason == "stop") for rows in own.values() for row, _ in rows
        ) + sum(start.decoded_tokens for start in starts[0])
        assert now["compute"]["decoded"] == spent <= full["compute"]["decoded"]
        if now["target"] == "gold":
            reads = arm in ("latent", "pivot")
            assert now["wrong_target_rate"] == (full["wrong_target_rate"] if reads else None)
            assert now["admitted"] <= full["admitted"]
    assert all(counts[False, n] for n in ((1, 3, 6) if stop == 1 else (3, 4, 6))), "some should stop after each round"
    assert counts[True, 1] + counts[True, 3], "a wrong answer that is reached ends its arm"


def test_the_control_follows_what_was_spent_and_is_drawn_whole(whole, rounds):
    (less, own), (more, full) = (
        (run.metrics["arms"]["resample@equal"]["samples_per_prompt"], samples(run.out, "resample@equal"))
        for run in (rounds, whole)
    )
    dearest = max(arm["compute"]["per_prompt"] for name, arm in rounds.metrics["arms"].items() if name in ARMS)
    pool = rounds.metrics["arms"]["resample@equal"]
    assert SAMPLES < less < more <= 20
    assert less * pool["compute"]["per_prompt"] / pool["samples_per_prompt"] == pytest.approx(dearest, rel=0.25)
    assert all(own[name] == rows[: int(less)] for name, rows in full.items())


class Interrupted(HFEngine):
    """Ends its process's work in the ``left``-th call from now."""

    left = 10**9

    def generate(self, *args, **kwargs):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        return super().generate(*args, **kwargs)


Interrupted.__name__ = "HFEngine"  # of the run's header


@pytest.mark.parametrize("scheduler", [None, Joint(1, 2)])
def test_a_run_that_is_interrupted_between_rounds_goes_on_to_the_same_rows(rule, mined, rounds, tmp_path, scheduler):
    engine, out = Interrupted(*rule), tmp_path / "out"
    less = {"strategies": ("pivot",), "equal_compute": False, "continuations": RoundsConfig(rounds=4)}
    run = recovery(rule, out, mined, scheduler, engine, **less)
    run.revise()
    engine.left = 6  # of at most four rounds each
    with pytest.raises(KeyboardInterrupt), run.session():
        run.sample()
    assert len(list((out / "samples").rglob("*.parquet"))) == 1
    with run.session():
        run.work()
    expected = {name: rows for name, rows in content(rounds.out).items() if name.split("/")[1:2] == ["pivot"]}
    assert len(expected) == 3 * 4, "mixtures, of which there are none, have a file too"
    assert {name: rows for name, rows in content(out).items() if name in expected} == expected


def start(name, prompt="p", n=1, rounds=1):
    return Start(f"a/{prompt}/{name}", prompt, None, "7", (), (5, 6), False, False, n, 0, 0, 0, 0.0, rounds=rounds)


def test_rounds_take_the_samples_of_a_prompt_in_the_order_of_its_starts():
    first, second, third, other = start(0, n=3), start(1), start(2, n=3), start(0, "q", n=2)
    found = plans([first, second, third, other], RoundsConfig(rounds=3, stop_after_correct=2))
    assert [list(own) for own in found["p"].rounds] == [
        [Draw(first, 0, 0, 2)],
        [Draw(first, 0, 2, 1), Draw(second, 0, 0, 1)],
        [Draw(third, 0, 0, 3)],
    ]
    assert [list(own) for own in found["q"].rounds] == [[Draw(other, 0, 0, 1)], [Draw(other, 0, 1, 1)]]
    assert found["p"].stop == 2
    # Rounds of a strategy's own stay its own.
    dart = start(0, n=4, rounds=3)
    own = plans([dart], RoundsConfig(rounds=2, stop_after_correct=2))["p"]
    assert ([list(draws) for draws in own.rounds], own.stop) == ([[Draw(dart, k, 0, 4)] for k in range(3)], 1)
    drawn = {first.start_id: 3, second.start_id: 1, other.start_id: 1}
    again = repeated([first, second, third, other], drawn, RoundsConfig(rounds=3))
    assert again == {first.start_id: 1, second.start_id: 0, other.start_id: 0}
    assert repeated([dart], {dart.start_id: 8}, RoundsConfig()) == {dart.start_id: 1}


def test_an_engine_without_shared_prefixes_is_charged_for_each_request(rule, mined, tmp_path, monkeypatch):
    monkeypatch.setattr(HFEngine, "shares_prefixes", False)
    own = RoundsConfig(rounds=SAMPLES)
    settings = {"strategies": ("resample-prefix", "dart"), "audit": False, "equal_compute": False}
    found = recovery(rule, tmp_path / "out", mined, continuations=own, **settings).recover()
    lengths = {p.id: len(p.ids) for p in read_records(found.out / "prompts.parquet", Prompt)}
    for arm, size in (("resample-prefix", 1), ("dart", SAMPLES)):
        starts = {s.start_id: s for s in read_records(found.out / "starts" / arm, Start)}
        rows = Counter(sample.start_id for sample in read_records(found.out / "samples" / arm, Sample))
        read = {name: lengths[s.prompt_id] + len(s.plain_ids) for name, s in starts.items()}
        # Each sample is a round here (of dart: six are); a start that no round came to is charged as it was proposed.
        assert found.metrics["arms"][arm]["compute"]["forward"] == sum(
            max(rows[name] // size, 1) * tokens for name, tokens in read.items()
        )
        assert len(rows) < len(starts) or arm == "dart"
