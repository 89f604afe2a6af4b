"""Grouped convolutions as plain ones, one for each group, for CPUs.

Few groups are convolved side by side, many in a loop, where only one convolution has to be compiled. XLA:CPU
computes a convolution in a loop quickly only if its arrays have the order [N, H, W, C] and [H, W, I, O]. JAX
writes gradients with other orders, so they are written out here, each in its fastest form:

    forward          Images lie beside each other where that lets XLA:CPU use all threads, see `wide`.
    input gradient   With a stride, pixels that lie a stride apart meet the same values of the kernel. Each
                     phase of the images is a convolution without stride; no inserted zeros are multiplied.
    weight gradient  Each value is a sum over the pixels of all images. XLA:CPU is slow at long sums, so they
                     are taken over one image or a few small ones at a time.
"""

import functools
import math
import operator
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
from epsanet_jax.ops.wide import MANY_OUTPUTS, Wide, images_of_a_device

MOST_SEPARATE = 16  # groups side by side; a loop over more is slower, but compiles quickly
MOST_CONVS = 32  # of all groups side by side
MOST_PHASES = 9  # each is a convolution to compile
NARROW = 16  # up to as many channels XLA:CPU takes vectors of images in a weight gradient
# Values of the outputs' gradient that a weight gradient reads at a time; the cache holds them.
LARGEST = 2**18
TOGETHER = 2**20  # values of images of which one transposition is faster than one for each group


def conv(x: jax.Array, kernels: jax.Array, window: Window) -> jax.Array:
    """Convolves images [N, H, W, B * I] with kernels [kh, kw, I, B, O]; returns [N, rows, columns, B * O]."""
    return _conv.bind(x, kernels, window=window)


def _forward(x: jax.Array, kernels: jax.Array, *, window: Window) -> jax.Array:
    kh, kw, inputs, blocks, outputs = kernels.shape
    out = window.outputs(x.shape[1:3], kernels.shape)
    wide = _wide(x, (kh, kw, inputs, outputs), blocks, [(window, kernels.shape)], out[1])

    def group(x: jax.Array, i: jax.Array | int) -> jax.Array:
        return _plain(x, _kernel(kernels, i), wide.window(window, kernels.shape))

    return _for_each(x, blocks, 1, wide, group, (*out, outputs))


def _wide(
    x: jax.Array,
    shape: Sequence[int],
    blocks: int,
    each: Sequence[tuple[Window, Sequence[int]]],
    columns: int,
) -> Wide:
    """Returns how to join the images, as `Wide.of`; few or many channels take all threads as they are."""
    if not _side_by_side(blocks, len(each)) or max(shape[2:]) <= NARROW or shape[3] >= MANY_OUTPUTS:
        return Wide()
    return Wide.of(x, math.prod(shape[:3]), each, columns)


def _side_by_side(blocks: int, convs: int) -> bool:
    """Returns whether the groups, of `convs` convolutions each, are not convolved in a loop."""
    return (blocks <= MOST_SEPARATE and blocks * convs <= MOST_CONVS) or blocks == 1


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

    # For each phase the values of the kernel that it meets, [kh, kw, O, B, I], and their window.
    phases = [
        [
            (
                flipped[row.begin :: strides[0], column.begin :: strides[1]],
                Window((1, 1), (row.padding, column.padding), window.dilation),
            )
            for column in columns
        ]
        for row in rows
    ]
    windows = [(each, met.shape) for line in phases for met, each in line if 0 not in met.shape[:2]]
    wide = _wide(dy, (*kernels.shape[:2], outputs, inputs), blocks, windows, columns[0].count)

    def group(dy: jax.Array, i: jax.Array | int) -> jax.Array:
        def convolve(met: jax.Array, each: Window) -> jax.Array:
            if 0 in met.shape[:2]:  # no value of the kernel meets these pixels
                width = columns[0].count if wide.images == 1 else dy.shape[2]
                return lax.full_like(dy, 0, shape=(dy.shape[0], rows[0].count, width, inputs))
            return _plain(dy, _kernel(met, i), wide.window(each, met.shape))

        lines = [interleave([convolve(*phase) for phase in line], 2) for line in phases]
        return interleave(lines, 1)[:, : size[0]]

    dx = _for_each(dy, blocks, len(windows), wide, group, (size[0], columns[0].count * len(columns), inputs))
    return dx[:, :, : size[1]]


