"""A window of the rollout is revised: what stands before it is the rollout's own, wherever it is written."""

import dataclasses

import pytest
import torch

from latentrevise import FailedRollout, RecoverConfig, ReviseConfig
from latentrevise.data.atoms import read_atoms
from latentrevise.data.formats import preference_rows, sft_rows
from latentrevise.data.records import Start, read_records
from latentrevise.demo import get_family, make_prompts, model_dir
from latentrevise.demo.run import demo_config
from latentrevise.model.loading import load_model
from latentrevise.recovery.cases import request_of
from latentrevise.recovery.pipeline import Recovery
from latentrevise.revise.hull import Mixture
from latentrevise.revise.reviser import Reviser
from latentrevise.strategies import Cut, ForkConfig, Latent, build
from latentrevise.strategies.candidates import Reader
from latentrevise.strategies.latent import _step_around
from tests.failed import tools_for, work_of
from tests.tiny import tiny_model, tiny_tokenizer

FORKS = ForkConfig(step_tokens=4, banned=("k",))
FULL = ReviseConfig(steps=3)
PLAUSIBLE = ReviseConfig(
    steps=3,
    hull="plausible",
    solver="entropic",
    p_min=0.01,
    step_size=2.0,
    explore_weight=0.0,
    fluency_weight=0.0,
    rounding="argmax",
)


@pytest.fixture(scope="module")
def tiny():
    return tools_for(tiny_model("qwen3", vocab=97), tiny_tokenizer(), max_new_tokens=12)


def encode(tools, text):
    return tuple(tools.tokenizer.encode(text, add_special_tokens=False))


def work_for(tools, text, **changes):
    item = work_of(
        encode(tools, "1+2?"), [encode(tools, text)], encode(tools, "= "), encode(tools, "42"), tools.tokenizer
    )
    return dataclasses.replace(item, **changes)


def entropies(tools, item, count):
    """Of the policy in front of each of the rollout's first tokens, by one plain pass."""
    ids = [*item.prompt.ids, *item.failed[0].completion_ids]
    with torch.no_grad():
        logits = tools.policy.model(torch.tensor([ids])).logits[0].float()
    return torch.special.entr(logits.softmax(-1)).sum(-1)[len(item.prompt.ids) - 1 :][:count].tolist()


def expected_window(tools, item, steps):
    """Among steps of these (start, end), the one with the highest entropy."""
    found = entropies(tools, item, steps[-1][1])
    return max(steps, key=lambda step: max(found[step[0] : step[1]]))


# Steps: at ";" or after 4 tokens. "k" opens what is not reasoning.
ROLLOUTS = {
    "ab;cde;fghij;xyk;zz": [(0, 3), (3, 7), (7, 11), (11, 13), (13, 15)],
    "abcdefghij": [(0, 4), (4, 8), (8, 9)],  # no boundary; the failed continuation keeps a token
    "kab;": [(0, 1)],  # no reasoning at all
}


@pytest.mark.parametrize("config", [FULL, PLAUSIBLE], ids=["full", "plausible"])
@pytest.mark.parametrize("text", list(ROLLOUTS))
def test_it_is_the_revision_behind_a_longer_prompt(tiny, text, config):
    item = work_for(tiny, text)
    start, end = expected_window(tiny, item, ROLLOUTS[text])
    ids = item.failed[0].completion_ids
    longer = FailedRollout(
        (*item.prompt.ids, *ids[:start]), ids[start:end], ids[end:], item.answer_ids, template_ids=item.template_ids
    )
    (revision,) = Reviser(tiny.policy, config).revise([longer])
    ((own,),) = Latent("window", config, window="entropy", forks=FORKS).propose(tiny, [item], 3)
    assert (own.n, own.kept, own.original_ids) == (3, start, ids[:end])
    assert own.plain_ids == (*ids[:start], *revision.mixture.argmax_ids().tolist())
    assert torch.equal(own.mixture.ids[start:], revision.ids)
    assert torch.equal(own.mixture.weights[start:], revision.weights)
    assert (own.mixture.ids[:start] == torch.tensor(ids[:start], dtype=torch.int32)[:, None]).all()
    assert own.mixture.weights[:start].tolist() == [[1.0] + [0.0] * (revision.ids.shape[1] - 1)] * start
    # Charged: a pass over what was looked at, the revision, and later what no cache holds of the revised prefix.
    assert own.compute.forward == revision.compute.forward + ROLLOUTS[text][-1][1] - 1
    assert own.compute.backward == revision.compute.backward
    if own.latent:
        assert own.uncached == end - start
    # Fed are the prompt's and the kept tokens' own embeddings, and behind them the revised ones.
    table = tiny.policy.table
    request = request_of(tiny.policy, item.prompt.ids, own, own.mixture, 0)
    if own.latent:
        kept = torch.cat([table[list(longer.prompt_ids)], revision.mixture.embed(table)])
        assert torch.equal(request.embeddings, kept)
    else:
        assert request.ids == (*item.prompt.ids, *own.plain_ids)


