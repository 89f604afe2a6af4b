"""Loss and accuracy as sums and counts, which add up exactly over devices and batches."""

import jax
import jax.numpy as jnp
import numpy as np
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


def decisions(logits: jax.Array, labels: jax.Array, mask: jax.Array) -> Sums:
    """Returns the 'label' and the 'decision', the class with the largest logit, of each row, int32 [N].

    The label is -1 for rows outside of the mask, and the decision is -1 for rows with NaN. The arguments are
    those of `batch_sums`.
    """
    decided = jnp.where(jnp.isnan(logits).any(axis=-1), -1, logits.argmax(axis=-1))
    return {'label': jnp.where(mask, labels, -1).astype(np.int32), 'decision': decided.astype(np.int32)}


def mean_class_accuracy(labels: np.ndarray, decisions: np.ndarray) -> float:
    """Returns the mean over classes of the share of their images that are decided correctly.

    Classes without images do not count. The arrays are those of `decisions`, [N].
    """
    counted = labels >= 0
    images = np.bincount(labels[counted])
    hits = np.bincount(labels[counted & (labels == decisions)], minlength=len(images))
    return float((hits[images > 0] / images[images > 0]).mean())


def averages(sums: dict[str, float]) -> dict[str, float]:
    """Returns the means 'loss', 'top1' and 'top5', and their number of 'examples'."""
    means = {k: sums[k] / sums['count'] for k in ('loss', 'top1', 'top5')}
    return {**means, 'examples': round(sums['count'])}
