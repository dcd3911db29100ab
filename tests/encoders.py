"""A tiny Hugging Face encoder with its tokenizer, in a folder: what stands in for a pretrained one."""

from __future__ import annotations

from pathlib import Path

from tests.front_door import COMMON, WORDS

POSITIONS = 192


def make_encoder(folder: Path, tokenizer: Path | None = None) -> Path:
    """A BERT of two blocks with random weights. tokenizer: a folder whose files it takes; None makes one for the
    tickets of `write_tickets`."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertModel

    folder.mkdir()
    if tokenizer is None:
        _write_tokenizer(folder)
    else:
        for file in tokenizer.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())
    config = BertConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(folder)),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=POSITIONS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).save_pretrained(folder)
    return folder


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *sorted({*COMMON, *(word for queue in WORDS.values() for word in queue)})]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