def test_some_window_lies_in_the_middle(tiny):
    starts = [expected_window(tiny, work_for(tiny, text), steps)[0] for text, steps in ROLLOUTS.items()]
    assert max(starts) > 0


def test_the_default_is_the_cut_of_the_run(tiny):
    item = work_for(tiny, "ab;cde;fghij;")
    assert RecoverConfig().window == "prefix"
    ids = item.failed[0].completion_ids
    cut = Cut("p/0", ids[:3], ids[3:])
    item = dataclasses.replace(item, cuts=(cut,))
    (revision,) = Reviser(tiny.policy, PLAUSIBLE).revise([item.rollout(cut)])
    ((own,),) = build("latent-plausible", RecoverConfig(latent_plausible=PLAUSIBLE)).propose(tiny, [item], 2)
    assert (own.kept, own.original_ids) == (0, ids[:3])
    assert torch.equal(own.mixture.ids, revision.ids)
    assert own.compute.passes == revision.compute.passes


@pytest.mark.parametrize(("name", "share"), [("latent", 0.8), ("latent-rho0.5", 0.5), ("latent-rho0.2", 0.2)])
def test_the_published_method_cuts_where_the_paper_does(tiny, name, share):
    item = work_for(tiny, "ab;cde;fghij;")
    ids = item.failed[0].completion_ids
    at = round(share * len(ids))
    (revision,) = Reviser(tiny.policy, FULL).revise([item.rollout(Cut("p/0", ids[:at], ids[at:]))])
    ((own,),) = build(name, RecoverConfig(latent=FULL)).propose(tiny, [item], 2)
    assert (own.original_ids, own.latent) == (ids[:at], True)
    assert torch.equal(own.mixture.ids, revision.ids)
    z = revision.embeddings(Reviser(tiny.policy, FULL).hull)
    scores = (z @ tiny.policy.table.T).masked_fill(~tiny.policy.known, -torch.inf)
    assert own.plain_ids == tuple(scores.argmax(1).tolist()), "written by Eq. 8"
    ((plain,),) = build(f"resample-rho{share}", RecoverConfig()).propose(tiny, [item], 2)
    assert plain.plain_ids == ids[:at]


def test_rollouts_are_cut_each_on_its_own_and_samples_shared(tiny):
    texts = list(ROLLOUTS)[:2]
    one, two = (work_for(tiny, text) for text in texts)
    rollouts = tuple(dataclasses.replace(r, sample_id=f"p/{j}") for j, r in enumerate(one.failed + two.failed))
    cuts = tuple(Cut(r.sample_id, r.completion_ids[:1], r.completion_ids[1:]) for r in rollouts[::-1])
    both = dataclasses.replace(one, failed=rollouts, cuts=cuts)
    strategy = Latent("window", PLAUSIBLE, window="entropy", forks=FORKS)
    (own,) = strategy.propose(tiny, [both], 5)
    alone = [strategy.propose(tiny, [item], 1)[0][0] for item in (two, one)]
    assert [p.n for p in own] == [3, 2]
    assert [(p.parent, p.plain_ids) for p in own] == [(f"p/{1 - j}", p.plain_ids) for j, p in enumerate(alone)]


