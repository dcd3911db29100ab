"""The own networks of defect detection: what they give, what it depends on, where the toolkit finds their blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dist_train.blocks import checkpoint_activations, repeated_blocks
from recipes.defect_detection.networks import build_backbone

KINDS = ["resnet", "convnext"]
WIDTHS, DEPTHS = [8, 12, 16], [1, 2, 1]


def _backbone(kind: str, stem_stride: int = 2, drop_path: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone(kind, 1, WIDTHS, DEPTHS, stem_stride, drop_path)


def _trained(kind: str) -> nn.Module:
    """A network whose blocks all add something, as after some steps: at first those of a ResNet are their shortcuts."""
    network = _backbone(kind)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def _images(rows: int = 3, height: int = 37, width: int = 50) -> Tensor:
    return torch.randn(rows, 1, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_features_have_the_stated_channels_and_stride_at_any_size(kind: str, stem_stride: int) -> None:
    network = _backbone(kind, stem_stride)
    assert network.out_channels == 16
    assert network.stride == 4 * stem_stride
    for height, width in [(37, 50), (64, 32), (16, 16)]:
        expected = (3, 16, math.ceil(height / network.stride), math.ceil(width / network.stride))
        assert network(_images(3, height, width)).shape == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stem_stride", [1, 2, 4])
def test_a_feature_looks_at_the_pixels_around_its_stated_middle(kind: str, stem_stride: int) -> None:
    network = _backbone(kind, stem_stride)
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.GroupNorm):  # which looks at the whole image
            network.set_submodule(name, nn.Identity())
        if name.endswith("conv_out"):
            nn.init.ones_(module.gain)
    images = torch.rand(1, 1, 400, 400, requires_grad=True)
    place = 200 // network.stride
    features = network(images)[0, :, place, place]
    (gradient,) = torch.autograd.grad((features * torch.randn_like(features)).sum(), images)
    seen = gradient[0, 0].abs().sum(1).nonzero()
    assert (seen.min() + seen.max() + 1).item() / 2 == network.middle + place * network.stride


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_a_function_of_torchs_seed(kind: str) -> None:
    one, same, other = (list(_backbone(kind, seed=seed).parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(left, right) for left, right in zip(one, same, strict=True))
    assert not all(torch.equal(left, right) for left, right in zip(one, other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_features_of_an_image_do_not_depend_on_its_batch_even_in_training(kind: str) -> None:
    network, images = _trained(kind).train(), _images()
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]))


@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_found_and_checkpointing_changes_no_gradient(kind: str) -> None:
    network, images = _trained(kind), _images()

    def gradients() -> list[Tensor]:
        torch.manual_seed(2)
        return list(torch.autograd.grad(network(images).square().mean(), list(network.parameters())))

    plain = gradients()
    assert len(repeated_blocks(network)) == sum(DEPTHS)
    assert checkpoint_activations(network) == sum(DEPTHS)
    for left, right in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_paths_skip_whole_images_in_training_alone(kind: str) -> None:
    torch.manual_seed(0)
    network, images = build_backbone(kind, 1, [8], [2], 2, drop_path=0.5), _images(1).expand(32, -1, -1, -1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rounded = (network(images).detach() * 1e3).round().flatten(1)
    assert len(torch.unique(rounded, dim=0)) == 2  # the first block is never dropped, the last with one half
    assert len(torch.unique((network.eval()(images).detach() * 1e3).round().flatten(1), dim=0)) == 1


def test_resnet_filters_ignore_the_scale_and_the_mean_of_their_weights() -> None:
    network, images = _trained("resnet"), _images()
    before = network(images)
    with torch.no_grad():
        weight = network.get_parameter("blocks.0.conv_out.weight")
        weight.mul_(3.0).add_(1.0)
    torch.testing.assert_close(network(images), before, rtol=1e-3, atol=1e-3)


def test_the_size_l_of_convnext_can_be_expressed() -> None:
    with torch.device("meta"):
        network = build_backbone("convnext", 3, [192, 384, 768, 1536], [3, 3, 27, 3], 4)
    assert network.stride == 32
    assert len(repeated_blocks(network)) == 36
    assert 195e6 < sum(parameter.numel() for parameter in network.parameters()) < 198e6
