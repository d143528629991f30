"""Fused vocabulary-sized operations: the vertex oracle, log-probs without logits, mixtures of embeddings.

One identity carries them all: the vocabulary is an attention memory. For queries ``Q [N, d]`` and a table ``[V,
d]``, hard attention (argmin) is the vertex oracle, soft attention is the mixture projection, and the gradient of any
loss on per-token log-probs is soft attention minus the target row. None of them needs the ``[N, V]`` matrix in memory.

Every op lives in a folder of its own: ``__init__.py`` is the public function (contract, checks, gradient),
``reference.py`` is the specification in plain torch, and ``cpu.py``, ``triton.py``, ``cuda.py`` are the fast
implementations that exist. :mod:`latentrevise.kernels.dispatch` says which one runs, and why.

This package knows tensors only: no model, no tokenizer, no branch. Bad arguments raise ``ValueError`` or
``TypeError`` that name the argument; a backend that was asked for and cannot run raises :class:`BackendError`.
"""

# With the source tree's root on sys.path (python -m pytest, python -m benchmarks) this folder is also importable as
# `kernels`, the name of an unrelated distribution that transformers probes for by importing it. It finds an empty
# module without a version then, concludes that the distribution is absent, and nothing here is loaded twice.
if __name__ != "kernels":
    from .dispatch import BackendError, Choice, available, explain, use_backend
    from .entropic_step import EntropicStep, entropic_step
    from .hull_step import HullStep, hull_step
    from .linear_logprob import linear_logprob, table_gradient
    from .mixture_embed import mixture_embed
    from .plausible_vertices import plausible_vertices
    from .softmax_mixture import softmax_mixture
    from .vertex_oracle import vertex_oracle

    __all__ = [
        "BackendError",
        "Choice",
        "EntropicStep",
        "HullStep",
        "available",
        "entropic_step",
        "explain",
        "hull_step",
        "linear_logprob",
        "mixture_embed",
        "plausible_vertices",
        "softmax_mixture",
        "table_gradient",
        "use_backend",
        "vertex_oracle",
    ]
