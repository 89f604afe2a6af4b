"""Grouped convolutions as plain ones, one group after another, for many groups on a CPU.

In a loop only one convolution has to be compiled, however many groups there are. XLA:CPU computes a
convolution in a loop quickly only if its arrays have the order [N, H, W, C] and [H, W, I, O]. JAX writes
gradients with other orders, so they are written out here, each in its fastest form:

    input gradient   With a stride, pixels that lie a stride apart meet the same values of the kernel. Each
                     phase of the images is a convolution without stride; no inserted zeros are multiplied.
    weight gradient  Each value is a sum over the pixels of all images. XLA:CPU is slow at long sums, so they
                     are taken over one image or a few small ones at a time.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, mlir

from epsanet_jax.ops import plain
from epsanet_jax.ops.materialize import materialize
from epsanet_jax.ops.plain import Window, interleave, pad
from epsanet_jax.ops.primitive import make_primitive

MOST_PHASES = 9  # each is a convolution to compile
NARROW = 16  # up to as many channels XLA:CPU takes vectors of images in a weight gradient
# Values of the outputs' gradient that a weight gradient reads at a time; the cache holds them.
LARGEST = 2**18


def conv(x: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolves images [N, H, W, B * I] with kernels [kh, kw, I, B, O]; returns [N, rows, columns, B * O]."""
    return _conv.bind(x, kernels, window=window)


def _forward(x: jax.Array, kernels: jax.Array, *, window: Window) -> jax.Array:
    inputs, blocks, outputs = kernels.shape[2:]
    out = window.outputs(x.shape[1:3], kernels.shape)

    def group(i: jax.Array | int) -> jax.Array:
        return _plain(_channels(x, i, inputs), _kernel(kernels, i), window)

    return _for_each(blocks, group, lax.full_like(x, 0, shape=(x.shape[0], *out, blocks * outputs)))


class _Phase(NamedTuple):
    """Rows or columns of images that lie a stride apart, and the convolution that gives their gradient."""

    count: int  # number of these rows or columns
    begin: int  # first value of the flipped kernel that they meet; the others follow at steps of the stride
    padding: tuple[int, int]  # of the outputs' gradient