def _weight_gradient(x: jax.Array, dy: jax.Array, window: Window, shape: Sequence[int]) -> jax.Array:
    """Returns the gradient of kernels of `shape` [kh, kw, I, B, O]."""
    kh, kw, inputs, blocks, outputs = shape
    n, rows, columns, _ = dy.shape
    parts = _parts(n, rows * columns, inputs, outputs)
    each = zip(
        x.shape[1:3], (rows, columns), window.extents(shape), window.strides, window.padding, strict=True
    )
    above, beside = ((low, (m - 1) * stride + extent - low - n) for n, m, extent, stride, (low, _) in each)

    def by_part(x: jax.Array, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns [B, parts, I, H, W, n] and [B, parts, H, W, n, O]; each part has images of every device."""
        few = n // parts, parts
        x = x.reshape(*few, *x.shape[1:3], x.shape[3] // inputs, inputs)
        dy = dy.reshape(*few, rows, columns, dy.shape[3] // outputs, outputs)
        return materialize(x.transpose(4, 1, 5, 2, 3, 0)), materialize(dy.transpose(4, 1, 2, 3, 0, 5))

    def part(x: jax.Array, dy: jax.Array) -> jax.Array:
        # The images' channels are the batch here, and the images are the channels.
        return _plain(x, dy, Window(window.dilation, (above, beside), window.strides))  # [I, kh, kw, O]

    def group(xy: tuple[jax.Array, jax.Array]) -> jax.Array:
        if parts == 1 or _side_by_side(blocks, parts):
            return functools.reduce(operator.add, [part(xy[0][j], xy[1][j]) for j in range(parts)])
        zero = lax.full_like(dy, 0, shape=(inputs, kh, kw, outputs))
        return lax.scan(lambda total, xy: (total + part(*xy), None), zero, xy)[0]

    if not _side_by_side(blocks, 1):
        return lax.map(group, by_part(x, dy)).transpose(2, 3, 1, 0, 4)
    if isinstance(x.size, int) and x.size > TOGETHER:
        each = [by_part(x, dy)]
    else:
        pairs = zip(jnp.split(x, blocks, axis=3), jnp.split(dy, blocks, axis=3), strict=True)
        each = [by_part(*pair) for pair in pairs]
    gradients = [group((x[i], dy[i])) for x, dy in each for i in range(x.shape[0])]
    return jnp.stack(gradients, 3).transpose(1, 2, 0, 3, 4)


def _parts(images: int, pixels: int, inputs: int, outputs: int) -> int:
    """Returns the number of parts in which a weight gradient takes the images; divides theirs."""
    if not (isinstance(images, int) and isinstance(pixels, int)):
        return 1
    most = NARROW if max(inputs, outputs) <= NARROW else max(1, LARGEST // max(1, pixels * outputs))
    each = images_of_a_device(images)
    return next((d for d in range(1, each + 1) if each % d == 0 and each // d <= most), 1)


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


def _for_each(
    x: jax.Array,
    blocks: int,
    convs: int,
    wide: Wide,
    group: Callable[[jax.Array, jax.Array | int], jax.Array],
    shape: Sequence[int],
) -> jax.Array:
    """Returns [N, rows, columns, B * O] from the images of each group.

    Args:
        x: images, [N, H, W, C].
        blocks: number of groups, B.
        convs: number of convolutions for each group.
        wide: how the images are joined.
        group: function that convolves the images of a group with its kernel.
        shape: (rows, columns, O) of the result of `group`.
    """
    each = x.shape[3] // blocks
    if wide.images > 1:
        joined = wide.join(x, blocks)
        return wide.separate(jnp.stack([group(joined[i], i) for i in range(blocks)]), shape[1])
    if _side_by_side(blocks, convs):
        parts = jnp.split(x, blocks, axis=3)
        return jnp.concatenate([group(part, i) for i, part in enumerate(parts)], axis=3)

    def body(i: jax.Array, y: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(y, group(_channels(x, i, each), i), i * shape[2], axis=3)

    zeros = lax.full_like(x, 0, shape=(x.shape[0], *shape[:2], blocks * shape[2]))
    return lax.fori_loop(0, blocks, body, zeros)


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
