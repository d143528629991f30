"""The strategies that propose tokens: explanations, hints, substitutions, resampling until success."""

import dataclasses

import pytest
import torch

from latentrevise import RecoverConfig, recover
from latentrevise.data.boundary import Boundary
from latentrevise.data.records import Prompt, Sample, Start, Verdict, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.engines import HFEngine, SamplingParams
from latentrevise.errors import ConfigError, InputError
from latentrevise.model.loading import load_model
from latentrevise.model.policy import Policy
from latentrevise.revise.reviser import Reviser
from latentrevise.revise.revision import ReviseConfig
from latentrevise.strategies import Cut, Tools, Work, build, names
from latentrevise.strategies.explain import ExplainConfig
from latentrevise.strategies.gcg import GCGConfig
from latentrevise.strategies.hint import HintConfig
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tools():
    model, tokenizer = tiny_model("qwen3", vocab=97, seed=3), tiny_tokenizer()
    params = SamplingParams(max_new_tokens=8)
    return Tools(Policy(model, tokenizer), HFEngine(model, tokenizer), tokenizer, params, None, None)


def piece(tokenizer, text="xyz", meta=None, target="9"):
    prompt = Prompt("p", text, tuple(tokenizer.encode(text)), target, meta or {})
    cuts = (Cut("p/0", (11, 12, 13, 14, 15), (16, 17)), Cut("p/1", (21, 22), (23,)))
    answer = tuple(tokenizer.encode(target, add_special_tokens=False))
    return Work(prompt, target, (), cuts, answer, tuple(tokenizer.encode("=", add_special_tokens=False)), 0)


def test_explain_is_told_the_answer_and_nothing_is_lost_to_braces(tools):
    config = RecoverConfig(explain=ExplainConfig(template="A{answer}B{prompt}C"))
    work = piece(tools.tokenizer)
    work = dataclasses.replace(work, prompt=dataclasses.replace(work.prompt, text="q{answer}"))
    work = dataclasses.replace(
        work, prompt=dataclasses.replace(work.prompt, ids=tuple(tools.tokenizer.encode(work.prompt.text)))
    )
    ((proposal,),) = build("explain", config).propose(tools, [work], 4)
    assert proposal.context_ids == tuple(tools.tokenizer.encode("A9Bq{answer}C"))
    assert (proposal.n, proposal.plain_ids, proposal.uncached) == (4, (), len(proposal.context_ids))
    with pytest.raises(ConfigError, match=r"\{answer\}"):
        ExplainConfig(template="{prompt}")


def test_explain_asks_behind_the_messages_before_the_question(tools):
    tokenizer = tiny_tokenizer(chat=True)
    said = [("system", "s"), ("user", "a"), ("assistant", "b")]
    before = [{"role": role, "content": text} for role, text in said]

    def encode(question):
        messages = [*before, {"role": "user", "content": question}]
        return messages, tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])

    messages, ids = encode("q")
    prompt = Prompt("p", "s\na\nb\nq", ids, "9", {}, messages)
    strategy = build("explain", RecoverConfig(explain=ExplainConfig(template="{prompt}: {answer}")))
    work = dataclasses.replace(piece(tokenizer), prompt=prompt)
    ((proposal,),) = strategy.propose(dataclasses.replace(tools, tokenizer=tokenizer), [work], 4)
    assert proposal.context_ids == encode("q: 9")[1]


def test_hints_end_behind_a_step_and_before_the_box(tools):
    encode = tools.tokenizer.encode
    solution = "abcdefgh\\boxed{9}"
    strategy = build("hint", RecoverConfig(hint=HintConfig(fractions=(0.9, 0.25))))
    work = piece(tools.tokenizer, meta={"solution": solution})
    ((first, second),) = strategy.propose(tools, [work], 3)
    assert (first.n, second.n) == (2, 1), "the shorter hint gets the larger share"
    assert first.plain_ids == tuple(encode("ab", add_special_tokens=False))
    assert second.plain_ids == tuple(encode("abcdefg", add_special_tokens=False))
    ((first, second),) = strategy.propose(
        dataclasses.replace(tools, boundary=Boundary("c", tools.tokenizer)), [work], 3
    )
    assert first.plain_ids == second.plain_ids == tuple(encode("abc", add_special_tokens=False))
    for meta in ({}, {"solution": "\\boxed{9}"}, {"solution": None}):
        with pytest.raises(InputError, match=r"prompt p has no reference solution.*hint\.column"):
            strategy.propose(tools, [piece(tools.tokenizer, meta=meta)], 2)


