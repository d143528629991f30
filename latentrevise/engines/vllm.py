"""Sampling with vLLM, in this process: token prompts and embedding prompts in one batch, weights renewed in place.

The engine holds a second copy of the policy. Whether it computes what the policy computes depends on dtypes, on how an
architecture feeds embeddings, on the prefix cache and on the build, so that is measured whenever it starts and
whenever it is given new weights: see ``VLLMEngine.compare``. Measured facts and limits: docs/engines.md.
"""

from __future__ import annotations

import gc
import logging
import os
import tempfile
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

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
from latentrevise.engines.vllm_setup import (
    CPU_BLOCK,
    CPU_KV_GIB,
    EngineDied,
    VLLMConfig,
    alive,
    caller_undisturbed,
    completion_of,
    named_weights,
    on_cpu,
    own_random_numbers,
    prompt_input,
    sampled,
    unavailable,
    upto_stop,
    vllm_params,
)
from latentrevise.errors import ConfigError, ModelError, RunError
from latentrevise.model.loading import base_of, check_model, input_embedding, is_adapter, position_limit

if TYPE_CHECKING:
    import vllm
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from vllm.outputs import CompletionOutput

log = logging.getLogger(__name__)

_WORKER = "latentrevise.engines.vllm_worker"
_PROBED = 8  # tokens that the comparison with the policy decodes


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

    shares_prefixes = True  # see Engine: prefix caching is on

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

    def reusing(self) -> AbstractContextManager[None]:
        """See Engine. vLLM's own prefix cache does it, always."""
        return nullcontext()

    def sleep(self) -> None:
        """See Engine. On a CPU, and with ``sleep=False``, everything stays where it is."""
        if self._llm is None or self._asleep or not self.config.sleep or on_cpu():
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
        with caller_undisturbed():
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
        inputs = [prompt_input(Request(ids), self.model.dtype)]
        inputs += [prompt_input(Request(embeddings=prompt), self.model.dtype) for prompt in prompts]
        params = vllm_params(SamplingParams(temperature=0, max_new_tokens=_PROBED), seed=0, first=0, stops=[])
        found = dict(self._complete((i, prompt, params) for i, prompt in enumerate(inputs)))
        samples = [sampled(found[i][0]) for i in range(len(inputs))]
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
        config, cpu = self.config, on_cpu()
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
        gib = config.kv_cache_gib or (CPU_KV_GIB if cpu else None)
        if gib is not None:
            given["kv_cache_memory_bytes"] = int(gib * 2**30)
        if cpu:
            # A chunked prefill rewinds the request's random generator by a call that only CUDA has.
            given |= {
                "block_size": CPU_BLOCK,
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
                    own = vllm_params(p, seed, request.first, stop_ids(self.model, self.tokenizer, p))
                    yield index, prompt_input(request, self.model.dtype), own

        with closing(self._complete(jobs())) as finished:
            for index, outputs in finished:
                p = params[index]
                own = [upto_stop(self.tokenizer, p, self._completion(index, output, p)) for output in outputs]
                done[index] = own if len(own) == p.n else own * p.n  # greedily all samples are one
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
            with own_random_numbers():
                while True:
                    while held < room and (job := next(waiting, None)) is not None:
                        index, prompt, params = job
                        with alive():
                            engine.add_request(str(index), prompt, params)
                        flying[str(index)] = index, params.n
                        held += params.n
                        del job, prompt
                    if not flying:
                        break
                    with alive():
                        outputs = engine.step()
                    for output in outputs:
                        index, n = flying.pop(output.request_id)
                        held -= n
                        yield index, output.outputs
                with alive():
                    engine.step()  # workers let go of finished requests at the next step only
        except EngineDied:
            raise
        except BaseException:  # the caller stopped, or an error of ours: vLLM lives on, and must not finish these later
            engine.abort_request(list(flying))
            raise

    def _completion(self, index: int, output: CompletionOutput, params: SamplingParams) -> Completion:
        ids, logprobs = sampled(output)
        broken = next((i for i, value in enumerate(logprobs) if not np.isfinite(value)), None)
        if broken is not None:
            self.close()  # NaN is in its KV cache now, and would reach later requests
            raise not_finite(index, broken)
        if output.finish_reason not in ("stop", "length"):
            raise EngineDied(f"request {index} ended with {output.finish_reason!r}")
        return completion_of(output, ids, logprobs, params)
