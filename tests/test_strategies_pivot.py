"""Forks off failed rollouts, their branches' values, and the strategy that follows the best of them."""

from dataclasses import replace

import pytest
import torch

from latentrevise.config import from_dict, to_dict
from latentrevise.demo import get_family, model_dir
from latentrevise.errors import ConfigError
from latentrevise.model.loading import load_model
from latentrevise.recovery.settings import RecoverConfig
from latentrevise.strategies import Choice, ForkConfig, PivotConfig, build
from latentrevise.strategies.candidates import Reader, Reading, _off_trie, completed, find_forks, score
from latentrevise.strategies.pivot import Pivot, PivotRandom, _gains
from tests.failed import rollout, tools_for, work_of, zero_hit
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def tiny():
    tokenizer = tiny_tokenizer()
    return tools_for(tiny_model("qwen3", vocab=97), tokenizer, max_new_tokens=12)


@pytest.fixture(scope="module")
def rule():
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    tools = tools_for(model, tokenizer)
    family = get_family("rule")
    return family, tools, zero_hit(family, tools, 20, 6, seed=3)


def encode(tools, text):
    return tuple(tools.tokenizer.encode(text, add_special_tokens=False))


def tiny_work(tools, *rollouts, answer="7", template="= ", prompt="1+2?"):
    return work_of(
        encode(tools, prompt),
        [encode(tools, text) for text in rollouts],
        encode(tools, template),
        encode(tools, answer),
        tools.tokenizer,
    )


def plain_logits(tools, ids):
    with torch.no_grad():
        return tools.policy.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)


def test_forks_leave_the_trie_by_untried_tokens_alone(tiny):
    def path(name, ids):
        alternatives = [[(token, -float(token)) for token in (5, 6, 7)] for _ in ids]
        return rollout(name, ids, tiny.tokenizer), ids, Reading([-1.0] * len(ids), [0.5] * len(ids), alternatives)

    # The second path goes on where the first ends; the third leaves the first at once.
    paths = [path("a", (5, 6)), path("b", (5, 6, 7)), path("c", (6,))]
    found = {(fork.prefix_ids, fork.token): fork for fork in _off_trie(paths)}
    assert set(found) == {((), 7), ((5,), 5), ((5,), 7), ((5, 6), 5), ((5, 6), 6)}
    assert found[(5, 6), 5].rollout.sample_id == "b"
    assert found[(5, 6), 5].mass == -2.0 - 5.0
    assert found[(), 7].mass == -7.0


def test_forks_are_all_the_plausible_tokens(tiny):
    work = tiny_work(tiny, "a=b;c", "a=b;c", "ad;")
    config = ForkConfig(p_min=0.01, banned=("k",))
    reader = Reader(tiny, work.template_ids, config.banned)
    (own,) = find_forks(tiny, reader, [work], [work.failed], config)
    wanted = {}
    tried = {r.completion_ids[:n] for r in work.failed for n in range(len(r.completion_ids) + 1)}
    for r in work.failed:
        logprobs = plain_logits(tiny, [*work.prompt.ids, *r.completion_ids])[len(work.prompt.ids) - 1 :]
        for at in range(len(r.completion_ids)):
            entropy = float(torch.special.entr(logprobs[at].exp()).sum())
            mass = sum(float(logprobs[j, r.completion_ids[j]]) for j in range(at))
            for token in (logprobs[at].exp() >= 0.01).nonzero().flatten().tolist():
                if token >= 4 and tiny.tokenizer.decode([token]) not in "k=":
                    new = (*r.completion_ids[:at], token)
                    if new not in tried:
                        wanted[new] = (float(logprobs[at, token]), entropy, mass + float(logprobs[at, token]))
    found = {(*f.prefix_ids, f.token): (f.logprob, f.entropy, f.mass) for f in own.forks}
    assert set(found) == set(wanted)
    assert len(found) > 10
    for key, values in wanted.items():
        assert found[key] == pytest.approx(values, abs=1e-4)
    # Two rollouts are one, and the last token of each is predicted but not fed.
    assert (own.compute.forward, own.compute.backward, own.compute.decoded) == (4 + 2, 0, 0)


