"""What the Pallas kernels for TPUs read of images: strips of rows, and the tiles in them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from epsanet_jax.ops.pallas_call import divide, index, loop, slot_of, span
from epsanet_jax.ops.pallas_tiles import CHUNK, LANES, Branch, Plan
from epsanet_jax.ops.plain import divisors

TOGETHER = 2  # tiles in one product: a matrix unit of a v6e is 256 wide, and a tile has 128 images
# Products of 128 by 128 values with others in a step of a loop. With fewer, matrix units wait between steps;
# more take longer to compile.
LEAST_PRODUCTS = 28
LEAST_OF_ROW = 48  # the same, where the tiles of one row are divided among steps


def images_last(a: jax.Array) -> jax.Array:
    """Returns [N, H, W, C] as [H, W, C, N], with zeros up to whole lanes."""
    return jnp.pad(a.transpose(1, 2, 3, 0), [(0, 0)] * 3 + [(0, -a.shape[0] % LANES)])


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


def visit_tiles(branch: Branch, phase: int, pixels: Any, body: Callable[[Any, list[Any]], None]) -> None:
    """Calls `body` for tiles side by side, of neighbouring blocks, until it was called for all of a strip.

    Args:
        branch: sizes.
        phase: of the rows.
        pixels: reference to the rows of a phase, [rows, columns, C, LANES].
        body: gets the first row of pixels, and a list of block, tiles and values [values, tiles x LANES].
    """
    from jax.experimental import pallas as pl

    count = blocks_at_once(branch, phase)

    def read(group, top, lists):
        channels, parts = span(group, count * branch.inputs), []
        for tiles in lists:
            places = (span(tile, branch.tile[1]) for tile in tiles)
            each = [pixels[pl.ds(top, branch.tile[0]), place, channels] for place in places]
            for part in range(count):
                inputs = slice(part * branch.inputs, (part + 1) * branch.inputs)
                values = [tile[:, :, inputs].reshape(-1, LANES) for tile in each]
                parts.append((group * count + part, tiles, jnp.concatenate(values, axis=1)))
        body(top, parts)

    walk(branch, phase, pixels.shape[0], read)


def walk(branch: Branch, phase: int, rows: int, visit: Callable[[Any, Any, list[list[Any]]], None]) -> None:
    """Calls `visit` until it was called for all tiles of a strip.

    Args:
        branch: sizes.
        phase: of the rows.
        rows: how many the strip has.
        visit: gets which `blocks_at_once`, the first row, and lists of tiles; see `_along`.
    """
    count, rows_of_tiles = blocks_at_once(branch, phase), rows // branch.tile[0]

    def visit_row(place):
        group, row = divide(place, rows_of_tiles)
        top = row * branch.tile[0]
        _along(branch, count * branch.products(phase), functools.partial(visit, group, top))

    loop(branch.blocks // count * rows_of_tiles, visit_row)


def blocks_at_once(branch: Branch, phase: int) -> int:
    """Returns for how many neighbouring blocks a step of a loop computes a row of tiles."""
    shared = min(branch.blocks, max(1, CHUNK // branch.inputs))  # in one register
    counts = [n for n in divisors(branch.blocks) if n % shared == 0]
    enough = (n for n in counts if n * branch.tiles * branch.products(phase) >= LEAST_PRODUCTS)
    return next(enough, counts[-1])


def _along(branch: Branch, products: int, visit: Callable[[list[list[Any]]], None]) -> None:
    """Calls `visit` with the tiles of a row, from left to right.

    Args:
        branch: sizes.
        products: of 128 by 128 values with 128 others, for a tile.
        visit: gets lists of `TOGETHER` tiles or fewer. It is written out once for the steps of a loop, and
            for the tiles that remain.
    """
    tiles = branch.tiles
    steps = [n for n in range(TOGETHER, tiles, TOGETHER) if n * products >= LEAST_OF_ROW]
    step = min([tiles, *steps], key=lambda n: n + tiles % n)

    def visit_from(first, number):
        each = [first + index(i) for i in range(number)]
        visit([each[i : i + TOGETHER] for i in range(0, number, TOGETHER)])

    loop(tiles // step, lambda i: visit_from(i * index(step), step))
    if tiles % step:
        visit_from(index(tiles - tiles % step), tiles % step)
