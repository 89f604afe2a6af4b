"""The paper's block: Pyramid Split Attention (arXiv 2105.14447, section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.models.conv import Conv, branches
from epsanet_jax.models.dtypes import Dtype, at_least_float32
from epsanet_jax.models.norm import Weighted


class SEWeightModule(nn.Module):
    """Squeeze-and-excitation weights: one number in (0, 1) for each image and channel.

    Attributes:
        channels: number of input channels.
        reduction: divisor that gives the `channels // reduction` units of the hidden layer.
        dtype: type of the computation; float32 is used instead of narrower types, because it is cheap here.
        param_dtype: type of the parameters.
    """

    channels: int
    reduction: int = 16
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        hidden = self.channels // self.reduction
        if hidden < 1:
            raise InputError(
                f'SEWeightModule: {self.channels} channels / reduction {self.reduction} leaves no hidden unit'
            )
        dtypes = {'dtype': at_least_float32(self.dtype), 'param_dtype': self.param_dtype}
        self.fc1 = Conv(hidden, 1, use_bias=True, **dtypes)
        self.fc2 = Conv(self.channels, 1, use_bias=True, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to weights [N, 1, 1, C]."""
        wide = at_least_float32(x.dtype)
        return self.excite(x.mean(axis=(1, 2), keepdims=True, dtype=wide))

    def excite(self, means: jax.Array) -> jax.Array:
        """Maps channel means [N, A, B, C] to weights of the same shape, separately for each position."""
        return nn.sigmoid(self.fc2(nn.relu(self.fc1(means))))


class PSAModule(nn.Module):
    """A pyramid of grouped convolutions with attention over its branches in each channel.

    S convolutions (S = 4 in the paper) of growing kernel size each read ALL input channels and produce
    planes / S channels. One squeeze-and-excitation module, shared by the branches, gives a sigmoid weight to
    each channel of each branch. A softmax over the branches turns these weights into attention. The weighted
    branches are concatenated in REVERSE order, largest kernel first, as in the reference.

    Raises InputError if the number of planes is not a multiple of the number of branches.

    The attention is sown as 'attention' into 'intermediates': [N, S, planes / S], in the order of `kernels`.

    Attributes:
        planes: number of output channels.
        stride: step of every branch in both directions.
        kernels: kernel size of each branch.
        groups: number of groups of each branch.
        reduction: reduction of the squeeze-and-excitation module.
        use_bias: whether the branches have biases (as in the paper's listing; the reference repository has
            none).
        dilation: distance in pixels between neighbouring values of each kernel.
        conv: convolution algorithm, see `epsanet_jax.ops.grouped_conv`.
        dtype: type of the computation and the result.
        param_dtype: type of the parameters.
    """

    planes: int
    stride: int = 1
    kernels: tuple[int, ...] = (3, 5, 7, 9)
    groups: tuple[int, ...] = (1, 4, 8, 16)
    reduction: int = 16
    use_bias: bool = False
    dilation: int = 1
    conv: str = 'auto'
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        if self.planes % len(self.kernels):
            raise InputError(
                f'PSAModule: planes must be a multiple of the {len(self.kernels)} branches, got {self.planes}'
            )
        width = self.planes // len(self.kernels)
        dtypes = {'dtype': self.dtype, 'param_dtype': self.param_dtype}
        for i, (kernel, groups) in enumerate(zip(self.kernels, self.groups, strict=True), start=1):
            branch = Conv(
                width,
                kernel,
                stride=self.stride,
                groups=groups,
                dilation=self.dilation,
                use_bias=self.use_bias,
                conv=self.conv,
                **dtypes,
            )
            setattr(self, f'conv_{i}', branch)
        self.se = SEWeightModule(width, self.reduction, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to [N, ceil(H / stride), ceil(W / stride), planes]."""
        return self.weighted(x).value()

    def weighted(self, x: jax.Array) -> Weighted:
        """Returns the branches and their attention, for a BatchNorm that does not need their product."""
        outputs = branches([getattr(self, f'conv_{i + 1}') for i in range(len(self.kernels))], x)
        wide = at_least_float32(self.dtype)
        means = jnp.stack([y.mean(axis=(1, 2), dtype=wide) for y in outputs], axis=1)  # [N, S, C]
        weights = self.se.excite(means[:, :, None, :])[:, :, 0, :]  # [N, S, C]
        attention = nn.softmax(weights, axis=1)  # [N, S, C]
        self.sow('intermediates', 'attention', attention)
        means, attention = (lax.collapse(a[:, ::-1], 1) for a in (means, attention))
        return Weighted(tuple(outputs[::-1]), means, attention)
