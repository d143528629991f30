"""The packed pass against two plain passes of the model itself, on every architecture people use."""

import dataclasses
import functools
import statistics

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

from latentrevise import Branch, ReviseConfig, Reviser
from latentrevise.engines import HFEngine
from latentrevise.errors import InputError, ModelError
from latentrevise.model.branches import score_branches
from latentrevise.model.loading import keep_softcap
from latentrevise.model.policy import Policy
from tests.test_reviser import compare, plain_passes, rollouts
from tests.tiny import BOS, EOS, PAD

VOCABULARY = 97
CONFIG = ReviseConfig()
SLIDING = ["sliding_attention", "full_attention"]
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

# model_type, what it needs beside the common settings. Windows are short enough to be crossed.
ARCHITECTURES = {
    "qwen2": ("qwen2", {}),
    "qwen2 windows": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3_moe": ("qwen3_moe", {"head_dim": 8, "num_experts": 4, **MOE}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": 4, "shared_expert_intermediate_size": 32, **MOE}),
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            }
        },
    ),
    "mistral": ("mistral", {"sliding_window": 8}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9}),
    "gemma": ("gemma", {"head_dim": 8}),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "sliding_window": 8,
            "layer_types": SLIDING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 4.0,
        },
    ),
    "gemma3": ("gemma3_text", {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8, "layer_types": SLIDING}),
    "phi": ("phi", {"partial_rotary_factor": 0.5, "tie_word_embeddings": False}),
    "phi3": ("phi3", {"sliding_window": 8, "tie_word_embeddings": False}),
    "olmo2": ("olmo2", {"tie_word_embeddings": False}),
    "olmo3": ("olmo3", {"sliding_window": 8, "layer_types": SLIDING}),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.5, "attention_multiplier": 0.3},
    ),
    "cohere": ("cohere", {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 8, "layer_types": SLIDING}),
    "gpt_neox": ("gpt_neox", {"tie_word_embeddings": False, "num_key_value_heads": None}),
    "gpt2": ("gpt2", {"n_inner": 64}),
    "gptj": ("gptj", {"rotary_dim": 4, "tie_word_embeddings": False}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "starcoder2": ("starcoder2", {"sliding_window": 8}),
    "stablelm": ("stablelm", {"partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 8}),
    "ernie4_5": ("ernie4_5", {"head_dim": 8}),
    "gpt_oss": (
        "gpt_oss",
        {"head_dim": 8, "sliding_window": 8, "layer_types": SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 32, "do_layer_norm_before": True}),
}
UNUSED_BY = {"gptj": {"num_key_value_heads"}, "gpt2": {"num_key_value_heads", "intermediate_size"}}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes):
    model_type, own = ARCHITECTURES[name]
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    settings |= own | changes
    kept = {k: v for k, v in settings.items() if v is not None and k not in UNUSED_BY.get(model_type, ())}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **kept), dtype=torch.float32).eval()
        keep_softcap(model)
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases and norms start at 0 or 1, which hides what is done with them
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype)


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def check(model, tolerance: float = 1e-5, seed: int = 0) -> None:
    work = rollouts(seed)
    for rollout, found in zip(work, Reviser(model, CONFIG).value_and_grad(work), strict=True):
        compare(found, plain_passes(model, rollout, CONFIG), tolerance)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradient_equals_two_plain_passes(name):
    """Ragged rollouts, at the first, middle and last place of the batch."""
    check(build(name))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_bfloat16_is_as_good_as_the_model_in_bfloat16(name):
    low, work = build(name, torch.bfloat16), rollouts()
    exact = build(name, torch.bfloat16).float()  # the same rounded weights
    ours, theirs = [], []
    for rollout, found in zip(work, Reviser(low, CONFIG).value_and_grad(work), strict=True):
        truth = plain_passes(exact, rollout, CONFIG)[2]
        ours.append(relative(found.grad, truth))
        theirs.append(relative(plain_passes(low, rollout, CONFIG)[2], truth))
    # Where experts are chosen, a tie that rounding decides the other way moves a whole rollout, in either computation.
    typical = statistics.median if hasattr(low.config, "num_experts_per_tok") else sum
    assert typical(ours) < 2 * typical(theirs), (ours, theirs)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_experts_chosen_for_padding_change_no_other_token(name):
    """The batch's longest rollout pads all others; alone, nothing is padded."""
    model, work = build(name), rollouts(seed=2)
    together = Reviser(model, dataclasses.replace(CONFIG, token_budget=100000)).value_and_grad(work)
    for rollout, found in zip(work, together, strict=True):
        (alone,) = Reviser(model, CONFIG).value_and_grad([rollout])
        assert relative(found.grad, alone.grad) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere"])
