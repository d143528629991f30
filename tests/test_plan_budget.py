"""Settings for a budget: what they take is counted by hand, and held against runs by the same settings."""

from dataclasses import replace

import pytest

from benchmarks.plan import BAR, by_passes, taken
from latentrevise import RecoverConfig
from latentrevise.config import from_dict, unlike
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.compute import Compute
from latentrevise.model.loading import load_model
from latentrevise.recovery.budget import hours_of, proposal_text, propose
from latentrevise.recovery.estimate import expected, sampled
from latentrevise.recovery.measure import ArmTook, Measured, Tries
from latentrevise.recovery.mined import Glance
from latentrevise.recovery.pipeline import Recovery
from latentrevise.recovery.settings import RoundsConfig


def drawn(*right):
    return [Glance("correct" if c else "wrong", "length", "1", 10) for c in right]


def took(prompts, proposing, sampling, tries, verifying=0.0):
    """An arm; a pass is a second."""
    return ArmTook(
        prompts,
        Compute(forward=proposing, seconds=proposing),
        Compute(decoded=sampling, seconds=sampling),
        verifying,
        {name: Tries(*own) for name, own in tries.items()},
        100,
        None,
    )


CONFIG = RecoverConfig(rollouts=8, samples=4, strategies=("latent", "pivot", "resample"), equal_compute_cap=40)
# Prompts of five tokens: one solved at once, one by its last rollout, two never.
SAMPLE = Measured(
    config=CONFIG,
    usable=40,
    lengths=dict.fromkeys("abcd", 5),
    rollouts={
        "a": drawn(1, 0, 0, 0, 1, 0, 0, 0),
        "b": drawn(0, 0, 0, 0, 0, 0, 0, 1),
        "c": drawn(*[0] * 8),
        "d": drawn(*[0] * 8),
    },
    sampling=300.0,
    verifying=40.0,
    zero_hit=["c", "d"],
    aimed=frozenset("c"),
    arms={
        "latent": took(2, 600, 80, {"c": (4, 0), "d": (4, 0)}),
        "latent@wrong": took(1, 300, 40, {"c": (4, 0)}),
        "pivot": took(2, 100, 60, {"c": (4, 2), "d": (2, 0)}),
        "pivot@wrong": took(1, 50, 30, {"c": (4, 0)}),
        "resample": took(2, 0, 80, {"c": (4, 0), "d": (4, 1)}, verifying=8.0),
        "resample@equal": took(2, 0, 680, {"c": (34, 0), "d": (34, 4)}),
    },
    mined_disk=1000,
    mined_memory=None,
    rest=80,
    gpus=0,
)


def lines(**changes):
    found = expected(SAMPLE, replace(CONFIG, **changes))
    return found, {line.name: line for line in found.costs}


def test_by_its_own_settings_it_is_the_sample_times_as_many_prompts():
    found, of = lines()
    assert {name: line.passes for name, line in of.items()} == {
        "mine": 3400, "latent": 6800, "latent@wrong": 3400, "pivot": 1600, "pivot@wrong": 800, "resample": 800,
        "resample@equal": 6800,
    }  # fmt: skip
    assert found.seconds[0] == 3400 + 6800 + 3400 + 1600 + 800 + 800 + 80 + 6800
    assert of["mine"].stages == {"sample": 3000, "verify": 400}
    assert (of["latent"].prompts, of["latent@wrong"].prompts) == (20, 10)
    assert (found.prompts, found.sampled, found.recovered, found.control) == (40, 4, 20, 34)
    assert found.disk == 10 * (80 + 1000 + 6 * 100)


def test_rounds_by_hand():
    found, of = lines(mine=RoundsConfig(rounds=2))
    # a stops behind its first four; the prompt is read twice by the others.
    assert of["mine"].tokens == 10 * (40 + 3 * 80)
    assert of["mine"].passes == 10 * (40 + 3 * 80 + 5 + 3 * 10)
    assert of["mine"].seconds == pytest.approx(3400 * 315 / 340)
    assert found.zero_hit[0] == 0.5
    assert of["latent"].passes == 6800


