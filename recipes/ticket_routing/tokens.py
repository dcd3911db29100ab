"""The tokenizer: trained on the training split, or a ready one. Written as a Hugging Face tokenizer folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dist_train.errors import DataError
from dist_train.pretrained import fetched_model
from recipes.ticket_routing.config import Config
from recipes.ticket_routing.hub import tokenizer_folder

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def make_tokenizer(config: Config, train_texts: Iterable[str], folder: Path) -> Any:
    """A `tokenizers.Tokenizer` that cuts at data.max_tokens, saved in `folder`."""
    ready = tokenizer_folder(config)
    if ready is not None:
        return _load(ready, config.data.max_tokens, folder)
    tokenizer = _train(train_texts, config.data.vocab_size)
    tokenizer.enable_truncation(config.data.max_tokens)
    _write(tokenizer, folder)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.data.max_tokens,
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    return tokenizer


def describe_ready(config: Config) -> list[str | None] | None:
    """What tells one ready tokenizer from another: its files, and the commit of a fetched encoder, which facts.json
    names; None to train one."""
    ready = tokenizer_folder(config)
    if ready is None:
        return None
    files = [Path(ready) / name for name in _FILES]
    encoder = fetched_model(config)
    commit = [] if encoder is None else [encoder.revision]
    if not files[0].is_file():
        return [ready, *commit]
    return [file_hash(file) if file.is_file() else None for file in files] + commit


def file_hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _train(texts: Iterable[str], vocab_size: int) -> Any:
    """Byte-pair encoding (Sennrich et al. 2016) over lower-cased words; a ticket starts with [CLS]."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=_SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", special_tokens=[("[CLS]", tokenizer.token_to_id("[CLS]"))]
    )
    return tokenizer


def _write(tokenizer: Any, folder: Path) -> None:
    # Not the library's own save, whose errors do not say that a disk is full.
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")


def _load(source: str, max_tokens: int, folder: Path) -> Any:
    from tokenizers import Tokenizer

    file = Path(source) / _FILES[0]
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise DataError(f"{file} is no tokenizer: {error}") from error
        for name in _FILES[1:]:
            if (file.parent / name).is_file():
                (folder / name).write_bytes((file.parent / name).read_bytes())
    else:
        from transformers import AutoTokenizer

        try:
            loaded = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise DataError(
                f"the tokenizer {source} could not be loaded: {str(error).splitlines()[0]}\n"
                "Give a folder or hub name that holds tokenizer.json (data.tokenizer or model.pretrained)."
            ) from error
        loaded.save_pretrained(folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    _write(tokenizer, folder)
    return tokenizer
