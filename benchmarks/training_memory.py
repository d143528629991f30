"""Peak memory of one training step over the model: TRL's trainers against the same ones on ``linear_logprob``.

A step is the trainer's own ``training_step`` (forward, loss, backward) on one batch without padding, every token in the
loss, on a random model with a real vocabulary and width and few layers, so that the head's share is what is seen.
``trl``: TRL's fused head, which walks over tiles of logits. ``latentrevise``: ours. ``logits``: the model's own loss
from full logits, what TRL's trainers did before they had a fused head. ``full`` trains all weights, the tied table too,
with gradients that are there already, as in every step but the first; ``lora`` trains adapters on a frozen table.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks import harness

HEADS = ("trl", "latentrevise", "logits")


@dataclass(frozen=True)
class Row:
    trains: str
    head: str
    tokens: int
    peak_mib: float
    seconds: float
    loss: float


def main(options: argparse.Namespace) -> dict:
    device = torch.device(options.device)
    report = harness.Report.start("training_memory", device).to_json()
    rows = []
    for trains in options.trains:
        for head in options.heads:
            row = measure(trains, head, options, device)
            rows.append(row)
            print(
                f"{trains:5} {head:13} {row.tokens} tokens: {row.peak_mib:8.0f} MiB over the model,"
                f" {row.seconds:6.1f} s, loss {row.loss:.6f}",
                flush=True,
            )
        peak = {row.head: row.peak_mib for row in rows if row.trains == trains}
        for head in peak.keys() - {"latentrevise"} if "latentrevise" in peak else ():
            print(f"{trains:5} {head} over latentrevise: {peak[head] / peak['latentrevise']:.1f}x")
    report["rows"] = [asdict(row) for row in rows]
    report["model"] = {"vocab": options.vocab, "layers": options.train_layers, "width": options.train_width}
    return report


def measure(trains: str, head: str, options: argparse.Namespace, device: torch.device) -> Row:
    # Not at the top: the other benchmarks do without the extra `train`.
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    from latentrevise.train.sft import LinearSFTTrainer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocab,
        hidden_size=options.train_width,
        intermediate_size=4 * options.train_width,
        num_hidden_layers=options.train_layers,
        num_attention_heads=options.train_width // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    count, length = options.train_batch
    ids = torch.randint(0, options.vocab, (count, length), generator=torch.Generator().manual_seed(1)).tolist()
    with tempfile.TemporaryDirectory() as out:
        trainer = (LinearSFTTrainer if head == "latentrevise" else SFTTrainer)(
            model=Qwen2ForCausalLM(config).to(device),
            args=SFTConfig(
                out,
                per_device_train_batch_size=count,
                bf16=device.type == "cuda",
                use_cpu=device.type == "cpu",
                gradient_checkpointing=False,
                report_to="none",
                max_length=length,
            ),
            train_dataset=Dataset.from_list([{"input_ids": row} for row in ids]),
            processing_class=_tokenizer(),
            peft_config=LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if trains == "lora" else None,
        )
        trainer.model.train()
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
        count_items = torch.tensor(count * (length - 1), device=device)
        found: list[Any] = []

        def step() -> None:
            if head == "logits":
                loss = trainer.model(**batch).loss
                loss.backward()
            else:
                loss = trainer.training_step(trainer.model, dict(batch), count_items)
            found.append(loss.detach())

        seconds = harness.clock(lambda: found.append(harness.extra_memory(step, device)), device)
    loss, peak = found
    return Row(trains, head, count * length, peak, seconds, float(loss))


def _tokenizer() -> PreTrainedTokenizerFast:
    """The trainer wants one; the rows are ids already."""
    from tokenizers import Tokenizer, models

    backend = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


def add_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--trains", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    group.add_argument("--heads", nargs="+", choices=HEADS, default=HEADS)
    group.add_argument("--train-layers", type=int, default=2)
    group.add_argument("--train-width", type=int, default=896, help="a multiple of 64")
    group.add_argument("--train-batch", type=int, nargs=2, default=(4, 512), metavar=("ROWS", "TOKENS"))
