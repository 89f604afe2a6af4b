"""The training state."""

import chex
import jax
import optax
import small

from epsanet_jax.training.state import create_state

OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def test_a_new_state_has_no_steps_and_its_averages_are_its_variables():
    model = small.model(layers=(1,), planes=(8,))
    state = jax.jit(lambda key: create_state(model, OPTIMIZER, key, 32, ema=True))(jax.random.key(0))
    assert int(state.step) == 0
    chex.assert_trees_all_equal(state.ema, state.variables)
    chex.assert_trees_all_equal_shapes(optax.tree_utils.tree_get(state.opt_state, 'trace'), state.params)
    assert jax.eval_shape(lambda: create_state(model, OPTIMIZER, jax.random.key(0), 32)).ema is None


def test_the_image_size_does_not_change_the_shapes_of_a_state():
    model = small.model(layers=(1,), planes=(8,))
    small_size, large_size = (
        jax.eval_shape(lambda key, size=size: create_state(model, OPTIMIZER, key, size), jax.random.key(0))
        for size in (32, 64)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(small_size, large_size)
