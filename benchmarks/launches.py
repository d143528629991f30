"""Every Triton kernel as the ops launch it, without a GPU: the ops run on tensors that have shapes only ("meta").

A launch is compiled by Triton's own just-in-time path for an architecture that is not there, so the signature, the
arguments specialised on (divisible by 16, equal to 1), the constants, tile sizes and descriptors are those of a real
call; nothing of them is written down here. What varies is what a user varies: dtypes, few or many tokens, a table whose
rows are a multiple of 16 or not, what is optional in an op.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

PROCESSORS = {80: 108, 90: 132}  # of an A100 and an H100
FEW, MANY, DIM = 16, 2048, 896
VOCABULARIES = (151936, 50257)  # a multiple of 16 and none


@dataclass
class Launch:
    """A kernel that a call launched, compiled: ``asm`` has its forms from ttgir to cubin."""

    kernel: str
    variant: str
    arch: int
    compiled: Any

    @property
    def constants(self) -> dict[str, Any]:
        """Constants that the kernel was compiled with, by the names of its arguments: tile sizes among them."""
        source = self.compiled.src
        return {source.fn.arg_names[place]: value for (place, *_), value in source.constants.items()}


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def calls() -> Iterator[tuple[str, str, Callable[[], object]]]:
    """(op, what it is given, the call) that between them launch every kernel in every form that ships."""
    from latentrevise.kernels.entropic_step import triton as entropic
    from latentrevise.kernels.hull_step import triton as hull
    from latentrevise.kernels.linear_logprob import triton as logprob
    from latentrevise.kernels.mixture_embed import triton as mixture
    from latentrevise.kernels.numerics import Combination, Transform
    from latentrevise.kernels.plausible_vertices import triton as plausible
    from latentrevise.kernels.softmax_mixture import triton as softmax
    from latentrevise.kernels.vertex_oracle import triton as oracle

    combination = Combination(1.0, -0.5, "normalized")
    pairs = ((torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32))
    for V, (table, given) in itertools.product(VOCABULARIES, pairs):
        E = meta(V, DIM, dtype=table)
        what = f"{name(table)} from {name(given)} V={V}"
        allowed = meta(V, dtype=torch.bool)
        for T in (FEW, MANY):
            G, ids, weights = meta(T, DIM, dtype=given), meta(T, 11, dtype=torch.int64), meta(T, 11)
            for mask, second in itertools.product((None, allowed), (False, True)):
                label = f"{what} T={T}{' allowed' * (mask is not None)}{' second' * second}"
                other = (G, E) if second else (None, None)
                yield "vertex_oracle", label, lambda a=(G, E, mask, *other, None): oracle.vertex_oracle(*a)
            step = (ids, weights, meta(T), 10, combination)
            yield "hull_step", f"{what} T={T}", lambda a=(G, G, E, *step, None, None): hull.hull_step(*a)
        candidates = meta(MANY, 65, dtype=torch.int64)
        yield "vertex_oracle", f"{what} candidates", lambda a=(G, E, None, G, E, candidates): oracle.vertex_oracle(*a)
        yield "hull_step", f"{what} candidates", lambda a=(G, G, E, *step, None, candidates): hull.hull_step(*a)
        y, bias = meta(MANY, dtype=torch.int64), meta(V)
        for transformed, entropy, gradient in itertools.product((False, True), (False, True), (False, True)):
            label = f"{what}{' bias softcap' * transformed}{' entropy' * entropy}{' gradient' * gradient}"
            head = (bias, Transform(0.9, 30.0, 1.1)) if transformed else (None, Transform(1.0, None, 1.0))
            yield "linear_logprob", label, lambda a=(G, E, y, *head, entropy, gradient): logprob.linear_logprob(*a)
        for transformed, mask in itertools.product((False, True), (None, allowed)):
            label = f"{what}{' bias softcap' * transformed}{' allowed' * (mask is not None)}"
            head = (bias, Transform(0.9, 30.0, 1.1)) if transformed else (None, Transform(1.0, None, 1.0))
            yield (
                "plausible_vertices",
                label,
                lambda a=(G, E, -6.9, 64, *head, mask): plausible.plausible_vertices(*a),
            )
        segments = meta(MANY, dtype=torch.int64)
        yield (
            "entropic_step",
            what,
            lambda a=(G, G, E, ids, weights, 1.0, combination, segments): entropic.entropic_step(*a),
        )
        if table == given:
            theta, lse = meta(MANY, V, dtype=given), meta(MANY)
            yield "softmax_mixture", what, lambda a=(theta, E, 0.7): softmax.softmax_mixture(*a)
            backward = (theta, E, 0.7, lse, G, lse)
            yield "softmax_mixture", f"{what} backward", lambda a=backward: softmax.softmax_mixture_backward(*a)
            yield "mixture_embed", what, lambda a=(ids, weights, E): mixture.mixture_embed(*a)
            yield "mixture_embed", f"{what} backward", lambda a=(ids, G, E): mixture.mixture_embed_backward(*a)


def name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Absent:
    """Triton's driver of a GPU that is not there: what the just-in-time path asks before it compiles."""

    def __init__(self, arch: int):
        self.arch = arch

    def get_current_target(self) -> object:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # a cache of its own

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(arch: int, wanted: Callable[[str, str], bool] = lambda op, what: True) -> Iterator[Launch]:
    """The launches of the calls that are ``wanted``, each compiled form once."""
    from triton.runtime import driver, jit

    from latentrevise.kernels.linear_logprob import triton as logprob
    from latentrevise.kernels.vertex_oracle import tiles
    from latentrevise.kernels.vertex_oracle import triton as oracle

    compile_only, seen, launched = jit.JITFunction.run, set(), []

    def run(kernel: Any, *arguments: object, grid: object, warmup: bool, **options: object) -> None:
        launched.append((kernel.fn.__name__, compile_only(kernel, *arguments, grid=grid, warmup=True, **options)))

    def read(what: str) -> Iterator[Launch]:
        for kernel, form in launched:
            if id(form) not in seen:
                seen.add(id(form))
                yield Launch(kernel, what, arch, form)
        launched.clear()

    active = driver._active
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(jit.JITFunction, "run", run))
        stack.enter_context(mock.patch.object(tiles, "processors", return_value=PROCESSORS[arch]))
        for module in (oracle, logprob, tiles):
            stack.enter_context(mock.patch.object(module, "has_copy_engine", return_value=arch >= 90))
        stack.callback(driver.set_active, active)
        driver.set_active(Absent(arch))
        for op, what, call in calls():
            if wanted(op, what):
                call()
                yield from read(f"{op} {what}")
