"""`materialize`: an array that is read several times is computed once on a CPU; nothing else changes."""

import chex
import jax
import jax.numpy as jnp
import pytest

from epsanet_jax.ops.materialize import materialize


def rows_of(identity):
    """Returns a function whose intermediate result is read by four transposed slices."""

    def f(x):
        y = identity(jnp.sin(x) * x)
        return [y[:, 4 * i : 4 * i + 4].T for i in range(4)]

    return f


def gradient_of(identity):
    """Returns a function whose gradient is computed before and sliced after `identity`."""

    def f(x):
        def g(x):
            x = identity(x)
            return sum(jnp.sin(x * i).sum() for i in range(1, 3))

        return [jax.grad(g)(x)[:, 4 * i : 4 * i + 4].T for i in range(4)]

    return f


@pytest.mark.parametrize('make', [rows_of, gradient_of])
def test_the_array_is_computed_once(make):
    x = jnp.linspace(-1, 1, 64 * 16).reshape(64, 16)

    def count(f):
        text = jax.jit(f).lower(x).compile().as_text()
        return sum(text.count(f' {op}(') for op in ('sine', 'cosine'))

    once, repeated = count(make(materialize)), count(make(lambda x: x))
    assert once < repeated
    chex.assert_trees_all_equal(jax.jit(make(materialize))(x), jax.jit(make(lambda x: x))(x))


def test_every_mode_of_differentiation_works():
    def f(x):
        return materialize(x**3).sum()

    x = jnp.arange(1.0, 5.0)
    chex.assert_trees_all_close(jax.grad(f)(x), 3 * x**2)
    chex.assert_trees_all_close(jax.jvp(f, (x,), (x,))[1], (3 * x**3).sum())
    chex.assert_trees_all_close(jax.hessian(f)(x), jnp.diag(6 * x))
    chex.assert_trees_all_close(jax.vmap(jax.grad(f))(x[None]), 3 * x[None] ** 2)
    chex.assert_trees_all_close(jax.grad(jax.checkpoint(f))(x), 3 * x**2)


@pytest.mark.parametrize('platform', ['tpu', 'cuda'])
def test_other_platforms_compile_nothing_for_it(platform):
    lowered = jax.jit(materialize).trace(jnp.ones(3)).lower(lowering_platforms=(platform,))
    assert 'call' not in lowered.as_text()
    assert 'optimization_barrier' not in lowered.as_text()
