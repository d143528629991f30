"""Branch scores against one plain pass a branch, their cost, and what happens where memory runs out."""

import pytest
import torch

from latentrevise import FailedRollout, ReviseConfig, Reviser
from latentrevise.errors import InputError, RunError
from latentrevise.model import lean, memory
from latentrevise.model.branches import Branch, completion_logprobs, score_branches
from latentrevise.model.policy import Policy
from tests.test_architectures import build, relative
from tests.test_reviser import rollouts

VOCABULARY = 97


def ids(generator, low, high):
    n = int(torch.randint(low, high, (1,), generator=generator))
    return torch.randint(5, VOCABULARY, (n,), generator=generator).tolist()


def task(seed=0, trunks=4, branches=60, longest=6):
    """Ragged trunks; branches in random order, some of one token, some at the trunk's first token or at its end."""
    g = torch.Generator().manual_seed(seed)
    made = [ids(g, 3, 30) for _ in range(trunks)]
    found = []
    for i in range(branches):
        trunk = int(torch.randint(trunks, (1,), generator=g))
        at = {0: 1, 1: len(made[trunk])}.get(i % 7, int(torch.randint(1, len(made[trunk]) + 1, (1,), generator=g)))
        tokens = ids(g, 1, longest + 1)
        found.append(Branch(trunk, at, tokens, int(torch.randint(len(tokens), (1,), generator=g))))
    return made, found


def plain(model, trunk, branch):
    embed = model.get_input_embeddings()
    tokens = torch.tensor(list(branch.tokens))
    start = trunk[: branch.at] if isinstance(trunk, torch.Tensor) else embed(torch.tensor(trunk[: branch.at]))
    with torch.no_grad():
        inputs = torch.cat([start, embed(tokens)]).unsqueeze(0)
        logps = model(inputs_embeds=inputs, use_cache=False).logits[0].log_softmax(-1)
    first = branch.at - 1 + branch.scored_from
    return logps[first:-1].gather(1, tokens[branch.scored_from :].unsqueeze(1)).squeeze(1)


def check(model, trunks, branches, **settings):
    scores = score_branches(Policy(model), trunks, branches, **settings)
    for branch, found in zip(branches, scores.logprobs, strict=True):
        wanted = plain(model, trunks[branch.trunk], branch)
        assert found.dtype == torch.float32
        assert torch.allclose(found, wanted, rtol=1e-5, atol=2e-5), branch
    return scores


@pytest.mark.parametrize(
    "name", ["qwen2", "qwen3_moe", "mistral", "gemma2", "gemma3", "granite", "cohere2", "gpt_neox", "smollm3", "gpt2"]
)
def test_scores_equal_plain_passes(name):
    check(build(name), *task(branches=24))


@pytest.mark.parametrize("token_budget", [1, 64, 100000])
def test_any_budget_gives_the_same_scores(token_budget):
    check(build("mistral"), *task(1, branches=25), token_budget=token_budget)


def test_long_branches_and_more_than_a_row_holds():
    check(build("gemma3"), *task(2, trunks=2, branches=40, longest=60))
    check(build("qwen3"), *task(3, trunks=1, branches=1, longest=150))


def test_trunks_of_embeddings():
    """A branch behind a mixture: the score of the answer after a revised prefix."""
    model = build("qwen3")
    reviser = Reviser(model, ReviseConfig(steps=2))
    work = rollouts()
    table = model.get_input_embeddings().weight.detach()
    trunks = [
        torch.cat([table[list(rollout.prompt_ids)], revision.embeddings(reviser.hull)])
        for rollout, revision in zip(work, reviser.revise(work), strict=True)
    ]
    branches = [
        Branch(i, len(trunk), [*r.template_ids, *r.answer_ids], len(r.template_ids))
        for i, (trunk, r) in enumerate(zip(trunks, work, strict=True))
    ]
    scores = check(model, [*trunks, work[0].prompt_ids], [*branches, Branch(len(trunks), 1, [7, 8])])
    for nll, revision in zip(scores.logprobs[:-1], reviser.revise(work), strict=True):
        assert -float(nll.sum()) == pytest.approx(revision.trace.guide[-1], rel=1e-4)


