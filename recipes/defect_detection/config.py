"""The keys of the defect detection recipe, with the defaults that recipe.yaml and demo.yaml build on."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dist_train.config import CachedData, Flag, Positive, RunConfig, Section, Share, path_field

# Keys that say nothing where data.target is classes, and why.
_OF_DEFECTIVE = {
    "augment.scratches": "a part with a drawn scratch is defective, but of no class of the data",
    "augment.paste": "a part with a pasted defect is defective, but of no class of the data",
    "task.deployed_share": "answers are corrected for the share of defective parts, and there are classes instead",
    "task.cost_escape": "which parts in doubt are reviewed follows from task.cost_review and task.cost_overkill alone",
}
NonNegative = Annotated[float, Field(ge=0.0)]


class SyntheticConfig(Section):
    defective_share: Annotated[float, Field(gt=0.0, le=0.5)] = 0.04
    """Share of images with scratches."""
    scratch_width_px: Annotated[float, Field(gt=0.0)] = 1.5
    """Width of a scratch."""
    scratch_length_px: Annotated[float, Field(gt=0.0)] = 30.0
    """Mean length of a scratch; each is between half and one and a half of it."""
    scratch_contrast: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """How much darker or lighter than its surroundings a scratch is, as a share of the full range."""
    dust_per_image: NonNegative = 3.0
    """Mean number of dust specks, which are no defects."""
    lighting: Share = 0.25
    """How far the brightness falls off across an image, as a share of the full range."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the generator; the same seed and number give the same image."""


class DataConfig(CachedData):
    path: str | None = path_field(None)
    """Folder of images (a folder a class), table of files and labels, COCO file (.json), folder of `datasets`,
    `hub:NAME`, or `synthetic`."""
    revision: str | None = None
    """Revision of a hub data set; null takes the newest and records it."""
    images: Positive = 4000
    """Number of images that `synthetic` generates."""
    synthetic: SyntheticConfig = SyntheticConfig()
    """What `synthetic` generates."""
    file_column: str = "file"
    """Column of a table that names the image, relative to the table's folder."""
    label_column: str = "label"
    """Column of a table, or of a data set, that holds the class or the probability of a defect."""
    labels_are: Literal["classes", "probabilities"] = "classes"
    """probabilities: the label is how likely the part is defective, from 0 to 1, and is trained on as such."""
    defective_from: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Probability from which a part counts as defective in all metrics (labels_are: probabilities)."""
    target: Literal["defective", "classes"] = "defective"
    """defective: good or defective, whatever the kind of defect; classes: which class."""
    good_label: str | None = None
    """The class of parts without a defect; null takes the one that is called good, ok, free, normal or the like."""
    item_column: str | None = None
    """Column of a table that names the part: images of one part lie in one split. null: each image is a part."""
    item_pattern: str | None = None
    """Regular expression that finds the part in a file's name, as its first group, for example `^(part\\d+)_`."""
    mask_path: str | None = path_field(None)
    """Folder of masks with the images' names (any image suffix), in the same sub-folders; null: no masks."""
    mask_column: str | None = None
    """Column of a table that names an image's mask, relative to the table's folder; may be empty in a row."""
    split_column: str | None = None
    """Column with the words train, validation and test; null: the toolkit splits, unless the folders are so named."""
    validation_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.15
    """Share of the images in the validation split."""
    test_share: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.25
    """Share of the images in the test split; with `folds`, one of them is the test split."""
    split_seed: Annotated[int, Field(ge=0)] = 0
    """Seed of the split, apart from `seed`, so that seeds can be compared on one split."""
    folds: Annotated[int, Field(ge=2)] | None = None
    """Deal the parts into so many folds, of which `fold` is the test split; null splits by `test_share`."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Which of the folds is the test split."""
    test_only: list[str] = []
    """Kinds of defect of which every image is put into the test split, as if never seen before; [all]: every kind."""
    size_px: Annotated[int, Field(ge=16)] | Annotated[list[int], Field(min_length=2, max_length=2)] = 128
    """Height and width that images are brought to: a number for squares, or [height, width]."""
    fit: Literal["pad", "stretch"] = "pad"
    """pad: keep the proportions, shrink only what is larger, and fill up with the edge; stretch: resize both sides."""
    channels: Literal[1, 3] = 1
    """1: grey; 3: colour."""
    smallest_defect_px: Positive = 4
    """Warn when a marked defect has fewer pixels than this after the resizing."""
    most_unreadable: Annotated[int, Field(ge=0)] = 0
    """How many images may be left out because they cannot be read, each named; one more ends the command."""

    @model_validator(mode="after")
    def _shares_leave_training_images(self) -> Self:
        test = self.test_share if self.folds is None else 1 / self.folds
        if self.validation_share + test >= 0.9:
            raise ValueError("data.validation_share and the test split together leave less than a tenth for training")
        if self.folds is not None and self.fold >= self.folds:
            raise ValueError(f"data.fold is {self.fold}, but data.folds is {self.folds}: the folds are counted from 0")
        return self

    @model_validator(mode="after")
    def _probabilities_are_of_defects(self) -> Self:
        if self.labels_are == "probabilities" and self.target == "classes":
            raise ValueError(
                "data.labels_are is probabilities, but data.target is classes: a probability tells good from "
                "defective. Set data.target to defective, or data.labels_are to classes"
            )
        return self

    @model_validator(mode="after")
    def _one_source_of_masks(self) -> Self:
        if self.mask_path is not None and self.mask_column is not None:
            raise ValueError("data.mask_path and data.mask_column are both set: keep one and set the other to null")
        return self

    @model_validator(mode="after")
    def _one_source_of_parts(self) -> Self:
        if self.item_column is not None and self.item_pattern is not None:
            raise ValueError(
                f"data.item_column is {self.item_column}, but data.item_pattern is {self.item_pattern!r}: keep the one "
                "that names the parts, and set the other to null"
            )
        return self

    @field_validator("item_pattern")
    @classmethod
    def _pattern_has_a_group(cls, pattern: str | None) -> str | None:
        try:
            groups = re.compile(pattern).groups if pattern is not None else 1
        except re.error as error:
            raise ValueError(f"data.item_pattern is {pattern!r}, which is no regular expression: {error}") from error
        if groups < 1:
            raise ValueError(f"data.item_pattern is {pattern!r}, but needs a group in brackets that is the part's name")
        return pattern

    @property
    def height_width(self) -> tuple[int, int]:
        if isinstance(self.size_px, int):
            return self.size_px, self.size_px
        return self.size_px[0], self.size_px[1]


