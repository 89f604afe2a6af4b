"""The files of a folder in the layout of the Hugging Face Hub."""

import json

import chex
import numpy as np
import pytest
import small
import torch

import epsanet_jax
from epsanet_jax import InputError
from epsanet_jax.convert import to_torch
from epsanet_jax.data.preprocessing import Preprocessing

NET = small.model(layers=(1, 1), planes=(8, 16))
VARIABLES = small.random_variables(NET, dtype=np.float32)
STATE_DICT = to_torch(VARIABLES, NET)
NAMES = ('cat', 'dog', 'château', 'd', 'e', 'f', 'f')
SETTINGS = Preprocessing(32, 40, std=(0.2, 0.25, 0.3))


@pytest.fixture
def saved(tmp_path):
    epsanet_jax.save_pretrained(tmp_path / 'net', NET, VARIABLES, NAMES, SETTINGS)
    return tmp_path / 'net'


def test_files_have_the_layout_of_the_hub(saved):
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


def test_missing_config_is_replaced_by_metadata_of_the_weights(saved):
    (saved / 'config.json').unlink()
    net = epsanet_jax.from_pretrained(saved)
    assert (net.class_names, net.preprocessing) == (NAMES, SETTINGS)


def test_config_takes_precedence_over_metadata_of_the_weights(saved):
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
        (lambda saved: (saved / 'config.json').write_text('[]'), 'is not a config: it holds a list'),
        (lambda saved: (saved / 'config.json').write_bytes(b'\xff'), 'cannot read'),
        (damage(model=None), 'id2label has 7 classes, but the model has None'),
        (damage(model=3, id2label=None), 'damaged'),
        (damage(id2label={'1': 'x'}), 'keys of id2label must be'),
        (damage(id2label={'0': 'x'}), 'has 1 classes, but the model has 7'),
        (damage(id2label=['x']), 'keys of id2label must be'),
        (damage(id2label={str(i): i for i in range(7)}), 'class_names must be'),
        (damage(preprocessing={'image_size': 'x'}), 'image_size'),
        (lambda saved: (saved / 'model.safetensors').write_bytes(b'x'), 'is not a safetensors file'),
        (lambda saved: (saved / 'model.safetensors').unlink(), 'has no model.safetensors'),
    ],
)
def test_damaged_folders_are_refused(saved, change, part):
    change(saved)
    with pytest.raises(InputError, match=part) as error:
        epsanet_jax.from_pretrained(saved)
    assert '\n' not in str(error.value)


def foreign(folder, config=None, **extra):
    """Writes a folder as timm's, with PyTorch's names and its own config.json."""
    from safetensors.numpy import save_file

    folder.mkdir()
    save_file(STATE_DICT, folder / 'model.safetensors')
    if config is not None:
        (folder / 'config.json').write_text(json.dumps({**config, **extra}))
    return folder


TIMM = {
    'architecture': 'resnet50',
    'num_classes': 7,
    'pretrained_cfg': {
        'input_size': [3, 64, 64],
        'crop_pct': 0.8,
        'interpolation': 'bicubic',
        'mean': [0.5, 0.5, 0.5],
        'std': [0.25, 0.25, 0.25],
        'label_names': list(NAMES),
    },
}
DEFAULTS = 'the defaults are used'


def test_classes_and_preprocessing_are_taken_from_the_config_of_timm(tmp_path):
    net = epsanet_jax.load(foreign(tmp_path / 'timm', TIMM))
    chex.assert_trees_all_equal(net.variables, VARIABLES)
    assert net.class_names == NAMES
    assert net.preprocessing == Preprocessing(64, 80, (0.5,) * 3, (0.25,) * 3)
    bicubic = 'config.json asks for bicubic interpolation: images are resized bilinearly here'
    assert net.source.notes == (bicubic,)
    names, inner = (
        TIMM['pretrained_cfg']['label_names'],
        {k: TIMM['pretrained_cfg'][k] for k in ('mean', 'std')},
    )
    flat = {'num_classes': 7, 'id2label': {str(i): name for i, name in enumerate(names)}, **inner}
    net = epsanet_jax.load(foreign(tmp_path / 'flat', flat))
    assert (net.class_names, net.preprocessing) == (NAMES, Preprocessing(mean=(0.5,) * 3, std=(0.25,) * 3))
    missing = f'config.json is not of this package, and lacks input_size, crop_pct: {DEFAULTS}'
    assert net.source.notes == (missing,)


