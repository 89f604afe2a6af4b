"""How many images lie beside each other; that results stay the same is tested with `by_group`."""

import jax
import jax.numpy as jnp

from epsanet_jax.ops.plain import Window
from epsanet_jax.ops.wide import Wide


def test_a_symbolic_batch_keeps_images_apart(monkeypatch):
    monkeypatch.setattr(jax, 'device_count', lambda: 1)
    (n,) = jax.export.symbolic_shape('n')
    x = jax.ShapeDtypeStruct((n, 8, 8, 40), jnp.float32)
    window = Window(padding=((1, 1), (1, 1)))
    assert Wide.of(x, 1000, [(window, (3, 3))], 8) == Wide()
    assert Wide.of(x.update(shape=(4, 8, 8, 40)), 1000, [(window, (3, 3))], 8).images == 4


def test_each_device_keeps_its_own_images(monkeypatch):
    x = jax.ShapeDtypeStruct((12, 8, 8, 40), jnp.float32)
    window = Window(padding=((1, 1), (1, 1)))
    monkeypatch.setattr(jax, 'device_count', lambda: 4)
    assert Wide.of(x, 1000, [(window, (3, 3))], 8).images == 3
    monkeypatch.setattr(jax, 'device_count', lambda: 12)
    assert Wide.of(x, 1000, [(window, (3, 3))], 8) == Wide()
