"""Tiles of images and of outputs for the Pallas kernels for TPUs, and the memory that they need.

A matrix unit multiplies 128 by 128 values at once, and a group of the pyramid has 1 to 64 outputs. The
kernels therefore compute with tiles: rows and columns of the images with the inputs of a block of groups, and
all outputs that meet them. All images of a batch lie in the lanes, [H, W, C, N]. This is how the TPU compiler
lays out the images of this network, so that no copy is needed.

A block has too few outputs to fill a register, so the columns of the outputs lie beside them: [blocks, rows,
columns x outputs, N]. Rows of the images that differ by the stride meet other rows of the convolution's
kernel. Each such phase has products of its own, which therefore hold no zeros for the stride.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epsanet_jax.ops.plain import divisors

LANES = 128
CHANNELS = 8  # fewer inputs of a group are merged: they would lie across the sublanes of a register
CHUNK = 16  # channels of a register of bfloat16
MARGIN = 2**22  # bytes of memory for what the compiler adds
MOST_VALUES = 1024  # of a tile

Array = tuple[tuple[int, ...], Any]  # shape and type


def merged(inputs: int, groups: int) -> int | None:
    """Returns how many groups become one, None if their inputs cannot fill whole registers."""
    merge = max(1, CHANNELS // inputs)
    whole = inputs * merge
    fits = whole == CHANNELS or whole % CHUNK == 0
    return merge if groups % merge == 0 and fits else None


class Branch(NamedTuple):
    """Sizes for one convolution; its groups are merged to `blocks`."""

    size: int  # of the convolution's kernel
    stride: int
    blocks: int
    inputs: int  # of a block
    outputs: int  # of a block
    rows: int  # of the outputs, and of a phase of the images
    columns: int  # of the outputs
    width: int  # columns of the images
    tile: tuple[int, int]  # rows of a phase of the images, and columns

    @property
    def values(self) -> int:
        """Values of a tile."""
        return math.prod(self.tile) * self.inputs

    @property
    def tiles(self) -> int:
        """Tiles side by side; the last one may reach beyond the images."""
        return -(-self.width // self.tile[1])

    @property
    def step(self) -> int:
        """Columns of the outputs from a tile to the next one."""
        return self.tile[1] // self.stride

    @property
    def together(self) -> int:
        """Columns of the outputs whose values fill whole registers."""
        return CHUNK // math.gcd(self.outputs, CHUNK)

    @property
    def before(self) -> int:
        """Rows, and columns, of the outputs that the first of the images meets before its own."""
        return self.size // 2 // self.stride

    def rows_before(self, phase: int) -> int:
        """Returns `before` for the rows of a phase."""
        return (self.size // 2 - phase) // self.stride

    def rows_seen(self, phase: int) -> int:
        """Returns the rows of the outputs that a tile meets."""
        return self.tile[0] + self.rows_before(phase) + (phase + self.size // 2) // self.stride

    def rows_kept(self, strip: int) -> int:
        """Returns the rows of the outputs, with their border, that a strip meets."""
        return strip + self.before + (self.stride - 1 + self.size // 2) // self.stride

    @property
    def columns_seen(self) -> int:
        """Columns of the outputs that a tile meets, in whole registers."""
        seen = self.before + (self.tile[1] - 1 + self.size // 2) // self.stride + 1
        return -(-seen // self.together) * self.together

    @property
    def columns_stored(self) -> int:
        """Columns of the outputs with their border, in whole registers."""
        stored = (self.tiles - 1) * self.step + self.columns_seen
        return -(-stored // self.together) * self.together

    @property
    def across(self) -> int:
        """Values of the outputs in a row that a tile meets."""
        return self.columns_seen * self.outputs

    def depth(self, phase: int) -> int:
        """Returns the values of the outputs that a tile meets."""
        return self.rows_seen(phase) * self.across

    def products(self, phase: int) -> int:
        """Returns the products of 128 by 128 values with 128 others for a tile."""
        return -(-self.depth(phase) // LANES) * -(-self.values // LANES)

    def held(self, dtype: jnp.dtype) -> list[Array]:
        """Returns `pallas_columns.table` and `order`."""
        together = self.together * self.blocks * self.outputs
        return [((self.blocks, self.size, self.across, self.values), dtype), ((together, together), dtype)]

    def kernel_row(self, phase: int, row: int, seen: int) -> int | None:
        """Returns the row of the kernel that joins a row of a tile and one that it meets, or None."""
        found = phase + self.size // 2 + self.stride * (row + self.rows_before(phase) - seen)
        return found if 0 <= found < self.size else None

    def cycles(self, holds_tiles: bool) -> float:
        """Returns about the cycles of a matrix unit for a row of each phase; see `Plan.of`."""
        each = 0
        for depth in map(self.depth, range(self.stride)):
            held, passed = (self.values, depth) if holds_tiles else (depth, self.values)
            # It takes as long to load 128 values as to multiply them with 128 others.
            each += -(-held // LANES) * max(passed, LANES)
        return self.blocks * self.tiles * each / self.tile[0]

    def arriving(self, strip: int, dtype: jnp.dtype) -> dict[str, Array]:
        """Returns the arrays of `pallas_columns.Rows` in the chip's memory."""
        arriving = 2, self.columns_stored, self.blocks * self.outputs, LANES
        window = self.blocks, self.rows_kept(strip), self.columns_stored * self.outputs, LANES
        return {'arriving': (arriving, dtype), 'window': (window, dtype)}


