"""Sampling with vLLM, in this process: token prompts and embedding prompts in one batch, weights renewed in place.

The engine holds a second copy of the policy. Whether it computes what the policy computes depends on dtypes, on how an
architecture feeds embeddings, on the prefix cache and on the build, so that is measured whenever it starts and
whenever it is given new weights: see ``VLLMEngine.compare``. Measured facts and limits: docs/engines.md.
"""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import random
import tempfile
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from latentrevise.data.records import row_seed
from latentrevise.engines.base import (
    Completion,
    Progress,
    Request,
    SamplingParams,
    check,
    each,
    evaluating,
    not_finite,
    stop_ids,
)
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import base_of, check_model, input_embedding, is_adapter, position_limit, unwrapped

if TYPE_CHECKING:
    import vllm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from vllm.outputs import CompletionOutput

    from latentrevise.data.records import FinishReason

log = logging.getLogger(__name__)

_WORKER = "latentrevise.engines.vllm_worker"
_CPU_KV_GIB = 2.0
# On a CPU blocks are multiples of 32 tokens. Only whole blocks are shared, so short prompts want short blocks.
_CPU_BLOCK = 32
_PROBED = 8  # tokens that the comparison with the policy decodes


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


class VLLMEngine:
    """Batched sampling by vLLM; see Engine for the contract.

    model: the policy; vLLM loads the same weights from ``path`` (by default where the model came from) in the same
    dtype. tokenizer: needed for stop strings, and to keep ids that it cannot decode from being sampled.

    vLLM starts at the first use and is compared with the policy then and after each ``update``; ModelError says what
    differs. What it sets up belongs to the process, so one engine runs at a time: starting another one ends it, and it
    starts anew when it is used again. ``close`` frees its memory.

    If it dies it is started again, once: requests that were finished stay finished, the others are run again. A second
    death is a RunError.

    The global random state is neither read nor changed. On one machine the same list of requests gives the same
    completions; a request's random numbers do not depend on the others, but the last bits of its logits may.
    """

    _running: ClassVar[VLLMEngine | None] = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        config: VLLMConfig | None = None,
        *,
        path: str | os.PathLike[str] | None = None,
    ) -> None:
        if (why := unavailable()) is not None:
            raise ConfigError(f"engine vllm: {why}")
        check_model(model, tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.config = config or VLLMConfig()
        self.path = str(path or model.config._name_or_path)
        if not self.path:
            raise ModelError("the model was not loaded from anywhere; save it, and pass its directory as `path`")
        self.restarts = 0
        self._embedding = input_embedding(model)
        self._llm: vllm.LLM | None = None
        self._changed = False  # the policy's weights are not those at `path` any more
        if is_adapter(self.path):  # vLLM starts from the base; the policy has the adapters merged
            self.path, self._changed = base_of(self.path), True
        self._asleep = False

    @property
    def limit(self) -> int | None:
        limits = [limit for limit in (position_limit(self.model), self.config.max_length) if limit is not None]
        return min(limits, default=None)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams | Sequence[SamplingParams],
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See Engine. Raises RunError when vLLM died twice."""
        per_request, limit = each(requests, params), self.limit
        for index, (request, p) in enumerate(zip(requests, per_request, strict=True)):
            check(index, request, p, table=self._embedding.weight, limit=limit, tokenizer=self.tokenizer)
        done: dict[int, list[Completion]] = {}
        while len(done) < len(requests):
            try:
                self.start()
                self._serve(requests, per_request, done, progress)
            except EngineDied as death:
                self.close()
                if self.restarts:
                    raise RunError(
                        f"vLLM died a second time ({death}); {len(done)} of {len(requests)} requests were finished."
                        " A run directory keeps all of its parts: the same command goes on from there"
                    ) from death
                self.restarts += 1
                log.error(
                    "vLLM died (%s) with %d of %d requests finished; it is started again, once",
                    death,
                    len(done),
                    len(requests),
                    exc_info=death.__cause__,
                )
        return [done[index] for index in range(len(requests))]

    def update(self, model: PreTrainedModel, folder: str | os.PathLike[str] | None = None) -> None:
        """See Engine. Adapters are merged and sharded parameters gathered on the way, the model itself is not changed.

        folder: read the weights from safetensors there, saved from ``model``, instead of taking them from memory.
        Workers in processes of their own (tensor or pipeline parallel) always get theirs through a file.
        """
        check_model(model, self.tokenizer)
        self.model, self._embedding, self._changed = model, input_embedding(model), True
        if self._llm is not None:
            self._wake()
            self._accept(push=True, folder=folder)

    def sleep(self) -> None:
        """See Engine. On a CPU, and with ``sleep=False``, everything stays where it is."""
        if self._llm is None or self._asleep or not self.config.sleep or _on_cpu():
            return
        self._llm.reset_prefix_cache()
        self._llm.sleep(level=1)
        self._asleep = True

    def start(self) -> None:
        """Start vLLM now, rather than at the first request."""
        if self._llm is not None:
            return self._wake()
        if VLLMEngine._running is not None:
            VLLMEngine._running.close()
        with _caller_undisturbed():
            self._llm = self._load()
        VLLMEngine._running = self
        self._accept(push=self._changed, folder=None)

    def close(self) -> None:
        """End vLLM and free its memory. The engine can be used again; it then starts anew."""
        llm, self._llm, self._asleep = self._llm, None, False
        if llm is None:
            return
        VLLMEngine._running = None
        try:
            llm.llm_engine.engine_core.shutdown()
        except Exception as error:  # whatever a dead engine raises, it is going anyway
            log.warning("vLLM did not shut down cleanly: %s", error)
        del llm
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    # The comparison with the policy

    def compare(self) -> None:
        """Decode a few tokens greedily and compare their log-probs with the policy's own.

        Prompts: token ids, the embeddings of the same ids, and two mixtures that share these ids and the first half of
        the rows. Raises ModelError that names the likely cause if the engine does not compute what the policy does.
        """
        llm = self._started()
        ids, prompts = self._probes(2 * llm.llm_engine.vllm_config.cache_config.block_size + 5)
        inputs = [_input(Request(ids), self.model.dtype)]
        inputs += [_input(Request(embeddings=prompt), self.model.dtype) for prompt in prompts]
        params = self._params(SamplingParams(temperature=0, max_new_tokens=_PROBED), seed=0, stops=[])
        found = dict(self._complete((i, prompt, params) for i, prompt in enumerate(inputs)))
        samples = [_sampled(found[i][0]) for i in range(len(inputs))]
        known = self._embedding.weight.shape[0] if self.tokenizer is None else len(self.tokenizer)
        exact = self.model.dtype in (torch.float32, torch.float64)
        tolerance = 5e-3 if exact else 0.1
        off = []
        for prompt, (tokens, logprobs) in zip([prompts[0], *prompts], samples, strict=True):
            own = self._policy_logprobs(prompt, tokens)
            chosen = own.gather(1, torch.tensor(tokens)[:, None])[:, 0]
            # Both: the log-probs are the policy's, and the chosen tokens (nearly) the most probable it may choose.
            difference = torch.maximum((chosen - torch.tensor(logprobs)).abs(), own[:, :known].amax(1) - chosen)
            off.append(float(difference.max() if exact else difference.mean()))
        bad = [not value < tolerance for value in off]
        if not any(bad):
            return
        if bad[0]:
            loaded = llm.model_config.dtype
            cause = (
                f"vLLM computes in {loaded}, the policy in {self.model.dtype}"
                if loaded != self.model.dtype
                else f"its weights are not the policy's: {self.path} holds another model, or the policy was trained"
                " since it was loaded; pass it to `update`"
            )
        elif bad[1]:
            scaled = not torch.equal(prompts[0], self._embedding.weight[torch.tensor(ids)].to(prompts[0]))
            cause = (
                "the embedding module scales its rows, and this build of vLLM does not feed prompt embeddings of this"
                " architecture as they are given"
                if scaled
                else "this build of vLLM does not feed prompt embeddings as they are given"
            )
        else:
            cause = (
                "two prompts that differ in their embeddings alone are confused: the prefix cache of this build of vLLM"
                " does not tell embeddings apart"
            )
        parts = ("token ids", "their embeddings", "a mixture", "another mixture")
        figures = ", ".join(f"{part} {value:.1e}" for part, value in zip(parts, off, strict=True))
        raise ModelError(
            f"vLLM does not compute what the policy computes. Likely cause: {cause}. Difference in nats (allowed"
            f" {tolerance:g}): {figures}. Use --engine hf until it is found"
        )

    def _probes(self, length: int) -> tuple[list[int], list[Tensor]]:
        """Token ids, and ``[L, d]`` embeddings: of these ids, then of two mixtures."""
        rows = self._embedding.weight.shape[0]
        special: set[int] = set()
        if self.tokenizer is not None:
            rows, special = len(self.tokenizer), set(self.tokenizer.all_special_ids)
        known = torch.tensor([i for i in range(rows) if i not in special])
        if self.limit is not None:
            length = max(2, min(length, self.limit - _PROBED))
        draw = torch.Generator().manual_seed(0)
        ids, first, second = known[torch.randint(len(known), (3, length), generator=draw)]
        with torch.no_grad():
            plain, *others = (self._embedding(i.to(self._embedding.weight.device)) for i in (ids, first, second))
        half = length // 2
        mixtures = [torch.cat([plain[:half], 0.5 * plain[half:] + 0.5 * other[half:]]) for other in others]
        return ids.tolist(), [plain, *mixtures]

    def _policy_logprobs(self, prompt: Tensor, tokens: list[int]) -> Tensor:
        """Log-probs ``[n, V]`` under which the policy would choose each of ``tokens`` behind ``prompt [L, d]``."""
        with evaluating(self.model), torch.no_grad():
            own = self._embedding(torch.tensor(tokens, device=prompt.device))
            logits = self.model(inputs_embeds=torch.cat([prompt, own])[None], use_cache=False).logits[0]
        return torch.log_softmax(logits[len(prompt) - 1 : -1].float(), -1).cpu()

    # vLLM

    def _load(self) -> vllm.LLM:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of vLLM's own imports
                from vllm import LLM

                return LLM(**self.arguments())
        except Exception as error:  # vLLM raises whatever the part that fails raises
            raise ModelError(
                f"{self.path}: vLLM cannot start with it ({type(error).__name__}: {error}); adjust the vllm.* settings,"
                " or use --engine hf"
            ) from error

    def arguments(self) -> dict[str, Any]:
        """What vLLM's ``LLM`` is made with."""
        config, cpu = self.config, _on_cpu()
        given: dict[str, Any] = {
            "model": self.path,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "load_format": "safetensors",
            "generation_config": "vllm",
            "skip_tokenizer_init": self.tokenizer is None,
            "use_tqdm_on_load": False,
            "enable_prompt_embeds": True,
            "enable_prefix_caching": True,
            "enable_sleep_mode": config.sleep and not cpu,
            "enforce_eager": cpu if config.eager is None else config.eager,
            "gpu_memory_utilization": config.memory,
            "tensor_parallel_size": config.tensor_parallel,
            "pipeline_parallel_size": config.pipeline_parallel,
            "worker_extension_cls": f"{_WORKER}.Weights",
        }
        if config.data_parallel > 1:
            given |= {
                "data_parallel_size": config.data_parallel,
                "distributed_executor_backend": "external_launcher",
            }
        optional = {"max_model_len": config.max_length, "max_num_seqs": config.max_sequences}
        given |= {name: value for name, value in optional.items() if value is not None}
        gib = config.kv_cache_gib or (_CPU_KV_GIB if cpu else None)
        if gib is not None:
            given["kv_cache_memory_bytes"] = int(gib * 2**30)
        if cpu:
            # A chunked prefill rewinds the request's random generator by a call that only CUDA has.
            given |= {
                "block_size": _CPU_BLOCK,
                "enable_chunked_prefill": False,
                "max_num_batched_tokens": max(8192, self.limit or 0),
            }
        rows = self._embedding.weight.shape[0]
        if self.tokenizer is not None and len(self.tokenizer) < rows:
            given["logits_processors"] = [f"{_WORKER}:KnownTokens"]
            given["additional_config"] = {"latentrevise_known_tokens": len(self.tokenizer)}
        return given

    def _started(self) -> vllm.LLM:
        if self._llm is None:
            raise RunError("vLLM is not running; call start() first")
        return self._llm

    def _wake(self) -> None:
        if self._asleep:
            self._started().wake_up()
            self._asleep = False

    def _accept(self, *, push: bool, folder: str | os.PathLike[str] | None) -> None:
        """Nothing is sampled from an engine whose weights were not taken whole or are not the policy's: it ends."""
        try:
            if push:
                self._push(folder)
            self.compare()
        except EngineDied as death:
            self.close()
            raise ModelError(f"{self.path}: vLLM cannot run it ({death}); use --engine hf") from death.__cause__
        except BaseException:
            self.close()
            raise

    def _push(self, folder: str | os.PathLike[str] | None) -> None:
        """The policy's weights into the workers, and nothing left of what the old ones computed."""
        llm, config = self._started(), self.config
        try:
            if folder is not None:
                llm.collective_rpc("latentrevise_load", args=(None, str(folder)))
            elif config.tensor_parallel * config.pipeline_parallel == 1:
                llm.collective_rpc("latentrevise_load", args=(list(named_weights(self.model).items()), None))
            else:
                with tempfile.TemporaryDirectory(prefix="latentrevise-weights-") as place:
                    weights = {name: value.cpu().contiguous() for name, value in named_weights(self.model).items()}
                    save_file(weights, Path(place) / "model.safetensors")
                    llm.collective_rpc("latentrevise_load", args=(None, place))
        except Exception as error:
            raise ModelError(
                f"vLLM did not take the policy's weights ({type(error).__name__}: {error}); save them and make the"
                " engine anew with `path`, or use --engine hf"
            ) from error
        if not llm.reset_prefix_cache():
            raise RunError("vLLM's prefix cache could not be emptied after new weights; requests are still running")

    def _serve(
        self,
        requests: Sequence[Request],
        params: list[SamplingParams],
        done: dict[int, list[Completion]],
        progress: Progress | None,
    ) -> None:
        """Run what is not done yet."""

        def jobs() -> Iterator[tuple[int, Any, vllm.SamplingParams]]:
            for index, (request, p) in enumerate(zip(requests, params, strict=True)):
                if index not in done:
                    seed = request.seed if request.seed is not None else row_seed(p.seed, index)
                    own = self._params(p, seed, stop_ids(self.model, self.tokenizer, p))
                    yield index, _input(request, self.model.dtype), own

        with closing(self._complete(jobs())) as finished:
            for index, outputs in finished:
                p = params[index]
                own = [self._completion(index, output, p) for output in outputs]
                # Greedily all samples are one.
                done[index] = own if len(own) == p.n else own * p.n
                if progress is not None:
                    progress(p.n, sum(len(c.ids) + (c.finish_reason == "stop") for c in done[index]))

    def _complete(
        self, jobs: Iterable[tuple[int, Any, vllm.SamplingParams]]
    ) -> Generator[tuple[int, list[CompletionOutput]], None, None]:
        """Outputs of the jobs as they come. Only so many are handed to vLLM at a time as it can soon work on, however
        long the list; EngineDied if it raises."""
        engine = self._started().llm_engine
        room = 2 * engine.vllm_config.scheduler_config.max_num_seqs
        waiting, held = iter(jobs), 0
        flying: dict[str, tuple[int, int]] = {}  # the job and how many samples, by request id
        try:
            with _own_random_numbers():
                while True:
                    while held < room and (job := next(waiting, None)) is not None:
                        index, prompt, params = job
                        with _alive():
                            engine.add_request(str(index), prompt, params)
                        flying[str(index)] = index, params.n
                        held += params.n
                        del job, prompt
                    if not flying:
                        break
                    with _alive():
                        outputs = engine.step()
                    for output in outputs:
                        index, n = flying.pop(output.request_id)
                        held -= n
                        yield index, output.outputs
                with _alive():
                    engine.step()  # workers let go of finished requests at the next step only
        except EngineDied:
            raise
        except BaseException:  # the caller stopped, or an error of ours: vLLM lives on, and must not finish these later
            engine.abort_request(list(flying))
            raise

    def _params(self, params: SamplingParams, seed: int, stops: list[int]) -> vllm.SamplingParams:
        from vllm import SamplingParams as Theirs
        from vllm.sampling_params import RequestOutputKind

        greedy = params.temperature == 0
        return Theirs(
            n=1 if greedy else params.n,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k or 0,
            max_tokens=params.max_new_tokens,
            seed=None if greedy else seed % 2**62,  # sample i adds i to it
            stop=list(params.stop),
            stop_token_ids=stops,
            ignore_eos=True,  # it is among the stop tokens
            logprobs=0,  # of the sampled token; always, for they tell logits that are not numbers
            detokenize=bool(params.stop),
            skip_special_tokens=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def _completion(self, index: int, output: CompletionOutput, params: SamplingParams) -> Completion:
        ids, logprobs = _sampled(output)
        broken = next((i for i, value in enumerate(logprobs) if not np.isfinite(value)), None)
        if broken is not None:
            self.close()  # NaN is in its KV cache now, and would reach later requests
            raise not_finite(index, broken)
        if output.finish_reason not in ("stop", "length"):
            raise EngineDied(f"request {index} ended with {output.finish_reason!r}")
        reason: FinishReason = "stop" if output.finish_reason == "stop" else "length"
        if reason == "stop" and not isinstance(output.stop_reason, str):
            del ids[-1], logprobs[-1]
        return Completion(tuple(ids), tuple(logprobs) if params.logprobs else None, reason)


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


def _on_cpu() -> bool:
    from vllm.platforms import current_platform

    return current_platform.is_cpu()


def _input(request: Request, dtype: torch.dtype) -> Any:
    from vllm.inputs import embeds_input, tokens_input

    if request.embeddings is not None:
        return embeds_input(request.embeddings.detach().to("cpu", dtype).contiguous())
    return tokens_input(list(request.ids or ()))


def _sampled(output: CompletionOutput) -> tuple[list[int], list[float]]:
    ids = list(output.token_ids)
    assert output.logprobs is not None
    return ids, [entry[token].logprob for entry, token in zip(output.logprobs, ids, strict=True)]


@contextmanager
def _alive() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise EngineDied(f"{type(error).__name__}: {error}") from error


@contextmanager
def _caller_undisturbed() -> Iterator[None]:
    """vLLM seeds the global generators, draws from them, replaces torch.set_num_threads on a CPU, and leaves
    LD_PRELOAD and LOCAL_WORLD_SIZE to child processes that are none of its own. Here all that is undone."""
    environment, threads = dict(os.environ), torch.set_num_threads
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # weights are handed over by reference
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    try:
        with _own_random_numbers():
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
def _own_random_numbers() -> Iterator[None]:
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_available() else []):
        yield
