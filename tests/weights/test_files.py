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
from PIL import Image

import epsanet_jax
from epsanet_jax import InputError, Network
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.weights import orbax, save
from epsanet_jax.weights.metadata import metadata_of

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
    ],
)
def test_options_that_do_not_apply_are_refused(saved, options, part):
    with pytest.raises(InputError, match=part):
        epsanet_jax.load(saved / 'x.pth', **options)
