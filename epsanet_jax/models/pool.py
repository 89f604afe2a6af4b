"""Max-pooling."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.ops.choice import GPUS

CODE = 4  # the place (i, j) in a window has the number CODE * i + j


def max_pool(x: jax.Array) -> jax.Array:
    """Returns the 3x3 max-pooling of [N, H, W, C] with stride 2 and one pixel of padding on every side.

    If several positions of a window share the maximum, the gradient goes to the first one, as in PyTorch.
    """
    gpus = dict.fromkeys(GPUS, _max_and_place)
    return lax.platform_dependent(x, tpu=_max_window, default=_max_of_slices, **gpus)


def _max_window(x: jax.Array) -> jax.Array:
    padding = ((1, 1), (1, 1))
    return nn.max_pool(x, (3, 3), strides=(2, 2), padding=padding)  # pyright: ignore[reportArgumentType]


def _max_of_slices(x: jax.Array) -> jax.Array:
    """Returns the same from nine slices; on a CPU its gradient is several times faster."""
    return functools.reduce(lambda a, b: jnp.where(_wins(b, a), b, a), _places(x))


def _places(x: jax.Array) -> list[jax.Array]:
    """Returns the nine values of each window, each [N, ceil(H / 2), ceil(W / 2), C]."""
    n, h, w, c = x.shape
    rows, columns = -(-h // 2), -(-w // 2)
    low = jnp.asarray(-jnp.inf, x.dtype)
    x = lax.pad(x, low, ((0, 0, 0), (1, 2 * rows - h, 0), (1, 2 * columns - w, 0), (0, 0, 0)))
    return [
        lax.slice(x, (0, i, j, 0), (n, i + 2 * rows - 1, j + 2 * columns - 1, c), (1, 2, 2, 1))
        for i in range(3)
        for j in range(3)
    ]


def _wins(new: jax.Array, old: jax.Array) -> jax.Array:
    return (new > old) | jnp.isnan(new)


def _later(old: tuple[jax.Array, jax.Array], new: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the larger of two values, with its place."""
    wins = _wins(new[0], old[0])
    return jnp.where(wins, new[0], old[0]), jnp.where(wins, new[1], old[1])


@jax.custom_jvp
def _max_and_place(x: jax.Array) -> jax.Array:
    """Returns the same; its derivatives keep one byte for each output, the place of the maximum.

    On an H200 the gradient of 256 images takes 0.8 instead of 1.8 ms.
    """
    return _max_of_slices(x)


@_max_and_place.defjvp
def _(primals, tangents):
    (x,), (dx,) = primals, tangents
    values = _places(x)
    places = (jnp.full(v.shape, CODE * (k // 3) + k % 3, jnp.int8) for k, v in enumerate(values))
    y, place = functools.reduce(_later, zip(values, places, strict=True))

    # The transpose of a transpose has the operations of `_spread`: few passes over memory. `checkpoint` keeps
    # the places, not what is computed from them.
    @functools.partial(jax.checkpoint, prevent_cse=False)
    def pick(dx: jax.Array, place: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda dy: _spread(dy, place, x.shape[1:3]), y)(dx)[0]

    return y, pick(dx, place)


def _spread(dy: jax.Array, place: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Returns the gradient of the images, [N, H, W, C] with `size` (H, W).

    Row h is in the window h // 2 and, if h is odd, also in the next one. Its place in them is 1 + h % 2 and
    that minus 2; -1 means that it is not in that window. The same holds for columns.

    Args:
        dy: gradient of the outputs, [N, ceil(H / 2), ceil(W / 2), C].
        place: number of the place of each maximum, with the same shape.
        size: height and width of the images.
    """
    n, rows, columns, c = dy.shape
    dy, place = (jnp.pad(a, ((0, 0), (0, 1), (0, 1), (0, 0))) for a in (dy, place))
    shape, parity = (n, rows, 2, columns, 2, c), jnp.arange(2, dtype=jnp.int8)

    def twice(a: jax.Array, i: int, j: int) -> jax.Array:
        return jnp.broadcast_to(a[:, i : i + rows, None, j : j + columns, None], shape)

    total = jnp.zeros(shape, at_least_float32(dy.dtype))
    for i in range(2):
        for j in range(2):
            code = CODE * (1 + parity - 2 * i)[:, None, None, None] + (1 + parity - 2 * j)[:, None]
            total += jnp.where(twice(place, i, j) == code, twice(dy, i, j), 0).astype(total.dtype)
    return total.astype(dy.dtype).reshape(n, 2 * rows, 2 * columns, c)[:, : size[0], : size[1]]
