"""Grouped convolutions and their weight gradients as Pallas kernels for TPUs: for which there is one."""

from collections.abc import Sequence

import jax.numpy as jnp

from epsanet_jax.ops import pallas_convolve, pallas_weights
from epsanet_jax.ops.pallas_convolve import convolve
from epsanet_jax.ops.pallas_weights import weight_gradient
from epsanet_jax.ops.plain import Window

__all__ = ['applies', 'convolve', 'weight_gradient']

DTYPES = ('bfloat16', 'float32')
SMALLEST = 14  # rows and columns of outputs; for fewer, XLA's own convolutions with groups are as fast
FEWEST = 32  # outputs; for fewer, XLA's own convolutions without groups are as fast


def applies(
    direction: str,
    shape: Sequence[int],
    dtype: jnp.dtype,
    kernel: Sequence[int],
    window: Window,
    groups: int,
) -> bool:
    """Returns whether there is a kernel for images [N, H, W, C] and a convolution [kh, kw, I, C_out].

    The convolution needs an odd square kernel larger than 1x1, its usual padding, dilation 1, and channels
    in whole registers. All of an image, and what is kept beside it, must fit into the chip's memory. Weight
    gradients need more than one group. Where XLA's own takes no longer by its schedule on a v5e
    there is no kernel: for input gradients, `SMALLEST` and `FEWEST`.
    """
    size, stride = kernel[0], window.strides[0]
    if dtype.name not in DTYPES or not all(isinstance(n, int) and n for n in shape):
        return False
    if kernel[0] != kernel[1] or size % 2 == 0 or size == 1:
        return False
    half = size // 2, size // 2
    if window != Window((stride, stride), (half, half)):
        return False
    if direction == 'weight_gradient':
        return pallas_weights.fits(shape, dtype.itemsize, kernel, groups, stride)
    gains = kernel[3] >= FEWEST if groups == 1 else min(window.outputs(shape[1:3], kernel)) >= SMALLEST
    return direction == 'forward' and gains and pallas_convolve.fits(shape, dtype, kernel, groups, stride)
