"""verl 0.9.1 on a CPU: what it lacks there. A platform, its FSDP engine for it, and an LLM server.

The rest is verl's own: configuration, data set, agent loop, reward loop, TransferQueue, replay buffer, advantages,
worker, engine, loss. The actor's worker and the agent loop's run in this process, not in Ray actors with GPUs.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from safetensors.torch import save_file
from verl.experimental.reward_loop import RewardLoopManager
from verl.models.transformers import monkey_patch
from verl.trainer.ppo.v1.agent_loop_tq import AgentLoopWorkerTQ
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.workers.engine import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
from verl.workers.engine_workers import ActorRolloutRefWorker
from verl.workers.rollout.replica import TokenOutput

from latentrevise.engines import HFEngine, Request, SamplingParams
from latentrevise.model.loading import load_model

# verl patches a class that TRL 1.16 has no more; where TRL is not installed it does without.
monkey_patch.is_trl_available = lambda: False
EngineRegistry.register(model_type="language_model", backend=["fsdp", "fsdp2"], device=["cpu"])(FSDPEngineWithLMHead)


class Server:
    """In the place of verl's LLM server and its client: this package's engine, with the weights of the last step.

    Each set of weights is left in ``out/N``, ``DONE`` last, as verl leaves ``hf_model``.
    """

    def __init__(self, model: str, out: Any) -> None:
        self.model, self.tokenizer = load_model(model, dtype="float32", device="cpu")
        self.engine, self.out, self.version, self.calls = HFEngine(self.model, self.tokenizer), out, 0, 0

    def update(self, named: Any, version: int) -> None:
        weights = {name: value.detach().clone().contiguous() for name, value in named}
        own = self.model.state_dict()
        tied = {name for name in own.keys() - weights.keys() if name == "lm_head.weight"}
        self.model.load_state_dict(weights, strict=not tied)
        self.model.tie_weights()
        self.version = version
        place = self.out / str(version)
        place.mkdir(parents=True)
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "DONE").touch()

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict, **_: Any) -> TokenOutput:  # type: ignore[type-arg]
        self.calls += 1
        params = SamplingParams(
            temperature=sampling_params["temperature"], top_p=sampling_params["top_p"], max_new_tokens=24
        )
        ((c,),) = self.engine.generate([Request(prompt_ids, seed=self.calls)], params)
        end = [] if c.end is None else [c.end]
        return TokenOutput(
            token_ids=[*c.ids, *(token for token, _ in end)],
            log_probs=[*(c.logprobs or ()), *(value for _, value in end)],
            stop_reason="completed",
            extra_fields={"min_global_steps": self.version, "max_global_steps": self.version},
        )


class Manager:
    """In the place of AgentLoopManagerTQ: one of its workers, in this process, on a loop of its own."""

    def __init__(self, *args: Any) -> None:
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()
        self.worker = self._run(self._made(args))
        self.worker.hf_model_type = None  # the tokenizer is not Qwen's, whatever the model is

    def generate_sequences(self, batch: Any) -> None:
        self._run(self._generated(batch))

    async def _made(self, args: Any) -> Any:
        return AgentLoopWorkerTQ.__ray_metadata__.modified_class(*args)

    async def _generated(self, batch: Any) -> None:
        await self.worker.generate_sequences(batch)
        await asyncio.gather(*self.worker.background_tasks)

    def _run(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


class Trainer(PPOTrainerSync):
    """verl's synchronous trainer, whose worker, server and manager are of this process."""

    def __init__(self, config: Any, server: Server) -> None:
        super().__init__(config)
        self.server, self.steps = server, []

    def _setup(self) -> None:
        self._init_tokenizer()
        self._init_dataloader()
        self._init_dump_executor()
        self._init_resource_pool_mgr()
        # verl would ask for cpu:gloo twice, once as this platform's.
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        worker = ActorRolloutRefWorker(config=self.config.actor_rollout_ref, role="actor")
        worker.init_model()
        worker._dispatch_info = {"actor": [0]}
        self.actor_rollout_wg = worker
        self.global_steps = 0
        self.reward_loop_manager = RewardLoopManager(config=self.config)
        self.manager = Manager(self.config, self.server, None, self.reward_loop_manager.reward_loop_worker_handles)

    def on_init_end(self) -> None:
        self.server.update(self.actor_rollout_wg.actor.engine.get_per_tensor_param()[0], self.global_steps)

    on_step_end = on_init_end

    def on_sample_end(self) -> None:
        """There is no server that would have to sleep."""

    def _compute_metrics(self, batch: Any, metrics: dict, *args: Any, **kwargs: Any) -> None:  # type: ignore[type-arg]
        super()._compute_metrics(batch, metrics, *args, **kwargs)
        self.steps.append(dict(metrics))


def settings(*overrides: str) -> Any:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=list(overrides))
    OmegaConf.resolve(config)
    return config
