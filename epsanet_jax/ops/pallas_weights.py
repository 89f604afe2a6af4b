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
    chunk,
    chunk_copies,
    divide,
    loop,
    merged,
    precision,
)
from epsanet_jax.ops.plain import divisors


def fits(shape: Sequence[int], itemsize: int, kernel: Sequence[int], groups: int) -> bool:
    """Returns whether the kernel exists for images [N, H, W, C] and a convolution [kh, kw, I, C_out]."""
    merge = merged(kernel[2], groups)
    if groups == 1 or merge is None or shape[3] % CHUNK or merge * kernel[3] // groups > LANES:
        return False
    return _plan(shape, kernel[3], groups // merge, kernel[0], itemsize).needed <= MEMORY


def weight_gradient(
    x: jax.Array, dy: jax.Array, groups: int, size: int, interpret: bool = False
) -> jax.Array:
    """Returns the gradient of a kernel [size, size, C_in / groups, C_out] where `fits`.

    Args:
        x: images, [N, H, W, C_in].
        dy: gradient of the outputs, [N, H, W, C_out].
        groups: number of groups.
        size: height and width of the kernel.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    n, channels = x.shape[0], x.shape[3]
    inputs, each = channels // groups, dy.shape[3] // groups
    merge = merged(inputs, groups) or 1
    plan = _plan(x.shape, dy.shape[3], groups // merge, size, x.dtype.itemsize)
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


def _tile(h: int, w: int, size: int, outputs: int) -> tuple[int, int]:
    """Returns rows and columns of a tile, of at most 128 values, with the fewest products."""
    tiles = [(r, c) for r in divisors(h) for c in divisors(w) if r * c * outputs <= LANES]
    return min(tiles, key=lambda t: (t[0] + size - 1) * (t[1] + size - 1) / (t[0] * t[1]))


class Plan(NamedTuple):
    """Sizes of a kernel, after groups are merged to `blocks`."""

    size: int  # of the convolution's kernel
    tile: tuple[int, int]  # pixels
    values: int  # tile pixels * outputs of a block
    window: tuple[int, ...]  # two chunks of the padded images, [2, rows, columns, channels, LANES]
    sums: tuple[int, ...]  # [blocks, rows and columns of what a tile reads, inputs, values]
    needed: int  # bytes of memory


def _plan(shape: Sequence[int], outputs: int, blocks: int, size: int, itemsize: int) -> Plan:
    _, h, w, channels = shape
    inputs, each = channels // blocks, outputs // blocks
    tile = _tile(h, w, size, each)
    window = (2, h + size - 1, w + size - 1, chunk(inputs), LANES)
    sums = (blocks, tile[0] + size - 1, tile[1] + size - 1, inputs, tile[0] * tile[1] * each)
    rows = -(-outputs // CHUNK) * CHUNK
    needed = (math.prod(window) + h * w * rows * LANES) * itemsize
    needed += 4 * LANES * inputs * blocks * (sums[1] * sums[2] + size**2)
    return Plan(size, tile, sums[-1], window, sums, needed)


def _sums(x: jax.Array, dy: jax.Array, plan: Plan, interpret: bool) -> jax.Array:
    """Returns float32 [blocks, size, size, inputs, tile rows * tile columns * outputs]; x is [H, W, C, N]."""
    from jax.experimental import pallas as pl  # here, because importing it takes long
    from jax.experimental.pallas import tpu as pltpu

    blocks, inputs = plan.sums[0], plan.sums[3]
    out = blocks, plan.size, plan.size, inputs, plan.values
    tiles = x.shape[0] * x.shape[1] * x.shape[3] // math.prod(plan.tile)
    cost = pl.CostEstimate(
        flops=2 * tiles * math.prod(plan.sums), bytes_accessed=x.nbytes + dy.nbytes, transcendentals=0
    )
    return pl.pallas_call(
        functools.partial(_kernel, size=plan.size, tile=plan.tile),
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


def _kernel(x, dy, out, window, gradient, sums, arrived, *, size, tile):
    """Adds up all tiles of all images in `sums`, and picks the gradient of the kernel from it."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    h, w, _, n = x.shape
    blocks, *seen, inputs, values = sums.shape
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
        left = window[slot, pl.ds(row * tile[0], seen[0]), pl.ds(column * tile[1], seen[1]), channel, :]
        output = slice(block * outputs, (block + 1) * outputs)
        right = gradient[pl.ds(row * tile[0], tile[0]), pl.ds(column * tile[1], tile[1]), output, :]
        products = lax.dot_general(
            left.reshape(-1, LANES),
            right.reshape(values, LANES),
            (((1,), (1,)), ((), ())),
            precision=precision(x.dtype),
            preferred_element_type=jnp.float32,
        )
        sums[block] += products.reshape(*seen, inputs, values)

    loop(n // LANES, add)
    pixel, _ = divide(lax.broadcasted_iota(jnp.int32, (1, 1, values), 2), outputs)
    rows, columns = divide(pixel, tile[1])

    def pick(place):
        """Takes for each output of the tile, in its lane, what lies under a row of the kernel."""
        block, u = divide(place, size)
        met = sums[block, u]
        for r in range(1, tile[0]):
            met = jnp.where(rows == r, sums[block, u + r], met)
        found = met[:size]
        for q in range(1, tile[1]):
            found = jnp.where(columns == q, met[q : q + size], found)
        out[block, u] = found

    loop(blocks * size, pick)
