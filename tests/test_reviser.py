"""The packed pass against two plain Hugging Face passes, and the invariants of a revision."""

import dataclasses
import itertools

import pytest
import torch

from latentrevise import FailedRollout, Mixture, ReviseConfig, Reviser
from latentrevise.errors import ConfigError, InputError, ModelError
from latentrevise.model.packing import batches, pack, suffix_length
from latentrevise.revise.objective import away_terms
from tests.tiny import tiny_model

ARCHITECTURES = ["qwen2", "qwen3", "llama", "gemma3"]
VOCABULARY = 97


def rollouts(seed: int = 0, count: int = 5) -> list[FailedRollout]:
    """Ragged in every part; two share a prompt, one has no template, one a single prefix token."""
    g = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=g))
        return torch.randint(5, VOCABULARY, (n,), generator=g).tolist()

    made = [
        FailedRollout(ids(1, 20), ids(1, 15), ids(1, 14), ids(1, 4), id=f"r{i}", template_ids=ids(1, 4))
        for i in range(count)
    ]
    made[1] = dataclasses.replace(made[1], prompt_ids=made[0].prompt_ids, template_ids=())
    made[2] = dataclasses.replace(made[2], prefix_ids=made[2].prefix_ids[:1])
    return made


def plain_passes(model, rollout: FailedRollout, config: ReviseConfig, prefix: torch.Tensor | None = None):
    """The objective and its gradient by autograd through two ordinary forward passes, no cache, no packing."""
    embed = model.get_input_embeddings()

    def tokens(ids):
        return embed(torch.tensor(ids, dtype=torch.long, device=model.device)).detach()

    z = (tokens(rollout.prefix_ids) if prefix is None else prefix).detach().requires_grad_(True)

    def logprobs(branch, first):
        inputs = torch.cat([tokens(rollout.prompt_ids), z, tokens(branch)])
        logits = model(inputs_embeds=inputs.unsqueeze(0), use_cache=False).logits[0]
        at = len(rollout.prompt_ids) + len(rollout.prefix_ids) - 1
        targets = torch.tensor(branch, device=logits.device).unsqueeze(1)
        return logits[at : at + len(branch)].log_softmax(-1).gather(1, targets).squeeze(1)[first:]

    gold = -logprobs([*rollout.template_ids, *rollout.answer_ids], len(rollout.template_ids)).mean()
    away = away_terms(logprobs(list(rollout.continuation_ids[: config.away_window]), 0), config).mean()
    loss = config.alpha * gold + config.beta * away
    (grad,) = torch.autograd.grad(loss, z)
    return loss.item(), gold.item(), away.item(), grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("away", ["unlikelihood", "clipped"])
def test_value_and_grad_equals_two_plain_passes(architecture, away):
    model = tiny_model(architecture, vocab=VOCABULARY, seed=1)
    config = ReviseConfig(alpha=0.7, beta=0.4, away=away, away_window=6)
    work = rollouts()
    for rollout, found in zip(work, Reviser(model, config).value_and_grad(work), strict=True):
        loss, gold, away_loss, grad = plain_passes(model, rollout, config)
        assert found.loss == pytest.approx(loss, rel=1e-5, abs=1e-6)
        assert found.gold_nll == pytest.approx(gold, rel=1e-5)
        assert found.away == pytest.approx(away_loss, rel=1e-5, abs=1e-6)
        assert found.grad.shape == grad.shape
        assert float((found.grad - grad).norm() / grad.norm()) < 1e-5, rollout.id


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_grad_at_mixtures(architecture):
    model = tiny_model(architecture, vocab=VOCABULARY, seed=2)
    config = ReviseConfig(steps=3, beta=0.5)
    reviser = Reviser(model, config)
    work = rollouts(seed=3)
    mixtures = [r.mixture for r in reviser.revise(work)]
    for rollout, mixture, found in zip(work, mixtures, reviser.value_and_grad(work, mixtures), strict=True):
        _, _, _, grad = plain_passes(model, rollout, config, mixture.embed(reviser.hull.table))
        assert float((found.grad - grad).norm() / grad.norm()) < 1e-5


def test_sliding_window_is_honoured_across_the_prompt_cache():
    model = tiny_model("gemma3", vocab=VOCABULARY, seed=4)
    window = model.config.sliding_window
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (3 * window + 8,), generator=g).tolist()
    rollout = FailedRollout(ids[: 2 * window], ids[2 * window : 3 * window], ids[3 * window : 3 * window + 4], ids[-4:])
    config = ReviseConfig(beta=0.5)
    loss, _, _, grad = plain_passes(model, rollout, config)
    (found,) = Reviser(model, config).value_and_grad([rollout])
    assert found.loss == pytest.approx(loss, rel=1e-5)
    assert float((found.grad - grad).norm() / grad.norm()) < 1e-5


