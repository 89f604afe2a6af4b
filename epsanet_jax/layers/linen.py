"""A drop-in replacement for `flax.linen.Conv` with faster grouped convolutions."""

import flax.linen as nn

from epsanet_jax.layers.conv_general import conv_general_dilated


def _conv_general_dilated():
    return conv_general_dilated


class GroupedConv(nn.Conv):
    """`flax.linen.Conv` whose 2-D convolutions are computed by `epsanet_jax.ops.grouped_conv`.

    Arguments, parameters, initial values and results are those of `flax.linen.Conv`. XLA computes the
    convolutions that `grouped_conv` does not support, see `layers.conv_general.is_supported`.
    """

    def __post_init__(self):
        if self.conv_general_dilated is None and self.conv_general_dilated_cls is None:
            self.conv_general_dilated_cls = _conv_general_dilated
        super().__post_init__()


# Flax names layers after their class: with this name, parameters keep their names and initial values.
GroupedConv.__name__ = 'Conv'