def test_what_a_foreign_config_lacks_is_reported(tmp_path):
    net = epsanet_jax.load(
        foreign(tmp_path / 'x', {'architectures': ['X'], 'id2label': {'0': 'a', '1': 'b'}})
    )
    assert (net.class_names, net.preprocessing) == ((), Preprocessing())
    assert net.source.notes == (
        f'config.json is not of this package, and lacks mean, std, input_size, crop_pct: {DEFAULTS}',
        '2 class names do not fit 7 classes: not used',
    )


@pytest.mark.parametrize(
    ('config', 'part'),
    [
        ({'input_size': 3}, 'input_size 3 and crop_pct None cannot be used'),
        ({'input_size': [3, 64, 64], 'crop_pct': 0}, 'crop_pct 0 cannot be used'),
        ({'input_size': [3, 64, '64']}, 'image_size must be of type int'),
        ({'mean': [1, 2, 3]}, 'mean must'),
        ({'std': 'x'}, 'preprocessing.std must hold numbers'),
        ({'label_names': 'ab'}, 'the names of the classes must be strings'),
        ({'label_names': [1] * 7}, 'the names of the classes must be strings'),
        ({'id2label': {'1': 'x'}}, 'keys of id2label must be'),
    ],
)
def test_foreign_configs_with_invalid_values_are_refused(tmp_path, config, part):
    with pytest.raises(InputError, match=part) as error:
        epsanet_jax.load(foreign(tmp_path / 'x', config))
    assert '\n' not in str(error.value)


def sharded(folder):
    from safetensors.numpy import save_file

    folder.mkdir()
    names, table = sorted(STATE_DICT), {}
    for i, part in enumerate((names[::2], names[1::2])):
        file = f'model-{i + 1:05}-of-00002.safetensors'
        save_file({name: STATE_DICT[name] for name in part}, folder / file)
        table |= dict.fromkeys(part, file)
    (folder / 'model.safetensors.index.json').write_text(json.dumps({'metadata': {}, 'weight_map': table}))
    return folder


@pytest.mark.parametrize('below', ['', 'model.safetensors.index.json'])
def test_parts_of_large_networks_are_read_together(tmp_path, below):
    net = epsanet_jax.load(sharded(tmp_path / 'x') / below)
    chex.assert_trees_all_equal(net.variables, VARIABLES)


@pytest.mark.parametrize(
    ('index', 'part'),
    [
        ('{', 'cannot read'),
        ('[]', 'it has no weight_map'),
        ('{"weight_map": {"a": 3}}', 'it has no weight_map'),
        (
            '{"weight_map": {"a": "../x.safetensors"}}',
            r"names '../x.safetensors', which is not in the folder",
        ),
        ('{"weight_map": {"a": "gone.safetensors"}}', "names 'gone.safetensors', which is not in the folder"),
    ],
)
def test_damaged_index_of_parts_is_refused(tmp_path, index, part):
    folder = sharded(tmp_path / 'x')
    (tmp_path / 'x.safetensors').write_bytes((folder / 'model-00001-of-00002.safetensors').read_bytes())
    (folder / 'model.safetensors.index.json').write_text(index)
    with pytest.raises(InputError, match=part):
        epsanet_jax.load(folder)


def test_missing_part_is_reported_as_missing_names(tmp_path):
    folder = sharded(tmp_path / 'x')
    path = folder / 'model.safetensors.index.json'
    table = json.loads(path.read_text())['weight_map']
    first = 'model-00001-of-00002.safetensors'
    path.write_text(json.dumps({'weight_map': {k: v for k, v in table.items() if v == first}}))
    with pytest.raises(InputError):
        epsanet_jax.load(folder)


def test_pytorch_file_of_a_hub_folder_is_read(tmp_path):
    (tmp_path / 'x').mkdir()
    torch.save({k: torch.from_numpy(v) for k, v in STATE_DICT.items()}, tmp_path / 'x' / 'pytorch_model.bin')
    chex.assert_trees_all_equal(epsanet_jax.load(tmp_path / 'x').variables, VARIABLES)
