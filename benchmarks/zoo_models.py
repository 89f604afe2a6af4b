"""ResNeXt-50 (32x4d) and ConvNeXt in flax.linen and in PyTorch, for `zoo_nets.py`.

The layers of both have the same names, so that `to_torch` converts the parameters of each network.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import torch
from flax.traverse_util import flatten_dict
from torch.nn import functional

LAYER_SCALE = 0.1  # 1e-6 in the paper, with which a comparison of logits would not notice an error in a block
PARAMETERS = {'kernel': 'weight', 'scale': 'weight', 'mean': 'running_mean', 'var': 'running_var'}


class ResNeXtBlock(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolutions with BatchNorm, and a shortcut."""

    width: int
    features: int
    stride: int
    groups: int
    conv: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        conv = functools.partial(self.conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.9)
        y = nn.relu(norm(name='norm1')(conv(self.width, (1, 1), name='conv1')(x)))
        grouped = {'strides': self.stride, 'padding': 1, 'feature_group_count': self.groups}
        y = nn.relu(norm(name='norm2')(conv(self.width, (3, 3), **grouped, name='conv2')(y)))
        y = norm(name='norm3')(conv(self.features, (1, 1), name='conv3')(y))
        if x.shape != y.shape:
            x = conv(self.features, (1, 1), strides=self.stride, name='conv4')(x)
            x = norm(name='norm4')(x)
        return nn.relu(x + y)


class ResNeXt(nn.Module):
    """ResNeXt; the default is ResNeXt-50 32x4d (arXiv 1611.05431)."""

    conv: type[nn.Module] = nn.Conv
    depths: Sequence[int] = (3, 4, 6, 3)
    planes: int = 64
    groups: int = 32

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = self.conv(self.planes, (7, 7), strides=2, padding=3, use_bias=False, name='stem')(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x))
        x = nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])  # [N, H/4, W/4, C]
        for stage, depth in enumerate(self.depths):
            width = 2 * self.planes * 2**stage
            for i in range(depth):
                stride = 2 if stage and not i else 1
                name = f'block{stage}_{i}'
                x = ResNeXtBlock(width, 2 * width, stride, self.groups, self.conv, name=name)(x, train)
        return nn.Dense(1000, name='head')(x.mean((1, 2)))


