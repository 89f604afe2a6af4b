"""Convolution layers for other networks: `layers.linen` for flax.linen and `layers.nnx` for flax.nnx."""
