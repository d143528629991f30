"""The evaluations of one batch as a CUDA graph: captured once, replayed with other mixtures.

From step to step nothing of a batch changes but the mixture. So the passes of the body, its head and the objective can
be issued as one graph, of which only the mixture is copied in and the results are copied out. The step of the atoms,
whose size and slot change with each, stays outside: a handful of launches. A graph lives as long as its batch; one that
a rollout leaves is another batch, with other shapes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from latentrevise.errors import ConfigError, ModelError
from latentrevise.model.memory import out_of_memory
from latentrevise.model.policy import Policy
from latentrevise.revise.hull import Mixture
from latentrevise.revise.objective import Terms

Evaluate = Callable[[Mixture], tuple[Terms, Tensor]]


def check(policy: Policy) -> None:
    """Raise ConfigError where a graph cannot hold what the policy does."""
    devices = sorted({str(p.device) for p in policy.model.parameters()})
    attention = policy.config._attn_implementation
    reason = None
    if policy.device.type != "cuda":
        reason = f"the model is on {policy.device}; move it to a GPU"
    elif policy.sharded or len(devices) > 1:
        reason = f"the weights are spread over processes or devices ({', '.join(devices)}); load the model on one GPU"
    elif attention == "flex_attention":
        reason = "FlexAttention may compile while the graph is captured; load the model with attn_implementation='sdpa'"
    if reason:
        raise ConfigError(f"ReviseConfig.cuda_graph = True: {reason}, or set cuda_graph=False")


def record(work: Callable[[], tuple[Terms, Tensor]]) -> tuple[Callable[[], None], tuple[Terms, Tensor]]:
    """Capture ``work`` without running it: what runs it, and where that leaves its results."""
    captured = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(captured):
            results = work()
    except RuntimeError as error:
        if out_of_memory(error):  # a smaller batch may fit
            raise
        raise ModelError(
            f"the step cannot be captured in a CUDA graph: {error}. Something in the model waits for the device (a"
            " mixture of experts, a rotary embedding that grows with the length); set cuda_graph=False"
        ) from error
    return captured.replay, results


class Graphed:
    """``evaluate``, of which the first call runs as it is, so that kernels are compiled and workspaces there; the
    second captures it, and it and all others replay that."""

    def __init__(self, evaluate: Evaluate) -> None:
        self.evaluate = evaluate
        self.warm = False
        self.replay: Callable[[], None] | None = None

    def __call__(self, mixture: Mixture) -> tuple[Terms, Tensor]:
        if not self.warm:
            self.warm = True
            return self.evaluate(mixture)
        if self.replay is None:
            self.point = mixture.map(Tensor.clone)
            self.replay, self.results = record(lambda: self.evaluate(self.point))
        self.point.ids.copy_(mixture.ids)
        self.point.weights.copy_(mixture.weights)
        if self.point.offset is not None and mixture.offset is not None:
            self.point.offset.copy_(mixture.offset)
        self.replay()
        terms, gradient = self.results
        return terms.map(Tensor.clone), gradient.clone()
