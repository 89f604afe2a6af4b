"""Calls of Pallas kernels for TPUs, and the operations that they consist of."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from epsanet_jax.ops.pallas_tiles import CHUNK, MARGIN, Array, is_array, nbytes
from epsanet_jax.ops.plain import divisors

AT_ONCE = 2**16  # values that are written by one step of a loop


def call(
    name: str,
    kernel: Callable[..., None],
    moved: Any,
    held: Any,
    results: Sequence[Array],
    scratch: dict[str, Any],
    semaphores: dict[str, tuple[int, ...]],
    products: int,
    interpret: bool,
    holds_results: bool = False,
) -> list[jax.Array]:
    """Calls a Pallas kernel; returns its results.

    Args:
        name: of the operation.
        kernel: gets `moved`, `held`, each of the results, and `scratch` and `semaphores` by name.
        moved: arrays in HBM.
        held: arrays in the chip's memory.
        results: shapes and types.
        scratch: trees of arrays in the chip's memory.
        semaphores: shapes, of semaphores for copies.
        products: number of them, for XLA's estimates.
        interpret: whether to compute it by XLA's operations instead, on any platform; slow.
        holds_results: whether the results are in the chip's memory instead of HBM.
    """
    from jax.experimental import pallas as pl  # here, because importing it takes long
    from jax.experimental.pallas import tpu as pltpu

    hbm, vmem = (pl.BlockSpec(memory_space=space) for space in (pltpu.HBM, pltpu.VMEM))
    arrays = jax.tree.map(lambda a: pltpu.VMEM(*a), scratch, is_leaf=is_array)
    constant = [(a.shape, a.dtype) for a in jax.tree.leaves(held)]
    needed = nbytes([scratch, constant, results if holds_results else []])
    size = sum(a.nbytes for a in jax.tree.leaves(moved)) + (0 if holds_results else nbytes(results))
    # Like what is moved: in a shard_map the results vary over the same mesh axes.
    like = jax.tree.leaves(moved)[0]
    return pl.pallas_call(
        kernel,
        in_specs=[jax.tree.map(lambda _: hbm, moved), jax.tree.map(lambda _: vmem, held)],
        out_specs=[vmem if holds_results else hbm] * len(results),
        out_shape=jax.eval_shape(lambda a: [lax.full_like(a, 0, t, shape) for shape, t in results], like),
        scratch_shapes={**arrays, **{k: pltpu.SemaphoreType.DMA(shape) for k, shape in semaphores.items()}},
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=needed + MARGIN),
        cost_estimate=pl.CostEstimate(flops=2 * products, bytes_accessed=size, transcendentals=0),
        interpret=interpret,
        name=name,
    )(moved, held)


def loop(count: int, body: Callable[[Any], None]) -> None:
    """Calls `body` with 0 to count - 1, in a loop of the compiled program."""

    # The counter of fori_loop has 64 bits in 64-bit mode, or else its number of steps is not a constant. Then
    # Pallas lowers the body twice, and that of a loop inside four times.
    def step(i, _):
        body(i)
        return i + index(1), None

    lax.scan(step, index(0), length=count)


def clear(arrays: Any) -> None:
    """Fills references to the chip's memory with zeros, in loops: written out, they take long to compile."""

    def write(array, rows, step):
        array[span(step, rows)] = jnp.zeros((rows, *array.shape[1:]), array.dtype)

    for array in jax.tree.leaves(arrays):
        length, *row = array.shape
        whole = 1 if len(row) > 1 else CHUNK  # a register has several of the last rows but one
        fits = [n for n in divisors(length) if n % whole == 0 and n * math.prod(row) <= AT_ONCE]
        if fits or len(row) < 2:
            rows = max(fits, default=length)
            loop(length // rows, functools.partial(write, array, rows))
        else:
            loop(length, lambda i, array=array: clear(array.at[i]))


def span(number: Any, size: int, length: int | None = None) -> Any:
    """Returns the slice that begins at `number` times `size`, which is also its length by default."""
    from jax.experimental import pallas as pl

    return pl.ds(pl.multiple_of(number * index(size), size), length or size)


def divide(a: Any, b: int) -> tuple[jax.Array, jax.Array]:
    """Returns quotient and remainder of numbers >= 0; // and % would ask for the TPU of this machine."""
    return lax.div(a, jnp.int32(b)), remainder(a, b)


def remainder(a: Any, b: int) -> jax.Array:
    """Returns the remainder of numbers >= 0."""
    return lax.rem(a, jnp.int32(b))


def index(i: int) -> np.int32:
    """Returns an index of a reference; an int would have 64 bits in 64-bit mode."""
    return np.int32(i)


def slot_of(number: Any) -> jax.Array:
    """Returns which of two places a row or strip takes, in turn."""
    return lax.bitwise_and(number, jnp.int32(1))


def multiply(a: jax.Array, b: jax.Array, images: bool = False) -> jax.Array:
    """Returns the product in float32, of [m, k] with [k, n] or, with `images`, with [n, k]."""
    return lax.dot_general(
        a,
        b,
        (((1,), (1 if images else 0,)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
