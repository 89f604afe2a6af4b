"""Folders in the layout of Hugging Face's Hub."""

import json
import os
import shutil
import subprocess
import sys

import chex
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import run

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


def test_a_folder_may_begin_at_home(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved.parent))
    assert (
        epsanet_jax.from_pretrained(f'~/{saved.name}').class_names
        == epsanet_jax.from_pretrained(saved).class_names
    )


def test_there_and_back_again(saved):
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
    ],
)
def test_every_setting_of_a_network(tmp_path, model):
    variables = small.random_variables(model, dtype=np.float32)
    epsanet_jax.save_pretrained(tmp_path / 'net', model, variables)
    net = epsanet_jax.from_pretrained(tmp_path / 'net')
    assert net.model == model
    assert net.class_names == ()
    assert net.preprocessing.image_size == 224


@pytest.mark.parametrize('name', epsanet_jax.list_models())
def test_a_published_network_is_known_by_its_name(name):
    from epsanet_jax.models.zoo import build_model, config_of

    model = epsanet_jax.create_model(name)
    config = config_of(model)
    assert config.name == name
    assert config == epsanet_jax.models.ModelConfig(name=name, num_classes=1000)
    assert build_model(config) == model


def test_the_files_are_what_the_hub_expects(saved):
    from safetensors.numpy import load_file

    config = json.loads((saved / 'config.json').read_text())
    assert config['architectures'] == ['EPSANet']
    assert config['id2label'] == {str(i): name for i, name in enumerate(NAMES)}
    weights = load_file(saved / 'model.safetensors')
    assert weights['layer1.0.conv2.conv_4.weight'].shape == (2, 4, 9, 9)
    card = (saved / 'README.md').read_text()
    assert card.startswith('---\nlibrary_name: epsanet_jax\n')
    assert card.count('\n---\n') == 1
    assert '\n# license: ' in card
    assert 'top-1' not in card


def test_the_card_is_read_by_the_hub(tmp_path):
    import huggingface_hub

    text = 'Trained on a walk.'
    epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, license='mit', description=text)
    card = huggingface_hub.ModelCard.load(tmp_path / 'net' / 'README.md')
    assert card.data.license == 'mit'
    assert card.data.library_name == 'epsanet_jax'
    assert text in card.text


def test_the_card_says_how_to_load_it(saved, monkeypatch, rng):
    import re

    monkeypatch.chdir(saved)
    blocks = re.findall(r'```python\n(.*?)```', (saved / 'README.md').read_text(), re.DOTALL)
    x = small.images(rng, dtype=np.float32)
    names = {'images': x}
    exec(compile(blocks[0], 'README.md', 'exec'), names)
    import torch

    exec(compile(blocks[1], 'README.md', 'exec'), names)
    theirs = names['network'](torch.from_numpy(x).permute(0, 3, 1, 2)).detach().numpy()
    np.testing.assert_allclose(names['logits'], theirs, atol=1e-5 * np.abs(theirs).max())


def test_the_commands_take_a_folder_and_write_one(capsys, saved, tmp_path, digits_dir):
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


def test_weights_without_a_configuration(saved):
    (saved / 'config.json').unlink()
    net = epsanet_jax.from_pretrained(saved)  # the weights' own metadata say it
    assert (net.class_names, net.preprocessing) == (NAMES, SETTINGS)


def test_the_configuration_counts(saved):
    config = json.loads((saved / 'config.json').read_text())
    config['id2label']['0'] = 'tom'
    (saved / 'config.json').write_text(json.dumps(config))
    assert epsanet_jax.from_pretrained(saved).class_names == ('tom', *NAMES[1:])


def damage(**changes):
    def change(saved):
        path = saved / 'config.json'
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return change


@pytest.mark.parametrize(
    ('change', 'part'),
    [
        (lambda saved: (saved / 'config.json').write_text('{'), 'cannot read'),
        (lambda saved: (saved / 'config.json').write_text('[]'), 'is not of an EPSANet'),
        (lambda saved: (saved / 'config.json').write_bytes(b'\xff'), 'cannot read'),
        (damage(package='timm'), 'is not of an EPSANet'),
        (damage(model=None), 'id2label names 7 classes, but the model has None'),
        (damage(model=3, id2label=None), 'damaged'),
        (damage(id2label={'1': 'x'}), 'id2label must name'),
        (damage(id2label={'0': 'x'}), 'names 1 classes, but the model has 7'),
        (damage(id2label=['x']), 'id2label must name'),
        (damage(id2label={str(i): i for i in range(7)}), 'class_names must be'),
        (damage(preprocessing={'image_size': 'x'}), 'image_size'),
        (lambda saved: (saved / 'model.safetensors').write_bytes(b'x'), 'no safetensors file'),
        (lambda saved: (saved / 'model.safetensors').unlink(), 'holds no model.safetensors'),
    ],
)
def test_damaged_folders(saved, change, part):
    change(saved)
    with pytest.raises(InputError, match=part) as error:
        epsanet_jax.from_pretrained(saved)
    assert '\n' not in str(error.value)


def test_what_cannot_be_saved(tmp_path):
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


def test_a_repository_in_the_cache_of_the_hub(saved, tmp_path):
    """What a download leaves behind is laid down by hand: there is no network here."""
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
    assert 'the Hub does not give someone/other' in error


def test_no_such_folder(tmp_path, monkeypatch):
    with pytest.raises(InputError, match='no such folder'):
        epsanet_jax.from_pretrained(tmp_path / 'gone')
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(InputError, match='pip install huggingface_hub'):
        epsanet_jax.from_pretrained('someone/net')
