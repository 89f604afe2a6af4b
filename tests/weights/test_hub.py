"""Folders for the Hugging Face Hub, and repositories from it."""

import json
import os
import re
import shutil
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from command import run
from hub_server import Hub

import epsanet_jax
from epsanet_jax import InputError
from epsanet_jax.data.preprocessing import Preprocessing

NET = small.model(layers=(1, 1), planes=(8, 16))
VARIABLES = small.random_variables(NET, dtype=np.float32)
NAMES = ('cat', 'dog', 'château', 'd', 'e', 'f', 'f')
SETTINGS = Preprocessing(32, 40, std=(0.2, 0.25, 0.3))


@pytest.fixture
def saved(tmp_path):
    epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, NAMES, SETTINGS)
    return tmp_path / 'net'


def test_tilde_in_folder_is_expanded(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved.parent))
    assert epsanet_jax.from_pretrained(f'~/{saved.name}').class_names == NAMES


def test_saved_network_is_read_unchanged(saved):
    net = epsanet_jax.from_pretrained(saved)
    assert net.model == NET
    chex.assert_trees_all_equal(net.variables, VARIABLES)
    assert net.class_names == NAMES
    assert net.preprocessing == SETTINGS
    assert sorted(p.name for p in saved.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    assert [p.name for p in saved.parent.iterdir()] == ['net']


@pytest.mark.parametrize(
    'model',
    [
        epsanet_jax.create_model('resnet50', num_classes=3, layers=(1, 1), planes=(8, 16), remat=True),
        small.model(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, psa_bias=True, bn_group=4, conv='tiled'),
        small.model(kernels=(3, 5), groups=(1, 2), reduction=3),
        small.model(**small.PER_STAGE, planes=(8, 12, 16, 32)),
        small.pyconv(output_stride=16),
    ],
)
def test_every_setting_of_a_network_is_kept(tmp_path, model):
    variables = small.random_variables(model, dtype=np.float32)
    epsanet_jax.save_pretrained(tmp_path / 'net', model, variables)
    net = epsanet_jax.from_pretrained(tmp_path / 'net')
    assert net.model == model
    assert net.class_names == ()
    assert net.preprocessing.image_size == 224


@pytest.mark.parametrize('name', epsanet_jax.list_models())
def test_published_network_has_its_own_name_in_config(name):
    from epsanet_jax.models.zoo import build_model, config_of

    model = epsanet_jax.create_model(name)
    config = config_of(model)
    assert config.name == name
    assert config == epsanet_jax.models.ModelConfig(name=name, num_classes=1000)
    assert build_model(config) == model


def test_card_is_valid_for_the_hub(tmp_path):
    import huggingface_hub

    text = 'Trained on photographs.'
    epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, license='mit', description=text)
    card = huggingface_hub.ModelCard.load(tmp_path / 'net' / 'README.md')
    assert card.data.license == 'mit'
    assert card.data.library_name == 'epsanet_jax'
    assert text in card.text


