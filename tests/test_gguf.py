"""Models in GGUF files: loaded, dequantised, saved, worked on."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from latentrevise import RecoverConfig, recover
from latentrevise.errors import ModelError
from latentrevise.model.loading import load_model, load_tokenizer
from latentrevise.recovery.rundir import RunDirectory, where_it_is

gguf = pytest.importorskip("gguf", reason="gguf is not installed")

WIDTH, HEADS, INNER, LAYERS = 64, 2, 128, 1
LETTERS = [chr(c) for c in range(33, 127)] + ["Ġ", "Ċ", "12"]
TOKENS = ["<|endoftext|>", "<s>", "</s>", *LETTERS]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A llama of one layer; its matrices in Q8_0."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * len(LETTERS))
    writer.add_token_merges(["1 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    g = torch.Generator().manual_seed(0)

    def matrix(name, *shape):
        weights = (0.2 * torch.randn(*shape, generator=g)).numpy()
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    matrix("token_embd.weight", len(TOKENS), WIDTH)
    writer.add_tensor("output_norm.weight", torch.ones(WIDTH).numpy())
    matrix("output.weight", len(TOKENS), WIDTH)
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{norm}.weight", torch.ones(WIDTH).numpy())
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        matrix(f"blk.0.{name}.weight", WIDTH, WIDTH)
    for name, shape in (("ffn_gate", (INNER, WIDTH)), ("ffn_up", (INNER, WIDTH)), ("ffn_down", (WIDTH, INNER))):
        matrix(f"blk.0.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_loaded_saved_and_worked_on(file, tmp_path):
    model, tokenizer = load_model(file, device="cpu")
    assert model.dtype == torch.float32
    again, _ = load_model(f"{file.parent}:{file.name}", device="cpu", dtype="bfloat16")
    assert again.dtype == torch.bfloat16
    ids = torch.tensor([tokenizer.encode("3+4=", add_special_tokens=False)])
    assert tokenizer.decode(ids[0]) == "3+4="

    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(plain(ids).logits, model(ids).logits)
    load_model(tmp_path / "plain", device="cpu")

    config = RecoverConfig(rollouts=1, samples=1, max_new_tokens=4, strategies=("latent",), equal_compute=False)
    recover(model, tokenizer, [{"prompt": "1+1=", "answer": "2"}], config, tmp_path / "run")
    header = RunDirectory(tmp_path / "run").read_header()
    assert header["model"]["path"] == str(file)
    assert header["model"]["weights"] == "dequantised from GGUF"
    assert len(load_tokenizer(where_it_is(header, tmp_path / "run"))) == len(tokenizer)


def test_a_file_that_is_not_there_is_named(file):
    with pytest.raises(ModelError, match=r"there is no other\.gguf in"):
        load_model(f"{file.parent}:other.gguf", device="cpu")
    with pytest.raises(ModelError, match=r"no\.gguf"):
        load_model(file.parent / "no.gguf", device="cpu")
    (file.parent / "bad.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        load_model(file.parent / "bad.gguf", device="cpu")
