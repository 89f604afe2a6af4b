"""Array functions without parameters of their own."""

from epsanet_jax.ops.grouped_conv import ALGORITHMS, grouped_conv

__all__ = ['ALGORITHMS', 'grouped_conv']
