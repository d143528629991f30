"""Strategies one after another, each on what is left; signals, agreement and selection in the rows of a run."""

import dataclasses
from collections import Counter

import pytest
import torch

from latentrevise import RecoverConfig, recover
from latentrevise.data.records import Sample, Start, Trajectory, Verdict, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.errors import ConfigError, RunError
from latentrevise.model.loading import load_model
from latentrevise.recovery.guards import GuardConfig, guard, wilson
from latentrevise.recovery.pipeline import Recovery


@pytest.fixture(scope="module")
def rule():
    return load_model(model_dir("rule"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def finished(rule, tmp_path_factory):
    family = get_family("rule")
    config = dataclasses.replace(
        demo_config(family),
        strategies=("resample-prefix", "latent-plausible", "resample"),
        stop_at_success=True,
        rollouts=4,
        samples=6,
        chunk=8,
        equal_compute_cap=12,
        guards=GuardConfig(min_agreement=0.25, min_contrast=0.5, min_used=0.5, min_true_steps=0.5),
        step_checker="benchmarks.step_checkers:check_step",
        select="shortest",
        keep=1,
    )
    out = tmp_path_factory.mktemp("chain") / "out"
    rows = make_prompts(family, 40, split="develop", seed=21)
    return recover(*rule, rows, config, out), config, rows


def admitted(out, arm):
    rows = read_records(out / "verdicts" / arm, Verdict)
    return {v.prompt_id for v in rows if v.verdict == "correct" and v.guard is None}


def given(out, arm):
    return {s.prompt_id for s in read_records(out / "starts" / arm, Start)}


def test_each_strategy_gets_what_those_before_it_left(finished):
    recovered, config, _ = finished
    out, arms = recovered.out, recovered.metrics["arms"]
    left = given(out, "resample-prefix")
    assert len(left) == recovered.metrics["zero_hit"]
    done = set()
    for name in config.strategies:
        assert given(out, name) == left - done
        assert arms[name]["prompts"] == len(left - done)
        done |= admitted(out, name)
    assert 0 < len(done) < len(left), "everything or nothing recovered shows nothing"
    assert given(out, "latent-plausible@wrong") <= given(out, "latent-plausible")
    assert given(out, "resample@equal") == left
    chain = recovered.metrics["chain"]
    assert chain["admitted_rate"] == pytest.approx(wilson(len(done), len(left)))
    spent = sum(arms[name]["compute"]["per_prompt"] * arms[name]["prompts"] for name in config.strategies)
    assert chain["per_prompt"] == pytest.approx(spent / len(left))


def test_a_chain_is_taken_up_where_it_stopped(finished, rule):
    recovered, config, _ = finished
    before = read_records(recovered.out / "trajectories.parquet", Trajectory)
    for path in [*(recovered.out / "verdicts").rglob("part-00001.parquet"), recovered.out / "trajectories.parquet"]:
        path.unlink()
    run = Recovery(*rule, config, recovered.out, progress=False)
    with run.session():
        with pytest.raises(RunError, match="latentrevise revise"):
            run.sample()
        run.revise()
        run.sample()
        run.verify()
        assert list(run.collect().trajectories) == before


def test_one_trajectory_a_prompt_and_it_is_the_shortest(finished):
    recovered, config, _ = finished
    rows = recovered.trajectories
    assert {t.rank for t in rows} == {0}
    assert (
        len({t.prompt_id for t in rows})
        == len(rows)
        == len(set().union(*(admitted(recovered.out, n) for n in config.strategies)))
    )
    for name in config.strategies:
        assert recovered.metrics["arms"][name]["kept"] == sum(t.strategy == name for t in rows)
        samples = {v.sample_id: v for v in read_records(recovered.out / "verdicts" / name, Verdict)}
        for t in rows:
            if t.strategy == name:
                rivals = [
                    v
                    for v in samples.values()
                    if v.prompt_id == t.prompt_id and v.verdict == "correct" and v.guard is None
                ]
                assert len(t.completion_ids) <= min(len(v.plain_logprobs) for v in rivals) or t.plain_prefix_ids


def test_signals_are_on_record_and_say_what_the_guards_said(finished):
    recovered, config, _ = finished
    seen, judged = 0, Counter()
    for name in config.strategies:
        for v in read_records(recovered.out / "verdicts" / name, Verdict):
            assert (v.signals is None) == (v.verdict != "correct")
            if v.signals is not None:
                seen += 1
                assert v.signals["agreement"] in (0, 0.25, 0.5, 0.75, 1)
                assert v.signals["plain"] == pytest.approx(sum(v.plain_logprobs) / len(v.plain_logprobs))
                assert guard(v.signals, config.guards) == (v.guard.split(",") if v.guard else [])
                judged[v.signals["true"] < 0.5, "false-step" in (v.guard or "")] += 1
    assert set(judged) <= {(True, True), (False, False)}
    assert judged[False, False], "no sample has steps that the checker holds for true"
    assert seen == recovered.metrics["guards"]["valid"] + recovered.metrics["guards"]["invalid"] - sum(
        v.verdict == "correct" for v in read_records(recovered.out / "verdicts" / "resample@equal", Verdict)
    )


def test_contrast_is_the_answers_lead_over_the_wrong_ones_at_hand(finished, rule):
    """By plain passes of the model, over the answers of failed rollouts and the audit's target."""
    recovered, config, _ = finished
    model, tokenizer = rule
    cases = {case.prompt.id: case for case in Recovery(*rule, config, recovered.out).cases()}

    def encode(text):
        return tokenizer.encode(text, add_special_tokens=False)

    def score(text, answer):
        ids, own = torch.tensor([encode(f"{text} so \\boxed{{ {answer}")]), encode(answer)
        with torch.no_grad():
            logprobs = model(ids).logits[0, -len(own) - 1 : -1].log_softmax(-1)
        return float(logprobs.gather(-1, torch.tensor(own)[:, None]).sum())

    starts = {s.start_id: s for s in read_records(recovered.out / "starts" / "latent-plausible", Start)}
    samples = {s.sample_id: s for s in read_records(recovered.out / "samples" / "latent-plausible", Sample)}
    verdicts = [v for v in read_records(recovered.out / "verdicts" / "latent-plausible", Verdict) if v.signals]
    for v in verdicts[:12]:
        case, sample = cases[v.prompt_id], samples[v.sample_id]
        steps = sample.completion.partition("so \\boxed{")[0]
        text = f"{case.prompt.text} {tokenizer.decode(list(starts[v.start_id].plain_ids))} {steps}"
        others = {r.extracted for r in case.failed if r.extracted} | {case.wrong}
        lead = score(text, case.prompt.answer) - max(score(text, answer) for answer in others)
        assert v.signals["contrast"] == pytest.approx(lead, abs=1e-3)
        assert ("undecided" in (v.guard or "")) is (lead < 0.5)
    assert verdicts


def test_keep_is_none_or_positive():
    with pytest.raises(ConfigError, match="keep"):
        RecoverConfig(keep=0)
