"""Parameters, multiply-adds and activations of a network."""

import jax
import jax.numpy as jnp
import pytest
import small

from epsanet_jax.analysis.summary import summarize

SETTINGS = {'layers': (1, 1), 'planes': (8, 16)}


@pytest.mark.parametrize(
    'net',
    [small.model(**SETTINGS), small.pyconv(**SETTINGS, kernels=((3, 5), (3,)), groups=((1, 2), (1,)))],
    ids=['epsanet', 'pyconvresnet'],
)
def test_rows_hold_the_parameters_and_the_output_shapes_of_the_stages(net):
    rows = {row.stage: row for row in summarize(net, 70)}
    assert list(rows) == ['stem', 'layer1', 'layer2', 'fc']
    images = jax.ShapeDtypeStruct((1, 70, 70, 3), jnp.float32)
    variables = jax.eval_shape(net.init, jax.random.key(0), images)
    features = jax.eval_shape(lambda v, x: net.apply(v, x, method='features'), variables, images)
    assert {k: row.output for k, row in rows.items() if k != 'fc'} == {
        k: v.shape[1:] for k, v in features.items()
    }
    total = sum(leaf.size for leaf in jax.tree.leaves(variables['params']))
    assert sum(row.params for row in rows.values()) == total


def test_multiply_adds_and_activations_of_the_stem_and_the_classifier():
    rows = {row.stage: row for row in summarize(small.model(**SETTINGS), 64)}
    outputs = 32 * 32 * 64
    assert rows['stem'].multiply_adds == outputs * 7 * 7 * 3
    assert rows['stem'].published_count == rows['stem'].multiply_adds + 2 * outputs
    assert rows['stem'].activation_bytes == 2 * outputs * 4  # the convolution and the BatchNorm
    assert (rows['fc'].multiply_adds, rows['fc'].activation_bytes) == (32 * 7, 7 * 4)
    half = {row.stage: row for row in summarize(small.model(**SETTINGS, dtype='bfloat16'), 64)}
    assert half['stem'].activation_bytes == outputs * 4
