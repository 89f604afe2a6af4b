"""The metadata stored with weights."""

import copy
import json

import pytest
import small
from safetensors.numpy import save_file
from torch_files import STATE_DICT, assert_refused

from epsanet_jax.training.config import DataConfig, ModelConfig
from epsanet_jax.weights.metadata import make_metadata, read_metadata

INVALID = ['[]', 'null', '[' * 100_000, '{}', '{"package": "epsanet_jax"}', 'no json']


def damaged_metadata():
    """Yields metadata of a safetensors file, each with one invalid entry."""
    settings = ModelConfig(**small.SETTINGS)
    good = json.loads(json.dumps(make_metadata(settings, (), DataConfig().preprocessing)))
    for path, value in (
        (('model',), 3),
        (('model', 'layers'), 'x'),
        (('model', 'layers'), [[1]]),
        (('model', 'num_classes'), '3'),
        (('model', 'dtype'), 'x'),
        (('model', 'new'), 1),
        (('class_names',), 'x'),
        (('class_names',), [1]),
        (('preprocessing', 'image_size'), 'x'),
        (('preprocessing', 'image_size'), 10**7),
        (('preprocessing', 'mean'), 3),
        (('preprocessing', 'mean'), [0.5]),
        (('preprocessing', 'std'), [0.2, 0.0, 0.2]),
        (('class_names',), ['x'] * 8),
        (('config',), {'data': {}}),
    ):
        bad = copy.deepcopy(good)
        node = bad
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        yield json.dumps(bad)


@pytest.mark.parametrize('metadata', [*INVALID, *damaged_metadata()], ids=lambda text: text[:20])
def test_invalid_metadata_are_refused(capsys, tmp_path, metadata):
    state_dict = {k: v.numpy() for k, v in STATE_DICT.items()}
    save_file(state_dict, tmp_path / 'x.safetensors', metadata={'epsanet_jax': metadata})
    assert_refused(capsys, 'convert', tmp_path / 'x.safetensors', tmp_path / 'y.pth', part='x.safetensors')


@pytest.mark.parametrize('smoothing', [{}, {'label_smoothing': 'x'}, {'label_smoothing': 1.5}])
def test_evaluation_refuses_an_invalid_configuration_of_the_run(capsys, tmp_path, smoothing):
    config = {'data': {}, 'optimizer': {}, **smoothing}
    metadata = make_metadata(ModelConfig(**small.SETTINGS), (), DataConfig().preprocessing, config)
    state_dict = {k: v.numpy() for k, v in STATE_DICT.items()}
    save_file(state_dict, tmp_path / 'x.safetensors', metadata={'epsanet_jax': json.dumps(metadata)})
    arguments = ('evaluate', tmp_path / 'x.safetensors', '--data', 'digits', '--data-dir', tmp_path)
    assert_refused(capsys, *arguments, part='x.safetensors are damaged')


def test_metadata_survive_json_and_name_every_output():
    settings = ModelConfig(**small.SETTINGS)
    metadata = json.loads(json.dumps(make_metadata(settings, ('cat', 'dog'), DataConfig().preprocessing)))
    model, names, preprocessing = read_metadata(metadata, 'x')
    assert (model, preprocessing) == (settings, DataConfig().preprocessing)
    assert names == ('cat', 'dog', '2', '3', '4', '5', '6')