def test_tied_and_untied_heads(name):
    check(build(name, tie_word_embeddings=name != "llama"))
    check(build(name, tie_word_embeddings=name == "llama"))


def test_tables_with_padded_rows():
    model = build("qwen3")
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.get_input_embeddings().weight.shape[0] == 128
    check(model)


def test_a_head_with_a_bias():
    model = build("llama")
    model.lm_head = torch.nn.Linear(32, VOCABULARY, bias=True)
    model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    check(model)


class TestLora:
    @staticmethod
    def wrapped(targets, **settings):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.LoraConfig(
            r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **settings
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return peft.get_peft_model(build("qwen3", tie_word_embeddings=False), config).eval()

    def test_on_the_body(self):
        check(self.wrapped(["q_proj", "v_proj", "down_proj"]))

    def test_on_embedding_and_head(self):
        model = self.wrapped(["embed_tokens", "lm_head", "o_proj"])
        check(model)

    def test_trained_between_calls(self):
        model = self.wrapped(["embed_tokens", "lm_head", "o_proj"])
        (rollout, *_) = rollouts()
        reviser = Reviser(model, CONFIG)
        (before,) = reviser.value_and_grad([rollout])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.mul_(1.5)
        (after,) = reviser.value_and_grad([rollout])
        loss, _, grad = plain_passes(model, rollout, CONFIG)
        assert after.loss == pytest.approx(loss, rel=1e-5)
        assert after.loss != pytest.approx(before.loss, rel=1e-3)
        assert relative(after.grad, grad) < 1e-5

    def test_virtual_tokens_are_refused(self):
        peft = pytest.importorskip("peft", reason="peft is not installed")
        config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
        with pytest.raises(ModelError):
            Policy(peft.get_peft_model(build("qwen3"), config))


def test_a_scaled_table_follows_training():
    model = build("gemma3")
    reviser = Reviser(model, CONFIG)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.2)
    work = rollouts()
    for rollout, found in zip(work, reviser.value_and_grad(work), strict=True):
        assert relative(found.grad, plain_passes(model, rollout, CONFIG)[2]) < 1e-5


def test_models_under_a_device_map():
    accelerate = pytest.importorskip("accelerate")
    model = build("llama")
    hooked = accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    check(hooked)
    assert hooked._hf_hook is not None


@pytest.fixture
def one_process():
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["gemma3", "llama"])
def test_under_fsdp2_between_training_steps(name, recompute, one_process):
    """Sharded and plain models are trained alike, with revisions before and between."""
    plain, sharded = build(name), build(name)
    for layer in sharded.model.layers:
        fully_shard(layer, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    work = rollouts()
    reviser = Reviser(sharded, dataclasses.replace(CONFIG, recompute=recompute))
    for _ in range(2):
        for rollout, found in zip(work, reviser.value_and_grad(work), strict=True):
            assert relative(found.grad, plain_passes(plain, rollout, CONFIG)[2]) < 1e-5
        for model in (plain, sharded):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            loss = -model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.log_softmax(-1)[..., 9].mean()
            loss.backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
    reviser.value_and_grad(work)
    assert all(parameter.grad is None for parameter in sharded.parameters())
    assert all(parameter.requires_grad for parameter in sharded.parameters())


def test_hooks_see_the_passes_and_stay():
    model, seen = build("qwen3"), []
    handles = [model.model.register_forward_hook(lambda *_: seen.append("body"))]
    handles += [model.model.layers[0].register_forward_pre_hook(lambda *_: seen.append("layer"))]
    before = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()]
    reviser = Reviser(model, CONFIG)
    seen.clear()
    reviser.revise(rollouts()[:1])
    assert seen.count("body") == seen.count("layer") == 1 + 10 + 1, "prompt, steps, last evaluation"
    after = [(list(m._forward_hooks), list(m._forward_pre_hooks), list(m._backward_hooks)) for m in model.modules()]
    assert before == after
    assert all(
        handle.id in (*model.model._forward_hooks, *model.model.layers[0]._forward_pre_hooks) for handle in handles
    )


