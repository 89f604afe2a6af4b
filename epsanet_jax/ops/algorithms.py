"""Ways to compute a grouped convolution.

XLA's own lowering of a grouped convolution (`feature_group_count`) is at its worst on thin groups with large
kernels, which is what the pyramid of EPSANet consists of. Three things mend that, alone or together:

    merging   Neighbouring groups become one, with a block-diagonal kernel: more products, in fewer and wider
              matrix multiplications.
    tiling    A tile of output pixels is computed at once. Its pixels become output channels, the kernel grows
              to the window that the whole tile sees, and the stride to the size of the tile: a convolution
              with many output channels at few places. A 9x9 kernel and tiles of 4x4 pixels make a 12x12
              kernel with stride 4, 16 times the channels and 1.8 times the products, where merging 16 groups
              takes 16 times the products.
    folding   As tiling, with the tiles of the *input* moved into channels beforehand (space to depth), so
              that the window becomes small and the stride 1.

And where several convolutions read the same input, as the branches of a pyramid do:

    joining   They become one, with as many groups and the largest kernel, into which the others are padded:
              few output channels cost a matrix unit as much as many.

All of them equal the plain convolution up to rounding, in value and in both gradients.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.errors import InputError, suggest


class Algorithm(NamedTuple):
    """How to compute a grouped convolution.

    Attributes:
        name: 'stock', 'merged', 'joint' (alone the same as 'merged'), 'tiled', 'folded', or 'matmul' for 1x1
            kernels.
        merge: how many neighbouring groups are merged into one; divides the number of groups.
        tile: rows and columns of output pixels that are computed at once.
        split: one convolution for each group that remains, instead of one with `feature_group_count`.
    """

    name: str
    merge: int = 1
    tile: tuple[int, int] = (1, 1)
    split: bool = False


NAMES = ('stock', 'merged', 'dense', 'tiled', 'folded', 'matmul')
MERGED_CHANNELS = 64  # below this many input channels a dense convolution leaves vector units idle


def check_name(name: str) -> None:
    """Raises InputError if there is no algorithm of this name."""
    known = ('auto', *NAMES)
    if name not in known:
        raise InputError(
            f'unknown convolution algorithm {name!r}{suggest(name, known)}; known: {", ".join(known)}'
        )


def by_name(name: str, kernel_shape: tuple[int, ...], groups: int) -> Algorithm:
    """Returns the algorithm of a name with the parameters that its idea suggests for a shape.

    stock, and whatever does not apply: one convolution with `feature_group_count = groups`
    merged: neighbouring groups merged until each has `MERGED_CHANNELS` input channels
    dense: all groups merged
    tiled, folded: groups as they are, tiles of 4x4 pixels for the large kernels, of 2x2 for the others
    matmul: a matrix product, for 1x1 kernels

    Args:
        name: one of `NAMES`.
        kernel_shape: [k, k, C_in / groups, C_out].
        groups: of the convolution.
    """
    size, _, channels, _ = kernel_shape
    if name == 'matmul':
        return Algorithm('matmul' if size == 1 and groups == 1 else 'stock')
    if name == 'dense' and groups > 1:
        return Algorithm('merged', groups)
    if name == 'merged' and groups > 1:
        merge = next((m for m in divisors(groups) if m * channels >= MERGED_CHANNELS), groups)
        return Algorithm('merged', merge, split=True)
    if name in ('tiled', 'folded') and size > 1:
        return Algorithm(name, tile=(4, 4) if size >= 7 else (2, 2))
    return Algorithm('stock')


def divisors(n: int) -> list[int]:
    """Returns the divisors of n, smallest first."""
    return [d for d in range(1, n + 1) if n % d == 0]


def convolve_all(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    stride: int,
    groups: Sequence[int],
    algorithms: Sequence[Algorithm],
) -> tuple[jax.Array, ...]:
    """Convolves the same images with each kernel as `convolve` does, in one go where that is 'joint'.

    Args:
        x: images, [N, H, W, C_in].
        kernels: [k, k, C_in / groups, C_out]; k is odd; all three may differ.
        stride: step in both directions, of all.
        groups: number of groups, for each kernel.
        algorithms: how, for each kernel.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out] for each kernel.
    """
    outputs: dict[int, jax.Array] = {}
    joint: dict[int, list[int]] = {}  # by the number of groups left: one convolution has one
    for i, algorithm in enumerate(algorithms):
        if algorithm.name == 'joint':
            joint.setdefault(groups[i] // algorithm.merge, []).append(i)
        else:
            outputs[i] = convolve(x, kernels[i], stride, groups[i], algorithm)
    for members in joint.values():
        merged = [_merge(kernels[i], groups[i], algorithms[i].merge) for i in members]
        outputs.update(zip(members, _joint(x, merged, stride), strict=True))
    return tuple(outputs[i] for i in range(len(kernels)))


def convolve(x: jax.Array, kernel: jax.Array, stride: int, groups: int, algorithm: Algorithm) -> jax.Array:
    """Convolves [N, H, W, C_in] with [k, k, C_in / groups, C_out], `k // 2` zeros on every side.

    Args:
        x: images.
        kernel: k is odd.
        stride: step in both directions.
        groups: number of groups.
        algorithm: how; the result does not depend on it, but for rounding.

    Returns:
        [N, ceil(H / stride), ceil(W / stride), C_out].
    """
    if algorithm.name == 'matmul':
        return _matmul(x, kernel, stride)
    if algorithm.name == 'stock':
        return _stock(x, kernel, stride, groups)
    kernels = _merge(kernel, groups, algorithm.merge)  # [k, k, I, B, O]
    if algorithm.name in ('merged', 'joint'):
        return _merged(x, kernels, stride, algorithm.split)
    return _tiled(x, kernels, stride, algorithm)


def _stock(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    pad = kernel.shape[0] // 2
    return _conv(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), groups)


def dilated(x: jax.Array, kernel: jax.Array, stride: int, groups: int, dilation: int) -> jax.Array:
    """Convolves with `dilation - 1` zeros between the kernel's values, padding `dilation * (k // 2)`."""
    pad = dilation * (kernel.shape[0] // 2)
    return _conv(x, kernel, (stride, stride), ((pad, pad), (pad, pad)), groups, dilation)


def _matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """A convolution with a 1x1 kernel, as one product of matrices."""
    x = x[:, ::stride, ::stride]
    return (x.reshape(-1, x.shape[-1]) @ kernel[0, 0]).reshape(*x.shape[:-1], -1)


def _conv(x, kernel, strides, padding, groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
        rhs_dilation=(dilation, dilation),
    )


def _conv_groups(x, kernels, strides, padding, split):
    """Convolves with [kh, kw, I, B, O], where input and output channels belong to B groups."""
    kh, kw, inputs, blocks, outputs = kernels.shape
    if not split:
        return _conv(x, kernels.reshape(kh, kw, inputs, blocks * outputs), strides, padding, blocks)
    # Split, not sliced: the gradient of slices would be a sum of padded arrays.
    each = zip(jnp.split(x, blocks, axis=3), jnp.split(kernels, blocks, axis=3), strict=True)
    parts = [_conv(x_i, k_i[:, :, :, 0], strides, padding) for x_i, k_i in each]
    return parts[0] if blocks == 1 else jnp.concatenate(parts, axis=3)


def _merge(kernel: jax.Array, groups: int, merge: int) -> jax.Array:
    """Turns [k, k, I, C_out] into [k, k, merge * I, B, C_out / B], block-diagonal; B is groups / merge."""
    kh, kw, inputs, outputs = kernel.shape
    each = outputs // groups
    if merge == 1:
        return kernel.reshape(kh, kw, inputs, groups, each)
    # Selections, not products: an infinite weight must not put NaN into other groups.
    zero = jnp.zeros((), kernel.dtype)
    if merge == groups:  # the form below makes weight gradients four times as dear on a TPU here
        k = kernel.reshape(kh, kw, inputs, groups, 1, each).transpose(0, 1, 3, 2, 4, 5)
        same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
        return jnp.where(same_group, k, zero).reshape(kh, kw, groups * inputs, 1, outputs)
    member = np.arange(outputs) // each % merge  # which of the groups that become one an output is of
    k = jnp.concatenate([jnp.where(member == i, kernel, zero) for i in range(merge)], axis=2)
    return k.reshape(kh, kw, merge * inputs, groups // merge, merge * each)


def _merged(x, kernels, stride, split):
    size = kernels.shape[0]
    pad = size // 2
    _, h, w, _ = x.shape
    # XLA's fast path on the CPU wants a kernel no larger than the image, for the gradient as well.
    grown = max(h, size), max(w, size)
    if split and grown != (h, w):
        x = jnp.pad(x, ((0, 0), (0, grown[0] - h), (0, grown[1] - w), (0, 0)))
    y = _conv_groups(x, kernels, (stride, stride), ((pad, pad), (pad, pad)), split)
    return y[:, : -(-h // stride), : -(-w // stride)]


def _joint(x, kernels, stride):
    """Convolves with each of [k, k, I, B, O], the k and the O of each its own, in one convolution."""
    size = max(k.shape[0] for k in kernels)
    blocks, widths = kernels[0].shape[3], [k.shape[4] for k in kernels]
    margins = [(size - k.shape[0]) // 2 for k in kernels]
    padded = [_pad(k, ((m, m), (m, m), *(((0, 0),) * 3))) for k, m in zip(kernels, margins, strict=True)]
    y = _merged(x, jnp.concatenate(padded, axis=4), stride, split=False)
    y = y.reshape(*y.shape[:3], blocks, sum(widths))
    parts = jnp.split(y, list(itertools.accumulate(widths))[:-1], axis=4)
    return [part.reshape(*y.shape[:3], blocks * width) for part, width in zip(parts, widths, strict=True)]


def _tiled(x, kernels, stride, algorithm):
    size, _, inputs, blocks, outputs = kernels.shape
    n, h, w, _ = x.shape
    pad = size // 2
    (rows, columns), step = algorithm.tile, (algorithm.tile[0] * stride, algorithm.tile[1] * stride)
    down, across = -(-h // (rows * stride)), -(-w // (columns * stride))  # tiles
    kernels = _tile_kernel(_tile_kernel(kernels, 0, rows, stride), 1, columns, stride)
    kh, kw = kernels.shape[:2]
    if algorithm.name == 'tiled':
        kernels = kernels.reshape(kh, kw, inputs, blocks, -1)  # [kh, kw, I, B, columns * rows * O]
        padding = (
            (pad, (down - 1) * step[0] + kh - h - pad),
            (pad, (across - 1) * step[1] + kw - w - pad),
        )
        y = _conv_groups(x, kernels, step, padding, algorithm.split)
    else:
        th, tw = -(-kh // step[0]), -(-kw // step[1])  # the window, in tiles of the input
        hh, ww = (down + th - 1) * step[0], (across + tw - 1) * step[1]
        x = _pad(x, ((0, 0), (pad, hh - h - pad), (pad, ww - w - pad), (0, 0)))
        x = x.reshape(n, hh // step[0], step[0], ww // step[1], step[1], -1)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(n, hh // step[0], ww // step[1], -1)
        k = _pad(kernels, ((0, th * step[0] - kh), (0, tw * step[1] - kw), *(((0, 0),) * 5)))
        k = k.reshape(th, step[0], tw, step[1], inputs, blocks, -1).transpose(0, 2, 4, 1, 3, 5, 6)
        k = k.reshape(th, tw, inputs * step[0] * step[1], blocks, -1)
        y = _conv_groups(x, k, (1, 1), ((0, 0), (0, 0)), algorithm.split)
    y = y.reshape(n, down, across, blocks, columns, rows, outputs).transpose(0, 1, 5, 2, 4, 3, 6)
    y = y.reshape(n, down * rows, across * columns, blocks * outputs)
    return y[:, : -(-h // stride), : -(-w // stride)]


def _tile_kernel(kernels: jax.Array, axis: int, tile: int, stride: int) -> jax.Array:
    """Grows `axis` of [kh, kw, I, B, ...] to the window of a tile, whose pixels become a new axis after B."""
    shifted = []
    for i in range(tile):
        padding = [(0, 0)] * kernels.ndim
        padding[axis] = (i * stride, (tile - 1 - i) * stride)
        shifted.append(_pad(kernels, padding))
    return jnp.stack(shifted, axis=4)


def _pad(x: jax.Array, padding) -> jax.Array:
    """Pads with zeros, or cuts where the padding is negative."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in padding])