def test_gcg_lowers_the_answers_nll_by_exact_scores(tools):
    work = piece(tools.tokenizer)
    before = Reviser(tools.policy, ReviseConfig.answer_only()).value_and_grad([work.rollout(c) for c in work.cuts])
    known = []
    for steps in (1, 3):
        strategy = build("gcg", RecoverConfig(gcg=GCGConfig(steps=steps, candidates=4)))
        (proposals,) = strategy.propose(tools, [work], 3)
        assert [p.n for p in proposals] == [2, 1]
        revised = [
            dataclasses.replace(work.rollout(c), prefix_ids=p.plain_ids)
            for c, p in zip(work.cuts, proposals, strict=True)
        ]
        after = Reviser(tools.policy, ReviseConfig.answer_only()).value_and_grad(revised)
        for cut, proposal, a, b in zip(work.cuts, proposals, after, before, strict=True):
            changed = sum(x != y for x, y in zip(cut.prefix_ids, proposal.plain_ids, strict=True))
            assert changed <= steps
            assert a.guide < b.guide if changed else a.guide == pytest.approx(b.guide)
            assert proposal.compute.backward <= steps * (len(cut.prefix_ids) + 2)
            assert all(bool(tools.policy.allowed[i]) for i in proposal.plain_ids)
        known.append(sum(e.guide for e in after))
    assert known[1] < known[0] < sum(e.guide for e in before)


def test_gcg_takes_the_best_single_substitution_when_all_are_scored(tools):
    """One position: the oracle's one candidate is taken exactly when a plain pass finds it better."""
    work = dataclasses.replace(piece(tools.tokenizer), cuts=(Cut("p/0", (11,), (16,)),))
    ((proposal,),) = build("gcg", RecoverConfig(gcg=GCGConfig(steps=1))).propose(tools, [work], 1)
    evaluate = Reviser(tools.policy, ReviseConfig.answer_only()).value_and_grad
    (here,) = evaluate([work.rollout(work.cuts[0])])
    scores = here.grad @ tools.policy.table.T
    vertex = int(scores.masked_fill(~tools.policy.allowed, torch.inf).argmin())
    (there,) = evaluate([dataclasses.replace(work.rollout(work.cuts[0]), prefix_ids=(vertex,))])
    assert proposal.plain_ids == ((vertex,) if there.guide < here.guide else (11,))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    family = get_family("rule")
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    rows = make_prompts(family, 24, split="develop", seed=5)
    rows = [{**row, "solution": " ".join(family.solution(family.parse(row["prompt"])))} for row in rows]
    config = dataclasses.replace(
        demo_config(family),
        strategies=("explain", "hint", "gcg", "dart", "resample"),
        rollouts=4,
        samples=4,
        equal_compute_cap=8,
        explain=ExplainConfig(template="{prompt} = {answer} ; {prompt}"),
    )
    out = tmp_path_factory.mktemp("text") / "out"
    return recover(model, tokenizer, rows, config, out), config


def test_each_is_sampled_judged_and_charged_as_it_says(run):
    recovered, config = run
    arms = recovered.metrics["arms"]
    assert set(config.strategies) <= set(names())
    assert {"explain@wrong", "gcg@wrong"} <= set(arms)
    assert "hint@wrong" not in arms
    prompts = {p.id: p for p in read_records(recovered.out / "prompts.parquet", Prompt)}
    for start in read_records(recovered.out / "starts" / "explain", Start):
        assert len(start.context_ids) == 2 * len(prompts[start.prompt_id].ids) + 3
        assert start.forward_tokens == len(start.context_ids)
    for start in read_records(recovered.out / "starts" / "hint", Start):
        assert start.plain_ids
        assert start.forward_tokens == len(start.plain_ids)
    assert arms["hint"]["recovered"] > arms["resample"]["recovered"], "half of a solution must help"
    assert arms["gcg"]["compute"]["backward"] > 0


def test_dart_stops_at_the_first_correct_round(run):
    recovered, config = run
    starts = read_records(recovered.out / "starts" / "dart", Start)
    samples = read_records(recovered.out / "samples" / "dart", Sample)
    verdicts = {v.sample_id: v.verdict for v in read_records(recovered.out / "verdicts" / "dart", Verdict)}
    rounds = set()
    for start in starts:
        assert start.rounds == 16
        own = [verdicts[s.sample_id] for s in samples if s.start_id == start.start_id]
        *failed, last = [own[i : i + 4] for i in range(0, len(own), 4)]
        assert all("correct" not in one for one in failed)
        assert "correct" in last or len(own) == config.dart.cap
        rounds.add(len(failed) + 1)
    assert len(rounds) > 1
    texts = {}
    for sample in samples:
        texts.setdefault(sample.start_id, []).append(sample.completion_ids)
    assert any(own[:4] != own[4:8] for own in texts.values() if len(own) > 4), "rounds must not repeat each other"
