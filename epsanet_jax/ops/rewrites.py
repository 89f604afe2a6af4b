"""The convolutions that `algorithms` uses: each equals a plain convolution, in a form that runs faster.

Kernels have the shape [kh, kw, I, B, O]: B groups, each with I input and O output channels.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

Phases = Mapping[tuple[int, int], jax.Array]  # (first row, first column) -> every stride-th row and column


def conv(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    groups: int = 1,
    dilation: int = 1,
) -> jax.Array:
    """Returns XLA's convolution of [N, H, W, C_in] with [kh, kw, C_in / groups, C_out]."""
    return lax.conv_general_dilated(
        x,
        kernel,
        window_strides=strides,
        padding=padding,
        dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        feature_group_count=groups,
        rhs_dilation=(dilation, dilation),
    )


def pad(x: jax.Array, padding: Sequence[tuple[int, int]]) -> jax.Array:
    """Pads with zeros; negative padding crops."""
    return lax.pad(x, jnp.zeros((), x.dtype), [(low, high, 0) for low, high in padding])


def stock(x: jax.Array, kernel: jax.Array, stride: int, groups: int) -> jax.Array:
    """Convolves by XLA's own lowering, with `k // 2` zeros of padding on every side."""
    return dilated(x, kernel, stride, groups, 1)