def test_a_value_is_the_plain_log_probability_behind_the_greedy_step(tiny):
    work = tiny_work(tiny, "a=b;c2", answer="42")
    config = ForkConfig(p_min=0.02, step_tokens=5, banned=("k",))
    reader = Reader(tiny, work.template_ids, config.banned)
    found = find_forks(tiny, reader, [work], [work.failed], config)
    before = found[0].compute.forward
    (own,) = score(tiny, reader, [work], found, config.step_tokens)
    decoded = 0
    for fork in own.forks:
        ids = [*work.prompt.ids, *fork.prefix_ids, fork.token]
        branch = len(ids)
        semicolon, eos = encode(tiny, ";")[0], tiny.tokenizer.eos_token_id
        while ids[-1] != semicolon and len(ids) < branch + 5:
            token = int(plain_logits(tiny, ids)[-1].argmax())
            decoded += 1
            if token == eos:
                break
            ids.append(token)
        if "k" in tiny.tokenizer.decode(ids[branch:]):  # what a banned text opens is left out
            ids = ids[: branch + reader.reasoning(ids[branch:])]
        ids += work.template_ids
        logprobs = plain_logits(tiny, [*ids, *work.answer_ids])
        wanted = sum(float(logprobs[len(ids) - 1 + j, token]) for j, token in enumerate(work.answer_ids))
        assert fork.value == pytest.approx(wanted, abs=1e-3)
    assert len(own.forks) > 10
    assert own.compute.decoded == decoded
    assert own.compute.forward == before + len(own.forks) * (1 + len(work.template_ids) + len(work.answer_ids) - 1)


def test_the_gain_is_the_gradient_at_the_end_of_the_step(tiny):
    work = tiny_work(tiny, "ab;cd;e", answer="42")
    config = ForkConfig(p_min=0.02)
    reader = Reader(tiny, work.template_ids, config.banned)
    found = find_forks(tiny, reader, [work], [work.failed], config)
    spent = found[0].compute.passes
    (gains,) = _gains(tiny, reader, [work], found)
    table = tiny.policy.table
    lengths = {0: 3, 1: 3, 2: 3, 3: 6, 4: 6, 5: 6, 6: 7}
    for fork, gain in zip(found[0].forks, gains, strict=True):
        ids = [*work.prompt.ids, *fork.rollout.completion_ids[: lengths[fork.at]], *work.template_ids]
        embeddings = table[[*ids, *work.answer_ids]].clone().requires_grad_(True)
        logprobs = tiny.policy.model(inputs_embeds=embeddings[None]).logits[0].log_softmax(-1)
        nll = -sum(logprobs[len(ids) - 1 + j, token] for j, token in enumerate(work.answer_ids))
        (gradient,) = torch.autograd.grad(nll, embeddings)
        move = table[fork.rollout.completion_ids[fork.at]] - table[fork.token]
        assert gain == pytest.approx(float(gradient[len(work.prompt.ids) + fork.at] @ move), abs=1e-3)
    scored = 3 * (len(work.template_ids) + len(work.answer_ids) - 1) + 3 + 6 + 7
    assert found[0].compute.passes == spent + 3 * scored


def test_what_may_be_forced_and_where_an_answer_opens(tiny):
    reader = Reader(tiny, encode(tiny, " so"), ("boxed",))
    assert not reader.may_force(encode(tiny, "s")[0]), "the first word of the template"
    assert reader.may_force(encode(tiny, "o")[0])
    # A text that is spread over tokens is found, and the template's own tokens in front of it belong to it.
    assert reader.reasoning(encode(tiny, "a+b so boxed{4}")) == len("a+b")
    assert reader.reasoning(encode(tiny, "a+b")) == 3
    assert reader.reasoning(()) == 0
    assert reader.ends(encode(tiny, ";a;b")) == [1, 3]
    without = Reader(tools_for(tiny.policy.model, tiny.tokenizer, boundary=None), (), ())
    assert without.ends(encode(tiny, ";\na")) == [2]