def test_fewer_rollouts_make_more_zero_hit_prompts():
    found, of = lines(rollouts=7)
    assert of["mine"].passes == 10 * 4 * 75
    assert found.zero_hit[0] == 0.75, "b was solved by its last"
    assert (of["latent"].passes, of["latent"].prompts) == (6800 * 1.5, 30)
    assert found.recovered == 20, "what is recovered of those that only fewer rollouts miss is not known"


def test_fewer_samples_by_hand():
    found, of = lines(samples=2, equal_compute=False)
    assert of["latent"].passes == 10 * (600 + 40)
    # pivot took two of d's prefixes, all that it had: it takes them again.
    assert of["pivot"].passes == pytest.approx(10 * (100 + 60 * 4 / 6))
    assert of["resample"].stages["verify"] == 40
    # c: two of pivot's four samples are right, so one of six pairs has none; d: half of resample's pairs have it.
    assert found.recovered == pytest.approx(10 * ((1 - 1 / 6) + 1 / 2))


def test_a_chain_by_hand():
    found, of = lines(stop_at_success=True, strategies=("pivot", "resample", "latent"))
    assert [of[name].prompts for name in ("pivot", "resample", "latent")] == [20, 10, 0]
    assert of["resample"].passes == 400
    assert (of["pivot@wrong"].prompts, of["latent@wrong"].prompts) == (10, 0)
    # All of a chain: (160 + 40) / 2 passes a prompt, at 10 a rollout.
    assert found.control == 10
    assert of["resample@equal"].passes == pytest.approx(10 * 680 * 10 / 34)
    assert found.recovered == 20


def test_what_no_prompt_reached_takes_forever():
    sample = replace(SAMPLE, arms=SAMPLE.arms | {"latent": took(0, 0, 0, {})})
    assert expected(sample, CONFIG).seconds[0] == float("inf")
    chain = replace(CONFIG, stop_at_success=True, strategies=("pivot", "resample", "latent"), equal_compute=False)
    assert expected(sample, chain).seconds[0] < 1e4


def test_the_control_follows_the_dearest_strategy():
    found, of = lines(strategies=("pivot", "resample"))
    assert found.control == 8  # 80 passes a prompt, at 10 a rollout
    assert of["resample@equal"].passes == pytest.approx(10 * 680 * 8 / 34)
    assert lines(equal_compute_cap=5)[0].control == 5
    assert lines(equal_compute_cap=2)[0].control == 4, "never fewer than the samples of a strategy"


def proposed(hours, sample=SAMPLE, workers=1):
    found = propose(sample, hours, workers)
    changes = unlike(found.found.config, sample.config)
    assert from_dict(RecoverConfig, unlike(found.found.config, RecoverConfig())) == found.found.config
    assert expected(sample, found.found.config) == found.found
    assert found.fits == (found.found.seconds[0] <= hours * 3600 * workers + 1e-6)
    return found, changes


def test_nothing_is_changed_where_it_fits():
    before = expected(SAMPLE, CONFIG).seconds[0]
    found, changes = proposed(before / 3600)
    assert (found.fits, changes, found.steps) == (True, {}, [])


def test_what_loses_least_goes_first_and_no_further_than_it_must():
    before = expected(SAMPLE, CONFIG).seconds[0]
    assert proposed((before - 1) / 3600)[1] == {"mine": {"rounds": 2}}
    # Rounds save 250, a rollout of the control 200.
    assert proposed((before - 300) / 3600)[1] == {"mine": {"rounds": 2}, "equal_compute_cap": 33}
    assert proposed((before - 500) / 3600)[1] == {"mine": {"rounds": 2}, "equal_compute_cap": 32}
    assert proposed((before - 6800) / 3600)[1] == {"equal_compute": False}, "rounds are not needed beside it"
    assert proposed((before - 6800 - 4200) / 3600)[1] == {"equal_compute": False, "audit": False}
    # The cheapest recovers d, the next c, so that latent is given none: control and audit can then stay.
    chain = {"stop_at_success": True, "strategies": ["resample", "pivot", "latent"]}
    assert proposed((before - 6800 - 4200 - 1000) / 3600)[1] == chain


def test_a_larger_step_gives_back_what_smaller_ones_took():
    config = replace(CONFIG, stop_at_success=False, equal_compute=False, audit=False, strategies=("latent", "resample"))
    arms = {"latent": took(2, 6000, 80, {"c": (4, 0), "d": (4, 0)}), "resample": SAMPLE.arms["resample"]}
    sample = replace(SAMPLE, config=config, arms=arms)
    found, changes = proposed(5000 / 3600, sample)
    assert found.fits
    assert changes == {"strategies": ["resample"]}, "without latent there is room for all samples and rollouts"


