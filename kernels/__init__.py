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

# With the source tree's root on sys.path (an editable install, python -m pytest) this folder is also importable as
# `kernels`, the name of an unrelated distribution that transformers probes for. Under that name it gives way to that
# distribution wherever else on the path it is, or else is a module without a version and without the folder's contents:
# transformers concludes that the distribution is absent, and nothing here is loaded twice. Other clones of this project
# on the path are no such distribution: two that gave way to each other would do so for ever.
if __name__ == "kernels":
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from pathlib import Path as _Path

    __path__ = []
    _elsewhere = [path for path in _sys.path if not (_Path(path) / "kernels" / "linear_logprob").is_dir()]
    _found = _PathFinder.find_spec("kernels", _elsewhere)
    if _found is not None and _found.loader is not None:
        __file__, __spec__ = _found.origin or __file__, _found
        __path__ = _found.submodule_search_locations or []
        _found.loader.exec_module(_sys.modules["kernels"])
else:
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