def test_it_finds_the_rule_that_was_never_tried(rule):
    family, tools, work = rule
    assert len(work) >= 8
    right = {True: 0, False: 0}
    for strategy in (Pivot("pivot", ForkConfig(), PivotConfig()), PivotRandom(ForkConfig(), PivotConfig())):
        for item, own in zip(work, strategy.propose(tools, work, 8), strict=True):
            assert sum(p.n for p in own) == 8
            assert [p.uncached for p in own] == [1] * len(own)
            (chosen,) = {tools.tokenizer.decode([own[0].plain_ids[-1]])}
            right[strategy.uses_answer] += chosen == family.parse(item.prompt.text).rule
    assert right[True] >= 0.6 * len(work)
    assert right[False] <= 0.3 * len(work)


def test_proposals_are_the_same_again_and_know_the_target_alone(rule):
    _, tools, work = rule
    for name in ("pivot", "pivot-trie", "pivot-random"):
        strategy = build(name, RecoverConfig())
        first = strategy.propose(tools, work[:4], 4)
        blind = [replace(item, prompt=replace(item.prompt, answer="nothing")) for item in work[:4]]
        assert strategy.propose(tools, blind, 4) == first
        wrong = [replace(item, answer_ids=tools_answer(tools, item)) for item in work[:4]]
        assert (strategy.propose(tools, wrong, 4) != first) is strategy.uses_answer


def tools_answer(tools, item):
    """Some other answer."""
    return encode(tools, str((int(item.prompt.answer) + 41) % 100))


def test_the_posterior_form_weighs_the_mass(rule):
    _, tools, work = rule
    strategy = Pivot("pivot-trie", ForkConfig(), PivotConfig(scope="all", order="mass", mass_weight=1.0, keep=0))
    for own in strategy.propose(tools, work[:4], 6):
        assert [(p.n, p.greedy) for p in own] == [(1, True)] * 6
        scores = [p.trace.value + p.trace.mass for p in own]
        assert scores == sorted(scores, reverse=True)
        assert all(p.compute.passes == 0 for p in own[1:])
        assert own[0].compute.decoded > 0


def test_only_so_many_forks_are_scored_in_the_order_asked_for(rule):
    _, tools, work = rule
    for order in ("entropy", "mass", "gain"):
        config = PivotConfig(order=order, keep=3)
        proposals = Pivot("p", ForkConfig(max_forks=3), config).propose(tools, work[:3], 3)
        for item, own in zip(work[:3], proposals, strict=True):
            reader = Reader(tools, item.template_ids, ForkConfig().banned)
            (found,) = find_forks(tools, reader, [item], [item.failed[:1]], ForkConfig(max_forks=3))
            assert len(found.forks) > 3
            taken = {(p.trace.positions[0], p.trace.tokens[0]) for p in own}
            keys = (
                _gains(tools, reader, [item], [found])[0]
                if order == "gain"
                else [getattr(fork, order) for fork in found.forks]
            )
            kept = min(key for key, f in zip(keys, found.forks, strict=True) if (f.at, f.token) in taken)
            assert sum(key > kept for key in keys) < 3
            assert own[0].trace.candidates == 3


def test_without_a_plausible_token_it_samples_from_the_prompt_and_says_so(tiny):
    work = tiny_work(tiny, "ab;c")
    for name in ("pivot", "pivot-trie", "pivot-random", "branch-mass", "branch-entropy"):
        settings = RecoverConfig(forks=ForkConfig(p_min=0.999))
        ((own,),) = build(name, settings).propose(tiny, [work], 5)
        assert (own.n, own.plain_ids, own.trace) == (5, (), Choice())
        assert own.compute.forward == 3


