"""A workdir of version 0.1.0 loads, evaluates and continues.

tests/fixtures/workdir_0_1_0 is a run of 3 steps with moving averages; version 0.1.0 gave the numbers below.
"""

import hashlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from command import run

import epsanet_jax
from epsanet_jax.training import loop
from epsanet_jax.training.flags import read_config

WORKDIR = pathlib.Path(__file__).parents[1] / 'fixtures' / 'workdir_0_1_0'
CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'
ARGUMENTS = [
    f'--config={CONFIGS}/image_folder.py',
    '--config.data.source=synthetic',
    '--config.data.synthetic_examples=48',
    '--config.data.synthetic_classes=3',
    '--config.data.image_size=32',
    '--config.data.resize_size=36',
    '--config.model.layers=(1,1)',
    '--config.model.planes=(8,16)',
    '--config.model.expansion=2',
    '--config.model.groups=(1,2,2,2)',
    '--config.model.reduction=2',
    '--config.batch_size=8',
    '--config.log_every_steps=2',
    '--config.ema_decay=0.9',
    '--config.schedule.name=constant',
    '--config.schedule.warmup_epochs=0',
    '--config.optimizer.lr=0.05',
    '--config.tensorboard=False',
    '--config.data.workers=0',
]
DIGESTS = {
    'averages': '7464fd167e807033cbd0b7ecf5c2692e853cba6d0267b4883058dedf0de9d5be',
    'weights': 'e6901bee111e7bce9b7c219932c5df31301519128abe759075c225bf2bebb082',
    'momentum': 'e9f149ebdf52c0f74857170855445044a80ecfb20dceec32a528d2c0fab4fa7c',
}
TRAINING_LOSS = {4: 1.1132087707519531, 6: 1.142663598060608, 7: 1.112192988395691}
EVALUATION = {'loss': 1.0971024831136067, 'ema_loss': 1.0978724161783855, 'examples': 48}


def digest(tree):
    found = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in sorted((jax.tree_util.keystr(path), leaf) for path, leaf in leaves):
        found.update(path.encode() + np.asarray(leaf).tobytes())
    return found.hexdigest()


def test_weights_averages_and_momentum_are_equal_bit_for_bit():
    averaged = epsanet_jax.load(WORKDIR)
    raw = epsanet_jax.load(WORKDIR, ema=False, with_checkpoint=True)
    state = raw.source.checkpoint.optimizer['state']
    assert {
        'averages': digest(averaged.variables),
        'weights': digest(raw.variables),
        'momentum': digest({k: v['momentum_buffer'] for k, v in state.items()}),
    } == DIGESTS
    assert (averaged.source.step, averaged.source.averaged, raw.source.averaged) == (3, True, False)
    assert averaged.class_names == ('class0', 'class1', 'class2')


@pytest.mark.parametrize(('options', 'loss'), [((), 1.0989789168039958), (('--no-ema',), 1.098927656809489)])
def test_the_evaluation_is_the_same(capsys, options, loss):
    found = json.loads(run(capsys, 'evaluate', WORKDIR, '--json', *options)[1])
    assert (found['step'], found['examples']) == (3, 48)
    assert found['loss'] == pytest.approx(loss, rel=1e-5)


def test_the_run_continues_with_the_same_steps(tmp_path):
    workdir = tmp_path / 'run'
    shutil.copytree(WORKDIR, workdir)
    config = read_config([*ARGUMENTS, '--config.steps=7'])
    result = loop.train(config, str(workdir))
    lines = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
    losses = {line['step']: line['loss'] for line in lines if line['split'] == 'train' and line['step'] > 3}
    assert losses == pytest.approx(TRAINING_LOSS, rel=1e-4)
    assert {k: result.last[k] for k in EVALUATION} == pytest.approx(EVALUATION, rel=1e-4)