class Plan(NamedTuple):
    """Sizes for convolutions of the same images."""

    shape: tuple[int, ...]  # of the images, [N, H, W, C]
    stride: int
    strip: int  # rows of each phase that are in the chip's memory at once
    branches: tuple[Branch, ...]

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        kernels: Sequence[Sequence[int]],
        groups: Sequence[int],
        stride: int,
        holds_tiles: bool,
    ) -> 'Plan':
        """Returns the plan with the fewest cycles for kernels [size, size, C_in / groups, C_out].

        Args:
            shape: of the images, [N, H, W, C].
            kernels: shapes.
            groups: number of groups of each.
            stride: pixels between two outputs, for rows and columns.
            holds_tiles: whether the matrix units hold tiles, or what tiles meet, while others pass by.
        """
        return _plan(tuple(shape), tuple(map(tuple, kernels)), tuple(groups), stride, holds_tiles)

    @property
    def strips(self) -> int:
        """How many strips there are."""
        return self.branches[0].rows // self.strip

    def pixels(self) -> tuple[int, ...]:
        """Returns the shape of a strip with all that tiles reach, [rows, phases, columns, C, LANES]."""
        width = max(b.tiles * b.tile[1] for b in self.branches)
        return self.strip, self.stride, width, self.shape[3], LANES


@functools.cache
def _plan(
    shape: tuple[int, ...],
    kernels: tuple[tuple[int, ...], ...],
    groups: tuple[int, ...],
    stride: int,
    holds_tiles: bool,
) -> Plan:
    plans = []
    for strip in divisors(-(-shape[1] // stride)):
        each = zip(kernels, groups, strict=True)
        branches = tuple(_branch(shape, k, g, stride, strip, holds_tiles) for k, g in each)
        plans.append(Plan(shape, stride, strip, branches))
    return min(plans, key=lambda p: (sum(b.cycles(holds_tiles) for b in p.branches), p.strip))


def _branch(
    shape: Sequence[int],
    kernel: Sequence[int],
    groups: int,
    stride: int,
    strip: int,
    holds_tiles: bool,
) -> Branch:
    """Returns the branch with the fewest cycles, for tiles of at most `strip` rows."""
    blocks = groups // (merged(kernel[2], groups) or 1)
    rows, columns = (-(-n // stride) for n in shape[1:3])
    sizes = kernel[0], stride, blocks, shape[3] // blocks, kernel[3] // blocks, rows, columns, shape[2]
    tiles = itertools.product(divisors(strip), range(stride, columns * stride + 1, stride))
    found = [Branch(*sizes, tile) for tile in tiles]
    # What a tile meets must begin at a whole register.
    found = [b for b in found if b.tiles == 1 or b.step % b.together == 0]
    small = [b for b in found if b.values <= MOST_VALUES] or found[:1]
    return min(small, key=lambda b: (b.cycles(holds_tiles), b.values))


def exist(shape: Sequence[int], kernel: Sequence[int], groups: int) -> bool:
    """Returns whether there are tiles for images [N, H, W, C] and a kernel [size, size, I, C_out].

    Channels must fill registers, alone or with those of the next groups.
    """
    return shape[3] % CHUNK == 0 and kernel[3] % CHUNK == 0 and merged(kernel[2], groups) is not None


def nbytes(arrays: Any) -> int:
    """Returns the bytes of a tree of `Array` in the chip's memory."""
    leaves = jax.tree.leaves(arrays, is_leaf=is_array)
    whole = [(*shape[:-1], -(-shape[-1] // LANES) * LANES, dtype) for shape, dtype in leaves]
    return sum(math.prod(shape) * jnp.dtype(dtype).itemsize for *shape, dtype in whole)


def is_array(a: Any) -> bool:
    """Returns whether this is an `Array`, in a tree of them."""
    return isinstance(a, tuple)
