"""The paper's block: Pyramid Split Attention (arXiv 2105.14447, section 3)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.models.conv import Conv
from epsanet_jax.models.dtypes import Dtype, at_least_float32
from epsanet_jax.models.norm import Weighted
from epsanet_jax.ops import pyramid_conv


class SEWeightModule(nn.Module):
    """Squeeze-and-excitation weights: one number in (0, 1) for each image and channel.

    Attributes:
        channels: of the input.
        reduction: the hidden layer has `channels // reduction` units.
        dtype: of the computation; at least float32, since there is next to nothing to compute.
        param_dtype: of the parameters.
    """

    channels: int
    reduction: int = 16
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    def setup(self):
        hidden = self.channels // self.reduction
        if hidden < 1:
            raise InputError(
                f'SEWeightModule: {self.channels} channels / reduction {self.reduction} leave no hidden unit'
            )
        dtypes = {'dtype': at_least_float32(self.dtype), 'param_dtype': self.param_dtype}
        self.fc1 = Conv(hidden, 1, use_bias=True, **dtypes)
        self.fc2 = Conv(self.channels, 1, use_bias=True, **dtypes)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, H, W, C] to weights [N, 1, 1, C]."""
        wide = at_least_float32(x.dtype)
        return self.excite(x.mean(axis=(1, 2), keepdims=True, dtype=wide))

    def excite(self, means: jax.Array) -> jax.Array:
        """Maps channel means [N, A, B, C] to weights of the same shape, each position on its own."""
        return nn.sigmoid(self.fc2(nn.relu(self.fc1(means))))


class PSAModule(nn.Module):
    """A pyramid of grouped convolutions, weighted against each other channel by channel.

    S convolutions (S = 4 in the paper) of growing kernel size each read ALL input channels and give
    planes / S. One squeeze-and-excitation module, shared by the branches, weighs the channels of each; a
    softmax over the branches turns its sigmoids into attention. The weighted branches are concatenated in
    REVERSE order, largest kernel first, as the reference does.

    Raises InputError if the planes do not divide among the branches.

    The attention is sown as 'attention' into 'intermediates': [N, S, planes / S], in the order of `kernels`.

    Attributes:
        planes: number of output channels.
        stride: of every branch.
        kernels: kernel size of each branch.
        groups: number of groups of each branch.
        reduction: of the squeeze-and-excitation module.
        use_bias: whether the branches have biases (the paper's listing; the reference repository has none).
        dilation: of every branch.
        conv: algorithm, see `epsanet_jax.ops.grouped_conv`.
        dtype: of the computation and the result.
        param_dtype: of the parameters.
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
                f'PSAModule: {self.planes} planes do not divide among {len(self.kernels)} branches'
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
        """Returns the branches and their attention, for a BatchNorm that need not see their product."""
        convs = [getattr(self, f'conv_{i + 1}') for i in range(len(self.kernels))]
        outputs = pyramid_conv(
            x.astype(self.dtype),
            [conv.parameters(x.shape[-1])[0] for conv in convs],
            groups=self.groups,
            stride=self.stride,
            dilation=self.dilation,
            algorithm=self.conv,
        )
        # Called all the same, so that whoever intercepts or captures calls of modules sees every branch.
        branches = [conv(x, convolved=y) for conv, y in zip(convs, outputs, strict=True)]
        wide = at_least_float32(self.dtype)
        means = jnp.stack([b.mean(axis=(1, 2), dtype=wide) for b in branches], axis=1)  # [N, S, C]
        weights = self.se.excite(means[:, :, None, :])[:, :, 0, :]  # [N, S, C]
        attention = nn.softmax(weights, axis=1)  # [N, S, C]
        self.sow('intermediates', 'attention', attention)
        means, attention = (lax.collapse(a[:, ::-1], 1) for a in (means, attention))
        return Weighted(tuple(branches[::-1]), means, attention)
