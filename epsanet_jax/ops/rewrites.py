"""The convolutions that `algorithms` uses: each equals a plain convolution, in a form that runs faster.

Kernels have the shape [kh, kw, I, B, O]: B groups, each with I input and O output channels.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.ops import by_group
from epsanet_jax.ops.plain import Window, conv, pad

Phases = Mapping[tuple[int, int], jax.Array]  # (first row, first column) -> every stride-th row and column


def stock(x: jax.Array, kernel: jax.Array, window: Window, groups: int) -> jax.Array:
    """Convolves by XLA's own lowering."""
    return conv(x, kernel, window.strides, window.padding, groups, window.dilation)


def matmul(x: jax.Array, kernel: jax.Array, window: Window, groups: int) -> jax.Array:
    """Convolves with a 1x1 kernel by a matrix product for each group."""
    (rows, columns), outputs = window.strides, kernel.shape[3]
    x = pad(x, ((0, 0), *window.padding, (0, 0)))[:, ::rows, ::columns]
    n, h, w, inputs = x.shape
    parts = jnp.split(x.reshape(n * h * w, inputs), groups, axis=1)
    kernels = jnp.split(kernel[0, 0], groups, axis=1)
    products = [part @ k for part, k in zip(parts, kernels, strict=True)]
    y = products[0] if groups == 1 else jnp.concatenate(products, axis=1)
    return y.reshape(n, h, w, outputs)


