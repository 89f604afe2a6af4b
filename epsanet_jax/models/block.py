"""The bottleneck block of EPSANet and ResNet."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.models.conv import Conv
from epsanet_jax.models.norm import Affine, BatchNorm
from epsanet_jax.models.psa import PSAModule, SEWeightModule
from epsanet_jax.models.settings import Settings, pyramid_of
from epsanet_jax.ops.materialize import materialize

Norm = Callable[[Any, bool], jax.Array]  # an activation, or a `Weighted`; training mode


class EPSABlock(nn.Module):
    """A bottleneck block: 1x1 conv, PSA module, 1x1 conv, each with BatchNorm, and a shortcut.

    Attributes:
        planes: width of the bottleneck; the output has planes * settings.expansion channels.
        stride: stride of the PSA module and of the shortcut.
        downsample: whether the shortcut is a 1x1 conv with BatchNorm instead of the identity.
        dilation: dilation of the PSA module.
        settings: options of the network, see `models.settings.Settings`, with the kernels and groups of this
            block.
        middle: 'psa', or 'conv3x3' for the bottleneck of ResNet.
        use_se: whether a squeeze-and-excitation module weights the output of the last convolution.
        bn_axis: mesh axis over which one BatchNorm group is spread, see `EPSANet`.
        folded: whether the block has no BatchNorm, see `EPSANet`.
    """

    planes: int
    stride: int = 1
    downsample: bool = False
    dilation: int = 1
    settings: Settings = Settings()
    middle: str = 'psa'
    use_se: bool = False
    bn_axis: str | None = None
    folded: bool = False

    def setup(self):
        conv, norm = parts(self.settings, self.bn_axis, self.folded)
        width = self.planes * self.settings.expansion
        self.conv1, self.bn1 = conv(self.planes, 1), norm()
        self.conv2 = self.make_conv2(conv)
        self.bn2: Norm = (
            Affine(**dtypes_of(self.settings)) if self.folded and self.middle == 'psa' else norm()
        )
        self.conv3, self.bn3 = conv(width, 1), norm()
        if self.use_se:
            self.se = SEWeightModule(width, self.settings.reduction, **dtypes_of(self.settings))
        if self.downsample:
            self.make_downsample(conv, norm)

    def make_conv2(self, conv: Callable[..., Any]) -> nn.Module:
        """Returns the convolutions in the middle of the block."""
        s = self.settings
        if self.middle != 'psa':
            return conv(self.planes, 3, stride=self.stride, dilation=self.dilation)
        options = {'use_bias': s.psa_bias, 'dilation': self.dilation, 'conv': s.conv, **dtypes_of(s)}
        return PSAModule(self.planes, self.stride, *pyramid_of(s, 0), s.reduction, **options)

    def make_downsample(self, conv: Callable[..., Any], norm: Callable[[], Norm]) -> None:
        """Creates the modules of a shortcut that is not the identity."""
        width = self.planes * self.settings.expansion
        self.downsample_0, self.downsample_1 = conv(width, 1, stride=self.stride), norm()

    def shortcut(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes * expansion]."""
        return self.downsample_1(self.downsample_0(x), train) if self.downsample else x

    def __call__(self, x: jax.Array, train: bool = False, keep: jax.Array | None = None) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes * expansion].

        Args:
            x: activations.
            train: whether BatchNorm normalises by the batch.
            keep: factor of the residual branch of each row, [N], for stochastic depth.
        """
        y = nn.relu(self.bn1(self.conv1(x), train))  # [N, H, W, P]
        y = self.conv2.weighted(y) if self.middle == 'psa' else self.conv2(y)
        y = nn.relu(self.bn2(y, train))  # [N, H/s, W/s, P]
        y = self.bn3(self.conv3(y), train)  # [N, H/s, W/s, P*e]
        if self.use_se:
            y = y * self.se(y).astype(y.dtype)
        if keep is not None:
            y = y * keep.astype(y.dtype)[:, None, None, None]
        return materialize(nn.relu(y + self.shortcut(x, train)))


def dtypes_of(settings: Settings) -> dict[str, Any]:
    """Returns the types of the modules of a network."""
    return {'dtype': jnp.dtype(settings.dtype), 'param_dtype': jnp.dtype(settings.param_dtype)}


def parts(
    settings: Settings, bn_axis: str | None, folded: bool
) -> tuple[Callable[..., Any], Callable[[], Norm]]:
    """Returns the constructors of a network's convolutions and BatchNorms."""
    dtypes = dtypes_of(settings)
    conv = functools.partial(Conv, conv=settings.conv, use_bias=folded, **dtypes)
    if folded:
        return conv, lambda: lambda x, train: x  # the convolution includes it
    options = {'group': settings.bn_group or None, 'frozen': settings.frozen_bn, **dtypes}
    return conv, functools.partial(BatchNorm, axis_name=bn_axis, **options)