def dilated(x: jax.Array, kernel: jax.Array, stride: int, groups: int, dilation: int) -> jax.Array:
    """Convolves with a dilated kernel and `dilation * (k // 2)` zeros of padding on every side."""
    margin = dilation * (kernel.shape[0] // 2)
    return conv(x, kernel, (stride, stride), ((margin, margin),) * 2, groups, dilation)


def matmul(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolves with a 1x1 kernel by one matrix product."""
    x = x[:, ::stride, ::stride]
    n, h, w, inputs = x.shape
    return (x.reshape(n * h * w, inputs) @ kernel[0, 0]).reshape(n, h, w, kernel.shape[-1])


def merged(x: jax.Array, kernels: jax.Array, stride: int, split: bool) -> jax.Array:
    """Convolves with merged kernels: by one convolution or, with `split`, by one for each group."""
    size = kernels.shape[0]
    margin = size // 2
    _, h, w, _ = x.shape
    # XLA's fast path on the CPU needs images at least as large as the kernel, for the gradient too.
    grown = max(h, size), max(w, size)
    if split and grown != (h, w):
        x = jnp.pad(x, ((0, 0), (0, grown[0] - h), (0, grown[1] - w), (0, 0)))
    y = _conv_groups(x, kernels, (stride, stride), ((margin, margin),) * 2, split)
    return y[:, : -(-h // stride), : -(-w // stride)]


def split_phases(x: jax.Array, stride: int) -> Phases:
    """Returns the images with every stride-th row and column, by the first row and column."""
    _, h, w, _ = x.shape
    rows, columns = (max(1, min(stride, size)) for size in (h, w))
    firsts = [(a, b) for a in range(rows) for b in range(columns)]
    return {(a, b): x[:, a::stride, b::stride] for a, b in firsts}


def phases(by_phase: Phases, kernels: jax.Array, stride: int) -> jax.Array:
    """Convolves the images from `split_phases` and adds the results.

    Each result is rounded before the addition, so outputs in bfloat16 have twice the rounding error. Input
    gradients do not, because each input pixel belongs to one phase only.
    """
    kh, kw, inputs, blocks, outputs = kernels.shape
    kernel = kernels.reshape(kh, kw, inputs, blocks * outputs)
    out = by_phase[0, 0].shape[1:3]  # ceil(H / stride), ceil(W / stride)
    y = None
    for firsts, x in by_phase.items():
        # The kernel's value u meets row i * stride + u - kh // 2, which has phase (u - kh // 2) % stride.
        begins = [(size // 2 + first) % stride for size, first in zip((kh, kw), firsts, strict=True)]
        part = kernel[begins[0] :: stride, begins[1] :: stride]
        if 0 in part.shape[:2]:
            continue
        padding = []
        for axis, (size, first, begin) in enumerate(zip((kh, kw), firsts, begins, strict=True)):
            low = (size // 2 + first - begin) // stride
            padding.append((low, out[axis] - 1 + part.shape[axis] - low - x.shape[1 + axis]))
        term = conv(x, part, (1, 1), padding, blocks)
        y = term if y is None else y + term
    assert y is not None  # the phase of the first row and column always exists
    return y


def bands(kernel_size: int, stride: int, columns: int) -> tuple[int, int]:
    """Returns how many bands to the left and to the right the outputs of a band read, in `banded`."""
    margin, step = kernel_size // 2, columns * stride
    return -(-margin // step), (kernel_size - 1 - margin + step - stride) // step


def banded(x: jax.Array, kernel: jax.Array, stride: int, columns: int) -> jax.Array:
    """Convolves with [k, k, C_in, C_out], computing `columns` columns of outputs at once as channels.

    The kernel becomes [k, bands that these outputs read, columns * stride * C_in, columns * C_out]. Images
    are copied only if their width is not a multiple of the width of a band.
    """
    size, _, inputs, outputs = kernel.shape
    n, h, w, _ = x.shape
    margin, step = size // 2, columns * stride  # input columns in a band
    before, after = bands(size, stride, columns)
    window = (before + 1 + after) * step
    lows = [before * step + j * stride - margin for j in range(columns)]
    shifted = [pad(kernel, ((0, 0), (low, window - size - low), (0, 0), (0, 0))) for low in lows]
    kernel = jnp.stack(shifted, axis=3).reshape(size, window // step, step * inputs, columns * outputs)
    across = -(-w // step)
    if across * step > w:
        x = pad(x, ((0, 0), (0, 0), (0, across * step - w), (0, 0)))
    x = x.reshape(n, h, across, step * inputs)
    y = conv(x, kernel, (stride, 1), ((margin, margin), (before, after)))
    return y.reshape(n, y.shape[1], across * columns, outputs)[:, :, : -(-w // stride)]


def tiled(
    x: jax.Array, kernels: jax.Array, stride: int, tile: tuple[int, int], split: bool, fold: bool
) -> jax.Array:
    """Convolves with the stride of a tile: its outputs and, with `fold`, its input pixels are channels."""
    size, _, inputs, blocks, outputs = kernels.shape
    n, h, w, _ = x.shape
    margin = size // 2
    (rows, columns), step = tile, (tile[0] * stride, tile[1] * stride)
    down, across = -(-h // step[0]), -(-w // step[1])  # tiles
    kernels = _tile_kernels(kernels, stride, tile)
    if fold:
        x, kernels = _fold(x, kernels, margin, step, (down, across))
        step, padding = (1, 1), ((0, 0), (0, 0))
    else:
        kh, kw = kernels.shape[:2]
        kernels = kernels.reshape(kh, kw, inputs, blocks, -1)
        padding = (
            (margin, (down - 1) * step[0] + kh - h - margin),
            (margin, (across - 1) * step[1] + kw - w - margin),
        )
    y = _conv_groups(x, kernels, step, padding, split)
    y = y.reshape(n, down, across, blocks, columns, rows, outputs).transpose(0, 1, 5, 2, 4, 3, 6)
    y = y.reshape(n, down * rows, across * columns, blocks * outputs)
    return y[:, : -(-h // stride), : -(-w // stride)]


def _tile_kernels(kernels: jax.Array, stride: int, tile: tuple[int, int]) -> jax.Array:
    """Returns [kh, kw, I, B, columns, rows, O]: the kernel of each tile pixel in the window of the tile."""
    for axis in (0, 1):
        shifted = []
        for i in range(tile[axis]):
            padding = [(0, 0)] * kernels.ndim
            padding[axis] = (i * stride, (tile[axis] - 1 - i) * stride)
            shifted.append(pad(kernels, padding))
        kernels = jnp.stack(shifted, axis=4)
    return kernels


def _fold(x, kernels, margin, step, tiles):
    """Moves the pixels of each input tile into channels, in the images and in the tile kernels."""
    n, h, w, channels = x.shape
    kh, kw, inputs, blocks = kernels.shape[:4]
    th, tw = -(-kh // step[0]), -(-kw // step[1])  # the window, in tiles of the input
    hh, ww = (tiles[0] + th - 1) * step[0], (tiles[1] + tw - 1) * step[1]
    x = pad(x, ((0, 0), (margin, hh - h - margin), (margin, ww - w - margin), (0, 0)))
    x = x.reshape(n, hh // step[0], step[0], ww // step[1], step[1], channels)
    x = x.transpose(0, 1, 3, 5, 2, 4).reshape(n, hh // step[0], ww // step[1], channels * step[0] * step[1])
    k = pad(kernels, ((0, th * step[0] - kh), (0, tw * step[1] - kw), *(((0, 0),) * 5)))
    k = k.reshape(th, step[0], tw, step[1], inputs, blocks, -1).transpose(0, 2, 4, 1, 3, 5, 6)
    return x, k.reshape(th, tw, inputs * step[0] * step[1], blocks, -1)


def _conv_groups(x, kernels, strides, padding, split):
    kh, kw, inputs, blocks, outputs = kernels.shape
    if not split:
        return conv(x, kernels.reshape(kh, kw, inputs, blocks * outputs), strides, padding, blocks)
    # `split` instead of slices, whose gradient would be a sum of padded arrays.
    each = zip(jnp.split(x, blocks, axis=3), jnp.split(kernels, blocks, axis=3), strict=True)
    parts = [conv(x_i, k_i[:, :, :, 0], strides, padding) for x_i, k_i in each]
    return parts[0] if blocks == 1 else jnp.concatenate(parts, axis=3)
