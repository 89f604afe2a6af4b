"""What the Pallas kernels for TPUs read beside images: tables of a kernel's values, rows of outputs."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.ops import rewrites
from epsanet_jax.ops.pallas_call import divide, index, loop, multiply, remainder, slot_of, span
from epsanet_jax.ops.pallas_tiles import LANES, Branch, Plan


def table(kernel: jax.Array, groups: int, branch: Branch) -> jax.Array:
    """Returns the kernel's values where a column of the outputs meets one of a tile, for each of its rows.

    [blocks, kernel row, (column, output), (tile row, tile column, input)]
    """
    b = branch
    blocks = rewrites.merge_groups(kernel, groups, groups // b.blocks)  # [p, q, I, B, O]
    column, q, x = np.ix_(range(b.columns_seen), range(b.size), range(b.tile[1]))
    meets = jnp.asarray(q == x + b.size // 2 + b.stride * (b.before - column), kernel.dtype)
    meets = jnp.tile(meets, b.tile[0])[:, :, None, :, None]  # [column, q, 1, tile rows * columns, 1]
    same = jnp.eye(b.inputs, dtype=kernel.dtype)[:, None]  # [input, 1, input of a tile]
    # A product with ones: TPUs pad a last axis of few outputs to 128.
    ones = (meets * same).reshape(b.columns_seen, b.size, b.inputs, b.values)
    result = jnp.einsum('pqigo,cqiv->gpcov', blocks, ones, precision=lax.Precision.HIGHEST)
    return result.reshape(b.blocks, b.size, b.across, b.values)


def tables(plan: Plan, kernels: Sequence[jax.Array], groups: Sequence[int]) -> list[jax.Array]:
    """Returns the table of each kernel."""
    return [table(k, g, b) for k, g, b in zip(kernels, groups, plan.branches, strict=True)]


def order(branch: Branch, dtype: jnp.dtype) -> jax.Array:
    """Returns the matrix that orders (column, block, output) as (block, column, output)."""
    sizes = branch.together, branch.blocks, branch.outputs
    places = np.arange(math.prod(sizes)).reshape(sizes).transpose(1, 0, 2).ravel()
    return jnp.asarray(np.eye(len(places))[places], dtype)


class Rows:
    """Rows of the outputs' gradients that arrive from HBM one after the other.

    The window holds those that a strip meets, with their columns beside the outputs of each block. Row r of
    those with their border is at place r modulo their number.
    """

    def __init__(self, branch: Branch, dy: Any, order: Any, arrived: Any, arriving: Any, window: Any) -> None:
        """Starts the first copy.

        Args:
            branch: sizes.
            dy: reference to the gradient of 128 images, [rows, columns, C_out, LANES].
            order: matrix of `order`.
            arrived: two semaphores.
            arriving: reference to two rows, zero beside the images.
            window: reference, [blocks, rows, columns x outputs, LANES].
        """
        self.branch, self.dy, self.order, self.arrived = branch, dy, order, arrived
        self.arriving, self.window = arriving, window
        self._copy(jnp.int32(0)).start()

    def _copy(self, row: Any) -> Any:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import tpu as pltpu

        slot = slot_of(row)
        inside = self.arriving.at[slot, pl.ds(self.branch.before, self.branch.columns)]
        return pltpu.make_async_copy(self.dy.at[row], inside, self.arrived.at[slot])

    def wait(self, stored: Any) -> None:
        """Waits for a row, of those with their border, and starts the copy of the next one."""
        from jax.experimental import pallas as pl

        row, rows = stored - self.branch.before, self.branch.rows
        pl.when((row >= 0) & (row + 1 < rows))(lambda: self._copy(row + 1).start())
        pl.when((row >= 0) & (row < rows))(lambda: self._copy(row).wait())

    def arrange(self, stored: Any) -> None:
        """Writes a row, of those with their border, to its place."""
        from jax.experimental import pallas as pl

        b, row = self.branch, stored - self.branch.before
        place, slot = remainder(stored, self.window.shape[1]), slot_of(row)
        inside = (row >= 0) & (row < b.rows)
        for first in range(0, b.columns_stored, b.together):
            taken = self.arriving[slot, first : first + b.together].reshape(-1, LANES)
            if b.together > 1:
                taken = multiply(self.order[...], taken).astype(taken.dtype)
            taken = jnp.where(inside, taken, jnp.zeros_like(taken)).reshape(b.blocks, -1, LANES)
            self.window[:, place, pl.ds(first * b.outputs, taken.shape[1])] = taken

    def seen(self, phase: int, block: Any, row: Any, tiles: Sequence[int]) -> jax.Array:
        """Returns what tiles meet, [depth, tiles x LANES].

        Args:
            phase: of the rows of the tiles.
            block: of the tiles.
            row: first row of the tiles, in its phase.
            tiles: which ones, from left to right.
        """
        b, kept = self.branch, self.window.shape[1]
        first = row + b.before - b.rows_before(phase)
        rows = [remainder(first + r, kept) for r in range(b.rows_seen(phase))]
        each = []
        for tile in tiles:
            met = span(tile, b.step * b.outputs, b.across)
            each.append(jnp.concatenate([self.window[block, row, met] for row in rows]))
        return jnp.concatenate(each, axis=1)


def begin_rows(
    plan: Plan, dys: Sequence[Any], images: Any, orders: Sequence[Any], arrived: Any, arrays: Sequence[Any]
) -> list[Rows]:
    """Returns the rows of each branch for 128 images; reads those that the first strip shares with the next.

    Args:
        plan: sizes.
        dys: references to the gradients of all images, [rows, columns, C_out, N].
        images: which 128 of them.
        orders: matrix of `order` for each branch.
        arrived: two semaphores for each branch.
        arrays: those of `Branch.arriving`.
    """
    rows = [
        Rows(branch, dys[i].at[..., images], orders[i], arrived.at[index(i)], **arrays[i])
        for i, branch in enumerate(plan.branches)
    ]
    for each in rows:
        _read(each.window.shape[1] - plan.strip, [each], [0])
    return rows


def read_rows(plan: Plan, rows: Sequence[Rows], strip: Any) -> None:
    """Reads the other rows that a strip meets."""
    first = [strip * plan.strip + each.window.shape[1] - plan.strip for each in rows]
    _read(plan.strip, rows, first)


def _read(count: int, rows: Sequence[Rows], first: Sequence[Any]) -> None:
    def read(n):
        for each, begin in zip(rows, first, strict=True):
            each.wait(begin + n)
        for each, begin in zip(rows, first, strict=True):
            each.arrange(begin + n)

    loop(count, read)


def build(plan: Plan, tables: Sequence[Any], matrices: Sequence[Any], transpose: bool = False) -> None:
    """Writes the matrices of each branch, phase and block, [depth, values] or the other way round."""

    def write(branch, phase, values, matrix, block):
        built = _matrix(branch, phase, values, block)
        matrix[block] = (built.T if transpose else built).astype(matrix.dtype)

    for branch, values, each in zip(plan.branches, tables, matrices, strict=True):
        for phase, matrix in enumerate(each):
            loop(branch.blocks, functools.partial(write, branch, phase, values, matrix))


def _matrix(branch: Branch, phase: int, values: Any, block: Any) -> jax.Array:
    """Returns the matrix of a block for a phase, [(row, column, output), values], in float32.

    Args:
        branch: sizes.
        phase: of the rows of the tiles.
        values: `table`.
        block: which one.
    """
    row_of = row_of_lanes(branch)
    parts = []
    for seen in range(branch.rows_seen(phase)):
        found = jnp.zeros((branch.across, branch.values), jnp.float32)
        for row in range(branch.tile[0]):
            p = branch.kernel_row(phase, row, seen)
            if p is not None:
                found = jnp.where(row_of == row, values[block, p].astype(jnp.float32), found)
        parts.append(found)
    return jnp.concatenate(parts)


def row_of_lanes(branch: Branch) -> jax.Array:
    """Returns the row of a tile for each of its values."""
    lanes = lax.broadcasted_iota(jnp.int32, (1, branch.values), 1)
    return divide(lanes, branch.tile[1] * branch.inputs)[0]
