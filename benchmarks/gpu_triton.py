"""A kernel for thin grouped convolutions on GPUs: a candidate that `gpu_op.py` measures.

XLA computes groups of few channels without matrix units, or merges groups and multiplies by zeros. Here a
program computes COLUMNS neighbouring outputs of each of several rows for one group, as matrix products. For
row u of the convolution kernel, the values that these outputs read are a matrix [rows, WINDOW columns * I].
Its product with a Toeplitz matrix [WINDOW columns * I, COLUMNS * O] has the outputs' sums over this row of
the kernel. A 9x9 kernel of 4 channels takes 3.6 times the necessary products; one dense convolution of 16
groups takes 16 times as many.

Written in Pallas for its Triton backend. With `interpret`, it runs on any device.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

COLUMNS = 16  # outputs of a row that a program computes; a matrix product has at least 16 columns
WINDOW = 32  # columns that these outputs read, at least COLUMNS + kernel size - 1, a power of two
ROWS = 64  # rows that a program computes


def fits(kernel: int, stride: int, groups: int, channels: int, features: int) -> bool:
    """Returns whether the kernel computes a convolution: stride 1, a power of two of channels, not many."""
    inputs, outputs = channels // groups, features // groups
    powers = all(n & (n - 1) == 0 for n in (inputs, outputs))
    return groups > 1 and stride == 1 and powers and max(inputs, outputs) <= 16 and kernel <= 17


def convolve(x: jax.Array, kernel: jax.Array, groups: int, interpret: bool = False) -> jax.Array:
    """Convolves images with stride 1 and k // 2 zeros around them.

    Args:
        x: images, [N, H, W, C_in].
        kernel: [k, k, C_in / groups, C_out], k odd.
        groups: number of groups.
        interpret: whether to run without a GPU.

    Returns:
        [N, H, W, C_out] with the dtype of x.
    """
    n, h, w, _ = x.shape
    size, _, inputs, features = kernel.shape
    outputs = features // groups
    rows = min(ROWS, max(16, 1 << (h - 1).bit_length()))
    down, across = -(-h // rows), -(-w // COLUMNS)
    low = size // 2
    # One copy of the images with zeros around them is cheaper than masks in the kernel.
    height, width = down * rows + size - 1, (across - 1) * COLUMNS + WINDOW
    padding = ((0, 0), (low, height - low - h), (low, width - low - w), (0, 0))
    x = lax.pad(x, jnp.zeros((), x.dtype), [(a, b, 0) for a, b in padding])
    program = functools.partial(
        _program, shape=(h, w, height, width), sizes=(size, groups, inputs, outputs), rows=rows
    )
    y = pl.pallas_call(
        program,
        grid=(n * down, across, groups),
        out_shape=jax.ShapeDtypeStruct((n * h * w * features,), x.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name='thin_convolution',
    )(x.reshape(-1), _toeplitz(kernel, groups).reshape(-1))
    return y.reshape(n, h, w, features)


def input_gradient(kernel: jax.Array, dy: jax.Array, groups: int, interpret: bool = False) -> jax.Array:
    """Returns the gradient of the images of `convolve` from that of its result, [N, H, W, C_out]."""
    size, _, inputs, features = kernel.shape
    turned = kernel[::-1, ::-1].reshape(size, size, inputs, groups, features // groups)
    turned = turned.transpose(0, 1, 4, 3, 2).reshape(size, size, features // groups, groups * inputs)
    return convolve(dy, turned, groups, interpret)


def _toeplitz(kernel: jax.Array, groups: int) -> jax.Array:
    """Returns [G, k, WINDOW * I, COLUMNS * O]: what column c of a window adds to each column of outputs."""
    size, _, inputs, features = kernel.shape
    shifted = [jnp.pad(kernel, ((0, 0), (i, WINDOW - size - i), (0, 0), (0, 0))) for i in range(COLUMNS)]
    k = jnp.stack(shifted, axis=3).reshape(size, WINDOW, inputs, COLUMNS, groups, features // groups)
    return k.transpose(4, 0, 1, 2, 3, 5).reshape(groups, size, WINDOW * inputs, -1)


def _program(x_ref, k_ref, y_ref, *, shape, sizes, rows):
    h, w, height, width = shape
    size, groups, inputs, outputs = sizes
    down = -(-h // rows)
    image, band = pl.program_id(0) // down, pl.program_id(0) % down
    first, group = pl.program_id(1) * COLUMNS, pl.program_id(2)
    depth, across = WINDOW * inputs, COLUMNS * outputs
    row = band * rows + jnp.arange(rows)
    inner = jnp.arange(depth)  # column of the window and channel
    value = (first + inner // inputs) * (groups * inputs) + group * inputs + inner % inputs
    start = (image * height + row) * (width * groups * inputs)
    x_at = start[:, None] + value[None, :]  # [rows, depth]
    k_at = inner[:, None] * across + jnp.arange(across)[None, :]  # [depth, across]

    def add(u, total):
        a = triton.load(x_ref.at[x_at + u * (width * groups * inputs)])
        b = triton.load(k_ref.at[k_at + (group * size + u) * (depth * across)])
        return total + jnp.dot(a, b, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, size, add, jnp.zeros((rows, across), jnp.float32))
    outer = jnp.arange(across)  # column and output channel
    column = first + outer // outputs
    y_at = ((image * h + row) * w)[:, None] + column[None, :]
    y_at = y_at * (groups * outputs) + (group * outputs + outer % outputs)[None, :]
    inside = (row < h)[:, None] & (column < w)[None, :]
    triton.store(y_ref.at[y_at], total.astype(y_ref.dtype), mask=inside)
