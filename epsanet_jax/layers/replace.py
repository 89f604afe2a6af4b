"""Faster convolutions for existing models of flax.nnx."""

from typing import Any

from jax import lax

from epsanet_jax.errors import InputError
from epsanet_jax.layers.conv_general import conv_general_dilated


def replace_convs(module: Any) -> Any:
    """Makes every 2-D `flax.nnx.Conv` in a model compute its convolution by `epsanet_jax.ops.grouped_conv`.

    The layers stay, with their parameters; only the function that they call changes. Optimizers, checkpoints
    and references to layers remain valid, and a layer that is used in two places is still one layer.
    Subclasses of `nnx.Conv` change too. 1-D and 3-D convolutions, `nnx.ConvTranspose`, and layers with a
    `conv_general_dilated` of their own do not. Call it before `nnx.split`: a GraphDef that was split from the
    model earlier still makes the layers as they were.

    Args:
        module: a `flax.nnx.Module`, for example a whole model or a single layer; changed in place.

    Returns:
        The same `module`.

    Raises:
        InputError: `module` is not a `flax.nnx.Module`.
    """
    from flax import nnx  # here, because users of flax.linen do not need it

    if not isinstance(module, nnx.Module):
        raise InputError(
            f'replace_convs: expected a flax.nnx Module, got {type(module).__name__}; '
            'for flax.linen, use nn.intercept_methods(epsanet_jax.layers.linen.fast_convs)'
        )
    for _, layer in nnx.iter_modules(module):
        if (
            isinstance(layer, nnx.Conv)
            and len(layer.kernel_size) == 2
            and layer.conv_general_dilated is lax.conv_general_dilated
        ):
            layer.conv_general_dilated = conv_general_dilated
    return module
