"""Array functions without parameters of their own."""

from epsanet_jax.ops.algorithms import NAMES as ALGORITHMS
from epsanet_jax.ops.grouped_conv import grouped_conv, pyramid_conv

__all__ = ['ALGORITHMS', 'grouped_conv', 'pyramid_conv']
