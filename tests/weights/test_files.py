"""`load`, `predict` and `save_pretrained` for every type of weight file."""

import os
import shutil
import subprocess
import sys

import chex
import numpy as np
import pytest
import small
import torch
from command import run
from PIL import Image

import epsanet_jax
from epsanet_jax import InputError, Network
from epsanet_jax.convert import to_torch
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.weights import orbax, save
from epsanet_jax.weights.network import metadata_of

NET = small.model(layers=(1, 1), planes=(8, 16))
VARIABLES = small.random_variables(NET, dtype=np.float32)
NETWORK = Network(NET, VARIABLES, tuple('abcdefg'), Preprocessing(32, 40, std=(0.2, 0.25, 0.3)))
TYPES = ['orbax', 'hub', 'x.safetensors', 'x.pth']


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    """A folder with the network in every type of file, and an image."""
    folder = tmp_path_factory.mktemp('network')
    orbax.save_weights(str(folder / 'orbax'), VARIABLES, metadata_of(NETWORK))
    epsanet_jax.save_pretrained(folder / 'hub', NETWORK)
    for name in ('x.safetensors', 'x.pth'):
        save.write(str(folder / name), NETWORK)
    pixels = np.random.default_rng(0).integers(0, 256, (60, 48, 3), np.uint8)
    Image.fromarray(pixels).save(folder / 'image.png')
    return folder


@pytest.mark.parametrize('name', TYPES)
def test_every_type_gives_the_same_network(saved, name):
    network = epsanet_jax.load(saved / name)
    assert isinstance(network, Network)
    assert network.model == NET
    chex.assert_trees_all_equal(network.variables, VARIABLES)
    assert network.class_names == NETWORK.class_names
    assert network.preprocessing == NETWORK.preprocessing


def test_every_type_gives_the_same_predictions_as_network_and_as_path(saved):
    images = [str(saved / 'image.png')]
    (expected,) = epsanet_jax.predict(NETWORK, images, top=2)
    assert expected.classes.shape == (2,)
    for name in TYPES:
        for network in (epsanet_jax.load(saved / name), str(saved / name)):
            (prediction,) = epsanet_jax.predict(network, images, top=2)
            np.testing.assert_array_equal(prediction.classes, expected.classes, err_msg=name)
            np.testing.assert_array_equal(prediction.probabilities, expected.probabilities, err_msg=name)
            np.testing.assert_array_equal(prediction.logits, expected.logits, err_msg=name)


def test_from_pretrained_is_load_and_save_pretrained_writes_the_same_folder(saved, tmp_path):
    loaded = epsanet_jax.from_pretrained(saved / 'hub')
    other = epsanet_jax.load(saved / 'hub')
    assert loaded.model == other.model == NET
    assert loaded.source == other.source
    chex.assert_trees_all_equal(loaded.variables, other.variables)
    epsanet_jax.save_pretrained(tmp_path / 'again', loaded)
    for name in ('config.json', 'README.md'):
        assert (tmp_path / 'again' / name).read_bytes() == (saved / 'hub' / name).read_bytes()
    chex.assert_trees_all_equal(epsanet_jax.load(tmp_path / 'again').variables, VARIABLES)


