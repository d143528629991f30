"""The step in a CUDA graph. Without a GPU: that nothing in it waits for the device, by what torch says of its ops, and
that a tape of its ops, which is to a CPU what a graph is to a GPU, replays to the same revisions."""

import dataclasses
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from latentrevise import Mixture, ReviseConfig, Reviser
from latentrevise.errors import ConfigError, ModelError
from latentrevise.revise import graph
from tests.test_reviser import ARCHITECTURES, OBJECTIVES, VOCABULARY, rollouts
from tests.tiny import tiny_model

WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class WithoutWaiting(TorchDispatchMode):
    """Refuses ops whose result, or its shape, the host must know, and copies between devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        waits = bool(WAITING & set(func.tags))
        if func in (torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default):
            waits = any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])  # whose count is asked
        out = func(*args, **(kwargs or {}))
        if func in COPIES:
            waits = len({x.device.type for x in (*tensors, out)}) > 1
        assert not waits, f"{func} waits for the device"
        return out


class Tape(TorchDispatchMode):
    """The ops that run, each with the tensors it read and wrote; ``replay`` runs them again into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for func, args, kwargs, out in self.calls:
            for kept, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor) and kept.data_ptr() != new.data_ptr():
                    assert kept.shape == new.shape
                    kept.copy_(new)


@pytest.fixture(autouse=True)
def opaque(monkeypatch):
    """Ours are one op each, as a graph being traced sees them, whatever a kernel does within."""
    ops = torch.ops.latentrevise
    kernels = (sys.modules[f"latentrevise.kernels.{name}"] for name in ("mixture_embed", "linear_logprob"))
    for module, call in zip(
        kernels,
        (ops.mixture_embed, lambda H, W, y, bias, head, *rest: ops.linear_logprob(H, W, y, bias, *head, *rest)),
        strict=True,
    ):
        monkeypatch.setattr(module, "_forward", call)


@pytest.fixture
def taped(monkeypatch):
    """CUDA graphs replaced by tapes; the tapes that were made."""
    tapes = []

    def record(work):
        tape = Tape()
        with tape:
            results = work()
        for x in (results[1], results[0].loss):
            x.fill_(torch.nan)  # a graph's results are not there until it is replayed
        tapes.append(tape)
        return tape.replay, results

    monkeypatch.setattr(graph, "check", lambda policy: None)
    monkeypatch.setattr(graph, "record", record)
    return tapes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_nothing_in_the_step_waits_for_the_device(architecture, name):
    reviser = Reviser(tiny_model(architecture, vocab=VOCABULARY), OBJECTIVES[name])
    work = rollouts()
    with reviser._scope():
        batch = reviser._batch(list(range(len(work))), work)
        point = Mixture.from_tokens(batch.packing.prefix_ids, 3)
        with WithoutWaiting():
            reviser._value_and_grad(batch, point)


def test_what_waits_is_seen():
    x = torch.arange(3.0)
    for wait in (lambda: x[x > 1], lambda: float(x[0]), lambda: torch.bincount(x.long()), lambda: x.to("meta")):
        with WithoutWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            wait()
    with WithoutWaiting():
        x[x.long()] + x.to(torch.float64)


CASES = {
    "published": ReviseConfig(steps=6, stop_guide=None),
    "softmax": ReviseConfig(steps=3, solver="softmax", stop_guide=None),
    "out of the hull": ReviseConfig(steps=4, solver="adam", stop_guide=None),
    "best as tokens": ReviseConfig(steps=3, iterate="best", rounding="argmax", stop_guide=None),
}


@pytest.mark.parametrize("name", CASES)
def test_replays_revise_as_the_steps_themselves_do(taped, name):
    compare(tiny_model("qwen3", vocab=VOCABULARY, seed=3), rollouts(4), CASES[name])
    assert len(taped) == 2  # batches: the five rollouts differ in length


def test_a_batch_that_a_rollout_leaves_is_captured_again(taped):
    model, work = tiny_model("qwen3", vocab=VOCABULARY, seed=3), rollouts(4)
    config = ReviseConfig(steps=8, stop_guide=None, step_size=0.5)
    answers = [r.trace.guide for r in Reviser(model, config).revise(work)]
    # At this an answer stops its rollout between the third iterate and the fifth, once its batch is captured.
    least = min(min(trace[2:5]) for trace in answers)
    stopping = dataclasses.replace(config, stop_guide=least * 1.0001)
    revisions = compare(model, work, stopping)
    assert {r.trace.stopped for r in revisions} == {"guide", "steps"}
    assert len(taped) == 3


def compare(model, work, config):
    eager = Reviser(model, config).revise(work)
    replayed = Reviser(model, dataclasses.replace(config, cuda_graph=True)).revise(work)
    for a, b in zip(eager, replayed, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.weights, b.weights)
        assert a.offset is None or torch.equal(a.offset, b.offset)
        assert a.trace == b.trace
        assert (a.compute.forward, a.compute.backward) == (b.compute.forward, b.compute.backward)
    return replayed


def test_refusals(monkeypatch):
    with pytest.raises(ConfigError, match="turn recompute or cuda_graph off"):
        ReviseConfig(cuda_graph=True, recompute=True)
    with pytest.raises(ConfigError, match=r"the model is on cpu; move it to a GPU, or set cuda_graph=False"):
        Reviser(tiny_model(vocab=VOCABULARY), ReviseConfig(cuda_graph=True))

    def policy(attention="sdpa", devices=("cuda:0",), sharded=False):
        parameters = [SimpleNamespace(device=torch.device(device)) for device in devices]
        return SimpleNamespace(
            model=SimpleNamespace(parameters=lambda: parameters), device=torch.device("cuda"), sharded=sharded,
            config=SimpleNamespace(_attn_implementation=attention),
        )  # fmt: skip

    graph.check(policy())
    for strange, match in (
        (policy("flex_attention"), "FlexAttention"), (policy(sharded=True), "spread"),
        (policy(devices=("cuda:0", "cuda:1")), r"spread over processes or devices \(cuda:0, cuda:1\)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            graph.check(strange)


@pytest.mark.parametrize("raised", ["operation not permitted when stream is capturing", "CUDA out of memory"])
def test_what_a_capture_raises(monkeypatch, raised):
    error = torch.OutOfMemoryError(raised) if "memory" in raised else RuntimeError(raised)

    class Capturing:
        def __init__(self, captured):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *problem):
            pass

    def work():
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", Capturing)
    with pytest.raises(torch.OutOfMemoryError if "memory" in raised else ModelError, match=raised):
        graph.record(work)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_on_a_gpu(architecture):
    """Sums of atomic additions differ in their last bits, so an iterate may differ in a tie: losses are compared."""
    model = tiny_model(architecture, vocab=VOCABULARY, seed=3).cuda().to(torch.bfloat16)
    config = ReviseConfig(steps=5, stop_guide=None)
    eager = Reviser(model, config).revise(rollouts(4))
    replayed = Reviser(model, dataclasses.replace(config, cuda_graph=True)).revise(rollouts(4))
    for a, b in zip(eager, replayed, strict=True):
        assert b.trace.loss == pytest.approx(a.trace.loss, rel=2e-2, abs=0.1)
