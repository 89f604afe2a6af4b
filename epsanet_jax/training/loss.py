"""The loss."""

import jax
import optax


def smoothed_cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy against y (1 - e) + e / K, as the reference takes it in training and in validation.

    Args:
        logits: [N, K].
        labels: [N], integers.
        smoothing: e, in [0, 1).

    Returns:
        [N], in nats.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, smoothing))
