"""Grouped convolutions as a Pallas kernel for TPUs, on `pallas_tiles`.

    outputs that a tile meets [depth, N] += matrix [depth, values] x tile [values, N]

The matrix has the kernel's values where an output meets a pixel of the tile, and zeros elsewhere. All
convolutions of the same images read them once. The chip's memory holds the sums of a few rows of outputs, row
r at place r modulo their number. A row that no later tile meets is rounded and leaves.
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
from epsanet_jax.ops.pallas_call import call, clear, index, loop, multiply, remainder, slot_of, span
from epsanet_jax.ops.pallas_tiles import LANES, Branch, Plan

HOLDS_TILES = True  # in the matrix units


# Traced and lowered once for equal convolutions.
@functools.partial(jax.jit, static_argnames=('groups', 'stride', 'interpret'))
def convolve(
    x: jax.Array,
    kernels: Sequence[jax.Array],
    groups: tuple[int, ...],
    stride: int,
    interpret: bool = False,
) -> list[jax.Array]:
    """Returns each convolution [N, rows, columns, C_out], with padding `size // 2`.

    Args:
        x: images, [N, H, W, C_in].
        kernels: of each convolution, [size, size, C_in / groups, C_out].
        groups: number of groups of each.
        stride: pixels between two outputs, for rows and columns.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    plan = Plan.of(x.shape, [k.shape for k in kernels], groups, stride, HOLDS_TILES)
    images = strips.by_phase(x, plan)
    orders = [columns.order(b, x.dtype).T for b in plan.branches]
    shapes = [(b.rows, b.columns, b.blocks * b.outputs, images.shape[-1]) for b in plan.branches]
    ys = call(
        'toeplitz_convolution',
        functools.partial(_kernel, plan=plan),
        images,
        [columns.tables(plan, kernels, groups), orders],
        [(shape, x.dtype) for shape in shapes],
        scratch(plan, x.dtype),
        {'arrived': (2,), 'left': (len(kernels), 2)},
        sum(math.prod(s) * math.prod(k.shape[:3]) for s, k in zip(shapes, kernels, strict=True)),
        interpret,
    )
    return [y[..., : x.shape[0]].transpose(3, 0, 1, 2) for y in ys]


def scratch(plan: Plan, dtype: jnp.dtype) -> dict[str, Any]:
    """Returns shape and type of each array that the kernel has in the chip's memory."""
    rows = []
    for b in plan.branches:
        sums = b.blocks, b.rows_kept(plan.strip), b.columns_stored * b.outputs, LANES
        leaving = 2, b.columns_stored, b.blocks * b.outputs, LANES
        rows.append({'sums': (sums, jnp.dtype('float32')), 'leaving': (leaving, dtype)})
    matrices = [
        [((b.blocks, b.depth(phase), b.values), dtype) for phase in range(plan.stride)] for b in plan.branches
    ]
    return {'rows': rows, 'matrices': matrices, 'pixels': ((2, *plan.pixels()), dtype)}


