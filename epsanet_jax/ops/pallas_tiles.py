"""What the Pallas kernels for TPUs share: sizes of the chip, tiles, and loops.

A matrix unit multiplies 128 by 128 values at once, and a group of the pyramid has 1 to 64 outputs. The
kernels compute the outputs of a tile of pixels, `tile rows x tile columns x outputs of a group`, together:
they are one side of a matrix product, and the window of the input that the tile reads is the other. All
images of a batch lie in the lanes, [H, W, C, N]. This is how the TPU compiler lays out the images of this
network, so that no copy is needed.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

LANES = 128
CHANNELS = 8  # fewer inputs of a group are merged: they would lie across the sublanes of a register
CHUNK = 16  # channels that are copied to the chip's memory at once: a register of bfloat16
MEMORY = 96 * 2**20  # bytes of the chip's fast memory (VMEM) that a kernel may take; v5e and v6e have 128 MiB
SLOTS = np.int32(0), np.int32(1)  # of a window; of this type in 64-bit mode, too
MARGIN = 2**23  # bytes for what the compiler adds


def merged(inputs: int, groups: int) -> int | None:
    """Returns how many groups become one, None if their inputs cannot fill whole registers."""
    merge = max(1, CHANNELS // inputs)
    whole = inputs * merge
    fits = whole == CHANNELS or whole % CHUNK == 0
    return merge if groups % merge == 0 and fits else None


def chunk(inputs: int) -> int:
    """Returns how many channels are copied at once for blocks of this many inputs."""
    return max(CHUNK, inputs)


def seen(outputs: Sequence[int], size: int, stride: int) -> tuple[int, int]:
    """Returns how many rows and columns of the images these rows and columns of outputs read."""
    rows, columns = (stride * (n - 1) + size for n in outputs)
    return rows, columns


def bordered(images: Sequence[int], outputs: Sequence[int], size: int, stride: int) -> tuple[int, int]:
    """Returns rows and columns of images with their border, as all rows and columns of outputs read them."""
    rows, columns = map(max, [n + size // 2 for n in images], seen(outputs, size, stride))
    return rows, columns


def loop(count: int, body: Callable[[jax.Array], None]) -> None:
    """Calls `body` with 0 to count - 1, in a loop of the compiled program."""
    lax.fori_loop(jnp.int32(0), jnp.int32(count), lambda i, _: body(i), None)


def divide(a: jax.Array, b: int) -> tuple[jax.Array, jax.Array]:
    """Returns quotient and remainder of numbers >= 0; // and % would ask for the TPU of this machine."""
    return lax.div(a, jnp.int32(b)), lax.rem(a, jnp.int32(b))


def precision(dtype: jnp.dtype) -> lax.Precision | None:
    """Returns the precision of products: float32 is multiplied as float32."""
    return lax.Precision.HIGHEST if dtype == jnp.float32 else None


def chunk_copies(x: Any, window: Any, arrived: Any, images: Any, half: int) -> list[Any]:
    """Returns the copies of each chunk of channels to the two slots of a window in turn, inside its border.

    Args:
        x: reference to images in HBM, [H, W, C, N].
        window: reference to the chip's memory, [2, rows, columns, channels of a chunk, LANES].
        arrived: two semaphores.
        images: which of the N images.
        half: width of the border before the first row and column.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import tpu as pltpu

    copied, inside = window.shape[3], (pl.ds(half, x.shape[0]), pl.ds(half, x.shape[1]))
    return [
        pltpu.make_async_copy(
            x.at[:, :, pl.ds(first, copied), images], window.at[(slot, *inside)], arrived.at[slot]
        )
        for slot, first in zip(itertools.cycle(SLOTS), range(0, x.shape[2], copied), strict=False)
    ]


def arriving_blocks(copies: Sequence[Any], parts: int) -> Iterator[tuple[np.int32, int, int]]:
    """Yields slot, part and number of each block of channels, of `parts` in a chunk, once it has arrived.

    The first copy must have been started; each next one is started while the one before it is used.
    """
    for i, copy in enumerate(copies):
        if i + 1 < len(copies):
            copies[i + 1].start()
        copy.wait()
        for part in range(parts):
            yield SLOTS[i % 2], part, i * parts + part