class Int8Linear(torch.nn.Module):
    """Weights stored as eight-bit integers with a scale a row, widened where they are used."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        scale = linear.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("weight", (linear.weight.detach() / scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


def replaced(model, make):
    """The body with each linear layer replaced."""
    for module in list(model.model.layers.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, make(child))
    return model


def test_a_body_in_eight_bits():
    model = replaced(build("qwen2"), Int8Linear)
    assert {b.dtype for b in model.buffers()} >= {torch.int8}
    check(model)


def test_a_body_that_passes_no_gradient_is_refused():
    """The residual stream would carry one all the same, a wrong one."""

    class Inference(Int8Linear):
        @torch.no_grad()
        def forward(self, x):
            return super().forward(x)

    with pytest.raises(ModelError, match="no gradient through Inference"):
        Policy(replaced(build("qwen2"), Inference))


def test_flattened_parameters_are_refused():
    model = build("qwen3", tie_word_embeddings=False)
    model.model.embed_tokens.weight = torch.nn.Parameter(torch.zeros(0))
    with pytest.raises(ModelError, match="ZeRO-3"):
        Policy(model)


def test_offloaded_weights_are_refused():
    accelerate = pytest.importorskip("accelerate")
    for part in (lambda model: model, lambda model: model.model.layers[1]):
        model = build("llama")
        accelerate.cpu_offload(part(model), execution_device=torch.device("cpu"))
        with pytest.raises(ModelError, match="offload"):
            Policy(model)


def test_softcapped_attention_is_not_run_without_its_softcap():
    model = build("gemma2")
    assert model.config._attn_implementation == "eager"
    model.config._attn_implementation = "sdpa"
    with pytest.raises(ModelError, match="'eager'"):
        Policy(model)


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "cohere2"])
def test_block_masks_say_what_explicit_masks_say(name):
    """Forward alone: on a CPU torch's FlexAttention has no backward pass."""
    model = build(name)
    policy = Policy(model)
    ids = torch.randint(10, VOCABULARY, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    branches = [Branch(0, 20, ids[40:47]), Branch(1, 5, ids[47:50]), Branch(0, 33, ids[50:58], scored_from=3)]
    trunks = [ids[:33], ids[3:17]]
    wanted = score_branches(policy, trunks, branches)
    model.set_attn_implementation("flex_attention")
    try:
        torch.compiler.set_stance("force_eager")
        found = score_branches(policy, trunks, branches)
    finally:
        torch.compiler.set_stance("default")
    for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the backward pass")
def test_flex_attention_is_refused_where_it_has_no_backward_pass():
    model = build("qwen3")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ModelError, match="FlexAttention"):
        Policy(model)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2"])
def test_flex_attention_gives_the_gradient_of_plain_passes(name):
    model = build(name, head_dim=16).cuda()
    model.set_attn_implementation("flex_attention")
    check(model, tolerance=1e-4)


def test_rotary_frequencies_that_depend_on_the_length_limit_it():
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 48}
    longrope = {"rope_type": "longrope", "long_factor": [4.0] * 4, "short_factor": [1.0] * 4, **rope}
    model = build("phi3", rope_parameters=longrope, original_max_position_embeddings=48)
    check(model)
    (rollout, *_) = rollouts()
    long = dataclasses.replace(rollout, prompt_ids=[5] * 60)
    with pytest.raises(InputError, match="48 positions"):
        Reviser(model, CONFIG).value_and_grad([long])
    assert HFEngine(model).limit == 48  # what is sampled is what is revised later


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),  # positions come from the mask
        ("mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),  # a state in place of keys
        ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
    ],
)
def test_what_cannot_share_a_prefix_is_refused(model_type, changes):
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY, **changes)
    with pytest.raises(ModelError, match=r"attention|positions|state|takes no"):
        Policy(AutoModelForCausalLM.from_config(config).eval())


def test_chunked_attention_is_refused():
    model = build("qwen3")
    model.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(ModelError, match="chunked_attention"):
        Policy(model)


def test_windows_that_the_configuration_hides_are_found_out():
    """The model slides where its configuration does not say so."""
    model = build("mistral")
    body = model.model.forward
    window = torch.ones(64, 64).tril() * torch.ones(64, 64).triu(-1)

    @functools.wraps(body)
    def narrow(*args, attention_mask=None, inputs_embeds=None, input_ids=None, **kwargs):
        if attention_mask is None:
            n = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            attention_mask = torch.where(window[:n, :n] > 0, 0.0, -1e9)[None, None]
        return body(*args, attention_mask=attention_mask, inputs_embeds=inputs_embeds, input_ids=input_ids, **kwargs)

    model.model.forward = narrow
    with pytest.raises(ModelError, match="packed behind a cached prompt"):
        Policy(model)
