"""Memory, communication and cost of a training step."""

import types

import jax
import jax.numpy as jnp
import pytest

from epsanet_jax.analysis import plan, topology
from epsanet_jax.errors import InputError
from epsanet_jax.training import tracing
from epsanet_jax.training.config import Config, ModelConfig

CPUS = topology.Topology('cpu:2', [None] * 2, 2**40)


def lower(batch):
    """Lowers a function whose memory is proportional to the batch."""
    return jax.jit(lambda x: (x @ x.T).sum()).lower(jax.ShapeDtypeStruct((batch, 1000), jnp.float32))


def test_plan_of_a_small_function():
    found = plan.make_plan(lower, 'net', 64, CPUS)
    assert (found.devices, found.batch, found.fits, found.collectives) == (2, 64, True, {})
    assert found.bytes_per_device >= 64 * 1000 * 4
    assert found.cost['flops'] >= 2 * 64 * 64 * 1000
    assert plan.describe(found)[0] == 'net on cpu:2: 2 devices, batch 64, 32 rows per device'
    assert 'per device: fits' in plan.describe(found)[1]


def test_step_that_the_compiler_cannot_fit_has_no_cost():
    def fails():
        raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: required (32.0G) exceeds available (16.0G)')

    found = plan.make_plan(lambda batch: types.SimpleNamespace(compile=fails), 'net', 64, CPUS)
    assert (found.fits, found.bytes_per_device, found.memory_per_device) == (False, 2**35, 2**34)
    assert (found.cost, found.collectives) == ({}, {})
    assert 'DOES NOT FIT' in plan.describe(found)[1]


def test_largest_batch_is_found_only_if_the_memory_is_known():
    unknown = topology.Topology('cuda:2', [None] * 2, None)
    with pytest.raises(InputError, match='the memory of cuda:2 is unknown'):
        plan.find_batch(lower, lambda n: True, 'net', 64, 2, unknown)


def test_memory_is_read_from_the_error_of_the_tpu_compiler():
    error = RuntimeError(
        'RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required '
        'for HLO temporaries (32.03G) exceeds available HBM (15.75G). HLO module: jit_f.'
    )
    assert plan._out_of_memory(error) == (int(32.03 * 2**30), int(15.75 * 2**30))
    with pytest.raises(RuntimeError, match='something else'):
        plan._out_of_memory(RuntimeError('INTERNAL: something else'))


def test_roofline_of_a_step_for_a_tpu_is_explained(tmp_path):
    chip = topology.Topology('v5e:1x1', [None], 2**40, None, clock=1.5e9, bandwidth=819e9)
    found = plan.make_plan(lower, 'net', 64, chip)
    assert found.cost['hbm_bytes'] >= 64 * 1000 * 4
    assert found.cost['roofline_seconds'] == pytest.approx(found.cost['hbm_bytes'] / 819e9, rel=0.01)
    (line,) = (line for line in plan.describe(found) if line.startswith('roofline:'))
    assert 'by the memory alone' in line
    for name in ('fusion', 'dot.1', 'dot', 'dot_reduce_fusion', 'wrapped_reduce', 'reduce'):
        text = ''.join(f'   0x{i:x}   :  {{}}\n' for i in range(1, 10))
        (tmp_path / f'1-{name}-01-final_bundles.txt').write_text(text)
    found = plan.make_plan(lower, 'net', 64, chip, schedules=str(tmp_path))
    assert found.cost['scheduled']
    assert any('by the schedules and the memory' in line for line in plan.describe(found))


def test_all_reduce_sends_twice_as_much_as_all_gather():
    ring = topology.Topology('v5e:2x4', [None] * 8, None, 100e9)
    assert plan._transfer('all-reduce', 10**9, ring) == pytest.approx(2 * 7 / 8 * 0.01)
    assert plan._transfer('all-gather', 10**9, ring) == pytest.approx(7 / 8 * 0.01)


def test_batch_must_hold_whole_batch_norm_groups():
    config = Config(batch_size=64, model=ModelConfig(bn_group=48))
    with pytest.raises(InputError, match='BatchNorm groups of 48'):
        tracing.lower_train_step(config, jax.devices('cpu'), 'cpu')
