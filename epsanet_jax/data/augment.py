"""What happens to a batch of pictures on the device, inside the step."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from epsanet_jax.models.dtypes import Dtype, at_least_float32


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
