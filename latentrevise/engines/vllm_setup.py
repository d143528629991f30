"""vLLM in a process that is not its own: settings, whether it is there, and what it must not leave behind."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from latentrevise.engines.base import Completion, Request, SamplingParams, stops_text
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import unwrapped

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from vllm.outputs import CompletionOutput

    from latentrevise.data.records import FinishReason

CPU_KV_GIB = 2.0
# On a CPU blocks are multiples of 32 tokens. Only whole blocks are shared, so short prompts want short blocks.
CPU_BLOCK = 32


@dataclass(frozen=True)
class VLLMConfig:
    """How vLLM is started; all are our own decision, and none belongs to the method.

    memory: share of the GPU that the engine may take for weights and KV cache together; the rest is the policy's and
    the reviser's. kv_cache_gib: size of the KV cache instead; on a CPU, where ``memory`` does not count, 2 if left out.
    sleep: free that memory while prefixes are revised (GPU only).
    max_length: positions of prompt and completion; None: all that the model has. max_sequences: decoded at once; None:
    vLLM's choice. tensor_parallel, pipeline_parallel, data_parallel: GPUs, as vLLM understands them; for the last start
    one process a rank with torchrun. eager: neither compile nor capture graphs; None: on a CPU only.
    """

    memory: float = 0.45
    kv_cache_gib: float | None = None
    sleep: bool = True
    max_length: int | None = None
    max_sequences: int | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    data_parallel: int = 1
    eager: bool | None = None

    def __post_init__(self) -> None:
        if not 0 < self.memory < 1:
            raise ConfigError(f"vllm.memory = {self.memory!r}: it is a share of the GPU, between 0 and 1")
        for name in (
            "kv_cache_gib",
            "max_length",
            "max_sequences",
            "tensor_parallel",
            "pipeline_parallel",
            "data_parallel",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"vllm.{name} = {value!r}: it must be positive")


class EngineDied(RunError):
    """vLLM raised in the middle of its work and cannot be used any more."""


def unavailable() -> str | None:
    """Why vLLM cannot be used here, or None."""
    if importlib.util.find_spec("vllm") is None:
        return "vllm is not installed (on a GPU: pip install '.[vllm]' in a clone; on a CPU: see docs/engines.md)"
    return None


def named_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's parameters under the names they have in a checkpoint, with LoRA merged and shards gathered.

    Nothing is copied but what has to be computed. Raises ModelError for an adapter that is not plain LoRA.
    """
    from transformers.core_model_loading import revert_weight_conversion

    inner: Any = unwrapped(model)
    modules = dict(inner.named_modules())
    found: dict[str, Tensor] = {}
    for name, parameter in inner.named_parameters():
        if ".lora_" in name:
            continue
        if "modules_to_save" in name or "original_module" in name:
            raise ModelError(f"parameter {name}: only plain LoRA can be merged on the way; merge the adapter first")
        value = parameter.detach()
        value = value.full_tensor() if isinstance(value, DTensor) else value
        place, wrapped, kind = name.rpartition(".base_layer.")
        if wrapped and kind == "weight":
            layer = modules[place]
            with torch.no_grad():
                for adapter in layer.active_adapters:
                    if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
                        value = value + layer.get_delta_weight(adapter).to(value)
        found[f"{place}.{kind}" if wrapped else name] = value
    return revert_weight_conversion(inner, found)


def on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def prompt_input(request: Request, dtype: torch.dtype) -> Any:
    from vllm.inputs import embeds_input, tokens_input

    if request.embeddings is not None:
        return embeds_input(request.embeddings.detach().to("cpu", dtype).contiguous())
    return tokens_input(list(request.ids or ()))


def vllm_params(params: SamplingParams, seed: int, first: int, stops: list[int]) -> Any:
    """Our parameters as vLLM's; first: index of the first sample; stops: token ids that end a completion."""
    from vllm import SamplingParams as Theirs
    from vllm.sampling_params import RequestOutputKind

    greedy = params.temperature == 0
    return Theirs(
        n=1 if greedy else params.n,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k or 0,
        max_tokens=params.max_new_tokens,
        seed=None if greedy else seed % 2**62 + first,  # sample i adds i to it
        stop=list(params.stop),
        stop_token_ids=stops,
        ignore_eos=True,  # it is among the stop tokens
        logprobs=0,  # of the sampled token; always, for they tell logits that are not numbers
        detokenize=bool(params.stop),
        skip_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def upto_stop(tokenizer: PreTrainedTokenizerBase | None, params: SamplingParams, completion: Completion) -> Completion:
    """The completion up to where ``stop_pattern`` ends it: vLLM knows strings alone, and decodes on."""
    if params.stop_pattern is None:
        return completion
    assert tokenizer is not None  # checked before anything is computed
    ids, logprobs = completion.ids, completion.logprobs
    ends = (n for n in range(1, len(ids) + 1) if stops_text(params, str(tokenizer.decode(list(ids[:n])))))
    if (end := next(ends, None)) is None:
        return completion
    return Completion(ids[:end], logprobs and logprobs[:end], "stop")


def sampled(output: CompletionOutput) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    assert output.logprobs is not None
    return ids, [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]


def completion_of(
    output: CompletionOutput, ids: list[int], logprobs: list[float], params: SamplingParams
) -> Completion:
    """What vLLM ended well, with the token that ended it apart."""
    reason: FinishReason = "stop" if output.finish_reason == "stop" else "length"
    end = None
    if reason == "stop" and not isinstance(output.stop_reason, str):
        end = ids.pop(), logprobs.pop()
    return Completion(tuple(ids), tuple(logprobs) if params.logprobs else None, reason, end)


@contextmanager
def alive() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error


@contextmanager
def caller_undisturbed() -> Iterator[None]:
    """vLLM seeds the global generators, draws from them, replaces torch.set_num_threads on a CPU, and leaves
    LD_PRELOAD and LOCAL_WORLD_SIZE to child processes that are none of its own. Here all that is undone."""
    environment, threads = dict(os.environ), torch.set_num_threads
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with own_random_numbers():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_num_threads = threads
        for name in os.environ.keys() | environment.keys():
            if name in environment:
                os.environ[name] = environment[name]
            elif not name.startswith("VLLM_"):
                del os.environ[name]


@contextmanager
def own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