def _kernel(x, held, *outs, plan, rows, matrices, pixels, arrived, left):
    """Builds the matrices, then convolves 128 images after the other."""
    from jax.experimental import pallas as pl

    tables, orders = held
    columns.build(plan, tables, matrices)
    clear(pixels)  # beside the images they stay zero

    def convolve(batch):
        images = span(batch, LANES)
        copy = functools.partial(strips.strip_copy, plan, x.at[..., images], pixels, arrived)
        copy(jnp.int32(0)).start()
        clear([arrays['sums'] for arrays in rows])
        outputs = [
            _Rows(branch, outs[i].at[..., images], orders[i], left.at[index(i)], **rows[i])
            for i, branch in enumerate(plan.branches)
        ]

        def compute(strip):
            pl.when(strip + 1 < plan.strips)(lambda: copy(strip + 1).start())
            copy(strip).wait()
            for phase, i in itertools.product(range(plan.stride), range(len(outputs))):
                tiles = pixels.at[slot_of(strip), :, index(phase)]
                add = functools.partial(_add, outputs[i], phase, matrices[i][phase], strip * plan.strip)
                strips.visit_tiles(plan.branches[i], phase, tiles, add)
            _leave(outputs, strip * plan.strip, plan.strip)

        loop(plan.strips, compute)
        for each in outputs:
            each.end()

    loop(x.shape[-1] // LANES, convolve)


def _add(outputs: '_Rows', phase: int, matrices, begin, top, parts):
    """Adds the products of a row of tiles to the sums."""
    b, sums = outputs.branch, outputs.sums
    first = begin + top + b.before - b.rows_before(phase)
    places = [remainder(first + r, sums.shape[1]) for r in range(b.rows_seen(phase))]
    step = b.step * b.outputs
    for block, tiles, values in parts:
        products = multiply(matrices[block], values)
        met = span(tiles[0], step, (len(tiles) - 1) * step + b.across)
        for r, place in enumerate(places):
            rows = products[r * b.across : (r + 1) * b.across]
            each = [rows[:, i * LANES : (i + 1) * LANES] for i in range(len(tiles))]
            sums[block, place, met] += _joined(each, step)


def _joined(products: Sequence[jax.Array], step: int) -> jax.Array:
    """Returns the sum of the products of tiles, each of which begins `step` rows after the one before."""
    total = products[0]
    for each in products[1:]:
        shared = len(each) - step
        first, second = total[: len(total) - shared], total[len(total) - shared :]
        total = jnp.concatenate([first, second + each[:shared], each[shared:]])
    return total


class _Rows:
    """The rows of a branch's outputs, which leave one after the other."""

    def __init__(self, branch: Branch, y: Any, order: Any, left: Any, sums: Any, leaving: Any) -> None:
        self.branch, self.y, self.order, self.left = branch, y, order, left
        self.sums, self.leaving = sums, leaving

    def _copy(self, row: Any) -> Any:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        slot = slot_of(row)
        inside = self.leaving.at[slot, pl.ds(self.branch.before, self.branch.columns)]
        return pltpu.make_async_copy(inside, self.y.at[row], self.left.at[slot])

    def wait(self, stored: Any) -> None:
        """Waits until there is space for a row, of those with their border."""
        from jax.experimental import pallas as pl

        row = stored - self.branch.before
        pl.when(row >= 2)(lambda: self._copy(row - 2).wait())

    def round(self, stored: Any) -> None:
        """Rounds a row, and frees its place."""
        from jax.experimental import pallas as pl

        b, sums, leaving = self.branch, self.sums, self.leaving
        slot = slot_of(stored - b.before)
        place = remainder(stored, sums.shape[1])
        for first in range(0, b.columns_stored, b.together):
            if first + b.together > b.before and first < b.before + b.columns:
                taken = sums[:, place, pl.ds(first * b.outputs, b.together * b.outputs)]
                taken = taken.astype(leaving.dtype).reshape(-1, LANES)
                if b.together > 1:
                    taken = multiply(self.order[...], taken).astype(leaving.dtype)
                leaving[slot, pl.ds(first, b.together)] = taken.reshape(b.together, -1, LANES)
        sums[:, place] = jnp.zeros((b.blocks, *sums.shape[2:]), sums.dtype)

    def start(self, stored: Any) -> None:
        """Starts the copy of a row."""
        from jax.experimental import pallas as pl

        row = stored - self.branch.before
        pl.when(row >= 0)(lambda: self._copy(row).start())

    def end(self) -> None:
        """Lets the last rows leave, and waits for them."""
        b = self.branch
        _leave([self], b.rows, b.before)
        for row in range(max(0, b.rows - 2), b.rows):
            self._copy(jnp.int32(row)).wait()


def _leave(rows: Sequence[_Rows], first: Any, count: int) -> None:
    """Lets rows leave that are complete."""

    def leave(n):
        for step in (_Rows.wait, _Rows.round, _Rows.start):
            for each in rows:
                step(each, first + n)

    loop(count, leave)
