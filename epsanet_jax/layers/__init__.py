"""Convolution layers for other networks, for flax.linen (`layers.linen`) and for flax.nnx (`layers.nnx`).

`GroupedConv` of both modules is a drop-in replacement for Flax's Conv. `replace_convs` switches an existing
model of flax.nnx, and the interceptor `layers.linen.fast_convs` one of flax.linen.
"""

from epsanet_jax.layers.replace import replace_convs

__all__ = ['replace_convs']
