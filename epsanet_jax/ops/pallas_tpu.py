"""Grouped convolutions and their gradients as Pallas kernels for TPUs: for which there is one."""

from collections.abc import Sequence

import jax.numpy as jnp

from epsanet_jax.ops import generation, pallas_convolve, pallas_input, pallas_tiles, pallas_weights
from epsanet_jax.ops.pallas_convolve import convolve
from epsanet_jax.ops.pallas_input import input_gradient
from epsanet_jax.ops.pallas_weights import weight_gradients
from epsanet_jax.ops.plain import Window

__all__ = ['convolve', 'input_gradient', 'taken', 'weight_gradients']

DTYPES = ('bfloat16', 'float32')
SHARE = 0.75  # of a core's fast memory (VMEM)
KERNELS = {'forward': pallas_convolve, 'input_gradient': pallas_input, 'weight_gradient': pallas_weights}


def taken(
    direction: str,
    shape: Sequence[int],
    dtype: jnp.dtype,
    kernels: Sequence[Sequence[int]],
    windows: Sequence[Window],
    groups: Sequence[int],
) -> list[int]:
    """Returns which convolutions of the same images [N, H, W, C] are computed by a Pallas kernel.

    A convolution needs an odd square kernel larger than 1x1, its usual padding, dilation 1, a stride not
    larger than the kernel, and channels that fill registers. One kernel computes all of them, so they must
    fit into the chip's memory together. Without groups XLA's own take no longer.

    Args:
        direction: 'forward', 'input_gradient' or 'weight_gradient'.
        shape: of the images.
        dtype: of the images.
        kernels: shapes, [kh, kw, C / groups, C_out].
        windows: of each kernel, with the same strides.
        groups: number of groups of each.
    """
    if dtype.name not in DTYPES or not all(isinstance(n, int) and n for n in shape):
        return []
    each = enumerate(zip(kernels, windows, groups, strict=True))
    found = [i for i, (k, window, g) in each if _is_usual(k, window) and pallas_tiles.exist(shape, k, g)]
    if max((groups[i] for i in found), default=1) == 1:
        return []
    module, stride = KERNELS[direction], windows[0].strides[0]
    some, parts = [kernels[i] for i in found], [groups[i] for i in found]
    plan = pallas_tiles.Plan.of(shape, some, parts, stride, module.HOLDS_TILES)
    arrays = [module.scratch(plan, dtype), *(b.held(dtype) for b in plan.branches)]
    return found if pallas_tiles.nbytes(arrays) <= SHARE * generation.vmem() else []


def _is_usual(kernel: Sequence[int], window: Window) -> bool:
    half, stride = (kernel[0] // 2, kernel[0] // 2), window.strides[0]
    odd = kernel[0] == kernel[1] > 1 and kernel[0] % 2 == 1
    # A stride larger than the kernel leaves images that no output reads.
    return odd and stride <= kernel[0] and window == Window((stride, stride), (half, half))
