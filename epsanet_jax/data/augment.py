"""Normalisation, mixup and cutmix of a batch on the device, inside the training step."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from epsanet_jax.models.dtypes import Dtype, at_least_float32


class Mixing(NamedTuple):
    """The strengths of mixup and cutmix, see `mix`."""

    mixup_alpha: float
    cutmix_alpha: float


def normalize(
    images: jax.Array, mean: Sequence[float], std: Sequence[float], dtype: Dtype = jnp.float32
) -> jax.Array:
    """Converts images [N, H, W, C] to (x / 255 - mean) / std.

    Args:
        images: uint8, or float32 in the same units.
        mean: mean of each channel, for values in 0..1.
        std: standard deviation of each channel, for values in 0..1.
        dtype: type of the result; the computation is in at least float32.
    """
    wide = at_least_float32(dtype)
    per_channel = (1,) * (images.ndim - 1) + (-1,)
    scale = jnp.asarray([1.0 / (255.0 * s) for s in std], wide).reshape(per_channel)
    shift = jnp.asarray([m / s for m, s in zip(mean, std, strict=True)], wide).reshape(per_channel)
    return (images.astype(wide) * scale - shift).astype(dtype)


def row_keys(seed: int | jax.Array, step: int | jax.Array, rows: jax.Array) -> jax.Array:
    """Returns keys [N] that depend only on the seed, the step and the rows [N] of the global batch."""
    # Independent of JAX's configuration: with other generators, a draw depends on the rows drawn with it.
    key = jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), step)
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)


def mix(
    images: jax.Array, targets: jax.Array, keys: jax.Array, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes every image and its target with those of its partner: rows 2j and 2j + 1 are partners.

    mixup (Zhang et al., 2017, arXiv:1710.09412) returns x times an image plus 1 - x times its partner. cutmix
    (Yun et al., 2019, arXiv:1905.04899) replaces a box by the same box of the partner. x is drawn from
    Beta(alpha, alpha). With both alphas above 0, each row uses one of the two with probability 0.5.

    Every row is drawn separately, from its key. Partners are neighbours, which are random in a shuffled
    batch. So no data comes from other devices, and the rows are the same for any number of devices and
    microbatches, if each holds an even number of rows and starts at an even row. torchvision draws once for
    the whole batch and mixes it with itself rolled by one row.

    Args:
        images: floating-point [N, H, W, C].
        targets: floating-point [N, K], probability of each class.
        keys: keys [N] from `row_keys`.
        mixup_alpha: alpha of mixup; 0: no mixup.
        cutmix_alpha: alpha of cutmix; 0: no cutmix.

    Returns:
        Mixed images and targets, of the same shapes and types; the computation is in at least float32.

    Raises:
        ValueError: N is odd.
    """
    if not mixup_alpha and not cutmix_alpha:
        return images, targets
    if images.shape[0] % 2:
        raise ValueError(f'{images.shape[0]} rows do not divide into pairs')
    height, width = images.shape[1:3]

    draw = jax.vmap(lambda key: _draw_shares(key, height, width, mixup_alpha, cutmix_alpha))
    of_pixels, of_targets = draw(keys)
    return _blend(images, of_pixels[..., None]), _blend(targets, of_targets[:, None])


def _draw_shares(
    key: jax.Array, height: int, width: int, mixup_alpha: float, cutmix_alpha: float
) -> tuple[jax.Array, jax.Array]:
    """Draws the weight of one image's own pixels [H, W], and of its own target []."""
    which_key, share_key, box_key = jax.random.split(key, 3)
    probability = 0.5 if mixup_alpha and cutmix_alpha else float(bool(cutmix_alpha))
    cutmix = jax.random.uniform(which_key, (), jnp.float32) < probability
    alpha = jnp.where(cutmix, jnp.float32(cutmix_alpha), jnp.float32(mixup_alpha))
    share = jax.random.beta(share_key, alpha, alpha, (), jnp.float32)
    outside = ~_draw_box(box_key, share, height, width)
    of_pixels = jnp.where(cutmix, outside.astype(jnp.float32), share)
    # The box may be cut off at the border, so the weight of the target is the area that was kept. XLA
    # multiplies by the reciprocal, which may yield more than 1.
    kept = outside.sum(dtype=jnp.int32).astype(jnp.float32) / jnp.float32(height * width)
    return of_pixels, jnp.where(cutmix, jnp.minimum(kept, jnp.float32(1)), share)


def _draw_box(key: jax.Array, share: jax.Array, height: int, width: int) -> jax.Array:
    """Draws the box of cutmix: a mask [H, W], which is true for about 1 - share of the pixels."""
    half = 0.5 * jnp.sqrt(1 - share)  # half of the box's sides, as a fraction of the image's

    def inside(key: jax.Array, size: int) -> jax.Array:
        centre = jax.random.randint(key, (), 0, size, jnp.int32)
        reach = (half * size).astype(jnp.int32)
        at = jnp.arange(size, dtype=jnp.int32)
        return (at >= centre - reach) & (at < centre + reach)

    y_key, x_key = jax.random.split(key)
    return inside(y_key, height)[:, None] & inside(x_key, width)[None, :]


def _blend(values: jax.Array, share: jax.Array) -> jax.Array:
    """Returns `share` times each row plus 1 - `share` times its partner."""
    wide: Any = at_least_float32(values.dtype)
    own, share = values.astype(wide), share.astype(wide)
    partner = own.reshape(-1, 2, *own.shape[1:])[:, ::-1].reshape(own.shape)
    return (share * own + (1 - share) * partner).astype(values.dtype)
