"""The bottleneck block: shortcut, stochastic depth, and the types and parts that it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from epsanet_jax.models.block import EPSABlock, dtypes_of, parts
from epsanet_jax.models.settings import Settings

SETTINGS = Settings(kernels=(3, 5), groups=(1, 2), expansion=2, reduction=2, conv='stock')
MIDDLES = ('psa', 'conv3x3')


def applied(block, x, **options):
    return block.apply(block.init(jax.random.key(0), x), x, **options)


@pytest.mark.parametrize('middle', MIDDLES)
def test_a_block_without_its_residual_branch_is_its_shortcut(rng, middle):
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 16)), jnp.float32)
    block = EPSABlock(8, settings=SETTINGS, middle=middle)
    y = applied(block, x, keep=jnp.asarray([0.0, 1.0]))
    np.testing.assert_array_equal(y[0], jax.nn.relu(x[0]))
    assert not np.array_equal(y[1], jax.nn.relu(x[1]))


@pytest.mark.parametrize(('stride', 'size'), [(1, (5, 6)), (2, (3, 3))])
def test_the_output_has_the_width_of_the_stage(rng, stride, size):
    x = jnp.asarray(rng.standard_normal((2, 5, 6, 12)), jnp.float32)
    block = EPSABlock(8, stride, downsample=True, settings=SETTINGS)
    assert applied(block, x).shape == (2, *size, 16)


def test_types_of_the_modules_are_those_of_the_settings():
    settings = Settings(dtype='bfloat16', param_dtype='float32')
    assert dtypes_of(settings) == {'dtype': jnp.bfloat16, 'param_dtype': jnp.float32}


def test_folded_parts_have_biases_and_no_batch_norm():
    conv, norm = parts(SETTINGS, None, folded=True)
    x = jnp.ones((1, 2, 2, 4))
    assert conv(4, 1).use_bias
    assert norm()(x, False) is x
    assert not parts(SETTINGS, None, folded=False)[0](4, 1).use_bias
