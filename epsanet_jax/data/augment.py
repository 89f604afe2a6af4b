"""What happens to a batch of pictures on the device, inside the step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epsanet_jax.models.dtypes import Dtype, at_least_float32


class Mixing(NamedTuple):
    """mixup and cutmix, see `mix`."""

    mixup_alpha: float
    cutmix_alpha: float


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Dtype = jnp.float32
) -> jax.Array:
    """Turns uint8 pictures [N, H, W, 3] into (x / 255 - mean) / std, of type `dtype`.

    Args:
        images: 0..255.
        mean: of each channel, for values in 0..1.
        std: likewise.
        dtype: of the result; computed in at least float32.
    """
    wide = at_least_float32(dtype)
    scale = jnp.asarray([1.0 / (255.0 * s) for s in std], wide)
    shift = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], wide)
    return (images.astype(wide) * scale - shift).astype(dtype)


def row_keys(seed: int | jax.Array, step: int | jax.Array, rows: jax.Array) -> jax.Array:
    """Returns the keys [N] of rows of the global batch of a step; they depend on nothing else.

    Args:
        seed: of the run.
        step: whose batch it is.
        rows: integers [N], places in the global batch.
    """
    # Whatever jax is set to: with other implementations, draws depend on which rows are drawn together.
    key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes every picture and its target with its neighbour's: rows 2j and 2j + 1 are each other's partners.

    mixup (Zhang et al., 2017, arXiv:1710.09412) adds up x of a picture and 1 - x of its partner, cutmix (Yun
    et al., 2019, arXiv:1905.04899) replaces a box by the partner's; x is drawn from Beta(alpha, alpha). With
    both alphas above 0 each row takes one of them, evenly.

    Whatever is drawn is drawn for each row, from its key. With neighbours as partners, which are as random as
    any in a shuffled batch, nothing has to come from other devices, and rows turn out the same for any number
    of devices and microbatches, if each holds an even number of rows and begins at an even one. torchvision
    draws once for the whole batch and mixes it with itself rolled by one row.

    Args:
        images: floating-point [N, H, W, 3].
        targets: floating-point [N, K], each row's shares of the classes.
        keys: [N], from `row_keys`.
        mixup_alpha: 0: no mixup.
        cutmix_alpha: 0: no cutmix.

    Returns:
        images and targets, of the same shapes and types; computed in at least float32.

    Raises:
        ValueError: N is odd.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    if images.shape[0] % 2:
        raise ValueError(f'{images.shape[0]} rows do not divide into pairs')
    height, width = images.shape[1:3]

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _draw_shares(key, height, width, mixup_alpha, cutmix_alpha)

    of_pixels, of_targets = jax.vmap(draw)(keys)
    return _blend(images, of_pixels[..., None]), _blend(targets, of_targets[:, None])


def _draw_shares(
    key: jax.Array, height: int, width: int, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Draws what one picture keeps of itself: the share of each pixel [H, W], and of its target []."""
    which_key, share_key, box_key = jax.random.split(key, 3)
    probability = 0.5 if mixup_alpha and cutmix_alpha else float(bool(cutmix_alpha))
    cutmix = jax.random.uniform(which_key, (), jnp.float32) < probability
    alpha = jnp.where(cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    share = jax.random.beta(share_key, alpha, alpha, (), jnp.float32)
    outside = ~_draw_box(box_key, share, height, width)
    of_pixels = jnp.where(cutmix, outside.astype(jnp.float32), share)
    # The box may be cut off at the rim, so its share of the target is what there is of it. XLA multiplies by
    # the reciprocal, which may yield more than 1.
    kept = outside.sum(dtype=jnp.int32).astype(jnp.float32) / jnp.float32(height * width)
    return of_pixels, jnp.where(cutmix, jnp.minimum(kept, jnp.float32(1)), share)


def _draw_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Draws cutmix's box, as torchvision and the paper: a mask [H, W] with about 1 - share of the pixels."""
    half = 0.5 * jnp.sqrt(1 - share)  # of the box's sides, as a part of the picture's

    def inside(key: jax.Array, size: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, size, jnp.int32)
        reach = (half * size).astype(jnp.int32)
        at = jnp.arange(size, dtype=jnp.int32)
        return (at >= centre - reach) & (at < centre + reach)

    y_key, x_key = jax.random.split(key)
    return inside(y_key, height)[:, None] & inside(x_key, width)[None, :]


def _blend(values: jax.Array, share: jax.Array) -> jax.Array:
    """Returns `share` of each row and the rest of its partner."""
    wide: Any = at_least_float32(values.dtype)
    own, share = values.astype(wide), share.astype(wide)
    partner = own.reshape(-1, 2, *own.shape[1:])[:, ::-1].reshape(own.shape)
    return (share * own + (1 - share) * partner).astype(values.dtype)
