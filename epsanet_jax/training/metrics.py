"""Loss and accuracy as sums and counts, which add up exactly over devices and batches."""

import jax
import jax.numpy as jnp
from jax import lax

Sums = dict[str, jax.Array]


def batch_sums(losses: jax.Array, logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Returns the sums of 'loss', 'top1' and 'top5' over the rows of the mask, and their number 'count'.

    Args:
        losses: [N].
        logits: [N, K]; with K < 5 classes, top-5 is top-K.
        labels: [N], integers.
        mask: [N], false for rows to leave out.
    """
    _, best = lax.top_k(logits, min(5, logits.shape[-1]))  # [N, 5]
    hits = best == labels[:, None]
    # top_k sorts NaN too: a row with NaN has no top classes.
    hits = hits & ~jnp.isnan(logits).any(axis=-1, keepdims=True)
    weight = mask.astype(losses.dtype)
    return {
        'loss': jnp.where(mask, losses, 0).sum(),
        'top1': (hits[:, 0].astype(losses.dtype) * weight).sum(),
        'top5': (hits.any(axis=-1).astype(losses.dtype) * weight).sum(),
        'count': weight.sum(),
    }


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Returns the means 'loss', 'top1' and 'top5', and their number of 'examples'."""
    means = {k: sums[k] / sums['count'] for k in ('loss', 'top1', 'top5')}
    return {**means, 'examples': round(sums['count'])}