def test_hub_repository_is_loaded_from_an_offline_cache(saved, tmp_path):
    repository, commit = tmp_path / 'cache' / 'models--owner--name', '0' * 40
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text(commit)
    shutil.copytree(saved / 'hub', repository / 'snapshots' / commit)
    code = 'import epsanet_jax; print(epsanet_jax.load("hf://owner/name").class_names)'
    environment = {**os.environ, 'HF_HUB_CACHE': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-c', code]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (process.returncode, process.stdout) == (0, f'{NETWORK.class_names}\n'), process.stderr


def test_hub_repository_needs_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(InputError, match='owner/name; .* pip install huggingface_hub'):
        epsanet_jax.load('hf://owner/name')


def test_file_without_classifier_gives_features(saved, tmp_path):
    state_dict = torch.load(saved / 'x.pth', weights_only=True)
    torch.save({k: v for k, v in state_dict.items() if not k.startswith('fc.')}, tmp_path / 'x.pth')
    network = epsanet_jax.load(tmp_path / 'x.pth')
    assert network.source.notes == ('no classifier in the file: the network returns the pooled features',)
    assert network.model.num_classes == 0
    images = np.ones((2, 32, 32, 3), np.float32)
    pooled = network.model.apply(network.variables, images)
    features = network.model.apply(network.variables, images, method='features')
    assert pooled.shape == (2, 32)
    np.testing.assert_allclose(features['layer2'].mean(axis=(1, 2)), pooled, rtol=1e-5)
    with pytest.raises(InputError, match='has no classifier'):
        list(epsanet_jax.predict(network, [str(saved / 'image.png')]))


@pytest.mark.parametrize(
    ('options', 'part'),
    [
        ({'step': 'best'}, 'has one set of weights'),
        ({'ema': False}, 'has one set of weights'),
        ({'revision': 'main'}, 'is only for Hub repositories'),
        ({'ignore': 'x', 'path': 'orbax'}, '--ignore is for files and Hub folders, not for the checkpoint'),
    ],
)
def test_options_that_do_not_apply_are_refused(saved, options, part):
    path = saved / options.pop('path', 'x.pth')
    with pytest.raises(InputError, match=part):
        epsanet_jax.load(path, **options)


RESNET = epsanet_jax.create_model('resnet50', layers=(1,), planes=(8,), expansion=2, num_classes=3)
UNSURE = (
    "read as resnet50; networks with the same names (timm's resnetaa50 and resnetblur50, Caffe's ResNet-50) "
    'would give wrong logits: check some images'
)
WARNING = 'warning: read as resnet50, but the file is of {}: the logits may be wrong'


@pytest.mark.parametrize(
    ('arch', 'notes'),
    [
        (None, (UNSURE,)),
        ('resnet50', ()),
        ('tv_resnet50.tv_in1k', ()),
        ('resnet50.a1_in1k', ()),
        ('seresnet50', (WARNING.format('seresnet50'),)),
        (
            'resnetaa50',
            ('warning: read as resnet50, but the file is of resnetaa50: the logits may be wrong',),
        ),
    ],
)
def test_resnet_that_may_be_another_architecture_is_reported(tmp_path, arch, notes):
    variables = small.random_variables(RESNET, dtype=np.float32)
    state_dict = {k: torch.from_numpy(v) for k, v in to_torch(variables, RESNET).items()}
    torch.save({'state_dict': state_dict, 'arch': arch}, tmp_path / 'x.pth')
    network = epsanet_jax.load(tmp_path / 'x.pth')
    chex.assert_trees_all_equal(network.variables, variables)
    assert network.source.notes == notes


@pytest.fixture(scope='module')
def averaged(tmp_path_factory):
    """A file with weights, moving averages, a prefix and a counter of a profiler."""
    state_dict = {k: torch.from_numpy(v) for k, v in to_torch(VARIABLES, NET).items()}
    average = {f'module.{k}': v for k, v in state_dict.items()} | {'module.total_ops': torch.zeros(1)}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1).state_dict()
    path = tmp_path_factory.mktemp('averaged') / 'last.ckpt'
    weights = {k: v * 0 for k, v in state_dict.items()}
    torch.save({'model': weights, 'model_ema': average, 'optimizer': optimizer, 'epoch': 3}, path)
    return path


def test_moving_averages_come_without_the_optimizer_of_the_weights(averaged):
    network = epsanet_jax.load(averaged, with_checkpoint=True, ignore='total_ops')
    assert network.source.averaged
    assert network.checkpoint.optimizer is None
    assert (
        network.source.no_optimizer == 'it belongs to the weights, not to their moving averages: use --no-ema'
    )
    chex.assert_trees_all_equal(network.variables, VARIABLES)
    network = epsanet_jax.load(averaged, ema=False, with_checkpoint=True)
    assert (network.source.averaged, network.source.no_optimizer) == (False, '')
    assert network.checkpoint.optimizer is not None
    assert not network.variables['params']['fc']['kernel'].any()


@pytest.mark.parametrize(
    'command',
    [
        ('convert', 'y.pth'),
        pytest.param(('export', 'y.onnx'), marks=pytest.mark.slow),
        ('predict', 'image.png'),
    ],
)
def test_commands_report_on_stderr_what_was_taken(capsys, saved, averaged, tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    shutil.copy(saved / 'image.png', tmp_path)
    status, out, err = run(capsys, command[0], averaged, command[1], '--ignore', 'total_ops$')
    assert status == 0
    assert err.splitlines() == [
        f'{averaged}: moving averages taken (model_ema.module); --no-ema takes the weights (model)',
        f"{averaged}: the prefix 'module.' of the names removed",
        f'{averaged}: --ignore left out 1 entries: total_ops',
    ]
    assert 'dropped: the optimizer state: it belongs to' in out or command[0] != 'convert'
    if command[0] == 'convert':
        chex.assert_trees_all_equal(epsanet_jax.load('y.pth').variables, VARIABLES)


def test_extra_entries_are_refused_in_one_line(capsys, averaged, tmp_path):
    status, out, err = run(capsys, 'convert', averaged, tmp_path / 'y.pth')
    assert (status, out) == (2, '')
    advice = "to leave entries out: epsanet convert SRC DST --ignore '(total_ops)$'"
    fit = f'the state dict does not fit the model in 1 places: unexpected total_ops; {advice}'
    assert err == f'error: {averaged}: {fit}\n'
