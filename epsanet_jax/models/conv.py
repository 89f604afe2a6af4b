"""Convolution and linear layers with the reference's initialisation."""

import math
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from epsanet_jax.models.dtypes import Dtype
from epsanet_jax.ops import grouped_conv, pyramid_conv


def conv_kernel_init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """Returns a kernel drawn from N(0, sqrt(2 / (k * k * C_out))); C_out is not divided by the groups.

    Args:
        key: random key.
        shape: [k, k, C_in / groups, C_out].
        dtype: type of the result.
    """
    std = math.sqrt(2.0 / (shape[0] * shape[1] * shape[3]))
    return jax.random.normal(key, shape, dtype) * jnp.asarray(std, dtype)


def uniform_init(fan_in: int):
    """Returns PyTorch's initialiser of biases and linear weights: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
    bound = 1.0 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


class Conv(nn.Module):
    """A 2-D convolution with `dilation * (kernel_size // 2)` zeros of padding on every side.

    Attributes:
        features: number of output channels.
        kernel_size: height and width of the kernel, an odd number.
        stride: step in both directions.
        groups: number of groups.
        dilation: distance in pixels between neighbouring values of the kernel.
        use_bias: whether to add a bias.
        conv: convolution algorithm, see `epsanet_jax.ops.grouped_conv`.
        dtype: type of the computation and the result.
        param_dtype: type of the parameters.
    """

    features: int
    kernel_size: int
    stride: int = 1
    groups: int = 1
    dilation: int = 1
    use_bias: bool = False
    conv: str = 'auto'
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def parameters(self, channels: int) -> tuple[jax.Array, jax.Array | None]:
        """Returns the kernel, [k, k, channels / groups, features], and the bias, [features]."""
        inputs, k = channels // self.groups, self.kernel_size
        kernel = self.param('kernel', conv_kernel_init, (k, k, inputs, self.features), self.param_dtype)
        bias = None
        if self.use_bias:
            bias = self.param('bias', uniform_init(inputs * k * k), (self.features,), self.param_dtype)
            bias = bias.astype(self.dtype)
        return kernel.astype(self.dtype), bias

    def __call__(self, x: jax.Array, *, convolved: jax.Array | None = None) -> jax.Array:
        """Maps [N, H, W, C_in] to [N, ceil(H / stride), ceil(W / stride), features].

        Args:
            x: images.
            convolved: x convolved with the kernel, if that was already computed together with other branches.
        """
        kernel, bias = self.parameters(x.shape[-1])
        if convolved is None:
            convolved = grouped_conv(
                x.astype(self.dtype),
                kernel,
                stride=self.stride,
                groups=self.groups,
                dilation=self.dilation,
                algorithm=self.conv,
            )
        return convolved if bias is None else convolved + bias[None, None, None]


def branches(convs: Sequence[Conv], x: jax.Array) -> list[jax.Array]:
    """Applies convolutions that differ only in kernel size, groups and features to the same images.

    Args:
        convs: the convolutions.
        x: images, [N, H, W, C_in].

    Returns:
        [N, ceil(H / stride), ceil(W / stride), features] of each convolution.
    """
    first = convs[0]
    outputs = pyramid_conv(
        x.astype(first.dtype),
        [conv.parameters(x.shape[-1])[0] for conv in convs],
        groups=[conv.groups for conv in convs],
        stride=first.stride,
        dilation=first.dilation,
        algorithm=first.conv,
    )
    # Call each module too, so that code that intercepts or captures module calls sees every branch.
    return [conv(x, convolved=y) for conv, y in zip(convs, outputs, strict=True)]


class Linear(nn.Module):
    """A linear layer with PyTorch's default initialisation.

    Attributes:
        features: number of outputs.
        dtype: type of the computation and the result.
        param_dtype: type of the parameters.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [N, C] to [N, features]."""
        init = uniform_init(x.shape[-1])
        kernel = self.param('kernel', init, (x.shape[-1], self.features), self.param_dtype)
        bias = self.param('bias', init, (self.features,), self.param_dtype)
        return x.astype(self.dtype) @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]
