"""Input gradients of grouped convolutions as a Pallas kernel for TPUs, on `pallas_tiles`.

    gradient of a tile [values, N] += matrix [values, depth] x gradients of outputs that it meets [depth, N]

The matrix has the kernel's values where a pixel of the tile meets an output, and zeros elsewhere. The
gradients of all convolutions of the same images are added in the chip's memory and written once.
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
from epsanet_jax.ops.pallas_call import call, clear, divide, index, loop, multiply, span
from epsanet_jax.ops.pallas_columns import Rows
from epsanet_jax.ops.pallas_tiles import LANES, Plan

HOLDS_TILES = False  # the matrix units hold the gradients of the outputs


# Traced and lowered once for equal convolutions.
@functools.partial(jax.jit, static_argnames=('shape', 'groups', 'stride', 'interpret'))
def input_gradient(
    shape: tuple[int, ...],
    dys: Sequence[jax.Array],
    kernels: Sequence[jax.Array],
    groups: tuple[int, ...],
    stride: int,
    interpret: bool = False,
) -> jax.Array:
    """Returns the gradient of images of a `shape` [N, H, W, C_in], with padding `size // 2`.

    Args:
        shape: of the images.
        dys: gradients of the outputs of each convolution, [N, rows, columns, C_out].
        kernels: of each convolution, [size, size, C_in / groups, C_out].
        groups: number of groups of each.
        stride: pixels between two outputs, for rows and columns.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    n, h, w, channels = shape
    dtype = dys[0].dtype
    plan = Plan.of(shape, [k.shape for k in kernels], groups, stride, HOLDS_TILES)
    orders = [columns.order(b, dtype) for b in plan.branches]
    moved = [strips.images_last(dy) for dy in dys]
    (dx,) = call(
        'toeplitz_input_gradient',
        functools.partial(_kernel, plan=plan),
        moved,
        [columns.tables(plan, kernels, groups), orders],
        [((plan.branches[0].rows, stride, w, channels, moved[0].shape[3]), dtype)],
        scratch(plan, dtype),
        {'arrived': (len(dys), 2), 'left': ()},
        sum(dy.size * math.prod(k.shape[:3]) for dy, k in zip(dys, kernels, strict=True)),
        interpret,
    )
    return dx.reshape(-1, *dx.shape[2:])[:h, ..., :n].transpose(3, 0, 1, 2)


def scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns shape and type of each array that the kernel has in the chip's memory."""
    rounded = *plan.pixels()[:2], *plan.shape[2:], LANES
    return {
        'rows': [b.arriving(plan.strip, dtype) for b in plan.branches],
        'matrices': [
            [((b.blocks, b.values, b.depth(phase)), dtype) for phase in range(plan.stride)]
            for b in plan.branches
        ],
        'sums': (plan.pixels(), jnp.dtype('float32')),
        'rounded': (rounded, dtype),
    }


def _kernel(dys, held, out, *, plan, rows, matrices, sums, rounded, arrived, left):
    """Builds the matrices, then computes the gradient of 128 images after the other."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    tables, orders = held
    columns.build(plan, tables, matrices, transpose=True)
    clear([arrays['arriving'] for arrays in rows])

    def add(batch):
        images = span(batch, LANES)
        outputs = columns.begin_rows(plan, dys, images, orders, arrived, rows)

        def compute(strip):
            columns.read_rows(plan, outputs, strip)
            for phase, i in itertools.product(range(plan.stride), range(len(outputs))):
                branch = plan.branches[i]
                settings = phase, strip * plan.strip, matrices[i][phase], sums.at[:, index(phase)], i == 0
                strips.walk(branch, phase, plan.strip, functools.partial(_add, outputs[i], *settings))
            to = out.at[pl.ds(strip * plan.strip, plan.strip), ..., images]
            copy = pltpu.make_async_copy(rounded, to, left)
            pl.when(strip > 0)(copy.wait)  # of the strip before
            loop(plan.strip * plan.stride, functools.partial(_round_row, plan, sums, rounded))
            copy.start()
            pl.when(strip == plan.strips - 1)(copy.wait)

        loop(plan.strips, compute)

    loop(dys[0].shape[3] // LANES, add)


def _round_row(plan: Plan, sums, rounded, place):
    row, phase = divide(place, plan.stride)
    rounded[row, phase] = sums[row, phase, : plan.shape[2]].astype(rounded.dtype)


def _add(outputs: Rows, phase: int, begin, matrices, sums, first: bool, group, top, lists):
    """Adds tiles of neighbouring blocks to the sums, or writes them as their `first` term."""
    from jax.experimental import pallas as pl

    b = outputs.branch
    count = strips.blocks_at_once(b, phase)
    for tiles in lists:
        for block in (group * count + part for part in range(count)):
            products = multiply(matrices[block], outputs.seen(phase, block, begin + top, tiles))
            for i, tile in enumerate(tiles):
                of_tile = products[:, i * LANES : (i + 1) * LANES].reshape(*b.tile, b.inputs, LANES)
                to = pl.ds(top, b.tile[0]), span(tile, b.tile[1]), span(block, b.inputs)
                sums[to] = of_tile if first else sums[to] + of_tile
