"""The demo models' tokenizer: one whitespace-separated word is one token."""

from __future__ import annotations

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from latentrevise.demo.family import EOS, Family

SPECIAL = ("<pad>", "<bos>", EOS, "<unk>")


def build_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the family's vocabulary.

    No token is added to an encoded text, so the ids of a text are the ids of its parts, one after the other; decoding
    joins words by single spaces and encoding that text gives the same ids again.  There is no chat template.
    """
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *family.vocabulary()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token=EOS,
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )
