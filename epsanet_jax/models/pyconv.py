"""PyConvResNet and PyConvHGResNet (arXiv 2006.11538): pyramids without attention, one for each stage."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.models.block import EPSABlock, Norm, dtypes_of
from epsanet_jax.models.conv import Conv, branches
from epsanet_jax.models.dtypes import Dtype
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.pool import max_pool
from epsanet_jax.models.settings import pyconv_widths, pyramid_of


class PyConv(nn.Module):
    """A pyramid of grouped convolutions of growing kernel size, concatenated in this order.

    Each branch reads ALL input channels. `models.settings.pyconv_widths` gives their output channels.

    Attributes:
        planes: number of output channels.
        stride: step of every branch in both directions.
        kernels: kernel size of each branch.
        groups: number of groups of each branch.
        use_bias: whether the branches have biases.
        dilation: distance in pixels between neighbouring values of each kernel.
        conv: convolution algorithm, see `epsanet_jax.ops.grouped_conv`.
        dtype: type of the computation and the result.
        param_dtype: type of the parameters.
    """

    planes: int
    stride: int = 1
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    groups: tuple[int, ...] = (1, 4, 8, 16)
    use_bias: bool = False
    dilation: int = 1
    conv: str = 'auto'
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        widths = pyconv_widths(self.planes, len(self.kernels))
        dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        branch = functools.partial(Conv, stride=self.stride, dilation=self.dilation, conv=self.conv, **dtypes)
        for i, (width, kernel, groups) in enumerate(zip(widths, self.kernels, self.groups, strict=True)):
            setattr(self, f'conv2_{i + 1}', branch(width, kernel, groups=groups, use_bias=self.use_bias))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes]."""
        convs = [getattr(self, f'conv2_{i + 1}') for i in range(len(self.kernels))]
        return jnp.concatenate(branches(convs, x), axis=-1)


class PyConvBlock(EPSABlock):
    """A bottleneck block with a `PyConv`, or with one convolution where the pyramid has one branch.

    A shortcut that is not the identity is max-pooled, then a 1x1 conv without stride and BatchNorm.
    """

    middle: str = 'pyconv'

    def make_conv2(self, conv: Callable[..., Any]) -> nn.Module:
        """Returns the convolutions in the middle of the block."""
        s, (kernels, groups) = self.settings, pyramid_of(self.settings, 0)
        options: dict[str, Any] = {'stride': self.stride, 'dilation': self.dilation}
        if len(kernels) == 1:
            return conv(self.planes, kernels[0], groups=groups[0], **options)
        options |= {'use_bias': self.folded, 'conv': s.conv, **dtypes_of(s)}
        return PyConv(self.planes, kernels=kernels, groups=groups, **options)

    def make_downsample(self, conv: Callable[..., Any], norm: Callable[[], Norm]) -> None:
        """Creates the modules of a shortcut that is not the identity."""
        self.downsample_1, self.downsample_2 = conv(self.planes * self.settings.expansion, 1), norm()

    def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes * expansion]."""
        if not self.downsample:
            return x
        x = max_pool(x) if self.stride == 2 else x
        return self.downsample_2(self.downsample_1(x), train)


class PyConvResNet(EPSANet):
    """The network; `epsanet_jax.create_model` creates the published variants.

    The stem has no max-pooling; instead the first block of every stage, the first one too, has stride 2.
    """

    middle: str = 'pyconv'

    block_type: ClassVar[type[EPSABlock]] = PyConvBlock
    pools_stem: ClassVar[bool] = False
