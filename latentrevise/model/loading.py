"""Loading a policy: weights and tokenizer, checked before anything is computed with them."""

from __future__ import annotations

import inspect
import json
import os
import struct
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import safe_open
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
    """A causal LM in eval mode and its tokenizer, from a directory or a hub id; of a LoRA adapter's directory the base
    model with the adapter merged; of a ``.gguf`` file (or ``DIR:FILE.gguf``) its weights dequantised, float32 under
    ``auto``.

    Only safetensors weights are read and no code that comes with a model is run. dtype: ``auto`` is what the weights
    are stored in. device: None is the first GPU, or else the CPU. Raises ModelError.
    """
    place = chosen_device(device)  # a wrong one is told before anything is loaded
    if is_adapter(found := model_place(name)):
        model, tokenizer = load_adapted(found, dtype)
    else:
        model, tokenizer = _load(found, dtype, revision)
    keep_softcap(model)
    check_model(model, tokenizer)
    try:
        model.to(place)  # type: ignore[arg-type]  # the wrapper around it hides its signature
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(
            f"{name}: it can't be put on {place} ({_first_line(error)}); choose another --device"
        ) from error
    return model.eval(), tokenizer


def chosen_device(device: torch.device | str | None) -> torch.device:
    """The device of that name, or the first GPU, or else the CPU. Raises ModelError for one that is not here."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ModelError(f"device {device!r}: there is none of that name; choose cpu, cuda, cuda:1, ...") from error
    if found.type == "cuda" and not (torch.cuda.is_available() and (found.index or 0) < torch.cuda.device_count()):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        raise ModelError(f"device {str(device)!r}: torch {torch.__version__} sees {count} such devices; choose another")
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise ModelError("device 'mps': torch finds none on this machine; choose cpu")
    if found.type == "meta":
        raise ModelError("device 'meta' holds no weights; choose cpu, cuda, cuda:1, ...")
    return found


def _load(
    name: str, dtype: torch.dtype | str, revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not (isinstance(found, torch.dtype) and found.is_floating_point):
            raise ModelError(f"dtype {dtype!r} is not a floating type; choose auto, float32, bfloat16 or float16")
        dtype = found
    folder, gguf = _gguf(name)
    if gguf and dtype == "auto":
        dtype = torch.float32
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, revision=revision, trust_remote_code=False, use_safetensors=True, **gguf
        )
    except (OSError, ValueError, KeyError, IndexError, RuntimeError, struct.error) as error:  # a torn GGUF file's
        raise ModelError(
            f"{name}: no causal language model can be loaded from it ({_first_line(error)}); give a directory with"
            " config.json and safetensors weights of an architecture that transformers knows by itself, or a hub id"
        ) from error
    finally:
        if bars:
            transformers_logging.enable_progress_bar()
    if gguf:
        _make_plain(model, name)
    return model, load_tokenizer(name, revision)


def _gguf(name: str) -> tuple[str, dict[str, str]]:
    """Of a place as ``model_place`` gives it: what transformers loads from, and the argument that names a GGUF file."""
    if not name.endswith(".gguf"):
        return name, {}
    if find_spec("gguf") is None:
        raise ModelError(
            f"{name}: reading it takes the package gguf; pip install 'gguf>=0.17' (the extra `real` has it)"
        )
    folder, _, file = name.rpartition("/" if Path(name).is_file() else ":")
    return folder, {"gguf_file": file}


def _make_plain(model: PreTrainedModel, name: str) -> None:
    """A model that transformers dequantised, without the marks of the quantised one, which it would refuse to save."""
    for owner, mark in ((model, "hf_quantizer"), (model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, mark):
            delattr(owner, mark)
    model.is_quantized = False  # type: ignore[assignment]
    model.config._name_or_path = name


def load_tokenizer(name: str | os.PathLike[str], revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model's directory or hub id; of adapters without one that of their base. Raises ModelError."""
    from transformers import AutoTokenizer

    name = model_place(name)
    if is_adapter(name) and not _has_tokenizer(name):
        name = base_of(name)
    try:
        folder, gguf = _gguf(name)
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=False, **gguf)
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            # What transformers makes up for some architectures when there are no files.
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{name}: it has no tokenizer that can be loaded ({_first_line(error)}); put the tokenizer's"
            " files (tokenizer.json, tokenizer_config.json) beside the weights"
        ) from error
    return tokenizer


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


