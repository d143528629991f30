"""The ablations of the latent strategy: what each takes away, and nothing else."""

import dataclasses

import pytest
import torch

from latentrevise import FailedRollout, ReviseConfig
from latentrevise.data.atoms import read_atoms, write_atoms
from latentrevise.errors import ConfigError
from latentrevise.model.policy import Policy
from latentrevise.revise.hull import Mixture
from latentrevise.revise.reviser import Reviser
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model("qwen3", vocab=61, seed=1))


ROLLOUTS = [
    FailedRollout((5, 6), (11, 12, 13), (14, 15), (20,), template_ids=(9,)),
    FailedRollout((7,), (31, 32, 33, 34, 35), (36,), (21,), template_ids=(9,)),
]


def revise(policy, rollouts=ROLLOUTS, **changes):
    return Reviser(policy, ReviseConfig.answer_only(**{"steps": 3, "step_size": 0.3, **changes})).revise(rollouts)


def test_random_vertices_are_the_rollouts_own_whatever_the_batch(policy):
    together = revise(policy, solver="random")
    alone = [revise(policy, [r], solver="random")[0] for r in ROLLOUTS]
    oracle = revise(policy)
    for a, b, best, rollout in zip(together, alone, oracle, ROLLOUTS, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
        # As much weight is moved as with the oracle, onto other vertices, which help less.
        assert a.weights.sum(-1) == pytest.approx(torch.ones(len(a.weights)), abs=1e-5)
        own = torch.tensor(rollout.prefix_ids).unsqueeze(1)
        left = [(r.weights * (r.ids == own)).sum(-1) for r in (a, best)]
        assert left[0] == pytest.approx(left[1], abs=0.31), "(a vertex may be the token itself)"
        assert a.trace.guide[-1] > best.trace.guide[-1]
        assert all(bool(policy.known[i]) for i in a.ids[a.weights > 0])
    assert not torch.equal(revise(policy, solver="random", seed=1)[0].ids, together[0].ids)


def test_random_vertices_of_the_plausible_hull_are_plausible(policy):
    reviser = Reviser(policy, ReviseConfig.answer_only(hull="plausible", p_min=0.02))
    with policy.frozen():
        batch = reviser._batch([0, 1], ROLLOUTS, candidates=True)
    candidates = batch.candidates.split([3, 5])
    for revision, listed in zip(revise(policy, solver="random", hull="plausible", p_min=0.02), candidates, strict=True):
        for t in range(len(listed)):
            assert set(revision.ids[t][revision.weights[t] > 0].tolist()) <= set(listed[t].tolist())


def test_the_free_optimiser_is_adam(policy):
    """Against torch's own Adam on the embeddings, three steps, the rate halving as the hull's step does."""
    (revision, _) = revise(policy, solver="adam", steps=3, step_size=0.2)
    reviser, table = Reviser(policy, ReviseConfig.answer_only()), policy.table
    own = table[torch.tensor(ROLLOUTS[0].prefix_ids)].clone().requires_grad_(True)
    unit = table.square().mean().sqrt()
    adam = torch.optim.Adam([own], lr=1.0)
    ids, weights = torch.tensor(ROLLOUTS[0].prefix_ids, dtype=torch.int32)[:, None], torch.ones(3, 1)
    for k in range(3):
        point = Mixture(ids, weights, own.detach() - table[ids[:, 0].long()])
        (evaluation,) = reviser.value_and_grad(ROLLOUTS[:1], [point])
        own.grad = evaluation.grad.clone()
        adam.param_groups[0]["lr"] = float(0.2 * 2 / (k + 2) * unit)
        adam.step()
    found = revision.embeddings(reviser.hull)
    assert torch.allclose(found, own.detach(), atol=1e-5)
    assert revision.trace.guide[-1] < revision.trace.guide[0]
    with pytest.raises(ConfigError, match="rounding='none'"):
        ReviseConfig(solver="adam", rounding="argmax")


def test_the_softmax_starts_near_the_tokens_and_descends(policy):
    revisions = revise(policy, solver="softmax", mass=0.1, step_size=1.0, max_candidates=61)
    for revision, rollout in zip(revisions, ROLLOUTS, strict=True):
        assert revision.trace.guide[-1] < revision.trace.guide[0]
        assert revision.weights.sum(-1) == pytest.approx(torch.ones(len(revision.weights)), abs=1e-5)
        assert revision.ids.max() < 61
        assert len(revision.ids) == len(rollout.prefix_ids)
    few = revise(policy, solver="softmax", mass=0.1, step_size=1.0, max_candidates=4)
    for revision, whole in zip(few, revisions, strict=True):
        assert revision.ids.shape[1] == 4
        assert torch.equal(revision.ids, whole.ids[:, :4])
        assert revision.weights.sum(-1) == pytest.approx(torch.ones(len(revision.weights)), abs=1e-5)


def test_the_softmax_step_is_gradient_descent_on_the_logits(policy):
    config = ReviseConfig.answer_only(steps=1, solver="softmax", mass=0.3, step_size=0.7, max_candidates=61)
    reviser = Reviser(policy, config)
    (revision,) = reviser.revise(ROLLOUTS[:1])
    allowed = policy.known.float()
    start = 0.3 * allowed / allowed.sum() + 0.7 * torch.eye(61)[torch.tensor(ROLLOUTS[0].prefix_ids)]
    every = torch.arange(61).expand(3, -1).to(torch.int32)
    (evaluation,) = reviser.value_and_grad(ROLLOUTS[:1], [Mixture(every, start)])
    scores = evaluation.grad @ policy.table.T
    slope = start * (scores - (start * scores).sum(-1, keepdim=True))
    wanted = torch.softmax(start.log() - 0.7 * slope / slope.abs().amax(-1, keepdim=True), -1)
    found = torch.zeros(3, 61).scatter_add(1, revision.ids.long(), revision.weights)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.parametrize("solver", ["softmax", "adam"])
def test_settings_an_ablation_does_not_know(solver):
    with pytest.raises(ConfigError, match=solver):
        ReviseConfig(solver=solver, hull="plausible")


def test_offsets_are_kept_beside_the_atoms(tmp_path):
    mixture = Mixture(
        torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 4.0]])
    )
    write_atoms(tmp_path / "a.safetensors", {"a": (mixture.ids, mixture.weights)}, {"a": mixture.offset})
    atoms, offsets = read_atoms(tmp_path / "a.safetensors")
    assert list(atoms) == ["a"]
    assert torch.equal(offsets["a"], mixture.offset)
    table = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0]])
    assert mixture.embed(table).tolist() == [[1.25, 5.0]]
    assert dataclasses.replace(mixture, offset=None).embed(table).tolist() == [[1.0, 1.0]]
