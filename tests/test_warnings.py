"""Deprecations of our own making are errors in this suite, and forward passes follow the names of transformers."""

import inspect
import warnings

import pytest
import torch

from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.model.loading import cache_argument
from latentrevise.model.policy import Policy
from tests.tiny import tiny_model, tiny_tokenizer

RENAMED = "`past_key_values` is deprecated and will be removed in version 5.40.0 for `Qwen3Model.forward`."


@pytest.mark.parametrize(
    ("kind", "module", "message", "ours"),
    [
        (DeprecationWarning, "latentrevise.model.policy", "gone soon", True),
        (FutureWarning, "latentrevise.train.sft", "gone soon", True),
        (FutureWarning, "torch.nn.modules.module", RENAMED, True),
        (FutureWarning, "transformers.utils.generic", RENAMED, True),
        (DeprecationWarning, "somebody.elses", "gone soon", False),
        (FutureWarning, "torch.nn.modules.module", "another matter", False),
    ],
)
def test_deprecations_of_ours_are_errors(kind, module, message, ours):
    def warn():
        warnings.warn_explicit(message, kind, f"{module}.py", 1, module=module)

    if ours:
        with pytest.raises(kind, match=r"gone soon|past_key_values"):
            warn()
    else:
        with pytest.warns(kind):
            warn()


def renamed(module, name):
    """The module's forward as a version of transformers has it that calls its cache ``name``."""
    inner, own = module.forward, cache_argument(module)
    seen = []

    def forward(*args, **kwargs):
        other = {"cache": "past_key_values", "past_key_values": "cache"}[name]
        assert kwargs.pop(other, None) is None  # the model around it may name it, without a cache
        if name in kwargs:
            seen.append(name)
            kwargs[own] = kwargs.pop(name)
        return inner(*args, **kwargs)

    signature = inspect.signature(inner)
    parameters = [p.replace(name=name) if p.name == own else p for p in signature.parameters.values()]
    forward.__signature__ = signature.replace(parameters=parameters)
    module.forward = forward
    return seen


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_the_cache_is_given_under_the_name_the_model_takes(name):
    requests, params = [Request([5, 6, 7]), Request([8])], SamplingParams(max_new_tokens=4, temperature=0)
    plain, prompts = tiny_model(), [[5, 6, 7], [8, 9]]
    expected = HFEngine(plain, tiny_tokenizer()).generate(requests, params)
    hidden = Policy(plain, tiny_tokenizer()).prompt_cache(prompts).hidden

    model = tiny_model()
    seen = renamed(model, name)
    found = HFEngine(model, tiny_tokenizer()).generate(requests, params)
    assert [own[0].ids for own in found] == [own[0].ids for own in expected]
    assert seen

    model = tiny_model()
    seen = renamed(model.model, name)
    policy = Policy(model, tiny_tokenizer())
    seen.clear()
    torch.testing.assert_close(policy.prompt_cache(prompts).hidden, hidden)
    assert seen