def spread(length: int, count: int, repeat: bool = False) -> list[int]:
    """``count`` places spread over ``range(length)``, the first and the last among them; where there are fewer, all of
    them, or with ``repeat`` some of them again. In integers: float32 counts no further than 2^24."""
    count = count if repeat else min(count, length)
    return [i * (length - 1) // max(count - 1, 1) for i in range(count)]


def cache_argument(module: nn.Module) -> str:
    """What a forward pass calls its cache: transformers renames ``past_key_values`` to ``cache``, and warns of the old
    name where it takes the new one."""
    return "cache" if "cache" in inspect.signature(unwrapped(module).forward).parameters else "past_key_values"


def unwrapped(model: Any) -> PreTrainedModel:
    """The model inside peft's wrapper, whose adapters act on it in place; any other as it is."""
    return cast("PreTrainedModel", model.get_base_model() if hasattr(model, "get_base_model") else model)


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


def model_place(name: str | os.PathLike[str]) -> str:
    """A model's directory in full, so that it is found from anywhere; a hub id as it is.

    Raises ModelError for a path that is no model's, before the hub is asked for a model of that name.
    """
    path = Path(name).expanduser()
    folder, _, file = str(name).rpartition(":")
    if file.endswith(".gguf") and folder:
        inside = Path(folder).expanduser() / file
        if not inside.is_file() and Path(folder).expanduser().is_dir():
            raise ModelError(f"{name}: there is no {file} in {folder}; check its name")
        return str(inside.resolve()) if inside.is_file() else str(name)
    if path.suffix == ".gguf" and path.is_file():
        return str(path.resolve())
    if path.is_dir():
        if not (path / "config.json").is_file() and not is_adapter(path):
            raise ModelError(
                f"{name}: there is no config.json in it, so it isn't a model directory; give the one that has it"
            )
        return str(path.resolve())
    if path.exists():
        raise ModelError(f"{name}: it is a file; give the model's directory, or a hub id such as organisation/model")
    if isinstance(name, os.PathLike) or str(name).startswith((".", "/", "~")) or str(name).count("/") > 1:
        raise ModelError(
            f"{name}: there is no such directory; check the path, or give a hub id such as organisation/model"
        )
    return str(name)


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether a directory holds adapters of another model (peft) and no model of its own."""
    return (Path(path) / "adapter_config.json").is_file() and not (Path(path) / "config.json").is_file()


def _has_tokenizer(path: str | os.PathLike[str]) -> bool:
    return any((Path(path) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def base_of(path: str | os.PathLike[str]) -> str:
    """The model that a directory's adapters belong to. Raises ModelError where it is not named or not there."""
    path = Path(path)
    try:
        base = json.loads((path / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: its adapter_config.json can't be read ({error}); restore it") from error
    try:
        # As it was typed when it was trained: perhaps from where the adapter lies.
        return model_place(path / base if base and base.startswith(".") and (path / base).is_dir() else base or ".")
    except ModelError as error:
        raise ModelError(
            f"{path} holds adapters of {base or 'a model that it does not name'}, which is not there ({error}); put its"
            " place under base_model_name_or_path in adapter_config.json, or merge with `latentrevise merge --base`"
        ) from error


def load_adapted(
    path: str | os.PathLike[str], dtype: torch.dtype | str, base: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base model with a directory's adapters merged into it, and the tokenizer beside the adapters (or the base's).

    base: in place of the one that the adapters name. Raises ModelError.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError as error:
        raise ModelError(
            f"{path} holds adapters, which need peft: pip install peft, or merge them elsewhere"
        ) from error
    weights = Path(path) / "adapter_model.safetensors"
    if not weights.is_file():
        raise ModelError(
            f"{path}: there is no adapter_model.safetensors in it, and pickled weights are not read; convert it"
        )
    model, tokenizer = _load(model_place(base) if base else base_of(path), dtype)
    if _has_tokenizer(path):
        tokenizer = load_tokenizer(path)
    try:
        adapted = PeftModel.from_pretrained(model, str(path))
        with safe_open(weights, "pt") as stored:
            keys = set(stored.keys())
        # peft leaves out what has no place in the model. Its "auto" looks for the base's config, perhaps on the hub.
        whole = any(".lora_" not in key for key in keys)
        lost = keys ^ set(get_peft_model_state_dict(adapted, save_embedding_layers="auto" if whole else False))
        if lost:
            raise ValueError(f"{len(lost)} tensors have no counterpart, {min(lost)} the first")
        merged: Any = adapted.merge_and_unload(safe_merge=True)
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise ModelError(
            f"{path}: its adapters can't be merged into {model.config._name_or_path} ({_first_line(error)}); they must"
            " be of that model and of a kind that merges (LoRA)"
        ) from error
    merged.config._name_or_path = str(path)
    return cast("PreTrainedModel", merged), tokenizer


def merge_adapter(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    base: str | None = None,
    dtype: torch.dtype | str = "auto",
) -> Path:
    """Write the model that a directory of adapters and its base make together to ``out``; see ``load_adapted``."""
    found, out = model_place(path), Path(out).expanduser()
    if not is_adapter(found):
        raise ModelError(f"{path}: there is no adapter_config.json without a config.json in it, so nothing to merge")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ModelError(f"{out} is there already; choose a new or an empty folder for the merged model")
    model, tokenizer = load_adapted(found, dtype, base)
    check_model(model, tokenizer)
    try:
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)
    except OSError as error:
        raise ModelError(f"{out} can't be written ({error.strerror or error}); choose another --out") from error
    return out


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.split("\n", 1)[0] if text else type(error).__name__
