"""EPSANet in PyTorch, all variants, with the reference's state-dict names: the tests compare with it.

Only this module imports torch when it is imported. Other modules import it only when they need it.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from epsanet_jax.models.epsanet import STEM_WIDTH
from epsanet_jax.models.epsanet import EPSANet as JaxEPSANet
from epsanet_jax.models.settings import pyconv_widths, pyramid_of

Ints = tuple[int, ...]


def _conv(inputs: int, outputs: int, kernel: int, stride=1, groups=1, bias=False, dilation=1) -> nn.Conv2d:
    padding = dilation * (kernel // 2)
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups=groups, bias=bias)


class SEWeightModule(nn.Module):
    """Squeeze-and-excitation weights: [N, C, H, W] to [N, C, 1, 1]."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        self.fc1 = _conv(channels, channels // reduction, 1, bias=True)
        self.fc2 = _conv(channels // reduction, channels, 1, bias=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns a weight in (0, 1) for each image and channel."""
        return torch.sigmoid(self.fc2(torch.relu(self.fc1(x.mean(dim=(2, 3), keepdim=True)))))


class PSAModule(nn.Module):
    """Pyramid Split Attention: [N, planes, H, W] to [N, planes, H/stride, W/stride]."""

    def __init__(
        self, planes: int, stride: int, kernels: Ints, groups: Ints, reduction: int, bias=False, dilation=1
    ):
        super().__init__()
        width = planes // len(kernels)
        self.names = [f'conv_{i + 1}' for i in range(len(kernels))]
        for name, kernel, group in zip(self.names, kernels, groups, strict=True):
            self.add_module(name, _conv(planes, width, kernel, stride, group, bias, dilation))
        self.se = SEWeightModule(width, reduction)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Weights the branches by their attention and concatenates them, the last branch first."""
        branches = [self.get_submodule(name)(x) for name in self.names]
        attention = torch.softmax(torch.stack([self.se(b) for b in branches]), dim=0)
        return torch.cat([b * a for b, a in zip(branches, attention, strict=True)][::-1], dim=1)


class PyConv(nn.Module):
    """A pyramid without attention: [N, planes, H, W] to [N, planes, H/stride, W/stride]."""

    def __init__(self, planes: int, stride: int, kernels: Ints, groups: Ints, dilation=1):
        super().__init__()
        widths = pyconv_widths(planes, len(kernels))
        for i, (width, kernel, group) in enumerate(zip(widths, kernels, groups, strict=True)):
            self.add_module(f'conv2_{i + 1}', _conv(planes, width, kernel, stride, group, dilation=dilation))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Concatenates the branches, the first branch first."""
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class EPSABlock(nn.Module):
    """A bottleneck block with a pyramid (or, in a ResNet, a 3x3 convolution) in the middle."""

    def __init__(
        self,
        inputs: int,
        planes: int,
        outputs: int,
        stride: int,
        downsample: bool,
        middle: nn.Module,
        se: nn.Module | None = None,
        pooled: bool = False,
    ):
        super().__init__()
        self.conv1, self.bn1 = _conv(inputs, planes, 1), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = middle, nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = _conv(planes, outputs, 1), nn.BatchNorm2d(outputs)
        self.se = se
        self.downsample = None
        if downsample:
            first = [nn.MaxPool2d(3, stride, padding=1) if stride == 2 else nn.Identity()] if pooled else []
            conv = _conv(inputs, outputs, 1, 1 if pooled else stride)
            self.downsample = nn.Sequential(*first, conv, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps [N, C, H, W] to [N, outputs, H/stride, W/stride]."""
        y = torch.relu(self.bn1(self.conv1(x)))
        y = torch.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.se is not None:
            y = y * self.se(y)
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


def _middle(s: JaxEPSANet, stage: int, stride: int, dilation: int) -> nn.Module:
    planes, (kernels, groups) = s.planes[stage], pyramid_of(s, stage)
    if s.middle == 'psa':
        return PSAModule(planes, stride, kernels, groups, s.reduction, s.psa_bias, dilation)
    if s.middle == 'conv3x3':
        return _conv(planes, planes, 3, stride, dilation=dilation)
    if len(kernels) == 1:
        return _conv(planes, planes, kernels[0], stride, groups[0], dilation=dilation)
    return PyConv(planes, stride, kernels, groups, dilation)


class EPSANet(nn.Module):
    """The PyTorch twin of a JAX model: the same settings, and the `state_dict` names of the reference.

    Args:
        settings: the JAX model, from `epsanet_jax.create_model`.
    """

    def __init__(self, settings: JaxEPSANet):
        super().__init__()
        s = settings
        self.conv1, self.bn1 = _conv(s.in_channels, STEM_WIDTH, 7, 2), nn.BatchNorm2d(STEM_WIDTH)
        self.stages, self.pools_stem = len(s.layers), s.pools_stem
        inputs, reached, dilation = STEM_WIDTH, 4 if s.pools_stem else 2, 1
        for stage, (count, planes) in enumerate(zip(s.layers, s.planes, strict=True)):
            blocks = []
            for i in range(count):
                halves = i == 0 and (stage > 0 or not s.pools_stem)
                kept = halves and s.output_stride < 32 and reached == s.output_stride
                outputs = planes * s.expansion
                stride = 2 if halves and not kept else 1
                reached *= stride
                middle = _middle(s, stage, stride, dilation)
                se = SEWeightModule(outputs, s.reduction) if s.use_se else None
                downsample, pooled = halves or inputs != outputs, s.middle == 'pyconv'
                blocks.append(EPSABlock(inputs, planes, outputs, stride, downsample, middle, se, pooled))
                inputs, dilation = outputs, dilation * (2 if kept else 1)
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, s.num_classes) if s.num_classes else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                k = module.kernel_size[0]
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / (k * k * module.out_channels)))

    def features(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns the activations after the stem and each stage, [N, C, H, W] each."""
        x = torch.relu(self.bn1(self.conv1(images)))
        if self.pools_stem:
            x = nn.functional.max_pool2d(x, 3, 2, padding=1)
        outputs = {'stem': x}
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f'layer{stage}')(x)
            outputs[f'layer{stage}'] = x
        return outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps images [N, 3, H, W] to logits [N, num_classes]."""
        return self.fc(self.features(images)[f'layer{self.stages}'].mean(dim=(2, 3)))


class FromPixels(nn.Module):
    """A network that takes uint8 images and normalises them.

    Args:
        network: maps normalised images [N, 3, H, W] to logits.
        mean: mean of each channel, for values from 0 to 1.
        std: standard deviation of each channel, for values from 0 to 1.
    """

    scale: torch.Tensor
    shift: torch.Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        shift = [m / s for m, s in zip(mean, std, strict=True)]
        self.register_buffer('scale', torch.tensor([1 / (255 * s) for s in std])[:, None, None])
        self.register_buffer('shift', torch.tensor(shift)[:, None, None])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Maps uint8 images [N, 3, H, W] to logits."""
        return self.network(images.float() * self.scale - self.shift)
