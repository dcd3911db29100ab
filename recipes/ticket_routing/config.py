"""The keys of the ticket routing recipe, with the defaults that recipe.yaml and demo.yaml build on."""

from __future__ import annotations

import collections
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_train.config import CachedData, Positive, RunConfig, Section, Share, path_field


class SyntheticConfig(Section):
    queues: Annotated[int, Field(ge=2, le=64)] = 8
    """Number of queues."""
    wrong_label_share: Share = 0.05
    """Share of tickets whose label is a wrong queue, drawn at random."""
    near_duplicate_share: Share = 0.03
    """Share of tickets that repeat an earlier one with small edits."""
    typo_share: Share = 0.03
    """Share of words with a typo."""
    overlap: Share = 0.5
    """Share of a ticket's words that come from vocabulary that several queues use."""
    seed: int = 0
    """Seed of the generator; the same seed and rows give the same tickets."""


class DataConfig(CachedData):
    path: str | list[str] | None = path_field(None)
    """CSV, TSV, JSONL, Parquet (gz too), a folder of Parquet or of `datasets`, `hub:NAME`, or `synthetic`."""
    validation_path: str | list[str] | None = path_field(None)
    """File(s) of the validation split; null takes it from `path`."""
    test_path: str | list[str] | None = path_field(None)
    """File(s) of the test split; null takes it from `path`."""
    revision: str | None = None
    """Revision of a hub data set; null takes the newest and records it."""
    rows: Positive = 20_000
    """Number of tickets that `synthetic` generates."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """What `synthetic` generates."""
    text_columns: Annotated[list[str], Field(min_length=1)] = ["text"]
    """Columns joined into the ticket's text, in this order (for example subject and body)."""
    label_column: str = "label"
    """Column that holds the queue."""
    id_column: str | None = None
    """Column that names a ticket in predictions; null uses the row number."""
    time_column: str | None = None
    """Time stamp column: older tickets train, newer ones test; null splits at random within each queue."""
    split_column: str | None = None
    """Column with the words train, validation and test; null lets the toolkit split."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.1
    """Share of the rows in the validation split."""
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.2
    """Share of the rows in the test split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, apart from `seed`, so that seeds can be compared on one split."""
    near_duplicates: Literal["group", "ignore"] = "group"
    """group: near-duplicate tickets always lie in one split; ignore: only count them."""
    labels: Annotated[list[str], Field(min_length=2)] | None = None
    """The queues of the model, in this order; a row of any other is refused. null takes those that the data has."""
    drop_labels_below: Positive | None = None
    """Drop queues with fewer rows than this, unless listed, and say so; null refuses a queue with one row."""
    max_tokens: Annotated[int, Field(ge=8)] = 192
    """Longest ticket in tokens; the rest of it is cut."""
    vocab_size: Annotated[int, Field(ge=300)] = 12_000
    """Size of the BPE vocabulary that is trained on the training split."""
    tokenizer: str | None = path_field(None, hub_name=True)
    """Folder or hub name of a ready tokenizer; null trains one (or takes that of the model that is given)."""
    tokenizer_revision: str | None = None
    """Revision of a hub tokenizer; null takes the newest and records it."""

    @model_validator(mode="after")
    def _shares_leave_training_rows(self) -> Self:
        if self.validation_share + self.test_share >= 0.9:
            raise ValueError("data.validation_share and data.test_share together leave less than a tenth for training")
        return self

    @field_validator("labels")
    @classmethod
    def _labels_are_names(cls, labels: list[str] | None) -> list[str] | None:
        seen = collections.Counter(labels or [])
        twice = [label for label, count in seen.items() if count > 1]
        # Blanks around a label are cut where the data is read.
        odd = [label for label in seen if label != label.strip() or not label]
        if twice or odd:
            what = f"lists {twice[0]!r} twice" if twice else f"lists {odd[0]!r}, which is empty or has blanks around it"
            raise ValueError(f"data.labels {what}: name each label once, as it is in the data")
        return labels


class ModelConfig(Section):
    kind: Literal["transformer", "lstm", "pretrained"] = "transformer"
    """Own Transformer encoder, bidirectional LSTM, or a Hugging Face encoder (`model.pretrained` sets it)."""
    pretrained: str | None = path_field(None, hub_name=True)
    """Folder or hub name of a Hugging Face encoder; null trains an own model from scratch."""
    revision: str | None = None
    """Revision of the hub model; null takes the newest and records it."""
    init_from: str | None = path_field(None)
    """Directory of an earlier run (or its best/) to take weights and tokenizer from; null starts anew."""
    layers: Positive = 2
    """Encoder or LSTM layers."""
    width: Positive = 128
    """Width of the token vectors."""
    heads: Positive = 4
    """Attention heads (transformer)."""
    feedforward: Positive = 512
    """Inner width of the feed-forward block (transformer)."""
    dropout: Share = 0.1
    """Dropout probability in training."""
    lora_rank: Positive | None = None
    """Freeze the pretrained encoder and train LoRA adapters of this rank in it, and the head; null trains all of it."""
    lora_alpha: Positive | None = None
    """The adapters' output is multiplied by this over the rank; null takes twice the rank."""
    lora_dropout: Share | None = None
    """Dropout probability before the adapters; null takes none."""
    lora_targets: Annotated[list[str], Field(min_length=1)] | None = None
    """Modules that get adapters, for example [q_lin, v_lin], or [all-linear]; null leaves the choice to PEFT."""

    @model_validator(mode="before")
    @classmethod
    def _pretrained_is_a_kind(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("pretrained") is not None:
            return {"kind": "pretrained", **values}
        return values

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.kind == "pretrained") != (self.pretrained is not None):
            raise ValueError(
                f"model.kind is {self.kind}, but model.pretrained is {self.pretrained or 'null'}: kind pretrained goes "
                "with a folder or hub name, and for an own model model.pretrained is null"
            )
        if self.kind == "transformer" and self.width % (2 * self.heads):
            raise ValueError(f"model.width is {self.width}, but must be an even multiple of model.heads ({self.heads})")
        if self.kind == "lstm" and self.width % 2:
            raise ValueError(f"model.width is {self.width}, but must be even: the LSTM has two directions")
        return self

    @model_validator(mode="after")
    def _adapters_need_an_encoder(self) -> Self:
        if self.lora_rank is not None and self.pretrained is None:
            raise ValueError(
                f"model.lora_rank is {self.lora_rank}, but model.pretrained is null: adapters go into a pretrained "
                "encoder. Set model.pretrained to a folder or hub name, or model.lora_rank to null"
            )
        for key in ("lora_alpha", "lora_dropout", "lora_targets"):
            value = getattr(self, key)
            if self.lora_rank is None and value is not None:
                raise ValueError(
                    f"model.{key} is {value}, but model.lora_rank is null, so that there are no adapters: set "
                    f"model.lora_rank, for example to 8, or model.{key} to null"
                )
        return self


