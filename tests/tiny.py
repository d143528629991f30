"""Random models of a few thousand parameters, and a tokenizer for them, built on the spot: nothing is downloaded."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAD, BOS, EOS, UNK = 0, 1, 2, 3

CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": False}),
    # One layer in two slides, over a window that short tests can cross.
    "gemma3": (
        Gemma3TextConfig,
        Gemma3ForCausalLM,
        {
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
        },
    ),
}


def tiny_model(arch: str = "qwen3", vocab: int = 97, seed: int = 0, **changes: object) -> PreTrainedModel:
    """A random model in float32 and eval mode: 2 layers, d = 32, 4 heads, 2 of them for keys.

    Its weights are ten times larger than at a usual initialisation, so that what it predicts depends on what it reads.
    """
    config_class, model_class, own = CLASSES[arch]
    settings = {
        "vocab_size": vocab,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_class(config_class(**(settings | own | changes))).eval()


def tiny_tokenizer(vocab: int = 97, chat: bool = False) -> PreTrainedTokenizerFast:
    """Single characters: 4 special tokens, then as much printable ASCII as ``vocab`` has room for.

    The default holds digits, operators, letters and ``\\boxed{}``. ``chat`` adds a template.
    """
    known = sorted("0123456789+-*/=()[]{}<>.,:;!?'\"$%&#@^_|~` \n\\") + [chr(c) for c in range(97, 123)]
    known += [chr(c) for c in range(65, 91)]
    table = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "<unk>": UNK}
    for character in known[: vocab - len(table)]:
        table[character] = len(table)
    backend = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    if chat:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] + '\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
        )
    return tokenizer
