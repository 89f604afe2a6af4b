"""Runs that start from other weights, and trainings that continue from PyTorch in JAX and back."""

import dataclasses

import jax
import numpy as np
import pytest
import runs
import small
import torch
from runs import (
    equal_trees,
    lines,
)

from epsanet_jax import InputError
from epsanet_jax.commands.main import main
from epsanet_jax.convert import read_checkpoint, to_torch, torch_model
from epsanet_jax.convert.momentum import momentum_from_torch, momentum_to_torch
from epsanet_jax.models.zoo import build_model
from epsanet_jax.training import datasets, init_from, inputs, loop
from epsanet_jax.training.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from epsanet_jax.training.run import prepare
from epsanet_jax.training.validation import validate
from epsanet_jax.weights import load
from epsanet_jax.weights.metadata import make_metadata
from epsanet_jax.weights.orbax import save_weights

TWO_STAGES = {'layers': (1, 1), 'planes': (8, 16)}
MODEL = {k: v for k, v in {**small.SETTINGS, **TWO_STAGES}.items() if k != 'num_classes'}
EXAMPLES, BATCH = 64, 16  # 4 steps an epoch
NET = small.model(**MODEL, num_classes=4)


def recipe(**changes):
    config = Config(
        batch_size=BATCH,
        epochs=3,
        log_every_steps=1,
        eval_every_epochs=0.0,
        model=ModelConfig(**MODEL),
        data=DataConfig(
            source='synthetic',
            image_size=32,
            resize_size=32,
            synthetic_examples=EXAMPLES,
            synthetic_classes=4,
        ),
        optimizer=OptimizerConfig(lr=0.01, momentum=0.9, weight_decay=1e-3),
        schedule=ScheduleConfig(name='step', step_epochs=2),
        checkpoint=CheckpointConfig(every_minutes=0, keep=9),
    )
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def batches(config, first, last):
    """Yields the same batches as the trainer, for PyTorch."""
    source, _ = datasets.open_source(config.data, 'train')
    for _, batch in zip(range(first, last), inputs.train_batches(config, source, first), strict=False):
        images = (batch['image'] / 255.0 - np.array(config.data.mean)) / np.array(config.data.std)
        labels = torch.from_numpy(batch['label']).long()
        yield torch.from_numpy(images.astype(np.float32)).permute(0, 3, 1, 2), labels