def test_no_fork_leaves_less_room_than_scoring_needs(tiny):
    # 256 positions: 4 of the prompt, one forced, 4 of the step it opens, the template and the answer.
    work = tiny_work(tiny, "ab" * 125)
    reader = Reader(tiny, work.template_ids, ())
    (own,) = find_forks(tiny, reader, [work], [work.failed], ForkConfig(p_min=0.02, step_tokens=4))
    scored = len(work.template_ids) + len(work.answer_ids)
    assert max(fork.at for fork in own.forks) == 256 - 4 - 1 - 4 - scored - 1
    assert score(tiny, reader, [work], [own], 4)[0].forks[0].value is not None
    (own,) = find_forks(tiny, reader, [work], [work.failed], ForkConfig(p_min=0.05, step_tokens=4, max_positions=20))
    assert max(fork.at for fork in own.forks) == 19


def test_settings_are_checked_and_read_from_plain_data():
    for change in ({"p_min": 0.0}, {"max_forks": 0}, {"step_tokens": 0}, {"banned": ("",)}):
        with pytest.raises(ConfigError, match="ForkConfig"):
            ForkConfig(**change)
    with pytest.raises(ConfigError, match=r"PivotConfig\.keep = -1: it must be 0 or more"):
        PivotConfig(keep=-1)
    config = from_dict(RecoverConfig, {"forks": {"p_min": 0.02}, "pivot_trie": {"keep": 0}})
    assert (config.forks.p_min, config.pivot_trie.scope, config.pivot.scope) == (0.02, "all", "chosen")
    assert from_dict(RecoverConfig, to_dict(config)) == config


def no_e(prompt, before, step):
    """A step checker: false where a step holds an e; with nothing before, it can't say that one holds."""
    assert prompt == "1+2?"
    return False if "e" in step else None if not before else True


def test_checked_forks_stand_where_the_steps_hold_and_so_do_all_that_follow(tiny):
    name = "tests.test_strategies_pivot:no_e"
    work = tiny_work(tiny, "a;b;ce;d;=8", "f;fg;=8", "a;b;hi=8")
    forks = ForkConfig(p_min=0.015, max_forks=600, step_tokens=5)
    config = RecoverConfig(strategies=("pivot-checked",), step_checker=name, forks=forks)
    (own,) = build("pivot-checked", config).propose(tiny, [work], 600)
    text = tiny.tokenizer.decode
    sound = {"a;b;ce;": 7, "f;fg;=8": 8, "a;b;hi=8": 9}  # up to the end of the first false step
    assert sum(p.n for p in own) == 600
    assert len({(p.parent, p.trace) for p in own}) > 20
    for proposal in own:
        (at,), (forced,) = proposal.trace.positions, proposal.trace.tokens
        parent = next(r for r in work.failed if r.sample_id == proposal.parent)
        reach = next(end for start, end in sound.items() if text(list(parent.completion_ids)).startswith(start))
        assert at < reach
        assert proposal.plain_ids[: at + 1] == (*parent.completion_ids[:at], forced)
        assert proposal.uncached == 0
        assert "e" not in text(list(proposal.plain_ids))
    kept = replace(config, pivot_trie=PivotConfig(scope="chosen", order="entropy", mass_weight=1.0, keep=2))
    (few,) = build("pivot-checked", kept).propose(tiny, [work], 6)
    assert {p.parent for p in few} == {"p/0"}
    assert len({p.trace for p in few}) <= 2, "scope and keep are those of pivot_trie"
    every = build("pivot-checked", replace(config, step_checker="tests.test_strategies_pivot:any_step"))
    unchecked = build("pivot-trie", replace(config, pivot_trie=PivotConfig(scope="all", order="mass", mass_weight=1.0)))
    (open_,), (trie,) = every.propose(tiny, [work], 1), unchecked.propose(tiny, [work], 1)
    # Where every step holds, the first fork is the one that pivot-trie takes, by the same value.
    assert open_[0].trace.positions == trie[0].trace.positions
    assert open_[0].trace.tokens == trie[0].trace.tokens
    assert open_[0].trace.value == pytest.approx(trie[0].trace.value, abs=1e-4)