class ModelConfig(Section):
    kind: Literal["resnet", "convnext", "pretrained"] = "resnet"
    """Own residual or ConvNeXt-V2-like network, or a Hugging Face image model (`model.pretrained` sets it)."""
    pretrained: str | None = path_field(None, hub_name=True)
    """Folder or hub name of a Hugging Face image model; null trains an own network from scratch."""
    revision: str | None = None
    """Revision of the hub model; null takes the newest and records it."""
    widths: Annotated[list[Positive], Field(min_length=1)] = [16, 32, 64, 128]
    """Channels of each stage (own networks)."""
    depths: Annotated[list[Positive], Field(min_length=1)] = [1, 1, 2, 1]
    """Blocks of each stage (own networks)."""
    stem_stride: Literal[1, 2, 4] = 2
    """By how much the first layer makes the image smaller (own networks)."""
    drop_path: Share = 0.0
    """Probability that a block is skipped in training, rising linearly to this at the last block (own networks)."""
    dropout: Share = 0.0
    """Dropout probability before the head."""
    standardise: Flag = False
    """Bring each image to mean 0 and deviation 1 of its own instead of the training images': where brightness and
    roughness differ from part to part and do not tell a defect."""
    members: Positive = 1
    """Networks side by side, each trained by its own loss; the mean of their logits answers. More of them take as much
    longer, and err less where images are few."""
    texture: Flag = False
    """Another member beside them, a small network over classical texture features of the image."""
    top_share: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The score is the mean over this share of the image's places, those that speak most for a defect; small defects
    need a small one, 1 takes all."""
    tile_px: Annotated[int, Field(ge=16)] | None = None
    """Look at the image in square tiles of this size, at its own resolution; null looks at all of it at once."""
    tile_overlap: Annotated[float, Field(ge=0.0, le=0.75)] = 0.25
    """How much of a tile its neighbour shares at least."""
    tile_top: Positive = 2
    """The image's score is the mean of so many of its highest-scored tiles."""

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
                "with a folder or hub name, and for an own network model.pretrained is null"
            )
        if len(self.widths) != len(self.depths):
            raise ValueError(
                f"model.widths has {len(self.widths)} stages, but model.depths has {len(self.depths)}: give as many"
            )
        return self


