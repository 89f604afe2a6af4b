"""The command `epsanet plan`."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import pytest
from command import run

from epsanet_jax.analysis import plan, topology
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import tracing
from epsanet_jax.training.flags import read_config

RECIPE = """
from epsanet_jax.training.config import *
def get_config(bn_group='8'):
    model = ModelConfig(
        layers=(1,), planes=(16,), expansion=2, groups=(1, 1, 2, 4), reduction=4, bn_group=int(bn_group)
    )
    data = DataConfig(image_size=32, resize_size=32)
    return Config(batch_size=64, model=model, data=data)
"""


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp('recipe') / 'recipe.py'
    path.write_text(RECIPE)
    return path


def gradient_and_statistics_bytes(config):
    model = build_model(config.model, 1000)
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), 'float32'))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))


def small_memory(size):
    return dataclasses.replace(topology.open_topology('cpu:8'), memory=size)


def plan_of(config, place, batch):
    def lower(batch):
        changed = dataclasses.replace(config, batch_size=batch)
        return tracing.lower_train_step(changed, place.devices, place.platform)

    return plan.make_plan(lower, 'net', batch, place)


@pytest.mark.parametrize(
    ('devices', 'microbatches'),
    [pytest.param(*n, marks=pytest.mark.slow) for n in ((8, 1), (8, 2), (256, 1))],
)
def test_only_gradients_statistics_and_metrics_are_communicated(recipe, devices, microbatches):
    arguments = [f'--config={recipe}', f'--topology=cpu:{devices}', f'--batch={devices * 16}', '--json']
    arguments += [f'--config.gradient_accumulation_steps={microbatches}']
    environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
    done = subprocess.run(
        [sys.executable, '-m', 'epsanet_jax', 'plan', *arguments],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    found = json.loads(done.stdout)
    assert (found['devices'], found['batch'], found['fits']) == (devices, devices * 16, True)
    assert list(found['collectives']) == ['all-reduce']
    expected = gradient_and_statistics_bytes(read_config([f'--config={recipe}']))
    assert found['collectives']['all-reduce']['bytes'] == pytest.approx(expected, rel=0.01)


def test_batch_norm_groups_over_several_devices_add_only_their_statistics(recipe, capsys):
    """Forward and backward of 3 BatchNorms with 8 devices' partial sums: thousands of bytes."""
    status, out, _ = run(capsys, 'plan', f'--config={recipe}:64', '--topology=cpu:8', '--json')
    assert status == 0
    found = json.loads(out)['collectives']
    assert list(found) == ['all-reduce']
    expected = gradient_and_statistics_bytes(read_config([f'--config={recipe}']))
    assert expected < found['all-reduce']['bytes'] < 1.1 * expected


def test_plan_as_text(recipe, capsys):
    status, out, err = run(capsys, 'plan', f'--config={recipe}', '--topology=cpu:8', '--batch=128')
    assert status == 0
    for part in (
        '8 devices, batch 128, 16 rows per device',
        'per device: fits',
        'all-reduce:',
        'compiled in',
    ):
        assert part in out
    assert 'compiling for cpu:8' in err


@pytest.mark.slow
def test_largest_batch_fits_and_a_larger_one_does_not(recipe, capsys, monkeypatch):
    config = read_config([f'--config={recipe}'])
    place = small_memory(2 * plan_of(config, small_memory(2**40), 512).bytes_per_device)
    monkeypatch.setattr(topology, 'open_topology', lambda name: place)
    arguments = (f'--config={recipe}', '--topology=cpu:8', '--batch=512', '--find-batch', '--json')
    found = json.loads(run(capsys, 'plan', *arguments)[1])
    most = found['largest_batch']
    assert [p['batch'] for p in found['plans']] == [256, 512]
    assert most % 64 == 0
    assert plan_of(config, place, most - most // 10 // 64 * 64).fits
    assert plan_of(config, place, most + most // 5 // 64 * 64).fits is False


def test_step_that_does_not_fit_gives_status_1(recipe, capsys, monkeypatch):
    too_small = small_memory(1000)
    monkeypatch.setattr(topology, 'open_topology', lambda name: too_small)
    status, out, _ = run(capsys, 'plan', f'--config={recipe}', '--topology=cpu:8')
    assert status == 1
    assert 'DOES NOT FIT' in out


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--topology=v9:2x2'], "unknown TPU 'v9'"),
        (['--topology=cpu:2x2'], 'cpu:N with a single number'),
        (['--topology=cpu:0'], '--topology=cpu:0 must be'),
        (['--topology=v5e'], '--topology=v5e must be cpu:N'),
        (['--topology=cuda:8'], '--topology=cuda:8: no compiler is installed for it'),
        (['--topology=cpu:7'], 'batch_size 64 does not divide among 7 devices'),
        (['--topology=cpu:8', '--config.optimizer.lrr=1'], "did you mean 'optimizer.lr'"),
        (['--topology=cpu:8', '--lr=1'], 'unrecognized arguments: --lr=1'),
        (['--topology=cpu:8', '--find-batch', '--batch=8'], 'a batch of 8 cannot be halved'),
        (['--topology=cpu:8', '--find-batch', '--schedule'], '--schedule reads one compilation'),
        (
            ['--topology=cpu:8', '--find-batch', '--config.gradient_accumulation_steps=0'],
            'gradient_accumulation_steps must be at least 1, got 0',
        ),
    ],
)
def test_invalid_arguments_are_errors_of_one_line(recipe, capsys, arguments, message):
    status, _, err = run(capsys, 'plan', f'--config={recipe}', *arguments)
    assert (status, err.count('\n')) == (2, 1)
    assert message in err
    assert err.startswith('error: ')


def test_recipe_without_a_config_is_an_error_of_one_line(tmp_path, capsys):
    (tmp_path / 'dict.py').write_text('def get_config():\n    return {}')
    status, _, err = run(capsys, 'plan', f'--config={tmp_path}/dict.py', '--topology=cpu:8', '--batch=64')
    assert (status, err) == (2, 'error: get_config() must return an epsanet_jax Config, got dict\n')


def test_recipe_is_required(capsys):
    status, _, err = run(capsys, 'plan', '--topology=cpu:8')
    assert (status, err) == (2, 'error: no --config=FILE is given, for example --config=configs/digits.py\n')


def test_rows_that_mixup_cannot_pair_are_refused_in_one_line(capsys, recipe):
    arguments = ('--topology=cpu:8', '--batch=8', '--config.mixup_alpha=0.2', '--config.model.bn_group=1')
    status, out, err = run(capsys, 'plan', f'--config={recipe}', *arguments)
    assert (status, out) == (2, '')
    assert err.endswith('got 1: change batch_size 8 (on 8 devices)\n')