def any_step(prompt, before, step):
    return True


def no_step(prompt, before, step):
    return False


def test_the_most_probable_forks_that_hold_are_gone_on_from_one_a_sample(tiny):
    name, samples = "tests.test_strategies_pivot:no_e", 12
    work = tiny_work(tiny, "a;b;ce;d;=8", "f;fg;=8", "a;b;hi=8")
    forks = ForkConfig(p_min=0.015, max_forks=600, step_tokens=5)
    reader, text = Reader(tiny, work.template_ids, forks.banned), tiny.tokenizer.decode
    (every,) = find_forks(tiny, reader, [work], [work.failed], forks)
    reach = {"p/0": 7, "p/1": 8, "p/2": 9}
    wanted: dict[str, tuple] = {}
    for fork in sorted(every.forks, key=lambda fork: fork.mass, reverse=True):
        stem = (*fork.prefix_ids, fork.token)
        if fork.at >= reach[fork.rollout.sample_id]:
            continue
        ((tail, _),) = completed(tiny, reader, [(work, stem)], 5)
        written = text([*stem, *tail]).strip()
        if "e" not in written:
            wanted.setdefault(written, (fork.rollout.sample_id, fork.at, fork.token))
    (own,) = build("branch-checked", RecoverConfig(step_checker=name, forks=forks)).propose(tiny, [work], samples)
    assert sum(p.n for p in own) == samples
    begun = [(p.parent, *p.trace.positions, *p.trace.tokens) for p in own]
    first = list(wanted.values())[:samples]
    assert len(wanted) > samples
    assert len(begun) > samples // 2, "few are given up"
    assert begun == [start for start in first if start in begun]
    for proposal in own:
        assert "e" not in text(list(proposal.plain_ids))
        assert proposal.uncached == 0
        assert proposal.trace.value is None


@pytest.mark.parametrize(("name", "most"), [("pivot-checked", 600), ("branch-checked", 600), ("branch-checked", 5)])
def test_checked_forks_that_are_turned_away_are_charged(tiny, name, most):
    """Reading the rollout up to the end of the first step, the forced token of each fork there, and all that is
    decoded."""
    work, forks = tiny_work(tiny, "ab;cd;"), ForkConfig(p_min=0.015, max_forks=most, step_tokens=1)
    config = RecoverConfig(step_checker="tests.test_strategies_pivot:no_step", forks=forks)
    ((start,),) = build(name, config).propose(tiny, [work], 1)
    reader = Reader(tiny, work.template_ids, forks.banned)
    (found,) = find_forks(tiny, reader, [work], [work.failed], forks)
    tried = [fork for fork in found.forks if fork.at < 3]
    assert 10 < len(tried) < len(found.forks)
    assert start.compute.forward == 2 + min(len(tried), most)
    assert start.compute.decoded > 0
    assert start.parent is None


@pytest.mark.parametrize("name", ["pivot-checked", "branch-checked"])
def test_without_a_fork_that_holds_checked_rollouts_begin_at_the_question(tiny, name):
    config = RecoverConfig(step_checker="tests.test_strategies_pivot:any_step", forks=ForkConfig(p_min=0.99))
    (own,) = build(name, config).propose(tiny, [tiny_work(tiny, "a;b")], 2)
    assert sum(p.n for p in own) == 2
    assert all(p.parent is None and p.trace is None for p in own)
    with pytest.raises(ConfigError, match=rf"{name} needs a step_checker.*leave the strategy out"):
        build(name, RecoverConfig())
