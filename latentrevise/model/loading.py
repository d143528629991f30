"""Loading a policy: weights and tokenizer, checked before anything is computed with them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from latentrevise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM in eval mode and its tokenizer, from a directory or a hub id.

    Only safetensors weights are read and no code that comes with a model is run. dtype: ``auto`` is what the weights
    are stored in. device: None is the first GPU, or else the CPU. Raises ModelError.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    _check_place(name)
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ModelError(f"dtype {dtype!r} is not a floating type; choose auto, float32, bfloat16 or float16")
        dtype = found
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=dtype, revision=revision, trust_remote_code=False, use_safetensors=True
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{name}: no causal language model can be loaded from it ({_first_line(error)}); give a directory with"
            " config.json and safetensors weights of an architecture that transformers knows by itself, or a hub id"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            # What transformers makes up for some architectures when there are no files.
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name}: it has a model but no tokenizer that can be loaded ({_first_line(error)}); put the tokenizer's"
            " files (tokenizer.json, tokenizer_config.json) beside the weights"
        ) from error
    keep_softcap(model)
    check_model(model, tokenizer)
    place = device if device is not None else "cuda" if torch.cuda.is_available() else "cpu"
    model.to(torch.device(place))  # type: ignore[arg-type]  # the wrapper around it hides its signature
    return model.eval(), tokenizer


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions up to which a token's encoding does not depend on how long the sequence is; None: not known.

    Beyond the original length, dynamic and long rotary embeddings change for *all* positions, those of the cached
    prompt too, so no cache is exact there.
    """
    config = model.config.get_text_config(decoder=True)
    limits = [getattr(config, "max_position_embeddings", None)]
    rope = getattr(config, "rope_parameters", None) or {}
    for kind in [rope, *rope.values()]:
        if isinstance(kind, dict) and kind.get("rope_type") in ("dynamic", "longrope"):
            limits.append(
                kind.get("original_max_position_embeddings")
                or getattr(config, "original_max_position_embeddings", None)
            )
    return min((limit for limit in limits if limit), default=None)


def sharded(model: nn.Module) -> bool:
    """Whether the weights are spread over the processes by FSDP2."""
    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Raises ModelError if the model has no plain input embedding or too few rows in it for the tokenizer, or if it
    leaves out the soft cap of its attention."""
    if _loses_softcap(model):
        raise ModelError(
            f"{type(model).__name__} caps its attention scores, which sdpa leaves out; load it with"
            " attn_implementation='eager'"
        )
    rows = input_embedding(model).weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens but the model's embedding table only {rows} rows; use the"
            " tokenizer that belongs to the model, or resize the table and train the new rows first"
        )


def keep_softcap(model: PreTrainedModel) -> None:
    """Let soft-capped attention run eagerly where transformers chose sdpa for it, as versions before 5.20 do."""
    if _loses_softcap(model):
        model.set_attn_implementation("eager")


def _loses_softcap(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    return capped and getattr(config, "_attn_implementation", None) == "sdpa"


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The module that turns token ids into input embeddings ``[.., d]``: an nn.Embedding, or a wrapper around one that
    shows its weight (an adapter); ModelError for anything else."""
    try:
        module = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        module = None
    inner = [m for m in module.modules() if isinstance(m, nn.Embedding)] if module is not None else []
    if module is None or not any(m.weight is getattr(module, "weight", None) for m in inner):
        raise ModelError(
            f"{type(model).__name__} has no plain input embedding (found {type(module).__name__}), so its vocabulary"
            " spans no hull; use a causal LM whose get_input_embeddings() is an nn.Embedding"
        )
    return cast(nn.Embedding, module)


def _check_place(name: str | os.PathLike[str]) -> None:
    """Say what is wrong with a path before the hub is asked for a model of that name."""
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{name}: there is no config.json in it, so it isn't a model directory; give the one that has it"
            )
    elif path.exists():
        raise ModelError(f"{name}: it is a file; give the model's directory, or a hub id such as organisation/model")
    elif isinstance(name, os.PathLike) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ModelError(
            f"{name}: there is no such directory; check the path, or give a hub id such as organisation/model"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
