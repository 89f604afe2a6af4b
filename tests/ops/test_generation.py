"""The algorithms of a TPU generation."""

import jax
import jax.numpy as jnp
import pytest

from epsanet_jax.ops import choice, generation, grouped_conv
from epsanet_jax.ops.algorithms import Algorithm
from epsanet_jax.ops.choice import Choice, Problem

STOCK, DENSE, BOTH = (
    Choice(*(a,) * 3) for a in (Algorithm('stock'), Algorithm('merged', 4), Algorithm('merged', 2))
)
SMALL = Problem(3, 1, 4, 16, 16, 8, 2, 'float32')
LARGE = SMALL._replace(size=16)


@pytest.fixture(autouse=True)
def table(monkeypatch):
    rows = {'tpu': [(SMALL, DENSE), (LARGE, DENSE)], 'tpu v5p': [(SMALL, BOTH)]}
    monkeypatch.setattr(choice, '_table', lambda: rows)
    choice.choose.cache_clear()
    yield
    choice.choose.cache_clear()


def groups_of_convolutions(device_kind):
    x, kernel = jnp.ones((2, 8, 8, 16)), jnp.ones((3, 3, 4, 16))
    traced = jax.jit(lambda x, k: grouped_conv(x, k, groups=4)).trace(x, kernel)
    with generation.lowering_for(device_kind):
        text = traced.lower(lowering_platforms=('tpu',)).as_text()
    return [n for n in (1, 2, 4) if f'feature_group_count = {n} ' in text]


def test_rows_of_a_generation_replace_those_for_all_tpus():
    assert choice.choose('tpu v5p', SMALL) == BOTH
    assert choice.choose('tpu v5p', LARGE) == choice.choose('tpu', SMALL) == DENSE
    assert choice.choose('tpu v6e', SMALL) == DENSE
    assert choice.choose('tpu v6e', SMALL._replace(kernel=9, groups=2, channels=64)) == STOCK


def test_a_program_for_a_generation_uses_its_rows():
    assert groups_of_convolutions('TPU v5') == [2]
    assert groups_of_convolutions('TPU v5 lite') == groups_of_convolutions('TPU of another kind') == [1]


def test_the_generation_is_that_of_the_devices_unless_another_is_asked_for(monkeypatch):
    class Device:
        device_kind = 'TPU v6 lite'

    assert generation.rows_of('tpu') == 'tpu'  # there is none here
    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    monkeypatch.setattr(jax, 'devices', lambda: [Device()])
    assert (generation.rows_of('tpu'), generation.rows_of('cpu')) == ('tpu v6e', 'cpu')
    with generation.lowering_for('TPU v5'):
        assert generation.rows_of('tpu') == 'tpu v5p'
    assert generation.rows_of('tpu') == 'tpu v6e'