class ConvNeXtBlock(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm and two linear layers, with a shortcut."""

    conv: type[nn.Module]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        y = self.conv(channels, (7, 7), padding=3, feature_group_count=channels, name='conv')(x)
        y = nn.Dense(4 * channels, name='expand')(nn.LayerNorm(name='norm')(y))
        y = nn.Dense(channels, name='reduce')(nn.gelu(y, approximate=False))
        return x + y * self.param('layer_scale', nn.initializers.constant(LAYER_SCALE), (channels,))


class ConvNeXt(nn.Module):
    """ConvNeXt (arXiv 2201.03545); the default is ConvNeXt-T."""

    conv: type[nn.Module] = nn.Conv
    depths: Sequence[int] = (3, 3, 9, 3)
    widths: Sequence[int] = (96, 192, 384, 768)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        for stage, (depth, width) in enumerate(zip(self.depths, self.widths, strict=True)):
            size = 2 if stage else 4
            if stage:
                x = nn.LayerNorm(name=f'norm{stage}')(x)
            x = self.conv(width, (size, size), strides=size, padding='VALID', name=f'reduce{stage}')(x)
            if not stage:
                x = nn.LayerNorm(name=f'norm{stage}')(x)
            for i in range(depth):
                x = ConvNeXtBlock(self.conv, name=f'block{stage}_{i}')(x)
        return nn.Dense(1000, name='head')(nn.LayerNorm(name='norm')(x.mean((1, 2))))


MODELS = {
    'resnext50': ResNeXt(),
    'convnext_atto': ConvNeXt(depths=(2, 2, 6, 2), widths=(40, 80, 160, 320)),
    'convnext_tiny': ConvNeXt(),
}


class TorchResNeXtBlock(torch.nn.Module):
    """`ResNeXtBlock` in PyTorch."""

    def __init__(self, inputs: int, width: int, features: int, stride: int, groups: int):
        super().__init__()
        conv = functools.partial(torch.nn.Conv2d, bias=False)
        self.conv1, self.norm1 = conv(inputs, width, 1), torch.nn.BatchNorm2d(width)
        self.conv2 = conv(width, width, 3, stride, padding=1, groups=groups)
        self.norm2 = torch.nn.BatchNorm2d(width)
        self.conv3, self.norm3 = conv(width, features, 1), torch.nn.BatchNorm2d(features)
        self.shortcut = inputs != features or stride != 1
        if self.shortcut:
            self.conv4, self.norm4 = conv(inputs, features, 1, stride), torch.nn.BatchNorm2d(features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = functional.relu(self.norm2(self.conv2(y)))
        y = self.norm3(self.conv3(y))
        return functional.relu(y + (self.norm4(self.conv4(x)) if self.shortcut else x))


class TorchResNeXt(torch.nn.Module):
    """`ResNeXt` in PyTorch."""

    def __init__(self, net: ResNeXt):
        super().__init__()
        self.stem = torch.nn.Conv2d(3, net.planes, 7, 2, padding=3, bias=False)
        self.norm = torch.nn.BatchNorm2d(net.planes)
        self.blocks = []
        inputs = net.planes
        for stage, depth in enumerate(net.depths):
            width = 2 * net.planes * 2**stage
            for i in range(depth):
                stride = 2 if stage and not i else 1
                self.blocks.append(f'block{stage}_{i}')
                block = TorchResNeXtBlock(inputs, width, 2 * width, stride, net.groups)
                self.add_module(self.blocks[-1], block)
                inputs = 2 * width
        self.head = torch.nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(functional.relu(self.norm(self.stem(x))), 3, 2, padding=1)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return self.head(x.mean((2, 3)))


class ChannelNorm(torch.nn.LayerNorm):
    """LayerNorm over the channels of images [N, C, H, W]."""

    def __init__(self, channels: int):
        super().__init__(channels, eps=1e-6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class TorchConvNeXtBlock(torch.nn.Module):
    """`ConvNeXtBlock` in PyTorch."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = torch.nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = torch.nn.LayerNorm(channels, eps=1e-6)
        self.expand = torch.nn.Linear(channels, 4 * channels)
        self.reduce = torch.nn.Linear(4 * channels, channels)
        self.layer_scale = torch.nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(self.conv(x).permute(0, 2, 3, 1))
        y = self.reduce(functional.gelu(self.expand(y))) * self.layer_scale
        return x + y.permute(0, 3, 1, 2)


class TorchConvNeXt(torch.nn.Module):
    """`ConvNeXt` in PyTorch."""

    def __init__(self, net: ConvNeXt):
        super().__init__()
        self.order, inputs = [], 3
        for stage, (depth, width) in enumerate(zip(net.depths, net.widths, strict=True)):
            size = 2 if stage else 4
            layers = {
                f'norm{stage}': ChannelNorm(inputs if stage else width),
                f'reduce{stage}': torch.nn.Conv2d(inputs, width, size, size),
            }
            self.order += list(layers) if stage else reversed(layers)  # the stem convolves first
            layers |= {f'block{stage}_{i}': TorchConvNeXtBlock(width) for i in range(depth)}
            self.order += list(layers)[2:]
            for name, layer in layers.items():
                self.add_module(name, layer)
            inputs = width
        self.norm = torch.nn.LayerNorm(inputs, eps=1e-6)
        self.head = torch.nn.Linear(inputs, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = self.get_submodule(name)(x)
        return self.head(self.norm(x.mean((2, 3))))


def to_torch(net: ResNeXt | ConvNeXt, variables: Any) -> torch.nn.Module:
    """Returns the network in PyTorch with the same parameters and statistics."""
    twin = TorchResNeXt(net) if isinstance(net, ResNeXt) else TorchConvNeXt(net)
    state = {}
    for (_, *path, last), value in flatten_dict(variables).items():
        array = np.array(value)
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[array.ndim]
        state['.'.join((*path, PARAMETERS.get(last, last)))] = torch.from_numpy(array.transpose(axes).copy())
    counters = {name: value for name, value in twin.state_dict().items() if 'num_batches' in name}
    twin.load_state_dict({**counters, **state})
    return twin