def test_gradient_matches_finite_differences():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=5).double()
    (rollout, *_) = rollouts(seed=6)
    config = ReviseConfig(beta=0.3)
    reviser = Reviser(model, config)
    z = reviser.hull.table[torch.tensor(rollout.prefix_ids)]
    direction = reviser.hull.table[11] - z

    def loss(gamma):
        return plain_passes(model, rollout, config, z + gamma * direction)[0]

    (found,) = reviser.value_and_grad([rollout])
    slope = float((found.grad.double() * direction).sum())
    # The normalisation layers compute in float32 whatever the model's dtype, so a smaller step would measure rounding.
    assert slope == pytest.approx((loss(2e-3) - loss(-2e-3)) / 4e-3, rel=1e-3)


CONFIGS = {
    "constant": ReviseConfig(steps=4),
    "harmonic": ReviseConfig(steps=4, step_rule="harmonic", step_size=1.0),
    "short": ReviseConfig(steps=4, step_rule="short", step_size=0.05),
    "line-search": ReviseConfig(steps=4, step_rule="line-search"),
    "fraction": ReviseConfig(steps=4, update_fraction=0.3),
    "normalized": ReviseConfig(steps=4, combine="normalized"),
    "plausible": ReviseConfig(steps=4, hull="plausible", p_min=5e-3, step_rule="harmonic", step_size=1.0),
    "entropic": ReviseConfig(steps=4, hull="plausible", solver="entropic", p_min=5e-3, step_size=2.0),
    "gold only": ReviseConfig(steps=4, beta=0.0),
    "away only": ReviseConfig(steps=4, alpha=0.0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_iterate_is_in_the_hull(name):
    config = CONFIGS[name]
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=7)
    reviser = Reviser(model, config)
    for rollout, revision in zip(rollouts(), reviser.revise(rollouts()), strict=True):
        assert revision.id == rollout.id
        assert revision.ids.dtype == torch.int32
        assert revision.weights.dtype == torch.float32
        assert (revision.weights >= 0).all()
        assert torch.allclose(revision.weights.sum(1), torch.ones(len(rollout.prefix_ids)), atol=1e-6)
        atoms = (revision.weights > 0).sum(1)
        if config.solver == "frank-wolfe":
            assert atoms.max() <= config.steps + 1
        for position in range(len(rollout.prefix_ids)):
            used = revision.ids[position][revision.weights[position] > 0].tolist()
            assert len(used) == len(set(used)), "an atom is listed twice"
            assert all(reviser.policy.allowed[i] or i == rollout.prefix_ids[position] for i in used)
        z = revision.embeddings(reviser.hull)
        spelled = torch.einsum("ta,tad->td", revision.weights, reviser.hull.table[revision.ids.long()])
        assert torch.allclose(z, spelled, atol=1e-6)
        trace = revision.trace
        assert len(trace.loss) == config.steps + 1
        assert len(trace.gap) == len(trace.step) == config.steps
        assert min(trace.gap) >= -1e-5, "the gap of a vertex oracle is never negative"
        assert trace.chosen == config.steps


def test_one_atom_start_and_no_step_leaves_the_prefix():
    mixture = Mixture.from_tokens(torch.tensor([4, 9]), 3)
    assert mixture.weights.tolist() == [[1.0, 0.0, 0.0]] * 2
    assert mixture.step(torch.tensor([7, 7]), torch.zeros(2), 1).argmax_ids().tolist() == [4, 9]
    moved = mixture.step(torch.tensor([4, 7]), torch.full((2,), 0.25), 1)
    assert moved.weights.tolist() == [[1.0, 0.0, 0.0], [0.75, 0.25, 0.0]], "a known vertex gains weight in its own slot"
    again = moved.step(torch.tensor([8, 7]), torch.tensor([0.6, 0.6]), 2)
    assert again.argmax_ids().tolist() == [8, 7]
    assert again.compact().ids[:, 0].tolist() == [8, 7]


def test_descent_on_the_gold_branch():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=8)
    config = ReviseConfig(steps=10, step_rule="line-search", beta=0.0, iterate="best")
    for revision in Reviser(model, config).revise(rollouts(seed=9)):
        losses = revision.trace.loss
        assert all(b <= a + 1e-5 for a, b in itertools.pairwise(losses))
        assert losses[-1] < losses[0] - 0.1


def test_best_iterate_and_early_stop():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=8)
    big = ReviseConfig(steps=8, step_size=0.9, iterate="best")
    for revision in Reviser(model, big).revise(rollouts(seed=9)):
        assert revision.trace.chosen == min(range(9), key=revision.trace.loss.__getitem__)
    stopping = ReviseConfig(steps=8, stop_nll=3.0, beta=0.0, step_rule="line-search")
    revisions = Reviser(model, stopping).revise(rollouts(seed=9))
    reasons = {r.trace.stopped for r in revisions}
    assert "nll" in reasons
    for rollout, revision in zip(rollouts(seed=9), revisions, strict=True):
        trace = revision.trace
        assert revision.compute.backward == len(trace.gap) * suffix_length(rollout, stopping)
        if trace.stopped == "nll":
            assert trace.gold_nll[-1] <= 3.0
            assert all(nll > 3.0 for nll in trace.gold_nll[:-1])
            assert len(trace.loss) == len(trace.gap)


