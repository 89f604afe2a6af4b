"""Grouped convolutions as functions of arrays; they hold no parameters."""

from epsanet_jax.ops.algorithms import NAMES as ALGORITHMS
from epsanet_jax.ops.grouped_conv import grouped_conv, pyramid_conv

__all__ = ['ALGORITHMS', 'grouped_conv', 'pyramid_conv']
