"""What the Pallas kernels for TPUs read: tables of a kernel's values, strips of images, rows of outputs."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.ops import rewrites
from epsanet_jax.ops.pallas_call import divide, index, loop, multiply, remainder, slot_of
from epsanet_jax.ops.pallas_tiles import CHUNK, LANES, Branch, Plan

TOGETHER = 2  # tiles in one product: a matrix unit of a v6e is 256 wide, and a tile has 128 images


def images_last(a: jax.Array) -> jax.Array:
    """Returns [N, H, W, C] as [H, W, C, N], with zeros up to whole lanes."""
    return jnp.pad(a.transpose(1, 2, 3, 0), [(0, 0)] * 3 + [(0, -a.shape[0] % LANES)])


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
        from jax.experimental import pallas as pl

        b, kept = self.branch, self.window.shape[1]
        first = row + b.before - b.rows_before(phase)
        rows = [remainder(first + r, kept) for r in range(b.rows_seen(phase))]
        each = []
        for tile in tiles:
            met = pl.ds(tile * b.step * b.outputs, b.across)
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


def side_by_side(tiles: int) -> list[range]:
    """Returns the tiles of a row, `TOGETHER` at a time."""
    return [range(first, min(first + TOGETHER, tiles)) for first in range(0, tiles, TOGETHER)]


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


def by_phase(x: jax.Array, plan: Plan) -> jax.Array:
    """Returns images [N, H, W, C] as [rows, phases, W, C, N]."""
    rows = plan.branches[0].rows
    x = jnp.pad(images_last(x), [(0, rows * plan.stride - x.shape[1]), (0, 0), (0, 0), (0, 0)])
    return x.reshape(rows, plan.stride, *x.shape[1:])


def strip_copy(plan: Plan, x: Any, pixels: Any, arrived: Any, strip: Any) -> Any:
    """Returns the copy of a strip from HBM to one of two places in turn.

    Args:
        plan: sizes.
        x: reference to 128 images, [rows, phases, W, C, LANES].
        pixels: reference to the chip's memory, [2, *plan.pixels()].
        arrived: two semaphores.
        strip: which one.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    slot, rows = slot_of(strip), pl.ds(strip * plan.strip, plan.strip)
    inside = pixels.at[slot, :, :, pl.ds(0, plan.shape[2])]
    return pltpu.make_async_copy(x.at[rows], inside, arrived.at[slot])


def each_row_of_tiles(branch: Branch, pixels: Any, body: Callable[[Any, list[Any]], None]) -> None:
    """Calls `body` for each row of tiles of neighbouring blocks in a strip.

    Args:
        branch: sizes.
        pixels: reference to the rows of a phase, [rows, columns, C, LANES].
        body: gets the first row of pixels, and a list of block, tiles and values [values, tiles x LANES].
    """
    from jax.experimental import pallas as pl

    # Neighbouring blocks may share a register.
    count = min(branch.blocks, max(1, CHUNK // branch.inputs))
    rows, wide = pixels.shape[0] // branch.tile[0], count * branch.inputs

    def visit(place):
        blocks, row = divide(place, rows)
        top = row * branch.tile[0]
        channels = pl.ds(pl.multiple_of(blocks * wide, wide), wide)
        parts = []
        for tiles in side_by_side(branch.tiles):
            places = (pl.ds(tile * branch.tile[1], branch.tile[1]) for tile in tiles)
            read = [pixels[pl.ds(top, branch.tile[0]), place, channels] for place in places]
            for part in range(count):
                inputs = slice(part * branch.inputs, (part + 1) * branch.inputs)
                values = [r[:, :, inputs].reshape(-1, LANES) for r in read]
                parts.append((blocks * count + part, tiles, jnp.concatenate(values, axis=1)))
        body(top, parts)

    loop(branch.blocks // count * rows, visit)
