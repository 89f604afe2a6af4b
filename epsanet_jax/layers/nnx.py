"""A drop-in replacement for `flax.nnx.Conv` with faster grouped convolutions."""

import functools
from typing import Any

from flax import nnx

from epsanet_jax.layers.conv_general import conv_general_dilated


class GroupedConv(nnx.Conv):
    """`flax.nnx.Conv` whose 2-D convolutions are computed by `epsanet_jax.ops.grouped_conv`.

    Arguments, parameters, initial values and results are those of `flax.nnx.Conv`. Convolutions that
    `grouped_conv` does not support are XLA's own, see `layers.conv_general.is_supported`.
    """

    @functools.wraps(nnx.Conv.__init__)
    def __init__(self, *args: Any, conv_general_dilated: Any = conv_general_dilated, **kwargs: Any):
        super().__init__(*args, conv_general_dilated=conv_general_dilated, **kwargs)
