"""Grouped convolutions as multiply-adds of shifted images, for groups of few channels on a CPU.

A matrix product has too little to do in a group of a few channels. These functions instead add up, for
each value of the kernel, the shifted images times that value. XLA:CPU makes the sum one loop over vectors:

    by channel  A vector holds channels. Inputs are repeated for each output of their group.
    by image    A vector holds the same pixel of several images. This needs two transpositions, but no
                repetition.

Every direction is written out, because the transpose of a slice is a padded array.
"""

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.ops.materialize import materialize
from epsanet_jax.ops.plain import Window, interleave, pad

CHAINS = 2  # sums that are added up side by side, because an addition waits for the one before it
TERMS = 28  # multiply-adds in one loop: fewer write the sum too often, more need too many registers
MOST_TERMS = 512  # multiply-adds for an output; more take long to compile
# Images whose weight gradients are summed side by side, if there are no more devices. Each device needs one.
LANES = 2

Tap = tuple[int, int, int, jax.Array]  # row, column, input of the group; kernel values, [C_out]


def has_few_terms(area: int, channels: int, features: int, groups: int) -> bool:
    """Returns whether these functions compile quickly; `area` is the kernel's height times width."""
    return area * max(channels, features) // groups <= MOST_TERMS


def forward(x: jax.Array, kernel: jax.Array, window: Window, groups: int, by_image: bool) -> jax.Array:
    """Convolves [N, H, W, C_in] with [kh, kw, C_in / groups, C_out]."""
    kh, kw, inputs, outputs = kernel.shape
    out = window.outputs(x.shape[1:3], kernel.shape)
    (down, across), x = window.dilation, _pad(x, window, window.extents(kernel.shape), out)
    taps = [
        (u * down, v * across, i, kernel[u, v, i])
        for u in range(kh)
        for v in range(kw)
        for i in range(inputs)
    ]
    arrays = _inputs(x, groups, outputs // groups, by_image)
    y = _sum(arrays, taps, out, window.strides, groups, outputs // groups, by_image)
    return _images_first(y, by_image).astype(x.dtype)


def input_gradient(
    dy: jax.Array, kernel: jax.Array, window: Window, groups: int, size: Sequence[int], by_image: bool
) -> jax.Array:
    """Returns the gradient of images [N, H, W, C_in] from that of the outputs; `size` is (H, W).

    Pixels that lie a stride apart meet the same values of the kernel: each such phase of the images is a
    convolution of the outputs' gradient without stride.
    """
    kh, kw, inputs, outputs = kernel.shape
    each = outputs // groups
    kernel = kernel.reshape(kh, kw, inputs, groups, each).transpose(0, 1, 4, 3, 2).reshape(kh, kw, each, -1)
    # Row a + q * stride of the images meets value u of the kernel in row q + offset of the outputs.
    axes = zip((kh, kw), window.strides, window.dilation, window.padding, strict=True)
    met = [
        [
            [((a + low - u * d) // stride, u) for u in range(k) if (a + low - u * d) % stride == 0]
            for a in range(stride)
        ]
        for k, stride, d, (low, _) in axes
    ]
    out = [-(-n // stride) for n, stride in zip(size, window.strides, strict=True)]
    first = [min(offset for phase in axis for offset, _ in phase) for axis in met]
    last = [max(offset for phase in axis for offset, _ in phase) for axis in met]
    padding = [(-a, b + n - m) for a, b, n, m in zip(first, last, out, dy.shape[1:3], strict=True)]
    arrays = _inputs(pad(dy, ((0, 0), *padding, (0, 0))), groups, inputs, by_image)

    def phase(rows: list[tuple[int, int]], columns: list[tuple[int, int]]) -> jax.Array:
        taps = [
            (row - first[0], column - first[1], o, kernel[u, v, o])
            for row, u in rows
            for column, v in columns
            for o in range(each)
        ]
        return _images_first(_sum(arrays, taps, out, (1, 1), groups, inputs, by_image), by_image)

    phases = [[phase(rows, columns) for columns in met[1]] for rows in met[0]]
    dx = interleave([interleave(row, 2) for row in phases], 1)
    return dx[:, : size[0], : size[1]].astype(dy.dtype)


def weight_gradient(
    x: jax.Array, dy: jax.Array, window: Window, groups: int, kernel: Sequence[int], by_image: bool
) -> jax.Array:
    """Returns the gradient of a kernel [kh, kw, C_in / groups, C_out]; `kernel` is (kh, kw).

    A loop over blocks of output pixels adds up the products of each block while its pixels are in the cache.
    """
    n, oh, ow, outputs = dy.shape
    inputs, each, extents = x.shape[3] // groups, outputs // groups, window.extents(kernel)
    block = _block(oh, ow, by_image)
    counts = [-(-size // b) for size, b in zip((oh, ow), block, strict=True)]
    padded = [count * b for count, b in zip(counts, block, strict=True)]
    x = _pad(x, window, extents, padded)
    dy = pad(dy, ((0, 0), *((0, p - size) for p, size in zip(padded, (oh, ow), strict=True)), (0, 0)))
    # By image: [H, W, I, B, N] and [H, W, B, O, N]. By channel: [lanes, parts, H, W, I, C_out] and
    # [lanes, parts, H, W, C_out], where the loop goes over the parts of the batch. A single input has no axis
    # here: XLA:CPU would copy the images once more for one of size 1.
    lanes, parts, rows = n, 1, 0
    if by_image:
        x = x.reshape(*x.shape[:3], groups, inputs).transpose(1, 2, 4, 3, 0)
        x = materialize(x[:, :, 0] if inputs == 1 else x)
        dy = materialize(dy.transpose(1, 2, 3, 0)).reshape(*padded, groups, each, n)
    else:
        if isinstance(n, int):
            lanes = math.gcd(n, max(LANES, jax.device_count()))
            parts, rows = n // lanes, 1
        x = _by_input(materialize(x), groups, each)
        x = x[:, :, :, 0] if inputs == 1 else x
        x, dy = (a.reshape(lanes, parts, *a.shape[1:]) for a in (x, dy))

    def take(a: jax.Array, part: jax.Array, place: Sequence[jax.Array], size: Sequence[int]) -> jax.Array:
        if not by_image:
            a = lax.dynamic_index_in_dim(a, part, 1, keepdims=False)
        for axis in (0, 1):
            a = lax.dynamic_slice_in_dim(a, place[axis], size[axis], rows + axis)
        return a

    def add(total: jax.Array, i: jax.Array) -> tuple[jax.Array, None]:
        part, i = i // (counts[0] * counts[1]), i % (counts[0] * counts[1])
        first = i // counts[1] * block[0], i % counts[1] * block[1]
        products = []
        for row, column in itertools.product(*map(range, block)):
            place = first[0] + row, first[1] + column
            seen = take(x, part, (place[0] * window.strides[0], place[1] * window.strides[1]), extents)
            seen = _window(seen, (0, 0), kernel, window.dilation, rows)
            seen = jnp.expand_dims(seen, rows + 2) if inputs == 1 else seen
            seen = jnp.expand_dims(seen, 4) if by_image else seen
            pixel = jnp.expand_dims(take(dy, part, place, (1, 1)), rows + 2)
            products.append(seen.astype(total.dtype) * pixel.astype(total.dtype))
        return total + _add(products), None

    lanes_of = (inputs, groups, each, n) if by_image else (inputs, outputs)
    total = lax.full_like(x, 0, _wide(x.dtype), (*(() if by_image else (lanes,)), *kernel[:2], *lanes_of))
    total, _ = lax.scan(add, total, jnp.arange(parts * counts[0] * counts[1]))
    total = total.sum(-1 if by_image else 0)
    return total.reshape(*kernel[:2], inputs, outputs).astype(x.dtype)


def _add(terms: Sequence[jax.Array]) -> jax.Array:
    """Returns the sum of the terms."""
    sums = [sum(terms[i + CHAINS :: CHAINS], terms[i]) for i in range(min(CHAINS, len(terms)))]
    return sum(sums[1:], sums[0])


def _sum(
    arrays: Sequence[jax.Array],
    taps: Sequence[Tap],
    out: Sequence[int],
    strides: Sequence[int],
    groups: int,
    each: int,
    by_image: bool,
) -> jax.Array:
    """Adds up the shifted inputs times their kernel values: [N, H, W, C] or, by image, [H, W, B, O, N]."""
    first, total, wide = 1 - by_image, None, _wide(arrays[0].dtype)
    for begin in range(0, len(taps), TERMS):
        terms = [] if total is None else [materialize(total)]
        for row, column, i, values in taps[begin : begin + TERMS]:
            values = values.reshape(1, 1, groups, -1, 1) if by_image else values.reshape(1, 1, 1, -1)
            seen = _window(arrays[i], (row, column), out, strides, first)
            terms.append(seen.astype(wide) * values.astype(wide))
        total = _add(terms)
    if total is None:  # no value of the kernel meets these pixels
        images = arrays[0].shape[-1 if by_image else 0]
        shape = (*out, groups, each, images) if by_image else (images, *out, groups * each)
        return lax.full_like(arrays[0], 0, wide, shape)
    return total


def _inputs(x: jax.Array, groups: int, each: int, by_image: bool) -> list[jax.Array]:
    """Returns, for all i, the i-th input of every group, in a shape that fits the outputs of the group."""
    n, h, w, channels = x.shape
    inputs = channels // groups
    if by_image:
        x = materialize(x.transpose(1, 2, 3, 0)).reshape(h, w, groups, inputs, n)
        return [x[:, :, :, i : i + 1] for i in range(inputs)]
    x = _by_input(materialize(x), groups, each)
    return [x[:, :, :, i] for i in range(inputs)]


def _by_input(x: jax.Array, groups: int, each: int) -> jax.Array:
    """Returns [N, H, W, I, C_out]: the i-th input of every group, once for each of its outputs, for all i."""
    n, h, w, channels = x.shape
    inputs = channels // groups
    if each == inputs == 1:
        return x[:, :, :, None]
    x = x.reshape(n, h, w, groups, inputs, 1).transpose(0, 1, 2, 4, 3, 5)
    x = jnp.broadcast_to(x, (n, h, w, inputs, groups, each))
    return materialize(x.reshape(n, h, w, inputs, groups * each))


def _window(
    a: jax.Array, begin: Sequence[int], size: Sequence[int], strides: Sequence[int], first: int
) -> jax.Array:
    """Returns `size` rows and columns from `begin`; `first` is the axis of the rows."""
    for axis in (0, 1):
        end = begin[axis] + (size[axis] - 1) * strides[axis] + 1
        a = lax.slice_in_dim(a, begin[axis], end, strides[axis], axis=first + axis)
    return a


def _pad(x: jax.Array, window: Window, extents: Sequence[int], out: Sequence[int]) -> jax.Array:
    """Pads or crops the images to the pixels that the outputs read."""
    each = zip(x.shape[1:3], window.padding, window.strides, extents, out, strict=True)
    padding = [(low, (o - 1) * stride + e - low - size) for size, (low, _), stride, e, o in each]
    return pad(x, ((0, 0), *padding, (0, 0)))


def _block(rows: int, columns: int, by_image: bool) -> tuple[int, int]:
    """Returns rows and columns of a block of about `TERMS` pixels, of which many cover the images evenly."""
    width = -(-columns // -(-columns // (TERMS // 2 if by_image else TERMS)))
    height = min(rows, -(-TERMS // width))
    return -(-rows // -(-rows // height)), width


def _images_first(y: jax.Array, by_image: bool) -> jax.Array:
    """Returns [N, H, W, C] from [H, W, B, O, N] if the sum was taken by image."""
    if not by_image:
        return y
    h, w, groups, each, n = y.shape
    return materialize(y).reshape(h, w, groups * each, n).transpose(3, 0, 1, 2)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the type in which products are added up."""
    return jnp.dtype(dtype if dtype.itemsize >= 4 else jnp.float32)
