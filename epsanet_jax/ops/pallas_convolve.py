"""Grouped convolutions as a Pallas kernel for TPUs, on Toeplitz tiles (`pallas_tiles`).

    outputs of a tile [values, images] = matrix [values, window] x window of the images [window, images]

The matrix has the kernel's values where a pixel of the tile meets one of the window, and zeros elsewhere. The
matrices of all groups are built once; then every image is read once.
"""

import functools
import itertools
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
    precision,
    seen,
)
from epsanet_jax.ops.plain import divisors


class Plan(NamedTuple):
    """Sizes of the kernel for one convolution."""

    shape: tuple[int, ...]  # of the images, [N, H, W, C]
    outputs: tuple[int, ...]  # [N, rows, columns, C_out]
    groups: int
    size: int  # of the convolution's kernel
    stride: int
    tile: tuple[int, int]  # pixels of the outputs

    @classmethod
    def of(cls, shape: Sequence[int], kernel: Sequence[int], groups: int, stride: int) -> 'Plan':
        """Returns the plan with the fewest products for a kernel [size, size, C_in / groups, C_out]."""
        size = kernel[0]
        rows, columns = ((n - 1) // stride + 1 for n in shape[1:3])
        make = functools.partial(
            cls, tuple(shape), (shape[0], rows, columns, kernel[3]), groups, size, stride
        )
        tiles = itertools.product(divisors(rows), divisors(columns))
        fitting = [t for t in tiles if math.prod(t) * kernel[3] // groups <= 2 * LANES]
        plans = [make(t) for t in fitting or [(1, 1)]]
        # The matrix unit takes as long to load a window as to multiply it with 128 values.
        return min(plans, key=lambda p: max(p.values, LANES) * p.depth / math.prod(p.tile))

    @property
    def seen(self) -> tuple[int, int]:
        """Rows and columns of the window that a tile reads."""
        return seen(self.tile, self.size, self.stride)

    @property
    def inputs(self) -> int:
        """Inputs of a group."""
        return self.shape[3] // self.groups

    @property
    def values(self) -> int:
        """Values of a tile."""
        return math.prod(self.tile) * self.outputs[3] // self.groups

    @property
    def depth(self) -> int:
        """Values of a window."""
        return math.prod(self.seen) * self.inputs

    def scratch(self, dtype: jnp.dtype) -> dict[str, tuple[tuple[int, ...], jnp.dtype]]:
        """Returns shape and type of each array in the chip's memory."""
        border = bordered(self.shape[1:3], self.outputs[1:3], self.size, self.stride)
        image = *self.outputs[1:], LANES
        single = jnp.dtype('float32')
        arrays = {
            'kernels': ((self.groups, self.size, self.size, self.inputs, self.values), dtype),
            'matrices': ((self.groups, self.values, self.depth), dtype),
            'rows': ((self.size, self.seen[1], self.inputs, self.values), single),
            'toeplitz': ((self.depth, self.values), single),
            'window': ((2, *border, chunk(self.inputs), LANES), dtype),
            'result': (image, dtype),
        }
        # A part of a register of bfloat16 is slow to write.
        if self.outputs[3] // self.groups % CHUNK and dtype != single:
            arrays |= {'result': (image, single), 'rounded': (image, dtype)}
        return arrays

    def needed(self, dtype: jnp.dtype) -> int:
        """Returns the bytes of all these arrays."""
        sides = [
            (*shape[:-1], -(-shape[-1] // LANES) * LANES, t) for shape, t in self.scratch(dtype).values()
        ]
        return sum(math.prod(shape) * t.itemsize for *shape, t in sides)


def fits(shape: Sequence[int], dtype: jnp.dtype, kernel: Sequence[int], groups: int, stride: int) -> bool:
    """Returns whether the kernel exists for images [N, H, W, C] and a convolution [size, size, I, C_out]."""
    if (kernel[2] != 8 and kernel[2] % CHUNK) or shape[3] % CHUNK or kernel[3] % CHUNK:
        return False
    return Plan.of(shape, kernel, groups, stride).needed(dtype) <= MEMORY


def convolve(x: jax.Array, kernel: jax.Array, groups: int, stride: int, interpret: bool = False) -> jax.Array:
    """Returns the convolution [N, rows, columns, C_out] with padding `size // 2`, where it `fits`.

    Args:
        x: images, [N, H, W, C_in].
        kernel: [size, size, C_in / groups, C_out].
        groups: number of groups.
        stride: pixels between two outputs, for rows and columns.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
    """
    from jax.experimental import pallas as pl  # here, because importing it takes long
    from jax.experimental.pallas import tpu as pltpu

    plan = Plan.of(x.shape, kernel.shape, groups, stride)
    images = jnp.pad(x.transpose(1, 2, 3, 0), [(0, 0)] * 3 + [(0, -x.shape[0] % LANES)])
    kernels = _repeat(kernel, plan)
    shape = *plan.outputs[1:], images.shape[3]
    products = plan.depth * math.prod(shape)
    scratch = {name: pltpu.VMEM(*array) for name, array in plan.scratch(x.dtype).items() if name != 'kernels'}
    y = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        in_specs=[pl.BlockSpec(memory_space=pltpu.HBM), pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
        # Like x: in a shard_map the result varies over the same mesh axes.
        out_shape=jax.eval_shape(lambda x: lax.full_like(x, 0, shape=shape), images),
        scratch_shapes={**scratch, 'arrived': pltpu.SemaphoreType.DMA((3,))},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=plan.needed(x.dtype) + MARGIN),
        cost_estimate=pl.CostEstimate(
            flops=2 * products,
            bytes_accessed=images.nbytes + kernels.nbytes + math.prod(shape) * x.dtype.itemsize,
            transcendentals=0,
        ),
        interpret=interpret,
        name='toeplitz_convolution',
    )(images, kernels)
    return y[..., : x.shape[0]].transpose(3, 0, 1, 2)


def _repeat(kernel: jax.Array, plan: Plan) -> jax.Array:
    """Returns the kernel once for each pixel of a tile, [groups, size, size, inputs, values]."""
    each = plan.outputs[3] // plan.groups
    kernel = kernel.reshape(*kernel.shape[:3], plan.groups, each).transpose(3, 0, 1, 2, 4)
    # A product with ones instead of a broadcast: TPUs pad a last axis of few outputs to 128.
    ones = jnp.asarray(np.tile(np.eye(each), math.prod(plan.tile)), kernel.dtype)
    return jnp.einsum('gpqio,ov->gpqiv', kernel, ones, precision=lax.Precision.HIGHEST)


def _kernel(x, kernels, out, *, plan, matrices, rows, toeplitz, window, result, rounded=None, arrived):
    """Builds the matrices, then convolves 128 images after the other."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    _build(plan, kernels, matrices, rows, toeplitz)
    window[...] = jnp.zeros_like(window)  # the borders stay zero
    each = plan.outputs[3] // plan.groups
    tiles = math.prod(plan.outputs[1:3]) // math.prod(plan.tile)

    def add(batch):
        images = pl.ds(pl.multiple_of(batch * LANES, LANES), LANES)
        copies = chunk_copies(x, window, arrived, images, plan.size // 2)
        copies[0].start()
        for slot, part, group in arriving_blocks(copies, window.shape[3] // plan.inputs):
            read = window.at[slot, :, :, part * plan.inputs : (part + 1) * plan.inputs]
            write = result.at[:, :, group * each : (group + 1) * each]
            loop(tiles, functools.partial(_tile, plan, read, matrices.at[group], write))
        if rounded is not None:
            loop(result.shape[0], functools.partial(_round_row, result, rounded))
        copy = pltpu.make_async_copy(
            result if rounded is None else rounded, out.at[:, :, :, images], arrived.at[np.int32(2)]
        )
        copy.start()
        copy.wait()

    loop(x.shape[3] // LANES, add)


def _round_row(result, rounded, row):
    rounded[row] = result[row].astype(rounded.dtype)


def _build(plan: Plan, kernels, matrices, rows, toeplitz):
    """Writes the matrix of each group, [values, window]."""
    from jax.experimental import pallas as pl

    pixel, _ = divide(lax.broadcasted_iota(jnp.int32, (1, 1, plan.values), 2), plan.outputs[3] // plan.groups)
    row_of, column_of = divide(pixel, plan.tile[1])
    width = plan.seen[1] * plan.inputs

    def build(group):
        def build_row(p):
            for v in range(plan.seen[1]):
                found = jnp.zeros((1, plan.inputs, plan.values), jnp.float32)
                for c in range(plan.tile[1]):
                    if 0 <= (q := v - plan.stride * c) < plan.size:
                        found = jnp.where(column_of == c, kernels[group, p, q].astype(jnp.float32), found)
                rows[p, v] = found[0]

        def build_window_row(u):
            found = jnp.zeros((plan.seen[1], plan.inputs, plan.values), jnp.float32)
            for r in range(plan.tile[0]):
                p = u - plan.stride * r
                inside = (p >= 0) & (p < plan.size) & (row_of == r)
                found = jnp.where(inside, rows[jnp.clip(p, 0, plan.size - 1)], found)
            place = pl.multiple_of(u * width, plan.inputs)
            toeplitz[pl.ds(place, width)] = found.reshape(width, plan.values)

        loop(plan.size, build_row)
        loop(plan.seen[0], build_window_row)
        matrices[group] = toeplitz[...].T.astype(matrices.dtype)

    loop(plan.groups, build)


def _tile(plan: Plan, window, matrix, result, place):
    """Computes a tile of a group."""
    from jax.experimental import pallas as pl

    row, column = divide(place, plan.outputs[2] // plan.tile[1])
    (rows, columns), step = plan.tile, plan.stride
    seen = window[pl.ds(row * rows * step, plan.seen[0]), pl.ds(column * columns * step, plan.seen[1])]
    products = lax.dot_general(
        matrix[...],
        seen.reshape(plan.depth, LANES),
        (((1,), (0,)), ((), ())),
        precision=precision(matrix.dtype),
        preferred_element_type=jnp.float32,
    )
    to = pl.ds(row * rows, rows), pl.ds(column * columns, columns)
    result[to] = products.reshape(rows, columns, -1, LANES).astype(result.dtype)