def test_each_trunk_is_run_once_and_predicted_tokens_never():
    seen = []
    model = build("qwen3")
    policy = Policy(model)
    model.model.register_forward_hook(
        lambda module, arguments, keywords, output: seen.append(keywords["inputs_embeds"].shape[:2].numel()),
        with_kwargs=True,
    )
    trunk = list(range(10, 30))
    branches = [Branch(0, at, [5, 6, 7], 1) for at in range(1, 19)] + [Branch(0, 4, [9])]
    scores = score_branches(policy, [trunk, trunk, [5]], branches)
    assert scores.trunk_tokens == [18, 0, 0], "tokens behind the last branch are not needed"
    assert scores.branch_tokens == [2] * 18 + [0]
    assert scores.compute.passes == 18 + 36 == sum(seen)
    assert scores.total.tolist() == pytest.approx([float(s.sum()) for s in scores.logprobs])
    empty = score_branches(policy, [trunk], [])
    assert (empty.logprobs, empty.total.shape, empty.compute.passes) == ([], (0,), 0)


def test_thousands_of_branches_take_few_passes():
    model, calls = build("qwen3"), []
    policy = Policy(model)
    trunk = torch.randint(5, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    branches = [Branch(0, at, [v, 6, 7, 8], 1) for at in range(1, 41) for v in range(5, 85)]
    model.model.register_forward_hook(lambda *_: calls.append(1))
    scores = score_branches(policy, [trunk], branches, token_budget=8192)
    assert len(calls) < 12
    for i in (0, 1777, 3199):
        assert torch.allclose(scores.logprobs[i], plain(model, trunk, branches[i]), atol=1e-5)


def test_logprobs_of_completions():
    model = build("llama")
    contexts = [[5, 6, 7], [5, 6, 7], [8, 9]]
    completions = [[10, 11, 12], [], [13]]
    found = completion_logprobs(Policy(model), contexts, completions, token_budget=64)
    for context, completion, logprobs in zip(contexts, completions, found, strict=True):
        assert len(logprobs) == len(completion)
        if completion:
            assert torch.allclose(logprobs, plain(model, context, Branch(0, len(context), completion)), atol=1e-5)


@pytest.mark.parametrize(
    ("branch", "match"),
    [
        (Branch(2, 1, [5]), "2 trunks"),
        (Branch(0, 0, [5]), "at least one"),
        (Branch(0, 4, [5]), "has 3 tokens"),
        (Branch(0, 1, []), "nothing to score"),
        (Branch(0, 1, [5], 1), "nothing to score"),
        (Branch(0, 1, [VOCABULARY]), f"token {VOCABULARY}"),
        (Branch(0, 1, [-100]), "negative"),
        (Branch(0, 3, [5] * 300), "256 positions"),
    ],
)
def test_bad_branches_are_named(branch, match):
    policy = Policy(build("qwen3"))
    with pytest.raises(InputError, match=match):
        score_branches(policy, [[5, 6, 7], [8]], [Branch(1, 1, [5]), branch])


@pytest.mark.parametrize("trunk", [[5, VOCABULARY], torch.tensor([VOCABULARY]), torch.zeros(3, 7), torch.zeros(32)])
def test_bad_trunks_are_named(trunk):
    with pytest.raises(InputError, match="trunk 1"):
        score_branches(Policy(build("qwen3")), [[5], trunk], [Branch(0, 1, [5])])


class Scarce:
    """Lets a pass of the policy through only up to so many padded tokens."""

    def __init__(self, policy, tokens, error):
        self.run, self.tokens, self.error, self.failures = policy._run, tokens, error, 0
        policy._run = self

    def __call__(self, embeddings, *arguments):
        if embeddings.shape[:2].numel() > self.tokens:
            self.failures += 1
            raise self.error
        return self.run(embeddings, *arguments)


ERRORS = [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]


@pytest.mark.parametrize("error", ERRORS)
def test_out_of_memory_halves_the_batch_and_changes_nothing(error):
    config = ReviseConfig(steps=3, token_budget=100000)
    work = rollouts(seed=20, count=12)
    calm, scarce = (Reviser(build("qwen3"), config) for _ in range(2))
    wanted = calm.revise(work)
    limit = Scarce(scarce.policy, 150, error)
    for a, b in zip(scarce.revise(work), wanted, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.allclose(a.weights, b.weights)
        assert a.compute.passes == b.compute.passes
    assert 0 < limit.failures < 6
    for a, b in zip(scarce.value_and_grad(work), calm.value_and_grad(work), strict=True):
        assert relative(a.grad, b.grad) < 1e-5
    trunks, branches = task(4)
    found = score_branches(scarce.policy, trunks, branches, token_budget=100000)
    before = score_branches(calm.policy, trunks, branches, token_budget=100000)
    assert torch.allclose(found.total, before.total, rtol=1e-5)


def test_what_does_not_fit_alone_is_named():
    reviser = Reviser(build("qwen3"))
    Scarce(reviser.policy, 4, ERRORS[0])
    with pytest.raises(RunError, match="one rollout of 5 cached"):
        reviser.revise([FailedRollout([5] * 5, [6] * 9, [7], [8])])
    spread = Reviser(build("qwen3"), ReviseConfig(token_budget=1000))
    Scarce(spread.policy, 4, ERRORS[0])
    spread.policy.sharded = True  # the other processes would not know
    with pytest.raises(RunError, match=r"batch of 1 rows .* of a sharded model"):
        spread.revise([FailedRollout([5] * 5, [6] * 9, [7], [8])])
    Scarce(reviser.policy, 10**9, RuntimeError("something else"))
    other = Reviser(build("qwen3"))
    Scarce(other.policy, 4, RuntimeError("something else"))
    with pytest.raises(RuntimeError, match="something else"):
        other.revise([FailedRollout([5] * 5, [6] * 9, [7], [8])])


def test_the_budget_follows_memory_and_model(monkeypatch):
    def free(mebibytes):
        monkeypatch.setattr(memory.os, "sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else mebibytes << 8)

    free(100_000)
    small = Policy(build("qwen3"))
    large = Policy(build("qwen3", num_hidden_layers=8, intermediate_size=20480, hidden_size=64))
    assert memory.token_budget(small) * memory.activation_bytes(small) == pytest.approx(memory._CPU_BYTES, rel=0.01)
    assert memory.token_budget(large) == memory._CPU_TOKENS[4]
    assert memory.token_budget(large, recompute=True) > memory._CPU_TOKENS[4]
    for mebibytes in (400, 200, 50):
        free(mebibytes)
        budget = memory.token_budget(large)
        assert budget in {memory._CPU_TOKENS[4] >> k for k in range(9)}, "the same for about as much memory"
        assert budget <= (mebibytes << 19) / memory.activation_bytes(large) < 2 * (budget + 1)
    free(0)
    assert memory.token_budget(large) == 1


def kept_bytes(reviser, work):
    """Bytes that autograd keeps between the forward and the backward pass, every storage counted once."""
    storages = {}

    def keep(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage().data_ptr() for p in reviser.policy.model.parameters()}
    pack = lean._pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "_pack", lambda x: keep(kept) if isinstance(kept := pack(x), torch.Tensor) else kept)
        reviser.value_and_grad(work)
    return sum(size for where, size in storages.items() if where not in weights)


def test_memory_grows_with_the_budget_and_not_with_the_vocabulary():
    g = torch.Generator().manual_seed(0)

    def work(count):
        return [FailedRollout([5] * 8, ids(g, 40, 41), [7] * 8, [8] * 2) for _ in range(count)]

    def measured(vocabulary, count):
        model = build("llama", vocab_size=vocabulary, tie_word_embeddings=False)
        return kept_bytes(Reviser(model, ReviseConfig(token_budget=10**6)), work(count))

    four, eight = measured(97, 4), measured(97, 8)
    assert eight == pytest.approx(2 * four, rel=0.1)
    assert measured(9700, 4) == pytest.approx(four, rel=0.02)
    split = Reviser(build("llama", tie_word_embeddings=False), ReviseConfig(token_budget=4 * 60))
    assert split.config.token_budget is not None
    seen = []
    run = split.policy._run
    split.policy._run = lambda embeddings, *rest: (seen.append(embeddings.shape[:2].numel()), run(embeddings, *rest))[1]
    split.value_and_grad(work(32))
    assert max(seen) <= 4 * 60


def test_the_estimate_of_activation_memory_is_near_the_truth():
    """It sets the default budget: too low means running out of memory, too high slow small batches."""
    for name in ("llama", "qwen3", "olmo2"):
        model = build(name, hidden_size=64, intermediate_size=256, num_hidden_layers=4, head_dim=16)
        reviser = Reviser(model, ReviseConfig(token_budget=10**6))
        work = [FailedRollout([5], [6] * 60, [7] * 5, [8])] * 4
        tokens = 4 * (60 + 4)
        ratio = memory.activation_bytes(reviser.policy) * tokens / kept_bytes(reviser, work)
        assert 0.7 < ratio < 3, (name, ratio)
