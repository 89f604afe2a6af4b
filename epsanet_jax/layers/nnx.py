"""A drop-in replacement for `flax.nnx.Conv` with faster grouped convolutions."""

import functools

from flax import nnx

from epsanet_jax.layers.conv_general import conv_general_dilated


class GroupedConv(nnx.Conv):
    """`flax.nnx.Conv` whose 2-D convolutions are computed by `epsanet_jax.ops.grouped_conv`.

    Arguments, parameters, initial values and results are those of `flax.nnx.Conv`. XLA computes the
    convolutions that `grouped_conv` does not support, see `layers.conv_general.is_supported`.
    """

    @functools.wraps(nnx.Conv.__init__)
    def __init__(self, *args, conv_general_dilated=conv_general_dilated, **kwargs):
        super().__init__(*args, conv_general_dilated=conv_general_dilated, **kwargs)