def _phases(size: int, outputs: int, kernel: int, stride: int, dilation: int, low: int) -> list[_Phase]:
    """Returns the phases of one axis; `low` is its padding before the first pixel."""
    phases = []
    count = -(-size // stride)
    for first in range(stride):
        value = (first + low) % stride  # the first one that they meet, of the kernel as it is
        span = (len(range(value, kernel, stride)) - 1) * dilation
        before = span - (first + low) // stride
        phases.append(_Phase(count, (kernel - 1 - value) % stride, (before, count + span - before - outputs)))
    return phases


def _input_gradient(dy: jax.Array, kernels: jax.Array, window: Window, size: Sequence[int]) -> jax.Array:
    """Returns the gradient of images of `size` (H, W) from that of the outputs."""
    inputs, blocks, outputs = kernels.shape[2:]
    flipped = kernels[::-1, ::-1].transpose(0, 1, 4, 3, 2)  # [kh, kw, O, B, I]
    # A phase of a dilated kernel may meet values that lie apart. There, or with many phases, insert zeros.
    many = math.prod(window.strides) > MOST_PHASES
    inserted = [s if d > 1 or many else 1 for s, d in zip(window.strides, window.dilation, strict=True)]
    dy = lax.pad(dy, jnp.zeros((), dy.dtype), [(0, 0, 0), *((0, 0, s - 1) for s in inserted), (0, 0, 0)])
    strides = [s // i for s, i in zip(window.strides, inserted, strict=True)]
    lows = [low for low, _ in window.padding]
    rows, columns = map(_phases, size, dy.shape[1:3], kernels.shape[:2], strides, window.dilation, lows)

    def phase(dy: jax.Array, kernel: jax.Array, row: _Phase, column: _Phase) -> jax.Array:
        kernel = kernel[row.begin :: strides[0], column.begin :: strides[1]]
        if 0 in kernel.shape[:2]:  # no value of the kernel meets these pixels
            return lax.full_like(dy, 0, shape=(dy.shape[0], row.count, column.count, inputs))
        return _plain(dy, kernel, Window((1, 1), (row.padding, column.padding), window.dilation))

    def group(i: jax.Array | int) -> jax.Array:
        dy_i, kernel = _channels(dy, i, outputs), _kernel(flipped, i)
        each = [interleave([phase(dy_i, kernel, row, column) for column in columns], 2) for row in rows]
        return interleave(each, 1)[:, : size[0], : size[1]]

    return _for_each(blocks, group, lax.full_like(dy, 0, shape=(dy.shape[0], *size, blocks * inputs)))


def _weight_gradient(x: jax.Array, dy: jax.Array, window: Window, shape: Sequence[int]) -> jax.Array:
    """Returns the gradient of kernels of `shape` [kh, kw, I, B, O]."""
    kh, kw, inputs, blocks, outputs = shape
    n, rows, columns, _ = dy.shape
    parts = _parts(n, rows * columns, inputs, outputs)
    each = zip(
        x.shape[1:3], (rows, columns), window.extents(shape), window.strides, window.padding, strict=True
    )
    above, beside = ((low, (m - 1) * stride + extent - low - n) for n, m, extent, stride, (low, _) in each)
    # [B, parts, I, H, W, n] and [B, parts, H, W, n, O]
    x = x.reshape(parts, n // parts, *x.shape[1:3], blocks, inputs).transpose(4, 0, 5, 2, 3, 1)
    dy = dy.reshape(parts, n // parts, rows, columns, blocks, outputs).transpose(4, 0, 2, 3, 1, 5)

    def part(x: jax.Array, dy: jax.Array) -> jax.Array:
        # The images' channels are the batch here, and the images are the channels.
        return _plain(x, dy, Window(window.dilation, (above, beside), window.strides))  # [I, kh, kw, O]

    def group(xy: tuple[jax.Array, jax.Array]) -> jax.Array:
        if parts == 1:
            return part(xy[0][0], xy[1][0])
        zero = lax.full_like(dy, 0, shape=(inputs, kh, kw, outputs))
        return lax.scan(lambda total, xy: (total + part(*xy), None), zero, xy)[0]

    x, dy = materialize(x), materialize(dy)
    gradient = group((x[0], dy[0]))[None] if blocks == 1 else lax.map(group, (x, dy))
    return gradient.transpose(2, 3, 1, 0, 4)


def _parts(images: int, pixels: int, inputs: int, outputs: int) -> int:
    """Returns the number of parts in which a weight gradient takes the images; divides theirs."""
    if not (isinstance(images, int) and isinstance(pixels, int)):
        return 1
    most = NARROW if max(inputs, outputs) <= NARROW else max(1, LARGEST // max(1, pixels * outputs))
    return next((d for d in range(1, images + 1) if images % d == 0 and images // d <= most), 1)


def _plain(x: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Convolves with [kh, kw, I, O]; XLA:CPU wants images as large as the result and the kernel."""
    size, out = x.shape[1:3], window.outputs(x.shape[1:3], kernel.shape)
    needed = zip(size, out, window.extents(kernel.shape), strict=True)
    if any(isinstance(n, int) and max(o, e) > n for n, o, e in needed):
        x, window = pad(x, ((0, 0), *window.padding, (0, 0))), window._replace(padding=((0, 0), (0, 0)))
    return plain.conv(x, kernel, window.strides, window.padding, dilation=window.dilation)


def _channels(x: jax.Array, i: jax.Array | int, count: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, i * count, count, axis=3)


def _kernel(kernels: jax.Array, i: jax.Array | int) -> jax.Array:
    return lax.dynamic_index_in_dim(kernels, i, axis=3, keepdims=False)


def _for_each(blocks: int, group: Callable[[jax.Array | int], jax.Array], y: jax.Array) -> jax.Array:
    """Returns y with the channels that `group` gives for each group."""
    if blocks == 1:
        return group(0)
    each = y.shape[3] // blocks

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y, group(i), i * each, axis=3)

    return lax.fori_loop(0, blocks, body, y)


_conv = make_primitive('conv_by_group', multiple_results=False)
mlir.register_lowering(_conv, mlir.lower_fun(_forward, multiple_results=False))


@_conv.def_abstract_eval
def _(x, kernels, *, window):
    out = window.outputs(x.shape[1:3], kernels.shape)
    return x.update(shape=(x.shape[0], *out, kernels.shape[3] * kernels.shape[4]))


def _transpose(dy, x, kernels, *, window):
    if type(dy) is ad.Zero:
        return None, None
    if ad.is_undefined_primal(x):
        return _input_gradient(dy, kernels, window, x.aval.shape[1:3]), None
    return None, _weight_gradient(x, dy, window, kernels.aval.shape)


ad.primitive_transposes[_conv] = _transpose
