"""Hugging Face encoders: loading one safely, LoRA adapters in it, and the folder that both leave."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dist_train.errors import ConfigError, DataError
from dist_train.pretrained import check_folder
from recipes.ticket_routing.config import ModelConfig


class PretrainedEncoder(nn.Module):
    """A Hugging Face sequence classifier, perhaps with adapters around it."""

    def __init__(self, model: nn.Module, has_adapters: bool = False) -> None:
        super().__init__()
        self.model = model
        self.has_adapters = has_adapters

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        return self.model(input_ids=token_ids, attention_mask=token_mask.long()).logits

    def head_prefixes(self) -> tuple[str, ...]:
        """How the names of the head's parameters begin."""
        classifier: Any = self.model
        where = "model."
        if self.has_adapters:
            classifier, where = classifier.get_base_model(), "model.base_model.model."
        return tuple(f"{where}{name}." for name in _head_modules(classifier))

    def save(self, folder: Path) -> None:
        """Write what AutoModelForSequenceClassification reads. Adapters are merged into its weights, and lie in
        adapter/ as PEFT reads them."""
        model: Any = self.model
        if self.has_adapters:
            model.save_pretrained(folder / "adapter", save_embedding_layers=False)
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder)


def make_pretrained(folder: str, config: ModelConfig, labels: list[str], max_tokens: int) -> PretrainedEncoder:
    """The encoder of model.pretrained, which lies in `folder`, with a head for these labels, and adapters if there
    shall be some. ConfigError when it has fewer positions than max_tokens."""
    model = load_pretrained(folder, labels, config.dropout)
    positions = getattr(model.config, "max_position_embeddings", max_tokens)
    if positions < max_tokens:
        raise ConfigError(
            f"data.max_tokens is {max_tokens}, but {config.pretrained} has {positions} positions: "
            f"set data.max_tokens to {positions} or less."
        )
    if config.lora_rank is None:
        return PretrainedEncoder(model)
    return PretrainedEncoder(_with_adapters(model, config), has_adapters=True)


def load_pretrained(source: str, labels: list[str], dropout: float | None) -> Any:
    """A Hugging Face classifier with a head for these labels, from a folder. Reads safetensors alone, runs no remote
    code, asks no hub.

    dropout: instead of the model's own probabilities, if given.
    """
    check_folder(source)
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=True)
        known = list(config.id2label.values())
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: index for index, name in enumerate(labels)}
        if dropout is not None:
            for key, value in config.to_dict().items():
                # hidden_dropout_prob, attention_dropout, seq_classif_dropout …: each model has its own names.
                if "dropout" in key and isinstance(value, float | int) and not isinstance(value, bool):
                    setattr(config, key, dropout)
        model = AutoModelForSequenceClassification.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,  # whatever it was stored in: the toolkit's precisions compute over fp32 weights
            ignore_mismatched_sizes=True,  # a head for other labels is made anew
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
        if len(known) == len(labels) and known != labels:
            # A head of as many other labels would be kept, each row under another name.
            head = model.get_submodule(_last_linear(model))
            nn.init.normal_(head.weight, std=getattr(config, "initializer_range", 0.02))
            if head.bias is not None:
                nn.init.zeros_(head.bias)
        return model
    except (OSError, ValueError, RuntimeError) as error:
        raise DataError(
            f"model.pretrained is {source}, which could not be loaded: {(str(error).splitlines() or [''])[0]}\n"
            "Give a folder or hub name with config.json and model.safetensors."
        ) from error


def _with_adapters(model: Any, config: ModelConfig) -> nn.Module:
    """LoRA (Hu et al. 2021): low-rank updates beside frozen weights. The head is trained whole."""
    assert config.lora_rank is not None
    try:
        import peft
    except ImportError as error:
        raise ConfigError(
            f"model.lora_rank is {config.lora_rank}, but PEFT, which makes the adapters, cannot be imported: "
            'pip install "dist-train[lora]", or set model.lora_rank to null.'
        ) from error
    usual = peft.utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    targets: Any = config.lora_targets or usual.get(model.config.model_type, "all-linear")
    head = _head_modules(model)
    settings = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_CLS,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout or 0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        # PEFT adds classifier and score by itself.
        modules_to_save=[name for name in head if name not in ("classifier", "score")] or None,
        exclude_modules=head,
    )
    try:
        adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"model.lora_targets is {config.lora_targets}, which PEFT refuses: {str(error).splitlines()[0]}\n"
            "Name modules of the encoder, or all-linear, or set model.lora_targets to null."
        ) from error
    # What the adapter's folder says it belongs to: not where the encoder lay on this machine.
    settings.base_model_name_or_path = Path(str(config.pretrained)).name if _is_path(config) else config.pretrained
    return adapted


def _is_path(config: ModelConfig) -> bool:
    return Path(str(config.pretrained)).is_absolute()


def _head_modules(classifier: Any) -> list[str]:
    """What a classifier adds to its base model."""
    children = classifier.named_children()
    return [
        name
        for name, child in children
        if name != classifier.base_model_prefix and any(True for _ in child.parameters())
    ]


def label_parameters(encoder: nn.Module) -> list[str]:
    """Names of an encoder's parameters that have one row a label; of own encoders too."""
    head = f"model.{_last_linear(encoder.model)}" if isinstance(encoder, PretrainedEncoder) else "head"
    return [name for name, _ in encoder.named_parameters() if name in (f"{head}.weight", f"{head}.bias")]


def _last_linear(classifier: Any) -> str:
    """The layer that gives the logits. Its name differs by model: classifier, score, classifier.out_proj."""
    outer = [name for name, module in classifier.named_modules() if isinstance(module, nn.Linear)]
    return [name for name in outer if not name.startswith(f"{classifier.base_model_prefix}.")][-1]
