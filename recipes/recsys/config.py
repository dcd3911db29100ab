"""The keys of the recommendation recipe, with the defaults that recipe.yaml and demo.yaml build on."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from dist_train.config import CachedData, Flag, Positive, RunConfig, Section, Share, path_field

SplitShare = Annotated[float, Field(gt=0.0, lt=1.0)]


class SyntheticConfig(Section):
    users: Positive = 4_000
    """Number of users."""
    items: Positive = 1_500
    """Number of items."""
    topics: Annotated[int, Field(ge=2)] = 30
    """Kinds of taste; an item belongs to one, and its words and category tell most of it."""
    new_share: Share = 0.3
    """Share of the items that appear while the log is written, evenly over its time."""
    drift: Share = 0.15
    """Probability that a user's interest moves to another topic from one event to the next."""
    sequel_share: Share = 0.35
    """Share of the events that follow from the event before: each item has a few successors."""
    popularity_exponent: Annotated[float, Field(ge=0.0)] = 0.8
    """How long the tail is: the n-th item of a topic is taken n to the power of minus this times as often."""
    content_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    """Share of an item's words that tell its topic and its family of successors; the others tell nothing."""
    days: Positive = 180
    """Length of the log."""
    seed: int = 0
    """Seed of the generator; the same keys give the same log."""


class DataConfig(CachedData):
    path: str | list[str] | None = path_field(None)
    """Events or sessions: CSV, TSV, JSONL, Parquet (gz too), a folder of Parquet, or `synthetic`."""
    test_path: str | list[str] | None = path_field(None)
    """File(s) of sessions that are the test split; null takes it from `path` by time."""
    kind: Literal["events", "sessions", "sequences"] = "events"
    """events: a row is one event. sessions: a row is a history and the target that came next, the rows in the order of
    time. sequences: a row is all items of a user, oldest first; without times, so for leave_one_out alone."""
    events: Positive = 60_000
    """Number of events that `synthetic` generates."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """What `synthetic` generates."""
    user_column: str = "user_id"
    """Column of the user."""
    item_column: str = "item_id"
    """Column of the item, in events and in the item table."""
    time_column: str | None = "timestamp"
    """Column of the time: seconds, milli-, micro- or nanoseconds since 1970, or ISO 8601. Sessions and sequences need
    none: their rows stand in the order of time."""
    history_column: str = "history"
    """Column of a session's items before the target, oldest first, separated by blanks or as a JSON list."""
    target_column: str = "target"
    """Column of a session's target."""
    sequence_column: str = "items"
    """Column of a sequence's items, oldest first."""
    type_column: str | None = None
    """Column of the event's type; goes with `types`."""
    types: Annotated[list[str], Field(min_length=1)] | None = None
    """The types of events that count, for example [purchase]; null takes every event."""
    weight_column: str | None = None
    """Column of what an event counts in the loss, above 0; null: each counts 1."""
    half_life_days: Annotated[float, Field(gt=0.0)] | None = None
    """An event counts half as much in the network's loss for every so many days that it is older than the end of the
    training; null: all count alike. For logs of years, whose taste has changed."""
    items_path: str | list[str] | None = path_field(None)
    """The item table; null: the items are those of the training events, and have no content."""
    text_columns: list[str] = []
    """Columns of the item table that hold text."""
    category_columns: list[str] = []
    """Columns of the item table that hold a category."""
    number_columns: list[str] = []
    """Columns of the item table that hold a number."""
    available_from_column: str | None = None
    """Column of the item table: time from which on an item may be recommended; empty: always."""
    available_until_column: str | None = None
    """Column of the item table: time from which on it may not be recommended any more; empty: never."""
    content_time_column: str | None = None
    """Column of the item table: when its row was written. Content that is younger than the training is refused."""
    unknown_items: Literal["refuse", "drop"] = "refuse"
    """Events whose item is not in the item table: refuse names them and ends, drop leaves them out and counts them."""
    text_features: Literal["svd", "hashed"] = "svd"
    """svd: TF-IDF and a truncated singular value decomposition, fitted to the items of the training events. hashed: the
    words' hashes, for millions of items; nothing is fitted."""
    text_dims: Annotated[int, Field(ge=2)] = 128
    """Numbers that each text column becomes."""
    split: Literal["time", "leave_one_out"] = "time"
    """time: train before validation before test, by the clock. leave_one_out: the last event of each user is the test,
    the one before the validation; other users' later events train, which no deployed model can see."""
    validation_share: SplitShare = 0.1
    """Share of the events in the validation split, the last ones before the test split."""
    test_share: SplitShare = 0.1
    """Share of the events in the test split, the last ones."""
    validation_from: str | None = None
    """Time at which the validation split begins, in place of validation_share."""
    test_from: str | None = None
    """Time at which the test split begins, in place of test_share."""
    test_until: str | None = None
    """Time at which the test split ends; later events are left out. null: the end of the log."""
    period_days: Annotated[float, Field(gt=0.0)] = 7.0
    """Age of the model is told in periods of so many days since the end of its training."""
    session_gap_s: Positive | None = None
    """A pause longer than this begins a new session, which knows nothing of those before; null: one session a user."""
    max_history: Annotated[int, Field(ge=1)] = 50
    """Most events of a session that the model reads, the last ones."""
    min_history: Annotated[int, Field(ge=0)] = 1
    """Events to predict with fewer events before them are left out of validation and test, and counted."""

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if self.validation_share + self.test_share >= 0.9:
            raise ValueError("data.validation_share and data.test_share together leave less than a tenth for training")
        if (self.types is None) != (self.type_column is None):
            raise ValueError(
                f"data.types is {self.types}, but data.type_column is {self.type_column}: they go together, set both "
                "or neither"
            )
        if self.kind == "sequences" and self.split == "time":
            raise ValueError(
                "data.kind is sequences, which have no times, but data.split is time: set data.split to leave_one_out, "
                "or give events with their times"
            )
        if self.test_path is not None and (self.kind != "sessions" or self.split != "time"):
            raise ValueError(
                f"data.test_path goes with data.kind sessions and data.split time, but they are {self.kind} and "
                f"{self.split}: set data.test_path to null"
            )
        if self.kind == "sessions" and self.split == "leave_one_out":
            raise ValueError("data.split is leave_one_out, but sessions have one target each: set data.split to time")
        if self.kind != "events" and self.session_gap_s is not None:
            raise ValueError(
                f"data.session_gap_s is {self.session_gap_s}, but data.kind is {self.kind}, whose rows are sessions "
                "already: set it to null"
            )
        by_time = self.kind == "events" and self.split == "time"
        for key in ("validation_from", "test_from", "test_until", "content_time_column"):
            if getattr(self, key) is not None and not by_time:
                raise ValueError(
                    f"data.{key} is {getattr(self, key)}, but data.kind is {self.kind} and data.split {self.split}: "
                    "it needs events that are split by time; set it to null"
                )
        for key in ("types", "weight_column", "available_from_column", "available_until_column"):
            if getattr(self, key) is not None and self.kind != "events":
                raise ValueError(
                    f"data.{key} is {getattr(self, key)}, but data.kind is {self.kind}, which have no times and no "
                    "types or weights of events; set it to null"
                )
        if self.half_life_days is not None and (self.kind != "events" or self.split != "time"):
            raise ValueError(
                f"data.half_life_days is {self.half_life_days:g}, but data.kind is {self.kind} and data.split "
                f"{self.split}: it needs events that are split by time; set it to null"
            )
        return self

    @model_validator(mode="after")
    def _content_has_a_table(self) -> Self:
        own = ("text_columns", "category_columns", "number_columns")
        others = ("available_from_column", "available_until_column", "content_time_column")
        given = [name for name in (*own, *others) if getattr(self, name)]
        if given and self.items_path is None and self.path != "synthetic":
            raise ValueError(
                f"data.{given[0]} is {getattr(self, given[0])}, but data.items_path is null: name the item table"
            )
        return self


