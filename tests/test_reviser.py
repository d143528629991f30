"""The packed pass against two plain Hugging Face passes, and the invariants of a revision."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from latentrevise import FailedRollout, Mixture, RecoverConfig, ReviseConfig, Reviser, VocabularyHull
from latentrevise.config import load_config
from latentrevise.errors import ConfigError, InputError, ModelError
from latentrevise.model.packing import FAILED, GOLD, PREFIX, batches, pack
from latentrevise.revise import solver
from latentrevise.revise.objective import suffix
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
    """The objective and its gradient by autograd through ordinary forward passes, no cache, no packing.

    Returns the loss, (explore, guide, fluency), and ``dL/dz``.
    """
    embed = model.get_input_embeddings()

    def tokens(ids):
        return embed(torch.tensor(ids, dtype=torch.long, device=model.device)).detach()

    z = (tokens(rollout.prefix_ids) if prefix is None else prefix).detach().requires_grad_(True)
    length = len(rollout.prompt_ids)

    def logprobs(branch, at):
        """Of the tokens ``branch``, the first of them predicted at position ``at - 1``."""
        inputs = torch.cat([tokens(rollout.prompt_ids), z, tokens(branch if at > length else [])])
        logits = model(inputs_embeds=inputs.unsqueeze(0), use_cache=False).logits[0]
        targets = torch.tensor(branch, device=logits.device).unsqueeze(1)
        return logits[at - 1 : at - 1 + len(branch)].log_softmax(-1).gather(1, targets).squeeze(1)

    end, failed = length + len(rollout.prefix_ids), list(rollout.continuation_ids[: config.explore_tokens])
    template = len(rollout.template_ids)
    explore, fluency = logprobs(failed, end), -logprobs(list(rollout.prefix_ids), length)
    if config.explore == "unlikelihood":
        explore = -torch.log1p(-explore.exp())
    guide = -logprobs([*rollout.template_ids, *rollout.answer_ids], end)[template:]
    reduce = torch.sum if config.reduction == "sum" else torch.mean
    explore, guide, fluency = reduce(explore), reduce(guide), reduce(fluency)
    loss = config.explore_weight * explore + config.guide_weight * guide + config.fluency_weight * fluency
    (grad,) = torch.autograd.grad(loss, z)
    return loss.item(), (explore.item(), guide.item(), fluency.item()), grad


def compare(found, wanted, tolerance=1e-5):
    loss, parts, grad = wanted
    assert found.loss == pytest.approx(loss, rel=tolerance, abs=tolerance)
    for value, part in zip((found.explore, found.guide, found.fluency), parts, strict=True):
        assert value == pytest.approx(part, rel=tolerance, abs=tolerance)
    assert found.grad.shape == grad.shape
    assert float((found.grad.cpu() - grad.cpu()).norm() / grad.cpu().norm()) < tolerance


OBJECTIVES = {
    "published": ReviseConfig(),
    "weighted": ReviseConfig(guide_weight=0.7, explore_weight=0.4, fluency_weight=2.0, explore_tokens=6),
    "bounded means": ReviseConfig(explore="unlikelihood", reduction="mean", fluency_weight=0.5),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_grad_equals_plain_passes(architecture, name):
    model, config = tiny_model(architecture, vocab=VOCABULARY, seed=1), OBJECTIVES[name]
    work = rollouts()
    for rollout, found in zip(work, Reviser(model, config).value_and_grad(work), strict=True):
        compare(found, plain_passes(model, rollout, config))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_value_and_grad_at_mixtures(architecture):
    model = tiny_model(architecture, vocab=VOCABULARY, seed=2)
    reviser = Reviser(model, ReviseConfig(steps=3))
    work = rollouts(seed=3)
    mixtures = [r.mixture for r in reviser.revise(work)]
    for rollout, mixture, found in zip(work, mixtures, reviser.value_and_grad(work, mixtures), strict=True):
        compare(found, plain_passes(model, rollout, reviser.config, mixture.embed(reviser.hull.table)))


def algorithm_1(model, rollout: FailedRollout, config: ReviseConfig, ours):
    """The paper's Algorithm 1 as a plain loop; returns its losses.

    ours: the vertices ``[T]`` that the reviser chose, step by step. At each they must be the loop's own; where two
    vertices are as good as each other to within rounding, either may be taken, and the loop goes on with ours.
    """
    table = model.get_input_embeddings()(torch.arange(VOCABULARY)).detach()
    E_r, losses, same = table[torch.tensor(rollout.prefix_ids)], [], []
    for i, vertex in enumerate(ours, start=1):
        loss, (_, guide, _), grad = plain_passes(model, rollout, config, E_r)
        losses.append(loss)
        assert guide >= config.stop_guide
        scores = grad @ table.T
        chosen, best = scores.gather(1, vertex[:, None])[:, 0], scores.amin(1)
        assert (chosen - best <= 1e-4 * best.abs()).all(), f"step {i}: another vertex is better"
        same += (scores.argmin(1) == vertex).tolist()
        gamma = config.step_size * 2 / (i + 1)
        E_r = (1 - gamma) * E_r + gamma * table[vertex]
    assert sum(same) >= 0.98 * len(same)
    return [*losses, plain_passes(model, rollout, config, E_r)[0]]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ten_steps_are_algorithm_1(architecture, monkeypatch):
    model, work = tiny_model(architecture, vocab=VOCABULARY, seed=21), rollouts(seed=22)
    reviser, steps = Reviser(model), []
    plain = solver.kernels.hull_step

    def watched(*arguments, **options):
        step = plain(*arguments, **options)
        steps.append(step.vertex)
        return step

    monkeypatch.setattr(solver.kernels, "hull_step", watched)
    for rollout in work:
        steps.clear()
        (revision,) = reviser.revise([rollout])
        assert len(steps) == 10
        assert revision.trace.loss == pytest.approx(algorithm_1(model, rollout, reviser.config, steps), rel=1e-4)
        own = (revision.ids == torch.tensor(rollout.prefix_ids).unsqueeze(1)) * revision.weights
        assert (own.sum(1) >= 0.65).all(), "with the paper's steps the old token keeps 0.660 of the weight"
    steps.clear()
    reviser.revise(work)
    assert len(steps) < 10 * len(work), "one call a step serves a batch"


def test_sliding_window_is_honoured_across_the_prompt_cache():
    model = tiny_model("gemma3", vocab=VOCABULARY, seed=4)
    window = model.config.sliding_window
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(5, VOCABULARY, (3 * window + 8,), generator=g).tolist()
    rollout = FailedRollout(ids[: 2 * window], ids[2 * window : 3 * window], ids[3 * window : 3 * window + 4], ids[-4:])
    (found,) = Reviser(model).value_and_grad([rollout])
    compare(found, plain_passes(model, rollout, ReviseConfig()))


def test_gradient_matches_finite_differences():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=5).double()
    (rollout, *_) = rollouts(seed=6)
    config = ReviseConfig(explore_weight=0.3)
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
    "published": ReviseConfig(steps=4),
    "constant": ReviseConfig(steps=4, step_rule="constant", step_size=0.3),
    "words only": ReviseConfig(steps=4, special_vertices=False),
    "plausible": ReviseConfig(steps=4, hull="plausible", p_min=5e-3, step_size=1.0),
    "entropic": ReviseConfig(steps=4, hull="plausible", solver="entropic", p_min=5e-3, step_size=2.0),
    "no explore": ReviseConfig(steps=4, explore_weight=0.0),
    "no guide": ReviseConfig(steps=4, guide_weight=0.0),
    "no fluency": ReviseConfig(steps=4, fluency_weight=0.0),
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
            assert all(reviser.hull.allowed[i] or i == rollout.prefix_ids[position] for i in used)
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


def test_the_answer_becomes_likelier_and_the_failure_less_likely():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=8)
    for revision in Reviser(model).revise(rollouts(seed=9)):
        trace = revision.trace
        assert trace.loss[-1] < trace.loss[0]
        assert trace.step == pytest.approx([0.1 * 2 / (i + 1) for i in range(1, 11)])
    (revision, *_) = Reviser(model, ReviseConfig.answer_only(step_size=0.5)).revise(rollouts(seed=9))
    assert revision.trace.guide[-1] < revision.trace.guide[0] - 0.1
    assert revision.trace.explore == [0.0] * 11


def test_best_iterate_and_early_stop():
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=8)
    big = ReviseConfig(steps=8, step_rule="constant", step_size=0.9, iterate="best")
    for revision in Reviser(model, big).revise(rollouts(seed=9)):
        assert revision.trace.chosen == min(range(9), key=revision.trace.loss.__getitem__)
    stopping = Reviser(model, ReviseConfig.answer_only(steps=8, stop_guide=9.0, step_rule="constant", step_size=0.3))
    revisions = stopping.revise(rollouts(seed=9))
    assert {r.trace.stopped for r in revisions} == {"guide", "steps"}
    for rollout, revision in zip(rollouts(seed=9), revisions, strict=True):
        trace = revision.trace
        evaluated = len(trace.loss) - (trace.stopped == "steps")  # the last iterate of a full run has no gradient
        assert revision.compute.backward == evaluated * stopping.tokens(rollout)
        assert len(trace.gap) == len(trace.step) == len(trace.loss) - 1
        if trace.stopped == "guide":
            assert trace.guide[-1] < 9.0
            assert all(nll >= 9.0 for nll in trace.guide[:-1]), "it stops before the step"


def test_one_copy_to_the_host_a_step(monkeypatch):
    """What a step says of all rollouts comes at once; a copy for each of them would hold a GPU up."""
    model, copies = tiny_model("qwen3", vocab=VOCABULARY, seed=8), []
    reviser, plain = Reviser(model), torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: copies.append(tuple(tensor.shape)) or plain(tensor))
    work = [dataclasses.replace(rollouts(seed=9)[0], id=None)] * 3
    reviser.revise(work)
    assert [shape for shape in copies if len(shape) == 2] == [(3, 6), *[(3, 7)] * 10]


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
        tokens = Reviser(model, config).tokens(rollout)
        assert revision.compute.forward == 4 * tokens
        assert revision.compute.backward == 3 * tokens
        assert revision.compute.passes == 4 * tokens + 2 * 3 * tokens


def test_batches_keep_the_budget_and_lose_nothing():
    sizes = [(len(r.prompt_ids), suffix(r, ReviseConfig()).fed) for r in rollouts(seed=14, count=20)]
    seen = []
    for index in batches(sizes, 90):
        seen += index
        fed = max(sizes[i][1] for i in index)
        width = max(sizes[i][0] for i in index) + fed
        assert len(index) == 1 or width * len(index) <= 90
        assert fed * len(index) * 0.75 <= sum(sizes[i][1] for i in index), "too much padding"
    assert sorted(seen) == list(range(20))
    assert batches([], 90) == []


def test_terms_without_weight_are_left_out_of_the_pass():
    (rollout, *_) = rollouts()

    def packed(**weights):
        return pack([suffix(rollout, ReviseConfig(**weights))], torch.device("cpu"))

    full = packed()
    assert set(full.score_kind.tolist()) == {PREFIX, FAILED, GOLD}
    parts = [len(rollout.prefix_ids), len(rollout.continuation_ids), len(rollout.answer_ids)]
    assert [int((full.score_kind == kind).sum()) for kind in (PREFIX, FAILED, GOLD)] == parts
    answer = packed(explore_weight=0.0, fluency_weight=0.0)
    assert set(answer.score_kind.tolist()) == {GOLD}
    assert answer.suffix_tokens[0] < full.suffix_tokens[0]
    assert packed(fluency_weight=0.0).suffix_tokens == full.suffix_tokens, "fluency takes no token of its own"


def test_text_by_eq_8_by_distance_and_by_weight():
    """Against the definitions, on a table whose rows differ in norm: the inner product does not return plain tokens."""
    g = torch.Generator().manual_seed(1)
    table = torch.randn(50, 8, generator=g) * torch.rand(50, 1, generator=g).mul(3).add(0.2)
    allowed = torch.ones(50, dtype=torch.bool)
    allowed[7] = False
    hull = VocabularyHull(table, allowed)
    plain = Mixture.from_tokens(torch.arange(50))
    ids = torch.randint(0, 50, (30, 4), generator=g).to(torch.int32)
    weights = torch.rand(30, 4, generator=g)
    mixture = Mixture(ids, weights / weights.sum(1, keepdim=True))
    z = mixture.embed(table)
    inner = (z @ table.T).masked_fill(~allowed, -torch.inf).argmax(1)
    near = torch.cdist(z.double(), table.double()).masked_fill(~allowed, torch.inf).argmin(1)
    assert torch.equal(hull.text_ids(mixture, "inner-product"), inner)
    assert torch.equal(hull.text_ids(mixture, "nearest"), near)
    assert torch.equal(hull.text_ids(mixture, "heaviest"), mixture.argmax_ids())
    assert torch.equal(hull.text_ids(plain, "nearest")[allowed], torch.arange(50)[allowed])
    assert float((hull.text_ids(plain, "inner-product") == torch.arange(50)).float().mean()) < 0.6
    with pytest.raises(ConfigError, match="inner-product, nearest or heaviest"):
        hull.text_ids(mixture, "closest")


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
    with pytest.raises(InputError, match="explore_weight=0"):
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
        ({"guide_weight": 0.0, "explore_weight": 0.0, "fluency_weight": 0.0}, "nothing to optimise"),
        ({"fluency_weight": float("nan")}, "fluency_weight"),
        ({"step_size": float("inf")}, "step_size"),
        ({"explore_tokens": 0}, "explore_tokens"),
        ({"step_size": 1.5}, "leaves the hull"),
        ({"solver": "entropic"}, "hull='plausible'"),
    ],
)
def test_bad_settings(change, match):
    with pytest.raises(ConfigError, match=match):
        ReviseConfig(**change)


@pytest.mark.parametrize("old", ["alpha", "beta", "away", "away_window", "stop_nll", "combine", "update_fraction"])
def test_settings_of_earlier_versions_name_the_new_ones(old):
    with pytest.raises(ConfigError, match=rf"{old} is gone; its place is taken by"):
        load_config(RecoverConfig, None, [f"latent.{old}=1"])


def test_the_defaults_are_the_published_method():
    config, job = ReviseConfig(), RecoverConfig()
    assert (config.guide_weight, config.explore_weight, config.fluency_weight) == (1.0, 1.0, 0.1)
    assert (config.steps, config.step_rule, config.step_size) == (10, "harmonic", 0.1)
    assert (config.reduction, config.explore, config.explore_tokens) == ("sum", "loglik", None)
    assert (config.stop_guide, config.special_vertices, config.hull) == (1e-3, True, "full")
    assert (job.latent, job.rho, job.prefix_fraction) == (config, 0.8, 0.8)
    assert job.pattern().template(job.answer_template) == "Based on my current reasoning process, the final answer is "


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


def test_under_inference_mode_and_in_two_threads_on_one_model():
    """People sample under inference mode; a second thread waits for the model, whose flags the first has changed."""
    model = tiny_model("qwen3", vocab=VOCABULARY, seed=18)
    config, work = ReviseConfig(steps=2), rollouts(seed=19)

    def revise(_: int) -> list[list[int]]:
        return [revision.mixture.ids.tolist() for revision in Reviser(model, config).revise(work)]

    expected = revise(0)
    with torch.inference_mode():
        assert revise(0) == expected
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(revise, range(6))) == [expected] * 6
    assert all(parameter.requires_grad for parameter in model.parameters())