def torch_steps(twin, sgd, config, first, last):
    criterion = torch.nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
    twin.train()
    for step, (images, labels) in enumerate(batches(config, first, last), start=first):
        for group in sgd.param_groups:
            group['lr'] = config.optimizer.lr * 0.1 ** (step // 8)
        sgd.zero_grad()
        criterion(twin(images), labels).backward()
        sgd.step()


def make_sgd(twin, lr=0.01):
    return torch.optim.SGD(twin.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


@pytest.fixture(scope='module')
def half_trained(tmp_path_factory):
    """One of three epochs in PyTorch, saved like the reference does, and the weights two steps later."""
    path = tmp_path_factory.mktemp('torch') / 'checkpoint.pth.tar'
    torch.manual_seed(0)
    twin = torch_model.EPSANet(NET)
    sgd = make_sgd(twin)
    torch_steps(twin, sgd, recipe(), 0, 4)
    state_dict = {f'module.{k}': v for k, v in twin.state_dict().items()}
    saved = {'epoch': 1, 'arch': 'epsanet50', 'state_dict': state_dict, 'best_prec1': 0.0}
    torch.save({**saved, 'optimizer': sgd.state_dict()}, path)
    torch_steps(twin, sgd, recipe(), 4, 6)
    return path, {k: v.numpy().copy() for k, v in twin.state_dict().items()}


def assert_close(ours, expected):
    for name, value in expected.items():
        if not name.endswith('num_batches_tracked'):
            error = np.abs(ours[name] - value).max() / np.abs(value).max()
            assert error < 2e-4, (name, error)  # float32, two steps on 8 devices


@pytest.mark.slow
def test_a_training_from_pytorch_continues_in_jax_with_the_same_updates(half_trained, tmp_path, capsys):
    path, expected = half_trained
    config = recipe(steps=6, init_from=str(path), init_optimizer=True)
    loop.train(config, str(tmp_path))
    assert 'continues at step 4 with its momentum' in capsys.readouterr().out
    loaded = load(str(tmp_path))
    assert loaded.source.step == 6
    assert_close(to_torch(loaded.variables, loaded.model), expected)

    without = recipe(steps=6, init_from=str(path))
    loop.train(without, str(tmp_path / 'without'))
    other = to_torch(load(str(tmp_path / 'without')).variables, NET)
    assert np.abs(other['fc.weight'] - expected['fc.weight']).max() > 1e-3


@pytest.mark.slow
def test_the_file_is_not_needed_after_the_first_checkpoint(half_trained, tmp_path):
    path = tmp_path / 'moved.pth.tar'
    path.write_bytes(half_trained[0].read_bytes())
    loop.train(recipe(steps=5, init_from=str(path), init_optimizer=True), str(tmp_path / 'run'))
    path.unlink()
    loop.train(recipe(steps=6, init_from=str(path), init_optimizer=True), str(tmp_path / 'run'))
    assert_close(to_torch(load(str(tmp_path / 'run')).variables, NET), half_trained[1])


@pytest.mark.slow
def test_the_learning_rate_continues_from_the_file(half_trained, tmp_path):
    """The last learning rate of the file is 0.01: the schedule continues there, not at its own peak."""
    config = recipe(steps=9, init_from=str(half_trained[0]), init_optimizer=True)
    config.optimizer.lr = 5.0
    loop.train(config, str(tmp_path))
    rates = [line['lr'] for line in lines(tmp_path) if line['split'] == 'train']
    assert rates == pytest.approx([0.01] * 4 + [0.001])


@pytest.mark.slow
def test_a_training_from_jax_continues_in_pytorch_with_the_same_updates(tmp_path):
    """Four steps in JAX, converted, then two in PyTorch: the same as six in JAX."""
    config = recipe(steps=8)
    config.checkpoint.every_steps = 4
    loop.train(config, str(tmp_path / 'run'))
    path = tmp_path / 'back.pth.tar'
    assert main(['convert', str(tmp_path / 'run'), str(path), '--step', '4']) == 0
    saved = torch.load(path, weights_only=True)
    assert saved['epoch'] == 1
    twin = torch_model.EPSANet(NET)
    twin.load_state_dict(saved['state_dict'], strict=True)
    sgd = make_sgd(twin, lr=0.5)
    sgd.load_state_dict(saved['optimizer'])
    assert sgd.param_groups[0]['lr'] == pytest.approx(0.01)
    torch_steps(twin, sgd, config, 4, 6)
    config.steps = 6
    loop.train(config, str(tmp_path / 'six'))
    expected = to_torch(load(str(tmp_path / 'six')).variables, NET)
    assert_close({k: v.numpy() for k, v in twin.state_dict().items()}, expected)


@pytest.mark.slow
def test_converting_half_an_epoch_reports_the_loss(tmp_path, capsys):
    loop.train(recipe(steps=6), str(tmp_path / 'run'))
    capsys.readouterr()
    assert main(['convert', str(tmp_path / 'run'), str(tmp_path / 'x.pth.tar')]) == 0
    assert 'files store whole epochs, here 2' in capsys.readouterr().out
    assert torch.load(tmp_path / 'x.pth.tar', weights_only=True)['epoch'] == 2
    assert main(['convert', str(tmp_path / 'run'), str(tmp_path / 'x.pth')]) == 0
    assert 'lost:' not in capsys.readouterr().out


def test_momentum_is_in_the_order_of_pytorch_and_converts_back(half_trained):
    read = read_checkpoint(half_trained[0])
    momentum = momentum_from_torch(read.optimizer, read.state_dict, NET)
    group = {'lr': 0.1, 'momentum': 0.9, 'weight_decay': 0.0, 'nesterov': False}
    back = momentum_to_torch(momentum, NET, group)
    for number, entry in read.optimizer['state'].items():
        np.testing.assert_array_equal(back['state'][number]['momentum_buffer'], entry['momentum_buffer'])
    twin = torch_model.EPSANet(NET)
    names = [name for name, _ in twin.named_parameters()]
    where = names.index('layer2.0.conv2.conv_3.weight')
    ours = momentum['layer2_0']['conv2']['conv_3']['kernel']
    expected = read.optimizer['state'][where]['momentum_buffer'].permute(2, 3, 1, 0)
    np.testing.assert_array_equal(ours, expected)


def test_other_optimizer_settings_are_refused(half_trained, tmp_path):
    path = str(half_trained[0])
    for changes, part in (
        ({'optimizer': OptimizerConfig(momentum=0.8, weight_decay=1e-3)}, 'optimizer.momentum=0.9'),
        ({'optimizer': OptimizerConfig()}, 'config.optimizer.weight_decay=0.001'),
        ({'epochs': 1.0}, 'is at step 4, but the run ends at step 4'),
        ({'model': ModelConfig(**{**MODEL, 'layers': (1,), 'planes': (8,)})}, 'unexpected layer2.0.conv1'),
        ({'init_from': ''}, 'needs config.init_from'),
    ):
        config = recipe(**{'init_from': path, 'init_optimizer': True, **changes})
        with pytest.raises(InputError, match=part):
            loop.train(config, str(tmp_path / 'run'))
        assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize(
    ('damage', 'part'),
    [
        (lambda o: o.update(param_groups=3), 'not that of SGD'),
        (lambda o: o.update(param_groups=[3]), 'not that of SGD'),
        (lambda o: o.update(param_groups=o['param_groups'] * 2), '2 groups'),
        (lambda o: o.update(state=[1]), 'not that of SGD'),
        (lambda o: o.update(state={0: {'exp_avg': 1}}), 'keeps exp_avg'),
        (lambda o: o['param_groups'][0].update(dampening=0.5), 'dampening 0.5'),
        (lambda o: o['param_groups'][0].update(maximize=True), 'maximize True'),
        (lambda o: o['param_groups'][0].update(lr=float('inf')), 'learning rate'),
        (lambda o: o['param_groups'][0].update(lr='x'), 'not that of SGD'),
        (lambda o: o['param_groups'][0].update(params=[0]), 'but the network has'),
        (lambda o: o['state'][0].update(momentum_buffer='x'), 'in conv1.weight'),
        (lambda o: o['state'][0].update(momentum_buffer=torch.zeros(3)), 'instead of'),
    ],
)
def test_damaged_or_other_optimizer_states_are_refused(half_trained, tmp_path, damage, part):
    content = torch.load(half_trained[0], weights_only=True)
    damage(content['optimizer'])
    torch.save(content, tmp_path / 'x.pth.tar')
    with pytest.raises(InputError, match=part):
        loop.train(recipe(init_from=str(tmp_path / 'x.pth.tar'), init_optimizer=True), str(tmp_path / 'run'))
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_an_epoch_may_be_a_fractional_number_of_steps(tmp_path, capsys):
    """100 examples in batches of 16: an epoch is 6.25 steps; a run continues at the right step."""
    config = recipe(epochs=2)
    config.data.synthetic_examples = 100
    loop.train(config, str(tmp_path / 'two'))
    assert main(['convert', str(tmp_path / 'two'), str(tmp_path / 'x.pth.tar')]) == 0
    assert torch.load(tmp_path / 'x.pth.tar', weights_only=True)['epoch'] == 2
    on = recipe(epochs=3, init_from=str(tmp_path / 'two'), init_optimizer=True)
    on.data.synthetic_examples = 100
    capsys.readouterr()
    loop.train(on, str(tmp_path / 'on'))
    assert 'continues at step 12 with its momentum' in capsys.readouterr().out


@pytest.mark.slow
def test_weights_survive_a_chain_of_conversions(tmp_path):
    loop.train(recipe(steps=1), str(tmp_path / 'run'))
    for src, dst in (('run', 'x.safetensors'), ('x.safetensors', 'orbax'), ('orbax', 'y.pth')):
        assert main(['convert', str(tmp_path / src), str(tmp_path / dst)]) == 0
    back = torch.load(tmp_path / 'y.pth', weights_only=True)
    expected = to_torch(load(str(tmp_path / 'run')).variables, NET)
    np.testing.assert_array_equal(back['conv1.weight'], expected['conv1.weight'])
    config = recipe(steps=1, init_from=str(tmp_path / 'orbax'))
    assert loop.train(config, str(tmp_path / 'on')).step == 1


@pytest.mark.slow
def test_weights_of_a_run_start_another_with_a_new_classifier(tmp_path, capsys):
    loop.train(recipe(steps=1), str(tmp_path / 'first'))
    config = recipe(steps=1, init_from=str(tmp_path / 'first'))
    config.data.synthetic_classes = 3
    config.optimizer.lr = 0.0
    config.optimizer.weight_decay = 0.0
    loop.train(config, str(tmp_path / 'second'))
    assert 'classifier of 4 classes replaced by a new one of 3' in capsys.readouterr().out
    first, second = (load(str(tmp_path / name)).variables['params'] for name in ('first', 'second'))
    np.testing.assert_array_equal(first['conv1']['kernel'], second['conv1']['kernel'])
    assert second['fc']['kernel'].shape == (32, 3)


@pytest.mark.slow
def test_fine_tuning_a_part_at_another_image_size(tmp_path):
    """Other classes and larger images; the stem and the first stage are frozen."""
    first = runs.recipe(steps=3, eval_every_epochs=0.0)
    first.model = dataclasses.replace(first.model, layers=(1, 1), planes=(8, 16))
    loop.train(first, str(tmp_path / 'first'))
    config = runs.recipe(
        steps=3,
        eval_every_epochs=0.0,
        model=first.model,
        init_from=str(tmp_path / 'first'),
        freeze='^conv1|^bn1|^layer1',
        data=DataConfig(
            source='synthetic', image_size=40, eval_image_size=48, resize_size=56, synthetic_examples=64,
            synthetic_classes=3,
        ),
    )  # fmt: skip
    loop.train(config, str(tmp_path / 'second'))
    before, after = (load(str(tmp_path / name)) for name in ('first', 'second'))
    for collection in ('params', 'batch_stats'):
        for name, old in before.variables[collection].items():
            if name != 'fc':
                same = equal_trees(old, after.variables[collection][name])
                assert same == name.startswith(('conv1', 'bn1', 'layer1')), (collection, name)
    assert after.class_names == ('class0', 'class1', 'class2')
    assert after.preprocessing.image_size == 48
    assert after.variables['params']['fc']['kernel'].shape[-1] == 3


@pytest.mark.parametrize(
    ('names', 'report'),
    [
        (('class0', 'class1'), 'classifier of 2 classes replaced by a new one of 4'),
        (('a', 'b', 'c', 'd'), 'classifier of other classes (a, b, c and 1 more) replaced by a new one'),
        (('class1', 'class0', 'class2', 'class3'), 'classifier of other classes (class1, class0, class2'),
        (('class0', 'class1', 'class2', 'class3'), ''),
        ((), 'classifier of 4 classes kept: the weights come without class names'),
    ],
)
def test_the_classifier_is_kept_only_for_the_same_classes(tmp_path, names, report):
    net = dataclasses.replace(runs.recipe().model, layers=(1,), planes=(8,), num_classes=len(names) or 4)
    variables = small.random_variables(build_model(net, 0), dtype=np.float32)
    save_weights(str(tmp_path / 'weights'), variables, make_metadata(net, names, DataConfig().preprocessing))
    config = runs.recipe(init_from=str(tmp_path / 'weights'))
    config.model = dataclasses.replace(net, num_classes=0)
    initial = prepare(config, str(tmp_path / 'run')).initial
    assert [line[: len(report)] for line in initial.report] == ([report] if report else [])
    before, after = variables['params']['fc']['kernel'], initial.taken['params', 'fc', 'kernel']
    kept = np.array_equal(before, after)
    assert kept == (not report or 'kept' in report)
    network, model = load(str(tmp_path / 'weights')), build_model(config.model, 4)
    classes = [f'class{i}' for i in range(4)]
    if not kept:
        with pytest.raises(InputError, match='cannot continue with other classes: the weights are for'):
            init_from.make_initial_state(network, model, classes, jax.random.key(0), 3, True)


@pytest.mark.slow
def test_a_resnet_starts_a_run_of_an_epsanet_with_gray_images(tmp_path, capsys):
    """What fits is taken, also by the moving averages; a stem for three channels becomes one for one."""
    net = dataclasses.replace(runs.recipe().model, layers=(1,), planes=(8,), num_classes=4)
    resnet = dataclasses.replace(net, name='resnet50', kernels=(), groups=())
    variables = small.random_variables(build_model(resnet, 0), dtype=np.float32)
    save_weights(str(tmp_path / 'resnet'), variables, make_metadata(resnet, (), DataConfig().preprocessing))
    config = runs.recipe(init_from=str(tmp_path / 'resnet'), init_partial=True, steps=1, ema_decay=0.5)
    config.optimizer.lr = 0.0
    config.model = dataclasses.replace(net, in_channels=1)
    config.data.mean, config.data.std = (0.5,), (0.25,)
    loop.train(config, str(tmp_path / 'run'))
    out = capsys.readouterr().out
    for line in (
        'classifier of 4 classes kept: the weights come without class names',
        'conv1.weight: 3 input channels became 1: their sum',
        'tensors taken, ',
        'not used: layer*.*.conv2.weight (1)',
    ):
        assert line in out
    for ema in (True, False):
        started = load(str(tmp_path / 'run'), ema=ema).variables['params']
        stem = variables['params']['conv1']['kernel'].sum(axis=2, keepdims=True)
        np.testing.assert_allclose(started['conv1']['kernel'], stem, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(started['fc']['kernel'], variables['params']['fc']['kernel'])
    whole = dataclasses.replace(config, init_partial=False)
    with pytest.raises(InputError, match='does not fit the model in'):
        loop.train(whole, str(tmp_path / 'other'))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'init_partial': True}, 'config.init_partial needs config.init_from=FILE'),
        (
            {'init_partial': True, 'init_from': 'x', 'init_optimizer': True},
            'config.init_optimizer needs all weights: set config.init_partial=False',
        ),
    ],
)
def test_a_partial_start_needs_weights_and_takes_no_optimizer(fields, message):
    with pytest.raises(InputError, match=message):
        validate(runs.recipe(**fields))
