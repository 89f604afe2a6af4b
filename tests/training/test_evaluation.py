"""Evaluation during and after training."""

import json

import numpy as np
import pytest
from command import run
from runs import (
    lines,
    recipe,
)

from epsanet_jax import InputError
from epsanet_jax.errors import TrainingError
from epsanet_jax.training import loop
from epsanet_jax.training.config import (
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.weights import load


def test_weights_and_averages_are_evaluated_and_the_averages_are_used(tmp_path):
    config = recipe(ema_decay=0.9, steps=4, eval_every_epochs=0.0)
    result = loop.train(config, str(tmp_path))
    assert {'ema_loss', 'ema_top1', 'ema_top5'} <= set(result.last)
    assert result.last['ema_loss'] != result.last['loss']
    averages, raw = (load(str(tmp_path), ema=ema) for ema in (True, False))
    assert (averages.source.averaged, raw.source.averaged) == (True, False)
    assert not np.allclose(
        averages.variables['params']['conv1']['kernel'], raw.variables['params']['conv1']['kernel']
    )
    both = [load(str(tmp_path), ema=ema, with_checkpoint=True).source.checkpoint for ema in (True, False)]
    assert both[0].optimizer is None  # it belongs to the weights that are not averaged
    assert both[1].optimizer is not None


@pytest.mark.slow
def test_commands_use_the_averages_by_default(watched, capsys, tmp_path):
    workdir, result = watched
    for options, name in (([], 'ema_loss'), (['--no-ema'], 'loss')):
        status, out, _ = run(capsys, 'evaluate', workdir, '--json', *options)
        assert status == 0
        assert json.loads(out)['loss'] == pytest.approx(result.last[name], rel=1e-5)
        status, out, _ = run(capsys, 'convert', workdir, tmp_path / f'{name}.pth.tar', *options)
        assert status == 0
        assert (', moving averages' in out) == (name == 'ema_loss')
        assert ('with optimizer state' in out) == (name == 'loss')


def test_too_many_bad_images_in_the_evaluation_lose_no_step(bad_folder):
    config, path = bad_folder
    config.data.on_bad, config.data.max_bad_images = 'skip', 0
    with pytest.raises(InputError, match=r'1 images of the evaluation cannot .* continues at step 2'):
        loop.train(config, str(path / 'run'))
    assert load(str(path / 'run')).source.step == 2


def test_a_non_finite_evaluation_is_not_recorded(tmp_path):
    config = recipe(steps=1, optimizer=OptimizerConfig(lr=1e30), schedule=ScheduleConfig(name='constant'))
    with pytest.raises(TrainingError, match='not finite|nan|inf'):
        loop.train(config, str(tmp_path))
    assert [line['split'] for line in lines(tmp_path)] == ['train']
    assert not list((tmp_path / 'checkpoints').iterdir())
