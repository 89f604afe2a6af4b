"""What is checked before a run compiles or writes anything."""

import dataclasses
import json
import shutil

import pytest
from runs import (
    Killed,
    kill_after,
    recipe,
)

from epsanet_jax import InputError, from_pretrained
from epsanet_jax.commands.main import main
from epsanet_jax.training import datasets, loop
from epsanet_jax.training.config import (
    DataConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.training.run import prepare
from epsanet_jax.weights import load
from epsanet_jax.weights.metadata import make_metadata, read_metadata


def test_another_run_in_the_workdir_is_refused_with_the_fields_that_differ(uninterrupted):
    workdir, _ = uninterrupted
    config = recipe(seed=7, optimizer=OptimizerConfig(lr=0.01))
    with pytest.raises(InputError) as e:
        loop.train(config, str(workdir))
    assert 'optimizer.lr: 0.05 -> 0.01' in str(e.value)
    assert 'seed: 0 -> 7' in str(e.value)
    assert 'momentum' not in str(e.value)


def test_a_run_without_a_checkpoint_can_be_replaced(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        kill_after(patch, 1)
        with pytest.raises(Killed):
            loop.train(recipe(), str(tmp_path))
    assert not (tmp_path / 'lock.json').exists()
    assert loop.train(recipe(seed=3, steps=2), str(tmp_path)).step == 2


def test_a_workdir_of_an_older_version_may_lack_new_fields(uninterrupted, tmp_path):

    workdir, result = uninterrupted
    shutil.copytree(workdir, tmp_path / 'run')
    path = tmp_path / 'run' / 'config.json'
    content = json.loads(path.read_text())
    del content['identity']['init_from'], content['identity']['data.flip']
    path.write_text(json.dumps(content))
    assert loop.train(recipe(), str(tmp_path / 'run')).last == result.last


def test_other_validation_images_give_a_warning_and_the_run_continues(tmp_path, monkeypatch, capsys):
    loop.train(recipe(steps=2, eval_every_epochs=0.0), str(tmp_path))
    longer = recipe(steps=4, eval_every_epochs=0.0)
    loop.train(longer, str(tmp_path))
    assert 'warning' not in capsys.readouterr().out
    original = datasets.open_splits

    def changed(data):
        train, evaluation, lines = original(data)
        evaluation.fingerprint = 'other'
        return train, evaluation, lines

    monkeypatch.setattr(datasets, 'open_splits', changed)
    assert loop.train(recipe(steps=6, eval_every_epochs=0.0), str(tmp_path)).step == 6
    assert 'warning: the validation images have changed' in capsys.readouterr().out
    loop.train(recipe(steps=6, eval_every_epochs=0.0), str(tmp_path))
    assert 'warning' not in capsys.readouterr().out


def test_one_value_per_batchnorm_channel_is_refused(tmp_path):
    config = recipe()
    config.model.layers, config.model.planes, config.model.bn_group = (1,) * 4, (8,) * 4, 1
    with pytest.raises(InputError, match='one value per channel in the last stage'):
        loop.train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_groups_of_one_image_need_frozen_batchnorm_or_large_feature_maps(tmp_path):
    config = recipe(batch_size=8)
    config.model = dataclasses.replace(config.model, layers=(1,) * 4, planes=(8,) * 4, bn_group=1)
    for changes in ({'frozen_bn': '.'}, {'output_stride': 16}):
        changed = dataclasses.replace(config, model=dataclasses.replace(config.model, **changes))
        assert prepare(changed, str(tmp_path / 'run')).total_steps == 6
    with pytest.raises(InputError, match='one value per channel in the last stage'):
        prepare(config, str(tmp_path / 'run'))


def test_more_classes_in_the_data_than_in_the_model_are_refused(tmp_path):
    config = recipe()
    config.model.num_classes = 3
    with pytest.raises(InputError, match='4 classes, more than config.model.num_classes=3'):
        loop.train(config, str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


def test_lr_batch_scales_the_learning_rate_with_the_batch_size(tmp_path):
    config = recipe(schedule=ScheduleConfig('constant'), optimizer=OptimizerConfig(0.1, lr_batch=64))
    assert prepare(config, str(tmp_path)).learning_rate(0) == pytest.approx(0.1 * 16 / 64)


@pytest.mark.slow
def test_outputs_without_a_class_are_named_by_their_numbers(tmp_path, capsys):
    config = recipe(steps=1, eval_every_epochs=0.0)
    config.model = dataclasses.replace(config.model, layers=(1,), planes=(8,), num_classes=6)
    loop.train(config, str(tmp_path / 'run'))
    names = [*(f'class{i}' for i in range(4)), '4', '5']
    assert list(load(str(tmp_path / 'run')).class_names) == names
    assert main(['export', str(tmp_path / 'run'), str(tmp_path / 'hub')]) == 0
    assert list(from_pretrained(tmp_path / 'hub').class_names) == names
    old = {
        **make_metadata(dataclasses.replace(config.model), (), DataConfig().preprocessing),
        'class_names': names[:4],
    }
    assert list(read_metadata(old, 'old')[1]) == names
    with pytest.raises(InputError, match='class_names has 7 names, but the model has 6 classes'):
        read_metadata({**old, 'class_names': [*names, 'x']}, 'old')


@pytest.mark.parametrize('content', ['{"architectures": ["EPSANet"]}', 'no json', '[]'])
def test_a_config_json_of_another_program_is_not_overwritten(tmp_path, content):
    (tmp_path / 'config.json').write_text(content)
    with pytest.raises(InputError, match='config.json is not the config.json of a run; choose another'):
        loop.train(recipe(), str(tmp_path))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [('config.json', content)]


def test_an_unusable_workdir_is_refused(tmp_path):
    (tmp_path / 'file').write_text('')
    with pytest.raises(InputError, match='is a file, not a folder'):
        loop.train(recipe(), str(tmp_path / 'file'))
    with pytest.raises(InputError, match='cannot write to --workdir='):
        loop.train(recipe(), str(tmp_path / 'file' / 'run'))
    (tmp_path / 'other' / 'checkpoints' / '3').mkdir(parents=True)
    (tmp_path / 'other' / 'config.json').write_text('{}')
    with pytest.raises(InputError, match=r'is not the config\.json of a run'):
        loop.train(recipe(), str(tmp_path / 'other'))
