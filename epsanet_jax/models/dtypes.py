"""Floating-point types that are wide enough for sums."""

from typing import Any

import jax.numpy as jnp

Dtype = Any


def at_least_float32(*dtypes: Dtype) -> Dtype:
    """Returns the widest of the types and float32, also under strict dtype promotion."""
    return max((jnp.dtype(jnp.float32), *map(jnp.dtype, dtypes)), key=lambda d: jnp.finfo(d).bits)
