"""The files of a folder in the layout of the Hugging Face Hub."""

import json

import numpy as np
import pytest
import small

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
        (lambda saved: (saved / 'config.json').write_text('[]'), 'is not a config of epsanet_jax'),
        (lambda saved: (saved / 'config.json').write_bytes(b'\xff'), 'cannot read'),
        (damage(package='timm'), 'is not a config of epsanet_jax'),
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
