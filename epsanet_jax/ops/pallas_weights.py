"""Weight gradients of grouped convolutions as a Pallas kernel for TPUs, on Toeplitz tiles (`pallas_tiles`).

128 images are the side that is summed:

    sums[window row, window column, input, (tile row, tile column, output)] += window x gradient of the tile

Each value of the kernel meets a tile's pixels at different places of the window. After all tiles, those
places are picked from `sums`.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.ops.pallas_tiles import (
    CHUNK,
    LANES,
    MARGIN,
    MEMORY,
    arriving_blocks,
    bordered,
    chunk,
    chunk_copies,
    divide,
    loop,
    merged,
    precision,
    seen,
)
from epsanet_jax.ops.plain import divisors


def fits(shape: Sequence[int], itemsize: int, kernel: Sequence[int], groups: int, stride: int) -> bool:
    """Returns whether the kernel exists for images [N, H, W, C] and a convolution [kh, kw, I, C_out]."""
    merge = merged(kernel[2], groups)
    if groups == 1 or merge is None or shape[3] % CHUNK or merge * kernel[3] // groups > LANES:
        return False
    outputs = *(-(-n // stride) for n in shape[1:3]), kernel[3]
    return _plan(shape, outputs, groups // merge, kernel[0], stride, itemsize).needed <= MEMORY


def weight_gradient(
    x: jax.Array, dy: jax.Array, groups: int, size: int, stride: int, interpret: bool = False
) -> jax.Array:
    """Returns the gradient of a kernel [size, size, C_in / groups, C_out] where `fits`.

    Args:
        x: images, [N, H, W, C_in].
        dy: gradient of the outputs, [N, rows, columns, C_out].
        groups: number of groups.
        size: height and width of the kernel.
        stride: pixels between two outputs, for rows and columns.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    n, channels = x.shape[0], x.shape[3]
    inputs, each = channels // groups, dy.shape[3] // groups
    merge = merged(inputs, groups) or 1
    plan = _plan(x.shape, dy.shape[1:], groups // merge, size, stride, x.dtype.itemsize)
    images = [(0, 0)] * 3 + [(0, -n % LANES)]
    x, dy = (jnp.pad(a.transpose(1, 2, 3, 0), images) for a in (x, dy))  # [H, W, C, N]
    sums = _sums(x, dy, plan, interpret)  # [B, k, k, m * I, tile pixels * m * O]
    sums = sums.reshape(groups // merge, size, size, merge, inputs, plan.values)
    # A sum over the pixels of a tile, as a product with ones: TPUs pad a last axis of few outputs to 128.
    # Products of the inputs of one merged group with the outputs of another one are left out.
    ones = np.tile(np.eye(merge * each).reshape(merge, each, -1), plan.values // (merge * each))
    gradient = jnp.einsum(
        'guvmiw,mow->uvigmo', sums, ones.astype(np.float32), precision=lax.Precision.HIGHEST
    )
    return gradient.reshape(size, size, inputs, groups * each).astype(x.dtype)


def _tile(rows: int, columns: int, size: int, stride: int, outputs: int) -> tuple[int, int]:
    """Returns rows and columns of a tile, of at most 128 values, with the fewest products."""
    tiles = [(r, c) for r in divisors(rows) for c in divisors(columns) if r * c * outputs <= LANES]
    return min(tiles, key=lambda t: math.prod(seen(t, size, stride)) / math.prod(t))


class Plan(NamedTuple):
    """Sizes of a kernel, after groups are merged to `blocks`."""

    size: int  # of the convolution's kernel
    stride: int
    tile: tuple[int, int]  # pixels
    values: int  # tile pixels * outputs of a block
    window: tuple[int, ...]  # two chunks of the padded images, [2, rows, columns, channels, LANES]
    sums: tuple[int, ...]  # [blocks, rows and columns of what a tile reads, inputs, values]
    needed: int  # bytes of memory


def _plan(
    shape: Sequence[int], outputs: Sequence[int], blocks: int, size: int, stride: int, itemsize: int
) -> Plan:
    """Plans for images of a shape [N, H, W, C] and outputs of [rows, columns, C_out]."""
    rows, columns, features = outputs
    inputs, each = shape[3] // blocks, features // blocks
    tile = _tile(rows, columns, size, stride, each)
    window = (2, *bordered(shape[1:3], (rows, columns), size, stride), chunk(inputs), LANES)
    sums = (blocks, *seen(tile, size, stride), inputs, math.prod(tile) * each)
    channels = -(-features // CHUNK) * CHUNK
    needed = (math.prod(window) + rows * columns * channels * LANES) * itemsize
    needed += 4 * LANES * inputs * blocks * (sums[1] * sums[2] + size**2)
    return Plan(size, stride, tile, sums[-1], window, sums, needed)


def _sums(x: jax.Array, dy: jax.Array, plan: Plan, interpret: bool) -> jax.Array:
    """Returns float32 [blocks, size, size, inputs, tile rows * tile columns * outputs]; x is [H, W, C, N]."""
    from jax.experimental import pallas as pl  # here, because importing it takes long
    from jax.experimental.pallas import tpu as pltpu

    blocks, inputs = plan.sums[0], plan.sums[3]
    out = blocks, plan.size, plan.size, inputs, plan.values
    tiles = dy.shape[0] * dy.shape[1] * dy.shape[3] // math.prod(plan.tile)
    cost = pl.CostEstimate(
        flops=2 * tiles * math.prod(plan.sums), bytes_accessed=x.nbytes + dy.nbytes, transcendentals=0
    )
    return pl.pallas_call(
        functools.partial(_kernel, size=plan.size, stride=plan.stride, tile=plan.tile),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * 2,
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        # Like x: in a shard_map the result varies over the same mesh axes.
        out_shape=jax.eval_shape(lambda x: lax.full_like(x, 0, jnp.float32, out), x),
        scratch_shapes={
            'window': pltpu.VMEM(plan.window, x.dtype),
            'gradient': pltpu.VMEM((*dy.shape[:3], LANES), dy.dtype),
            'sums': pltpu.VMEM(plan.sums, jnp.float32),
            'arrived': pltpu.SemaphoreType.DMA((3,)),
        },
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=plan.needed + MARGIN),
        cost_estimate=cost,
        interpret=interpret,
        name='toeplitz_weight_gradient',
    )(x, dy)


def _kernel(x, dy, out, window, gradient, sums, arrived, *, size, stride, tile):
    """Adds up all tiles of all images in `sums`, and picks the gradient of the kernel from it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    h, w, _, n = dy.shape
    blocks, *read, inputs, values = sums.shape
    outputs = values // math.prod(tile)
    window[...] = jnp.zeros_like(window)  # the borders stay zero
    sums[...] = jnp.zeros_like(sums)

    def add(batch):
        images = pl.ds(pl.multiple_of(batch * LANES, LANES), LANES)
        gradients = pltpu.make_async_copy(dy.at[:, :, :, images], gradient, arrived.at[np.int32(2)])
        copies = chunk_copies(x, window, arrived, images, size // 2)
        gradients.start()
        copies[0].start()
        gradients.wait()
        for slot, part, block in arriving_blocks(copies, window.shape[3] // inputs):
            loop(h * w // math.prod(tile), functools.partial(add_tile, slot, part, block))

    def add_tile(slot, part, block, place):
        row, column = divide(place, w // tile[1])
        channel = slice(part * inputs, (part + 1) * inputs)
        rows, columns = (pl.ds(i * t * stride, k) for i, t, k in zip((row, column), tile, read, strict=True))
        left = window[slot, rows, columns, channel, :]
        output = slice(block * outputs, (block + 1) * outputs)
        right = gradient[pl.ds(row * tile[0], tile[0]), pl.ds(column * tile[1], tile[1]), output, :]
        products = lax.dot_general(
            left.reshape(-1, LANES),
            right.reshape(values, LANES),
            (((1,), (1,)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        sums[block] += products.reshape(*read, inputs, values)

    loop(n // LANES, add)
    pixel, _ = divide(lax.broadcasted_iota(jnp.int32, (1, 1, values), 2), outputs)
    rows, columns = divide(pixel, tile[1])

    def pick(place):
        """Takes for each output of the tile, in its lane, what lies under a row of the kernel."""
        block, u = divide(place, size)
        met = sums[block, u]
        for r in range(1, tile[0]):
            met = jnp.where(rows == r, sums[block, u + stride * r], met)
        found = met[:size]
        for q in range(1, tile[1]):
            found = jnp.where(columns == q, met[stride * q : stride * q + size], found)
        out[block, u] = found

    loop(blocks * size, pick)
