"""The steps of a run, traced for its batches and devices."""

import jax
import pytest
from runs import recipe

from epsanet_jax import InputError
from epsanet_jax.training import tracing


@pytest.mark.parametrize(
    ('changes', 'ok'),
    [({}, True), ({'batch_size': 12}, False), ({'gradient_accumulation_steps': 3}, False)],
)
def test_divides_reports_whether_a_batch_divides_among_devices(changes, ok):
    assert tracing.divides(recipe(**changes), jax.devices()) == ok


def test_mixing_needs_an_even_number_of_rows_per_device():
    config = recipe(batch_size=8, mixup_alpha=0.2)
    with pytest.raises(InputError, match='an even number of rows per device, got 1: change batch_size 8'):
        tracing.run_mesh(config, 4, jax.devices())
    assert tracing.run_mesh(config, 4, jax.devices()[:4]).size == 4


def test_the_train_step_is_lowered_for_a_batch_of_all_devices():
    config = recipe(gradient_accumulation_steps=2)
    config.model.num_classes = 5
    lowered = tracing.lower_train_step(config, jax.devices()[:2], 'cpu')
    batch = lowered.in_avals[0][1]
    assert batch['image'].shape == (2, 8, 32, 32, 3)
    assert batch['requests'].shape == (2, 8, 2)
    state, sums = lowered.out_info
    assert state.params['fc']['kernel'].shape[-1] == 5
    assert sums['requests'].shape == (2,)