class TaskConfig(Section):
    class_weights: Literal["none", "balanced"] = "none"
    """Weight of each row in the loss; balanced: inverse to the frequency of its queue."""
    label_smoothing: Share = 0.0
    """Share of the target spread evenly over all queues."""
    target_accuracy: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95
    """Accuracy that routed tickets must reach on the validation split; those that the model is less sure of go to a
    person (decision `review`)."""


class Config(RunConfig):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()

    @model_validator(mode="after")
    def _adapters_are_not_frozen(self) -> Self:
        if self.model.lora_rank is not None and self.optim.freeze == "backbone":
            raise ValueError(
                f"model.lora_rank is {self.model.lora_rank}, but optim.freeze is backbone, where the adapters lie: set "
                "optim.freeze to null (the encoder's own weights are frozen anyway), or model.lora_rank to null"
            )
        return self

    @model_validator(mode="after")
    def _adapters_start_anew(self) -> Self:
        if self.model.lora_rank is not None and self.model.init_from is not None:
            raise ValueError(
                f"model.lora_rank is {self.model.lora_rank}, but model.init_from is {self.model.init_from}: adapters "
                "are trained on the encoder of model.pretrained alone. Give that best/ as model.pretrained, or set "
                "model.lora_rank to null"
            )
        return self

    @model_validator(mode="after")
    def _one_tokenizer(self) -> Self:
        if self.data.tokenizer is not None and self.model.init_from is not None:
            raise ValueError(
                f"data.tokenizer is {self.data.tokenizer}, but model.init_from is {self.model.init_from}, whose "
                "weights belong to its own tokenizer: set one of the two to null"
            )
        return self