def test_the_strategy_whose_prompts_cost_most_is_left_out():
    config = replace(CONFIG, equal_compute=False, audit=False, mine=RoundsConfig(rounds=2))
    arms = SAMPLE.arms | {"pivot": took(2, 100, 60, {"c": (4, 0), "d": (2, 2)})}
    sample = replace(SAMPLE, config=config, arms=arms)
    # In a chain latent is given c alone, which none recovers; where that is too much it is left out.
    found, changes = proposed(5900 / 3600, sample)
    assert changes == {"strategies": ["resample", "pivot"]}, "the chain is taken back, its order stays"
    assert found.found.recovered == found.before.recovered == 10


def test_fewer_samples_are_drawn_in_no_more_rounds_than_they_fill():
    config = replace(
        CONFIG, equal_compute=False, audit=False, stop_at_success=True, continuations=RoundsConfig(rounds=4)
    )
    found = proposed(1e-6, replace(SAMPLE, config=config))[0].found.config
    assert (found.samples, found.continuations.rounds) == (1, 1)


def test_fewer_prompts_are_the_last_step_and_less_than_the_sample_is_none():
    least = proposed(1e-6)[0]
    assert not least.fits
    assert least.found.prompts == len(SAMPLE.rollouts)
    with pytest.raises(ConfigError, match=r"no settings fit 1e-06 hours on 1 worker; the least is .*max_prompts=4"):
        proposal_text(least, 1e-6)
    found, changes = proposed(3 * least.found.seconds[0] / 3600)
    assert found.fits
    assert 8 <= changes["max_prompts"] <= 12
    assert proposed(least.found.seconds[0] / 3600 / 2, workers=2)[0].fits, "two workers have twice the time"


def test_without_a_zero_hit_prompt_nothing_is_proposed():
    arms = dict.fromkeys(SAMPLE.arms, took(0, 0, 0, {}))
    with pytest.raises(InputError, match="none of the 4 measured prompts is zero-hit"):
        propose(replace(SAMPLE, zero_hit=[], aimed=frozenset(), arms=arms), 1.0)


def test_the_words():
    before = expected(SAMPLE, CONFIG).seconds[0]
    found = propose(SAMPLE, (before - 6800 - 4200) / 3600)
    text = proposal_text(found, 3.5, workers=2)
    assert [line for line in text.splitlines() if not line.startswith("#")][-1] == "equal_compute_cap: 40"
    steps = text.splitlines()[3:5]
    assert "equal_compute=false: no row; how far the equal-compute control reaches" in steps[0]
    assert "audit=false: no row; the wrong-target rates" in steps[1]
    assert [float(step.split()[2]) for step in steps] == pytest.approx([6800 / 7200, 4200 / 7200], rel=1e-2)


def test_hours():
    assert (hours_of("12h"), hours_of("90m"), hours_of("0.5h")) == (12, 1.5, 0.5)


@pytest.fixture(scope="module")
def rule(tmp_path_factory):
    """The bundled model, 24 of its prompts, and what 12 of them took."""
    family = get_family("rule")
    model, rows = load_model(model_dir("rule"), dtype="float32", device="cpu"), make_prompts(family, 24, seed=11)
    few = {"rollouts": 8, "samples": 4, "equal_compute_cap": 16, "strategies": ("latent", "pivot", "resample")}
    run = Recovery(*model, replace(demo_config(family), **few), tmp_path_factory.mktemp("plan") / "out", progress=False)
    return model, rows, by_passes(sampled(run, rows, 12)[0])


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.6, 0.3, 0.12])
def test_a_run_by_the_proposed_settings_keeps_the_budget(rule, share, tmp_path):
    model, rows, sample = rule
    budget = share * expected(sample, sample.config).passes
    found = propose(sample, budget / 3600)
    assert found.fits
    assert found.found.passes <= budget * 1.001
    took = taken(model, found.found.config, rows, tmp_path / "run").passes
    assert took <= BAR * budget
    assert 1 / BAR <= took / found.found.passes <= BAR