def without_dilation(
    x: jax.Array, kernel: jax.Array, window: Window, convolve: Callable[[jax.Array, Window], jax.Array]
) -> jax.Array:
    """Convolves with a dilated kernel by convolving more and smaller images without dilation.

    Outputs whose distance is the dilation read the same rows and columns: every d-th. These become images of
    their own.

    Args:
        x: images, [N, H, W, C].
        kernel: [kh, kw, ..].
        window: with any dilation.
        convolve: function that convolves the new images with the kernel and a window without dilation.
    """
    n, h, w, channels = x.shape
    out = window.outputs((h, w), kernel.shape)
    steps = [d // math.gcd(s, d) for s, d in zip(window.strides, window.dilation, strict=True)]
    strides = [s // math.gcd(s, d) for s, d in zip(window.strides, window.dilation, strict=True)]
    counts = [-(-size // step) for size, step in zip(out, steps, strict=True)]
    lengths = [(c - 1) * s + k for c, s, k in zip(counts, strides, kernel.shape[:2], strict=True)]
    padding = []
    for axis, (low, _) in enumerate(window.padding):
        last = (steps[axis] - 1) * window.strides[axis] + (lengths[axis] - 1) * window.dilation[axis]
        padding.append((low, last + 1 - low - x.shape[1 + axis]))
    x = pad(x, ((0, 0), *padding, (0, 0)))
    for axis in (0, 1):
        x = jnp.stack(
            [
                lax.slice_in_dim(x, i * s, i * s + (length - 1) * d + 1, d, axis=1 + 2 * axis)
                for s, d, length in [(window.strides[axis], window.dilation[axis], lengths[axis])]
                for i in range(steps[axis])
            ],
            axis=1 + 2 * axis,
        )  # [N, steps, rows, W, C], then [N, steps, rows, steps, columns, C]
    x = x.transpose(0, 1, 3, 2, 4, 5).reshape(n * steps[0] * steps[1], *lengths, channels)
    y = convolve(x, Window((strides[0], strides[1])))
    y = y.reshape(n, *steps, *counts, y.shape[3]).transpose(0, 3, 1, 4, 2, 5)
    return y.reshape(n, counts[0] * steps[0], counts[1] * steps[1], -1)[:, : out[0], : out[1]]


def merge_groups(kernel: jax.Array, groups: int, count: int) -> jax.Array:
    """Makes block-diagonal kernels [kh, kw, count * I, B, C_out / B] from [kh, kw, I, C_out].

    Args:
        kernel: of a convolution with groups.
        groups: their number.
        count: number of neighbouring groups in each of the B merged ones.
    """
    kh, kw, inputs, outputs = kernel.shape
    each = outputs // groups
    if count == 1:
        return kernel.reshape(kh, kw, inputs, groups, each)
    # `where` instead of a product with 0: an infinite weight must not put NaN into other groups.
    zero = jnp.zeros((), kernel.dtype)
    if count == groups:  # here the form below makes weight gradients four times as slow on a TPU
        k = kernel.reshape(kh, kw, inputs, groups, 1, each).transpose(0, 1, 3, 2, 4, 5)
        same_group = jnp.eye(groups, dtype=bool)[:, None, :, None]  # [groups, 1, groups, 1]
        return jnp.where(same_group, k, zero).reshape(kh, kw, groups * inputs, 1, outputs)
    member = np.arange(outputs) // each % count  # [C_out]: place of the output's group in its merged group
    k = jnp.concatenate([jnp.where(member == i, kernel, zero) for i in range(count)], axis=2)
    return k.reshape(kh, kw, count * inputs, groups // count, count * each)


def merged(x: jax.Array, kernels: jax.Array, window: Window, split: bool) -> jax.Array:
    """Convolves with merged kernels: by one convolution or, with `split`, by one for each group."""
    kh, kw, inputs, blocks, outputs = kernels.shape
    if not split:
        kernel = kernels.reshape(kh, kw, inputs, blocks * outputs)
        return conv(x, kernel, window.strides, window.padding, blocks, window.dilation)
    return by_group.conv(x, kernels, window)


def split_phases(x: jax.Array, strides: tuple[int, int]) -> Phases:
    """Returns the images with every stride-th row and column, by the first row and column."""
    _, h, w, _ = x.shape
    rows, columns = (max(1, min(stride, size)) for stride, size in zip(strides, (h, w), strict=True))
    firsts = [(a, b) for a in range(rows) for b in range(columns)]
    return {(a, b): x[:, a :: strides[0], b :: strides[1]] for a, b in firsts}


def phases(by_phase: Phases, kernels: jax.Array, window: Window, out: Sequence[int]) -> jax.Array:
    """Convolves the images from `split_phases` and adds the results; `out` has the rows and columns.

    Each result is rounded before the addition, so outputs in bfloat16 have twice the rounding error. Input
    gradients do not, because each input pixel belongs to one phase only.
    """
    kh, kw, inputs, blocks, outputs = kernels.shape
    kernel = kernels.reshape(kh, kw, inputs, blocks * outputs)
    y = None
    for firsts, x in by_phase.items():
        # The kernel's value u meets row i * stride + u - low, which has phase (u - low) % stride.
        each = list(zip(firsts, window.padding, window.strides, strict=True))
        begins = [(low + first) % stride for first, (low, _), stride in each]
        part = kernel[begins[0] :: window.strides[0], begins[1] :: window.strides[1]]
        if 0 in part.shape[:2]:
            continue
        padding = []
        for axis, (first, (low, _), stride) in enumerate(each):
            before = (low + first - begins[axis]) // stride
            padding.append((before, out[axis] - 1 + part.shape[axis] - before - x.shape[1 + axis]))
        term = conv(x, part, (1, 1), padding, blocks)
        y = term if y is None else y + term
    if y is None:  # no row or no column of the kernel meets the images
        images = next(iter(by_phase.values())).shape[0]
        return jnp.zeros((images, *out, blocks * outputs), kernels.dtype)
    return y


def bands(size: int, stride: int, low: int, columns: int) -> tuple[int, int]:
    """Returns how many bands to the left and to the right the outputs of a band read, in `banded`.

    Args:
        size: width of the kernel.
        stride: columns between two outputs.
        low: columns of padding on the left.
        columns: columns of outputs in a band.
    """
    step = columns * stride
    return max(0, -(-low // step)), max(0, (size - 1 - low + step - stride) // step)


def banded(x: jax.Array, kernel: jax.Array, window: Window, columns: int) -> jax.Array:
    """Convolves with [kh, kw, C_in, C_out], computing `columns` columns of outputs at once as channels.

    The kernel becomes [kh, bands that these outputs read, columns * stride * C_in, columns * C_out]. Images
    are copied only if their width is not a multiple of the width of a band.
    """
    kh, kw, inputs, outputs = kernel.shape
    n, h, w, _ = x.shape
    out = window.outputs((h, w), kernel.shape)
    (down, stride), (rows, (low, _)) = window.strides, window.padding
    step = columns * stride  # input columns in a band
    before, after = bands(kw, stride, low, columns)
    width = before + 1 + after
    lows = [before * step + j * stride - low for j in range(columns)]
    shifted = [pad(kernel, ((0, 0), (i, width * step - kw - i), (0, 0), (0, 0))) for i in lows]
    kernel = jnp.stack(shifted, axis=3).reshape(kh, width, step * inputs, columns * outputs)
    across = -(-w // step)
    if across * step > w:
        x = pad(x, ((0, 0), (0, 0), (0, across * step - w), (0, 0)))
    x = x.reshape(n, h, across, step * inputs)
    missing = -(-out[1] // columns) - 1 + width - before - across
    y = conv(x, kernel, (down, 1), (rows, (before, missing)))
    return y.reshape(n, y.shape[1], -1, outputs)[:, :, : out[1]]


def tiled(
    x: jax.Array, kernels: jax.Array, window: Window, tile: tuple[int, int], split: bool, fold: bool
) -> jax.Array:
    """Convolves with the stride of a tile: its outputs and, with `fold`, its input pixels are channels."""
    outputs, blocks = kernels.shape[4], kernels.shape[3]
    n, h, w, _ = x.shape
    out = window.outputs((h, w), kernels.shape)
    (rows, columns), step = tile, (tile[0] * window.strides[0], tile[1] * window.strides[1])
    down, across = -(-out[0] // rows), -(-out[1] // columns)  # tiles
    lows = window.padding[0][0], window.padding[1][0]
    kernels = _tile_kernels(kernels, window.strides, tile)
    if fold:
        x, kernels = _fold(x, kernels, lows, step, (down, across))
        step, padding = (1, 1), ((0, 0), (0, 0))
    else:
        kh, kw, inputs = kernels.shape[:3]
        kernels = kernels.reshape(kh, kw, inputs, blocks, -1)
        padding = (
            (lows[0], (down - 1) * step[0] + kh - h - lows[0]),
            (lows[1], (across - 1) * step[1] + kw - w - lows[1]),
        )
    y = merged(x, kernels, Window(step, padding), split)
    y = y.reshape(n, down, across, blocks, columns, rows, outputs).transpose(0, 1, 5, 2, 4, 3, 6)
    y = y.reshape(n, down * rows, across * columns, blocks * outputs)
    return y[:, : out[0], : out[1]]


def _tile_kernels(kernels: jax.Array, strides: tuple[int, int], tile: tuple[int, int]) -> jax.Array:
    """Returns [kh, kw, I, B, columns, rows, O]: the kernel of each tile pixel in the window of the tile."""
    for axis in (0, 1):
        shifted = []
        for i in range(tile[axis]):
            padding = [(0, 0)] * kernels.ndim
            padding[axis] = (i * strides[axis], (tile[axis] - 1 - i) * strides[axis])
            shifted.append(pad(kernels, padding))
        kernels = jnp.stack(shifted, axis=4)
    return kernels


def _fold(x, kernels, lows, step, tiles):
    """Moves the pixels of each input tile into channels, in the images and in the tile kernels."""
    n, h, w, channels = x.shape
    kh, kw, inputs, blocks = kernels.shape[:4]
    th, tw = -(-kh // step[0]), -(-kw // step[1])  # the window, in tiles of the input
    hh, ww = (tiles[0] + th - 1) * step[0], (tiles[1] + tw - 1) * step[1]
    x = pad(x, ((0, 0), (lows[0], hh - h - lows[0]), (lows[1], ww - w - lows[1]), (0, 0)))
    x = x.reshape(n, hh // step[0], step[0], ww // step[1], step[1], channels)
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(n, hh // step[0], ww // step[1], channels * step[0] * step[1])
    k = pad(kernels, ((0, th * step[0] - kh), (0, tw * step[1] - kw), *(((0, 0),) * 5)))
    k = k.reshape(th, step[0], tw, step[1], inputs, blocks, -1).transpose(0, 2, 4, 1, 3, 5, 6)
    return x, k.reshape(th, tw, inputs * step[0] * step[1], blocks, -1)