def test_code_of_the_card_runs(saved, monkeypatch, rng):
    monkeypatch.chdir(saved)
    blocks = re.findall(r'```python\n(.*?)```', (saved / 'README.md').read_text(), re.DOTALL)
    x = small.images(rng, dtype=np.float32)
    names = {'images': x}
    exec(compile(blocks[0], 'README.md', 'exec'), names)
    exec(compile(blocks[1], 'README.md', 'exec'), names)
    theirs = names['model'](torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(names['logits'], theirs, atol=1e-5 * np.abs(theirs).max())


@pytest.mark.slow
def test_commands_read_and_write_hub_folders(capsys, saved, tmp_path, digits_dir):
    status, out, err = run(capsys, 'export', saved, tmp_path / 'again-1.2', '--verify')
    assert (status, err) == (0, '')
    assert 'verified: ' in out
    again = tmp_path / 'again-1.2'
    for name in ('config.json', 'README.md'):
        assert (again / name).read_bytes() == (saved / name).read_bytes()
    chex.assert_trees_all_equal(epsanet_jax.from_pretrained(again).variables, VARIABLES)
    assert run(capsys, 'convert', saved, tmp_path / 'ten', '--num-classes', 10)[0] == 0
    assert run(capsys, 'export', tmp_path / 'ten', tmp_path / 'hub')[0] == 0
    data = ('--data', 'digits', '--data-dir', digits_dir, '--json')
    outputs = [json.loads(run(capsys, 'evaluate', tmp_path / p, *data)[1]) for p in ('ten', 'hub')]
    assert outputs[0]['loss'] == outputs[1]['loss']
    assert outputs[0]['examples'] == 360


def test_invalid_networks_and_folders_are_not_saved(tmp_path):
    (tmp_path / 'old').mkdir()
    for arguments, part in (
        (('old', NET, VARIABLES), 'exists'),
        (('no/such', NET, VARIABLES), 'No such file'),
        (('x', NET, VARIABLES, ['cat']), '7 classes, but 1 names'),
        (('x', NET, VARIABLES, (), Preprocessing(8, 8)), 'image_size'),
        (('x', NET, VARIABLES, (), Preprocessing(32, 40, std=(0.2, 0.2, 0.0))), 'std must be three numbers'),
        (('x', small.model(num_classes=3), VARIABLES), 'fc/kernel'),
    ):
        with pytest.raises(InputError, match=part):
            epsanet_jax.save_pretrained(tmp_path / arguments[0], *arguments[1:])
    assert [p.name for p in tmp_path.iterdir()] == ['old']


def test_repository_is_read_from_the_cache_of_the_hub(saved, tmp_path):
    """The test creates the files of a download, because it has no network access."""
    repository = tmp_path / 'cache' / 'models--someone--net'
    commit = '0' * 40
    (repository / 'refs').mkdir(parents=True)
    (repository / 'refs' / 'main').write_text(commit)
    shutil.copytree(saved, repository / 'snapshots' / commit)
    code = (
        'import epsanet_jax\n'
        'print(epsanet_jax.from_pretrained("someone/net").class_names[2])\n'
        'try:\n'
        '    epsanet_jax.from_pretrained("someone/other")\n'
        'except epsanet_jax.InputError as e:\n'
        '    print(e)'
    )
    environment = {**os.environ, 'HF_HUB_CACHE': str(tmp_path / 'cache'), 'HF_HUB_OFFLINE': '1'}
    command = [sys.executable, '-X', 'utf8', '-c', code]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    name, error = process.stdout.splitlines()
    assert name == 'château'
    assert 'cannot download someone/other' in error


def test_missing_folder_or_package_is_reported(tmp_path, monkeypatch):
    with pytest.raises(InputError, match='no such folder'):
        epsanet_jax.from_pretrained(tmp_path / 'gone')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(InputError, match='pip install huggingface_hub'):
        epsanet_jax.from_pretrained('someone/net')


@pytest.mark.parametrize(
    ('given', 'stored'),
    [
        (np.array(NAMES), NAMES),
        (np.arange(7), tuple('0123456')),  # LabelEncoder.classes_ of integers
        (range(7), tuple('0123456')),
        ((), ()),
        (np.array([]), ()),
    ],
)
def test_class_names_may_be_any_sequence_of_names_or_integers(tmp_path, given, stored):
    epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, given)
    assert epsanet_jax.load(tmp_path / 'net').class_names == stored
    assert epsanet_jax.Network(NET, VARIABLES, given).class_names == stored
    assert len(epsanet_jax.Network(NET, VARIABLES, given).labels) == 7


@pytest.mark.parametrize('name', [None, 1.5, b'cat'])
def test_class_names_of_other_types_are_refused(tmp_path, name):
    with pytest.raises(InputError, match='class_names must be strings or integers, got'):
        epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, [name] * 7)


def test_a_file_of_weights_is_read_from_its_path(saved):
    net = epsanet_jax.from_pretrained(saved / 'model.safetensors')
    assert net.class_names == NAMES
    with pytest.raises(InputError, match='config.json is JSON, not weights'):
        epsanet_jax.from_pretrained(saved / 'config.json')


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local stand-in for the Hub, where this process is logged in."""
    from huggingface_hub import constants

    server = Hub()
    monkeypatch.setattr(constants, 'ENDPOINT', server.url)
    monkeypatch.setattr(
        constants,
        'HUGGINGFACE_CO_URL_TEMPLATE',
        server.url + '/{repo_id}/resolve/{revision}/{filename}',
    )
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('HF_TOKEN', 'hf_secret')
    yield server
    server.close()


def test_pushed_network_comes_back_from_the_hub(hub):
    network = epsanet_jax.Network(NET, VARIABLES, NAMES, SETTINGS)
    address = network.push_to_hub('someone/net', private=True, license='mit')
    assert address == f'{hub.url}/someone/net/commit/{"0" * 40}'
    files = hub.repositories['someone/net']
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert hub.private == {'someone/net': True}
    assert b'license: mit' in files['README.md']
    back = epsanet_jax.load('hf://someone/net')
    chex.assert_trees_all_equal(back.variables, VARIABLES)
    assert (back.class_names, back.preprocessing) == (NAMES, SETTINGS)


def test_card_of_a_repository_is_kept_unless_a_description_is_given(hub):
    network = epsanet_jax.Network(NET, VARIABLES)
    hub.repositories['someone/net'] = {'README.md': b'My own text.'}
    network.push_to_hub('someone/net')
    files = hub.repositories['someone/net']
    assert (files['README.md'], sorted(files)[-1]) == (b'My own text.', 'model.safetensors')
    network.push_to_hub('someone/net', description='New text.')
    assert b'New text.' in files['README.md']


def test_refused_uploads_are_one_line(hub, monkeypatch):
    network = epsanet_jax.Network(NET, VARIABLES)
    with pytest.raises(InputError, match="not the name of a Hub repository \\('owner/name'\\): net"):
        network.push_to_hub('net')
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(InputError, match='cannot upload to someone/net: .*') as error:
        network.push_to_hub('someone/net')
    assert '\n' not in str(error.value)
    assert hub.repositories == {}
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(InputError, match='to upload to the Hub: pip install huggingface_hub'):
        network.push_to_hub('someone/net')