class ModelConfig(Section):
    kind: Literal["transformer", "gru", "lstm", "last"] = "transformer"
    """What reads the session: a causal Transformer (SASRec), a GRU or LSTM (GRU4Rec); last: its last item alone."""
    items: Literal["hybrid", "id", "content"] = "hybrid"
    """What an item is to the model: its own vector and its content, one of both alone."""
    layers: Positive = 2
    """Transformer blocks or recurrent layers."""
    width: Positive = 64
    """Width of the item vectors."""
    heads: Positive = 2
    """Attention heads (transformer)."""
    feedforward: Positive = 128
    """Inner width of the feed-forward block (transformer, last)."""
    dropout: Share = 0.3
    """Dropout probability in training."""
    input_scale: Annotated[float, Field(gt=0.0)] = 4.0
    """Item vectors are multiplied by this where the session is read: how much they weigh beside positions and gaps."""
    content_scale: Annotated[float, Field(gt=0.0)] = 1.0
    """The numbers of an item's content are multiplied by this. Each is of a size of about 1, and a step of the
    optimizer moves an item's vector by about all of them together: less than 1 learns content more slowly than ids,
    for logs that are large enough to learn ids from."""
    id_dropout: Share = 0.2
    """Probability that an item's own vector is left out in a training step: its content alone must do then (hybrid)."""
    rules_share: Share = 0.0
    """Share of sequential rules (what followed what in the training) in an item's probability; the network's is the
    rest. 0: it ranks alone. Rules take no part in training. Their table, up to 100 items an item, 800 bytes, is held by
    every rank and stands in the model folder."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> Self:
        if self.kind == "transformer" and self.width % self.heads:
            raise ValueError(f"model.width is {self.width}, but must be a multiple of model.heads ({self.heads})")
        return self


class TaskConfig(Section):
    loss: Literal["auto", "full", "sampled"] = "auto"
    """full: softmax over all items, exact, in blocks. sampled: over drawn items, corrected by how often they are drawn
    (logQ). auto: full up to 200,000 items."""
    negatives: Positive = 8192
    """Items drawn in each forward pass (sampled)."""
    k: Positive = 10
    """Length of the list that NDCG, MAP and HR look at."""
    list_length: Positive = 20
    """Items of each answer, and of each list that is kept."""
    mask_seen: Flag = False
    """Never recommend what stands in the session already. Repeats are common where people buy again: then false."""

    @model_validator(mode="after")
    def _lists_hold_k(self) -> Self:
        if self.list_length < self.k:
            raise ValueError(f"task.list_length is {self.list_length}, but must be at least task.k ({self.k})")
        return self


class Config(RunConfig):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()

    @model_validator(mode="after")
    def _content_is_there(self) -> Self:
        data = self.data
        columns = (*data.text_columns, *data.category_columns, *data.number_columns)
        if self.model.items != "id" and not columns and data.path is not None:
            raise ValueError(
                f"model.items is {self.model.items}, but no column of the item table is named as content: set "
                "data.text_columns, data.category_columns or data.number_columns, or model.items to id"
            )
        return self
