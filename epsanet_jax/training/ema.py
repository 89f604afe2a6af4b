"""The moving average of parameters and BatchNorm statistics."""

from typing import Any

import jax
import jax.numpy as jnp


def update_average(average: Any, values: Any, step: jax.Array, decay: float) -> Any:
    """Returns d * average + (1 - d) * values with d = min(decay, (1 + step) / (10 + step)).

    The smaller decay of the first steps lets the average forget the initial parameters, in short runs too.

    Args:
        average: tree of arrays.
        values: a tree like it, of the values after an update.
        step: updates made before, [].
        decay: in [0, 1).
    """
    wide = jnp.result_type(float)
    grown = (1 + step.astype(wide)) / (10 + step.astype(wide))
    share = 1 - jnp.minimum(jnp.asarray(decay, wide), grown)
    return jax.tree.map(lambda a, v: a + share.astype(a.dtype) * (v - a), average, values)
