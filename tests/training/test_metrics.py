"""Loss and accuracy as sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.training.metrics import averages, batch_sums, decisions, mean_class_accuracy


def test_only_rows_of_the_mask_are_counted(rng):
    logits = rng.standard_normal((40, 9))
    labels, mask = rng.integers(0, 9, 40), rng.random(40) < 0.7
    losses = rng.random(40)
    sums = averages({k: float(v) for k, v in batch_sums(losses, logits, labels, mask).items()})
    order = np.argsort(-logits, axis=1)
    top5 = (order[:, :5] == labels[:, None]).any(1)[mask].mean()
    assert sums['top1'] == pytest.approx((order[:, 0] == labels)[mask].mean())
    assert sums['top5'] == pytest.approx(top5)
    assert sums['loss'] == pytest.approx(losses[mask].mean())
    assert sums['examples'] == mask.sum()


def test_constant_and_nan_logits_get_no_credit():
    labels, mask = jnp.arange(8), jnp.ones(8, bool)
    constant = batch_sums(jnp.zeros(8), jnp.zeros((8, 8)), labels, mask)
    assert (constant['top1'], constant['top5']) == (1, 5)
    broken = batch_sums(jnp.zeros(8), jnp.full((8, 8), jnp.nan), labels, mask)
    assert (broken['top1'], broken['top5']) == (0, 0)
    padded = batch_sums(jnp.full(8, jnp.nan), jnp.zeros((8, 8)), labels, ~mask)
    assert padded['loss'] == 0


def test_top_5_of_3_classes_is_top_3():
    sums = batch_sums(jnp.zeros(2), jnp.zeros((2, 3)), jnp.array([0, 2]), jnp.ones(2, bool))
    assert sums['top5'] == 2


def test_averages_do_not_depend_on_the_batch_size(rng):
    losses, logits = rng.random(10), rng.standard_normal((10, 6))
    labels = rng.integers(0, 6, 10)
    whole = batch_sums(losses, logits, labels, jnp.ones(10, bool))
    parts = [
        batch_sums(losses[i], logits[i], labels[i], jnp.ones(len(losses[i]), bool))
        for i in (slice(3), slice(3, 10))
    ]
    added = jax.tree.map(lambda *s: sum(s), *parts)
    for k in whole:
        assert float(added[k]) == pytest.approx(float(whole[k]), rel=1e-12)


def test_rows_outside_of_the_mask_and_rows_with_nan_have_no_hit():
    logits = jnp.eye(3)[jnp.array([0, 1, 2, 2])].at[3, 0].set(jnp.nan)
    rows = decisions(logits, jnp.array([0, 0, 2, 2]), jnp.array([True, True, False, True]))
    assert rows['label'].tolist() == [0, 0, -1, 2]
    assert rows['decision'].tolist() == [0, 1, 2, -1]
    assert mean_class_accuracy(*(np.asarray(rows[k]) for k in ('label', 'decision'))) == 0.25
