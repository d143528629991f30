"""Half-precision products in float32, layers that run again instead of being kept, padded shapes that repeat."""

import dataclasses
import statistics

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from latentrevise import ReviseConfig, Reviser
from latentrevise.errors import ModelError
from latentrevise.model import lean, memory, policy
from latentrevise.model.branches import score_branches
from latentrevise.model.packing import batches, bucket
from latentrevise.revise.objective import suffix
from tests.test_architectures import CONFIG, build, relative
from tests.test_branches import task
from tests.test_reviser import plain_passes, rollouts


@pytest.fixture
def no_half_products(monkeypatch):
    """Whatever this CPU can do."""
    for module in (lean, policy):
        monkeypatch.setattr(module, "slow", lambda dtype: dtype in (torch.bfloat16, torch.float16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_half_precision_products_in_float32(no_half_products, dtype, bias):
    g = torch.Generator().manual_seed(0)

    def whole(*shape):  # sums of such products are exact in float32, in any order, and too long for the dtype
        return torch.randint(-31, 32, shape, generator=g).to(dtype)

    layer = nn.Linear(48, 20, bias=bias, dtype=dtype).requires_grad_(False)
    for parameter in layer.parameters():
        parameter.copy_(whole(*parameter.shape))
    x, upstream = whole(3, 7, 48).requires_grad_(True), whole(3, 7, 20)
    with lean.Widened():
        out = layer(x)
        (grad,) = torch.autograd.grad(out, x, upstream)
    assert out.dtype == grad.dtype == dtype
    exact = nn.functional.linear(x.float(), layer.weight.float(), layer.bias.float() if bias else None)
    assert torch.equal(out, exact.to(dtype)), "sums in float32, rounded once"
    assert torch.equal(grad, (upstream.float() @ layer.weight.float()).to(dtype))


def test_weights_in_training_and_float32_are_left_to_torch(no_half_products, monkeypatch):
    monkeypatch.setattr(lean._Linear, "apply", lambda *_: pytest.fail("not a frozen half-precision layer"))
    with lean.Widened():
        trained = nn.Linear(4, 3, dtype=torch.bfloat16)
        trained(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        assert trained.weight.grad is not None
        nn.Linear(4, 3).requires_grad_(False)(torch.ones(2, 4))


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_bfloat16_model_without_bfloat16_products(no_half_products, name, recompute):
    """Against float32 on the same rounded weights, not further off than the model by itself."""
    low, exact, work = build(name, torch.bfloat16), build(name, torch.bfloat16).float(), rollouts()
    reviser = Reviser(low, dataclasses.replace(CONFIG, recompute=recompute))
    ours, theirs = [], []
    for rollout, found in zip(work, reviser.value_and_grad(work), strict=True):
        truth = plain_passes(exact, rollout, CONFIG)[2]
        ours.append(relative(found.grad, truth))
        theirs.append(relative(plain_passes(low, rollout, CONFIG)[2], truth))
    assert statistics.median(ours) < 2 * statistics.median(theirs), (ours, theirs)


@pytest.mark.parametrize("name", ["qwen2 windows", "qwen3_moe", "gemma3", "gpt2", "gpt_neox", "mixtral"])
def test_recomputed_layers_give_the_same_bits(name):
    model, work = build(name), rollouts()
    config = ReviseConfig(steps=3)
    before = [vars(module).get("forward") for module in model.modules()]
    reviser = Reviser(model, config)
    kept = reviser.revise(work)
    again = Reviser(model, dataclasses.replace(config, recompute=True)).revise(work)
    for rollout, a, b in zip(work, kept, again, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
        assert a.trace.loss == b.trace.loss
        assert b.compute.forward - a.compute.forward == 3 * reviser.tokens(rollout)
        assert b.compute.backward == a.compute.backward
    assert before == [vars(module).get("forward") for module in model.modules()]


def test_recomputation_under_hooks_and_adapters():
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    work = rollouts()
    sizes = [(len(rollout.prompt_ids), suffix(rollout, CONFIG).fed) for rollout in work]
    for model in (
        accelerate.dispatch_model(build("llama"), {"": "cpu"}, force_hooks=True),
        peft.get_peft_model(build("qwen3"), lora).eval(),
    ):
        runs = []
        handle = model.get_decoder().layers[0].register_forward_hook(lambda *_, runs=runs: runs.append(1))
        reviser = Reviser(model, dataclasses.replace(CONFIG, recompute=True))
        runs.clear()
        found = reviser.value_and_grad(work)
        assert len(runs) == len(batches(sizes, 10**6)) * 2, "prompts and pass; hooks do not see a layer run again"
        handle.remove()
        for rollout, evaluation in zip(work, found, strict=True):
            assert relative(evaluation.grad, plain_passes(model, rollout, CONFIG)[2]) < 1e-5


def test_recomputation_keeps_no_gates_and_the_budget_knows():
    def gates_kept(recompute):
        model, gates, alive = build("llama", num_hidden_layers=4), [], []
        reviser = Reviser(model, ReviseConfig(recompute=recompute))
        for layer in model.model.layers:
            layer.mlp.gate_proj.register_forward_hook(lambda *a: gates.append(StorageWeakRef(a[2].untyped_storage())))
        model.model.register_forward_hook(lambda *_: alive.append(sum(not gate.expired() for gate in gates)))
        reviser.value_and_grad(rollouts()[:1])
        return alive

    assert gates_kept(False) == [0, 4], "behind the prompt, behind the pass"
    assert gates_kept(True) == [0, 0]
    large = Reviser(build("llama", num_hidden_layers=8)).policy
    assert memory.activation_bytes(large, recompute=True) < memory.activation_bytes(large) / 2
    assert 0 < memory.cached_share(large) < 1


def test_a_body_without_a_list_of_layers_cannot_be_recomputed():
    model = build("qwen3")
    reviser = Reviser(model, ReviseConfig(recompute=True))
    reviser.policy.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="no list of its 3 layers"):
        reviser.policy._layers()


def test_buckets_are_few_and_waste_little():
    found = [bucket(n) for n in range(1, 4097)]
    assert all(n <= b and b % 8 == 0 for n, b in enumerate(found, start=1))
    assert all(b <= max(n + 7, n * 9 / 8) for n, b in enumerate(found, start=1))
    assert len({b for b in found if 1024 < b <= 2048}) == 8


def test_padded_shapes_repeat_and_change_nothing():
    model, work, shapes = build("gemma3"), rollouts(count=8), set()
    exact, padded = Reviser(model, CONFIG), Reviser(model, CONFIG)
    padded.policy.buckets = True
    model.model.register_forward_hook(
        lambda module, arguments, keywords, output: shapes.add(keywords["inputs_embeds"].shape[1]), with_kwargs=True
    )
    wanted = exact.value_and_grad(work)
    ragged = len(shapes)
    shapes.clear()
    for a, b in zip(padded.value_and_grad(work), wanted, strict=True):
        assert relative(a.grad, b.grad) < 1e-5
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
    assert all(n % 8 == 0 for n in shapes)
    assert len(shapes) <= ragged
    for a, b in zip(padded.revise(work), exact.revise(work), strict=True):
        assert torch.equal(a.ids, b.ids)
    trunks, branches = task(1)
    found = [score_branches(reviser.policy, trunks, branches).total for reviser in (exact, padded)]
    assert torch.allclose(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("masked", [True, False])
def test_half_precision_attention_in_float32(no_half_products, masked):
    g = torch.Generator().manual_seed(0)
    shapes = (2, 4, 5, 8), (2, 4, 9, 8), (2, 4, 9, 8)
    low = [torch.randn(shape, generator=g).bfloat16().requires_grad_(True) for shape in shapes]
    low[1].requires_grad_(False)
    mask = torch.randn(2, 1, 5, 9, generator=g).bfloat16() if masked else None
    upstream = torch.randn(shapes[0], generator=g).bfloat16()
    attention = nn.functional.scaled_dot_product_attention
    with lean.Widened():
        out = attention(*low, attn_mask=mask, scale=0.3)
    found = torch.autograd.grad(out, [low[0], low[2]], upstream)
    wide = [x.detach().float().requires_grad_(True) for x in low]
    exact = attention(*wide, attn_mask=None if mask is None else mask.float(), scale=0.3)
    wanted = torch.autograd.grad(exact, [wide[0], wide[2]], upstream.float())
    for low_one, wide_one in zip((out, *found), (exact, *wanted), strict=True):
        off = (low_one.float() - wide_one).abs()
        assert (off <= 2**-8 * 1.001 * wide_one.abs() + 1e-6).all(), "rounded once, whatever the order of the sums"


@pytest.mark.parametrize("function", [nn.functional.silu, nn.functional.gelu, nn.GELU(approximate="tanh"), torch.tanh])
def test_activations_made_again_give_the_same_bits(function):
    g = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(6, 50, generator=g, requires_grad=True) for _ in range(2))
    sizes = []

    def gradients():
        out = (function(gate) * up).square().sum()
        return torch.autograd.grad(out, (gate, up), retain_graph=True), torch.autograd.grad(out, (gate, up))

    kept = gradients()
    pack = lean._pack
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lean, "_pack", lambda x: (sizes.append(isinstance(pack(x), torch.Tensor)), pack(x))[1])
        with lean.activations_made_again():
            again = gradients()
    assert all(torch.equal(a, b) for p, q in zip(kept, again, strict=True) for a, b in zip(p, q, strict=True))
    assert sizes.count(False) == (0 if function is torch.tanh else 1)