class AugmentConfig(Section):
    flips: Flag = True
    """Mirror images at random: only where a mirrored part could be a real one."""
    turns: Flag = True
    """Turn images by right angles (half turns only, where they are not square)."""
    shift_px: Annotated[int, Field(ge=0)] = 0
    """Move images by up to so many pixels, up, down and aside; what comes into view repeats the edge; 0: off."""
    exposure: NonNegative = 0.2
    """Brightness and contrast change by up to this share; 0: off."""
    blur_px: NonNegative = 0.0
    """Gaussian blur of up to this standard deviation; 0: off."""
    noise: NonNegative = 0.0
    """Gaussian noise of up to this standard deviation, as a share of the full range; 0: off."""
    mixup: NonNegative = 0.0
    """Blend each training image and its target with another one, by a share drawn from Beta(mixup, mixup); 0: off."""
    scratches: Share = 0.0
    """Share of good training images that get a drawn scratch and count as defective; 0: off."""
    paste: Share = 0.0
    """Share of good training images that get a real defect, cut out by its mask from another training image."""

    @model_validator(mode="after")
    def _good_parts_are_left(self) -> Self:
        if self.scratches + self.paste >= 1:
            raise ValueError(
                f"augment.scratches is {self.scratches} and augment.paste is {self.paste}, which together leave no "
                "good part as it is: their sum must be below 1"
            )
        return self


class TaskConfig(Section):
    mode: Literal["auto", "classifier", "one_class"] = "auto"
    """one_class: learn from good parts alone, against defects that are drawn into them. auto: one_class where the
    training images show no defect, else classifier."""
    loss: Literal["cross_entropy", "focal"] = "cross_entropy"
    """focal: what is already predicted well counts less (Lin et al. 2017)."""
    focal_gamma: Annotated[float, Field(gt=0.0)] = 2.0
    """How fast the focal loss falls with the probability of the truth."""
    logit_adjustment: NonNegative = 0.0
    """Add so many times the log share of each class to the logits in training (Menon et al. 2021); 0: off."""
    balanced_share: Annotated[float, Field(gt=0.0, le=1.0)] | None = None
    """Repeat training images of the rarer classes until each has this share of the commonest; null repeats none."""
    label_smoothing: Share = 0.0
    """Share of the target spread evenly over all classes."""
    deployed_share: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Share of defective parts where the model will be used, to which its answers are corrected; null: the data's."""
    cost_escape: Annotated[float, Field(gt=0.0)] = 20.0
    """Cost of a defective part that is passed."""
    cost_overkill: Annotated[float, Field(gt=0.0)] = 1.0
    """Cost of a good part that is rejected."""
    cost_review: NonNegative = 0.3
    """Cost of a part that an operator looks at; parts in doubt go there where that is cheaper than to err."""
    corruptions: Flag = False
    """Evaluate the test split also under blur, noise, exposure, defocus and JPEG compression."""


class Config(RunConfig):
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _one_class_is_of_good_parts(self) -> Self:
        if self.task.mode == "one_class" and self.data.target == "classes":
            raise ValueError(
                "task.mode is one_class, but data.target is classes: good parts alone tell good from defective. Set "
                "data.target to defective, or task.mode to auto"
            )
        return self

    @model_validator(mode="after")
    def _the_metric_is_of_the_target(self) -> Self:
        target, metric = self.data.target, self.eval.metric
        other = {("classes", "f1"): "macro_f1", ("defective", "macro_f1"): "f1"}.get((target, str(metric)))
        if other is not None:
            raise ValueError(
                f"eval.metric is {metric}, but data.target is {target}, of which it is not measured: set eval.metric "
                f"to {other}, or data.target to {'defective' if target == 'classes' else 'classes'}"
            )
        return self

    @model_validator(mode="after")
    def _classes_are_not_defective(self) -> Self:
        for key, why in _OF_DEFECTIVE.items():
            group, name = key.split(".")
            section = getattr(self, group)
            value, default = getattr(section, name), type(section).model_fields[name].default
            if self.data.target == "classes" and value != default:
                raise ValueError(
                    f"{key} is {value}, but data.target is classes: {why}. Set data.target to defective, or {key} to "
                    f"{'null' if default is None else default}"
                )
        return self
