"""Weight gradients of grouped convolutions as a Pallas kernel for TPUs, on `pallas_tiles`.

Images are the side that is summed:

    sums [depth, values] += gradients of the outputs that a tile meets [depth, N] x tile [values, N]

Each value of the convolution's kernel joins several pixels of a tile with outputs. After all tiles, these
sums are added.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.ops import pallas_columns as columns
from epsanet_jax.ops import pallas_strips as strips
from epsanet_jax.ops.pallas_call import call, clear, index, loop, multiply, slot_of, span
from epsanet_jax.ops.pallas_columns import Rows
from epsanet_jax.ops.pallas_tiles import LANES, Branch, Plan

HOLDS_TILES = True  # in the matrix units


# Traced and lowered once for equal convolutions.
@functools.partial(jax.jit, static_argnames=('groups', 'sizes', 'stride', 'interpret'))
def weight_gradients(
    x: jax.Array,
    dys: Sequence[jax.Array],
    groups: tuple[int, ...],
    sizes: tuple[int, ...],
    stride: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """Returns the gradients of kernels [size, size, C_in / groups, C_out], with padding `size // 2`.

    Args:
        x: images, [N, H, W, C_in].
        dys: gradients of the outputs of each convolution, [N, rows, columns, C_out].
        groups: number of groups of each.
        sizes: height and width of each kernel.
        stride: pixels between two outputs, for rows and columns.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    channels = x.shape[3]
    shapes = [(k, k, channels // g, dy.shape[3]) for k, g, dy in zip(sizes, groups, dys, strict=True)]
    plan = Plan.of(x.shape, shapes, groups, stride, HOLDS_TILES)
    single = jnp.dtype('float32')
    sums = call(
        'toeplitz_weight_gradient',
        functools.partial(_kernel, plan=plan),
        [strips.by_phase(x, plan), [strips.images_last(dy) for dy in dys]],
        [columns.order(b, x.dtype) for b in plan.branches],
        [((b.blocks, b.size, b.outputs, b.size * b.inputs), single) for b in plan.branches],
        scratch(plan, x.dtype),
        {'arrived': (len(dys), 2), 'pixels_arrived': (2,)},
        sum(dy.size * math.prod(k[:3]) for dy, k in zip(dys, shapes, strict=True)),
        interpret,
        holds_results=True,
    )
    return [_gradient(*each).astype(x.dtype) for each in zip(sums, shapes, groups, strict=True)]


def _gradient(sums: jax.Array, shape: Sequence[int], groups: int) -> jax.Array:
    """Returns the gradient of a kernel of this shape from the sums, [blocks, p, outputs, (q, inputs)]."""
    blocks, size, *_ = sums.shape
    merge = groups // blocks
    sums = sums.reshape(blocks, size, merge, -1, size, merge, shape[2])  # [B, p, m, o, q, n, i]
    # Products of the inputs of one merged group with the outputs of another one are left out.
    own = jnp.diagonal(sums, axis1=2, axis2=5)  # [B, p, o, q, i, m]
    return own.transpose(1, 3, 4, 0, 5, 2).reshape(shape)


def scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns shape and type of each array that the kernel has in the chip's memory."""
    return {
        'rows': [b.arriving(plan.strip, dtype) for b in plan.branches],
        'pixels': ((2, *plan.pixels()), dtype),
        'sums': [
            [((b.blocks, b.depth(phase), b.values), jnp.dtype('float32')) for phase in range(plan.stride)]
            for b in plan.branches
        ],
    }


def _kernel(moved, orders, *outs, plan, rows, pixels, sums, arrived, pixels_arrived):
    """Adds up all tiles of all images, then the sums of each value of the kernels."""
    from jax.experimental import pallas as pl

    x, dys = moved
    # Beside the images they stay zero.
    clear([pixels, sums, [arrays['arriving'] for arrays in rows]])

    def add(batch):
        images = span(batch, LANES)
        copy = functools.partial(strips.strip_copy, plan, x.at[..., images], pixels, pixels_arrived)
        copy(jnp.int32(0)).start()
        outputs = columns.begin_rows(plan, dys, images, orders, arrived, rows)

        def compute(strip):
            pl.when(strip + 1 < plan.strips)(lambda: copy(strip + 1).start())
            columns.read_rows(plan, outputs, strip)
            copy(strip).wait()
            for phase, i in itertools.product(range(plan.stride), range(len(outputs))):
                tiles = pixels.at[slot_of(strip), :, index(phase)]
                add = functools.partial(_add, outputs[i], phase, sums[i][phase], strip * plan.strip)
                strips.visit_tiles(plan.branches[i], phase, tiles, add)

        loop(plan.strips, compute)

    loop(x.shape[-1] // LANES, add)
    for branch, total, out in zip(plan.branches, sums, outs, strict=True):
        loop(branch.blocks, functools.partial(_pick, branch, total, out))


def _add(outputs: Rows, phase: int, sums, begin, top, parts):
    """Adds the products of a row of tiles to the sums of their blocks."""
    for block, tiles, values in parts:
        seen = outputs.seen(phase, block, begin + top, tiles)
        sums[block] += multiply(seen, values, images=True)


def _pick(branch: Branch, sums, out, block):
    """Adds the sums of each value of the kernel, [kernel row, output, (kernel column, input)]."""
    b = branch
    of_row = b.tile[1] * b.inputs
    row_of = columns.row_of_lanes(b)
    found: dict[int, Any] = {}  # for each row of the kernel
    for phase, total in enumerate(sums):
        for seen, row in itertools.product(range(b.rows_seen(phase)), range(b.tile[0])):
            p = b.kernel_row(phase, row, seen)
            if p is not None:
                term = total[block, seen * b.across : (seen + 1) * b.across]
                found[p] = jnp.where(row_of == row, term, found[p]) if p in found else term
    for p, values in found.items():
        out[block, p] = jnp.zeros_like(out[block, p])
        for column in range(b.columns_seen):
            first = b.size // 2 + b.stride * (b.before - column)  # column of the kernel for that of the tile
            begin, end = max(0, -first), min(b.tile[1], b.size - first)
            if begin >= end:
                continue
            to = slice((begin + first) * b.inputs, (end + first) * b.inputs)
            for row in range(b.tile[0]):
                lanes = slice(row * of_row + begin * b.inputs, row * of_row + end * b.inputs)
                out[block, p, :, to] += values[column * b.outputs : (column + 1) * b.outputs, lanes]