def test_a_step_holds_its_boundary_and_is_not_too_long(tiny):
    reader = Reader(tiny, (), FORKS.banned)
    ids = encode(tiny, "ab;cdefgh;")
    found = [_step_around(reader, ids, at, 4) for at in range(len(ids))]
    assert found == [(0, 3)] * 3 + [(3, 7)] * 4 + [(7, 10)] * 3


def test_an_offset_stays_with_its_positions_and_is_fed(tiny):
    offset = torch.randn(1, tiny.policy.table.shape[1])
    point = Mixture(torch.tensor([[7, 7]], dtype=torch.int32), torch.tensor([[1.0, 0.0]]), offset)
    longer = point.behind((5, 6))
    table = tiny.policy.table
    assert torch.allclose(longer.embed(table), torch.cat([table[[5, 6]], table[[7]] + offset]))
    assert torch.equal(point.behind(()).embed(table), point.embed(table))
    start = Start("s", "p", None, "42", (5, 6, 7), (5, 6, 7), True, False, 1, 0, 0, 0, 0.0)
    fed = request_of(tiny.policy, (8, 9), start, longer, 0).embeddings
    assert torch.allclose(fed, torch.cat([table[[8, 9, 5, 6]], table[[7]] + offset]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    model, tokenizer = load_model(model_dir("rule"), dtype="float32", device="cpu")
    family = get_family("rule")
    config = dataclasses.replace(
        demo_config(family),
        strategies=("latent-plausible", "latent-window", "resample"),
        window="entropy",
        rollouts=4,
        samples=4,
        equal_compute=False,
        audit=False,
        # Every right answer is a row, so that there are rows to look at.
        guards=dataclasses.replace(demo_config(family).guards, min_derivation_tokens=0, min_plain_logprob=-99.0),
    )
    run = Recovery(model, tokenizer, config, tmp_path_factory.mktemp("window") / "out", progress=False)
    recovered = run.recover(make_prompts(family, 40, split="develop", seed=5))
    return run, recovered, tokenizer


@pytest.mark.parametrize("arm", ["latent-plausible", "latent-window"])
def test_what_stands_before_the_window_is_in_every_row_as_it_was(finished, arm):
    run, recovered, tokenizer = finished
    rollouts = {r.sample_id: r for own in run.rollouts().values() for r in own}
    mixtures, _ = read_atoms(run.run.part("starts", 0, arm).with_suffix(".safetensors"))
    windows = {}
    for start in read_records(run.run.path / "starts" / arm, Start):
        ids = rollouts[start.parent_sample_id].completion_ids
        assert start.prefix_ids == ids[: len(start.prefix_ids)]
        ends = [i + 1 for i, token in enumerate(start.prefix_ids[:-1]) if tokenizer.decode([token]) == ";"]
        kept = max(ends, default=0)
        atoms, weights = mixtures[start.start_id]
        assert len(atoms) == len(start.plain_ids) == len(start.prefix_ids)
        assert start.plain_ids[:kept] == ids[:kept]
        assert atoms[:kept, 0].tolist() == list(ids[:kept])
        assert weights[:kept, 0].tolist() == [1.0] * kept
        windows[start.start_id] = kept, ids
    assert any(kept for kept, _ in windows.values())
    trajectories = [t for t in recovered.trajectories if t.strategy == arm]
    for t in trajectories:
        kept, ids = windows[t.start_id]
        assert t.plain_prefix_ids[:kept] == t.prefix_ids[:kept] == ids[:kept]
        head = [*t.prompt_ids, *ids[:kept]]
        (row,) = sft_rows([t], tokenizer)
        assert row["input_ids"][: len(head)] == head
        (original,) = sft_rows([dataclasses.replace(t, plain_prefix_ids=t.prefix_ids)], tokenizer)
        assert original["input_ids"][len(t.prompt_ids) :][: len(t.prefix_ids)] == list(t.prefix_ids)
        # The failed rollout behind the same prefix, where that is context.
        context = dataclasses.replace(t, prefix_rendering="continuation")
        (pair,) = preference_rows([context], list(rollouts.values()), tokenizer)
        assert pair["rejected"] == tokenizer.decode(list(ids[len(t.prefix_ids) :]), skip_special_tokens=True)
    if arm == "latent-window":
        assert any(windows[t.start_id][0] for t in trajectories)
