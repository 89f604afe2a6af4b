"""The loss."""

from typing import Any

import jax
import optax


def smoothed_targets(labels: jax.Array, num_classes: int, smoothing: float, dtype: Any) -> jax.Array:
    """Returns y (1 - e) + e / K, [N, K], for integer labels [N] and e = `smoothing`."""
    return optax.smooth_labels(jax.nn.one_hot(labels, num_classes, dtype=dtype), smoothing)


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy against y (1 - e) + e / K, as the reference takes it in training and in validation.

    Args:
        logits: [N, K].
        labels: [N], integers.
        smoothing: e, in [0, 1).

    Returns:
        [N], in nats.
    """
    targets = smoothed_targets(labels, logits.shape[-1], smoothing, logits.dtype)
    return optax.softmax_cross_entropy(logits, targets)
