"""Exports networks to StableHLO: files that need only JAX, not this package."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from epsanet_jax.data.augment import normalize
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import EPSANet
from epsanet_jax.models.folding import fold_batch_norm

PLATFORMS = ('cpu', 'cuda', 'tpu')


def to_stablehlo(
    model: EPSANet,
    variables: Mapping[str, Any],
    image_size: int,
    *,
    pixels: Preprocessing | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> jax_export.Exported:
    """Exports inference, weights included: images [batch, H, W, C] to logits [batch, num_classes].

    The batch may have any size. Each platform gets the convolution algorithms chosen for it. Their precision
    is fixed here, by `jax.default_matmul_precision`. BatchNorm is folded into the convolutions
    (`models.fold_batch_norm`).

    Args:
        model: the network.
        variables: {'params', 'batch_stats'}.
        image_size: H and W in pixels.
        pixels: if given, the function takes uint8 images and normalises them with this mean and std;
            otherwise it takes normalised images of float32, or float64 for a float64 network.
        platforms: platforms for `jax.export`.

    Returns:
        The exported function; `.serialize()` gives the content of a file.

    Raises:
        InputError: the network computes in float64, but float64 is disabled in JAX.
    """
    if jnp.dtype(model.dtype) == jnp.float64 and not jax.config.jax_enable_x64:
        raise InputError('exporting a float64 network needs the environment variable JAX_ENABLE_X64=1')
    model, variables = fold_batch_norm(model.clone(remat=False), variables)
    variables = jax.tree.map(np.asarray, variables)  # numpy constants are stored once

    def epsanet(images: jax.Array) -> jax.Array:
        if pixels is not None:
            images = normalize(images, pixels.mean, pixels.std, model.dtype)
        return model.apply(variables, images, train=False)  # pyright: ignore[reportReturnType]

    dtype = at_least_float32(model.dtype) if pixels is None else jnp.uint8
    shape = jax_export.symbolic_shape(f'batch, {image_size}, {image_size}, {model.in_channels}')
    with _without_source_locations():
        return jax_export.export(jax.jit(epsanet), platforms=platforms)(jax.ShapeDtypeStruct(shape, dtype))


@contextlib.contextmanager
def _without_source_locations() -> Iterator[None]:
    """Keeps source locations, which contain private paths, out of lowered modules."""
    option = 'jax_traceback_in_locations_limit'
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)