def test_a_rollout_does_not_depend_on_its_companions():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=10)
    config = ReviseConfig(steps=5)
    work = rollouts(seed=11)
    together = Reviser(model, config).revise(work)
    for i, rollout in enumerate(work):
        (alone,) = Reviser(model, config).revise([rollout])
        assert torch.equal(alone.ids, together[i].ids)
        assert torch.allclose(alone.weights, together[i].weights)
        assert alone.trace.loss == pytest.approx(together[i].trace.loss, rel=1e-5)
        assert (alone.compute.forward, alone.compute.backward) == (
            together[i].compute.forward,
            together[i].compute.backward,
        )


def test_compute_counts_tokens_and_not_padding_or_the_cached_prompt():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=12)
    config = ReviseConfig(steps=3)
    work = rollouts(seed=13)
    for rollout, revision in zip(work, Reviser(model, config).revise(work), strict=True):
        tokens = suffix_length(rollout, config)
        assert revision.compute.forward == 4 * tokens
        assert revision.compute.backward == 3 * tokens
        assert revision.compute.passes == 4 * tokens + 2 * 3 * tokens


def test_batches_keep_the_budget_and_lose_nothing():
    config = ReviseConfig()
    sizes = [(len(r.prompt_ids), suffix_length(r, config)) for r in rollouts(seed=14, count=20)]
    seen = []
    for index in batches(sizes, 90):
        seen += index
        fed = max(sizes[i][1] for i in index)
        width = max(sizes[i][0] for i in index) + fed
        assert len(index) == 1 or width * len(index) <= 90
        assert fed * len(index) * 0.75 <= sum(sizes[i][1] for i in index), "too much padding"
    assert sorted(seen) == list(range(20))
    assert batches([], 90) == []


def test_branches_without_weight_are_left_out_of_the_pass():
    (rollout, *_) = rollouts()
    full = pack([rollout], ReviseConfig(), torch.device("cpu"))
    gold = pack([rollout], ReviseConfig(beta=0.0), torch.device("cpu"))
    assert gold.score_gold.all()
    assert not full.score_gold.all()
    assert sum(gold.suffix_tokens) < sum(full.suffix_tokens)


def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=15).train()
    model.model.layers[0].eval()
    model.model.norm.weight.requires_grad_(False)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    modes = [m.training for m in model.modules()]
    flags = [p.requires_grad for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    Reviser(model, ReviseConfig(steps=2)).revise(rollouts())
    assert modes == [m.training for m in model.modules()]
    assert flags == [p.requires_grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(weights[0]))
    assert model(torch.tensor([[5]])).logits.requires_grad


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"prompt_ids": []}, "prompt_ids is empty"),
        ({"prefix_ids": []}, "prefix_ids is empty"),
        ({"answer_ids": []}, "answer_ids is empty"),
        ({"prefix_ids": [[1, 2]]}, "one flat sequence"),
        ({"prefix_ids": [0.5]}, "one flat sequence"),
        ({"answer_ids": [-100]}, "negative id"),
    ],
)
def test_bad_rollouts_name_the_field(change, match):
    fields = {"prompt_ids": [5], "prefix_ids": [6], "continuation_ids": [7], "answer_ids": [8]}
    with pytest.raises(InputError, match=match):
        FailedRollout(**{**fields, **change})


def test_bad_input_to_the_reviser():
    reviser = Reviser(tiny_model("qwen3", vocab=VOCABULARY, seed=16))
    with pytest.raises(InputError, match=f"token {VOCABULARY}"):
        reviser.revise([FailedRollout([5], [VOCABULARY], [6], [7])])
    with pytest.raises(InputError, match="beta=0"):
        reviser.revise([FailedRollout([5], [6], [], [7])])
    with pytest.raises(InputError, match="positions"):
        reviser.revise([FailedRollout([5] * 5000, [6], [7], [8])])
    with pytest.raises(InputError, match="twice"):
        reviser.revise([FailedRollout([5], [6], [7], [8], id="a")] * 2)
    with pytest.raises(InputError, match="mixtures"):
        reviser.value_and_grad([FailedRollout([5], [6], [7], [8])], [])
    assert reviser.revise([]) == []


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"steps": 0}, "steps"),
        ({"alpha": 0.0, "beta": 0.0}, "nothing to optimise"),
        ({"step_size": 1.5}, "leaves the hull"),
        ({"solver": "entropic"}, "hull='plausible'"),
        ({"step_rule": "line-search", "line_search_grid": (2.0,)}, "line_search_grid"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ConfigError, match=match):
        ReviseConfig(**change)


def test_nan_logits_are_named():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=17)
    reviser = Reviser(model)
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="'bad'"):
        reviser.revise([FailedRollout([5], [6], [7], [8], id="bad")])


def test_a_model_that_hides_its_logits_is_refused():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=18)
    forward = model.forward

    def squared(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits**3
        return output

    model.forward = squared
    with pytest.raises(ModelError, match="not understood"):
        Reviser(model)
