"""The command `epsanet convert`."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from command import run
from torch_files import NET, REFERENCE, STATE_DICT, VARIABLES, assert_refused

import epsanet_jax
from epsanet_jax import create_model
from epsanet_jax.convert import files, read_checkpoint, to_torch, torch_model
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.training.config import DataConfig, ModelConfig
from epsanet_jax.weights import load, orbax
from epsanet_jax.weights.metadata import make_metadata


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(REFERENCE, path)
    return path


@pytest.mark.parametrize(
    'through',
    [
        'a.pth.tar',
        'a.safetensors',
        'orbax',
        *(pytest.param(n, marks=pytest.mark.slow) for n in ('a.pth', 'a.pt')),
    ],
)
def test_conversion_and_back_keeps_every_bit(capsys, saved, tmp_path, through):
    middle, end = tmp_path / through, tmp_path / 'end.pth'
    status, out, err = run(capsys, 'convert', saved, middle, '--verify')
    assert (status, err) == (0, f"{saved}: the prefix 'module.' of the names removed\n")
    for part in ('epoch 31', f'{small.SETTINGS["num_classes"]} classes', 'verified: logits', 'written: '):
        assert part in out
    assert run(capsys, 'convert', middle, end)[0] == 0
    back = torch.load(end, weights_only=True)
    torch_model.EPSANet(NET).load_state_dict(back, strict=True)
    assert list(back) == list(STATE_DICT)
    for name, tensor in STATE_DICT.items():
        assert torch.equal(back[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([saved.name, through, 'end.pth'])


def test_reference_checkpoint_keeps_epoch_arch_and_accuracy(capsys, saved, tmp_path):
    assert run(capsys, 'convert', saved, tmp_path / 'back.pth.tar')[0] == 0
    back = torch.load(tmp_path / 'back.pth.tar', weights_only=True)
    assert (back['epoch'], back['arch'], back['best_prec1']) == (31, 'epsanet50', 12.5)
    assert set(back['state_dict']) == set(STATE_DICT)


def test_safetensors_have_metadata_and_need_no_torch(capsys, saved, tmp_path):
    path = tmp_path / 'x.safetensors'
    run(capsys, 'convert', saved, path)
    read = read_checkpoint(path)
    assert read.metadata['model'] == 'epsanet50_small'
    assert read.metadata['num_classes'] == '7'
    assert json.loads(read.metadata['preprocessing'])['image_size'] == 224
    code = (
        'import sys; sys.modules["torch"] = None\n'
        'from epsanet_jax import load\n'
        f'loaded = load({str(path)!r})\n'
        'print(loaded.model.num_classes, loaded.variables["params"]["conv1"]["kernel"].shape)'
    )
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert output.stdout == '7 (7, 7, 3, 64)\n'


@pytest.mark.slow
def test_converted_checkpoint_can_be_evaluated(capsys, saved, tmp_path, digits_dir):
    status, out, _ = run(capsys, 'convert', saved, tmp_path / 'orbax', '--num-classes', 10)
    assert status == 0
    assert 'the classifier of 7 classes; a new one of 10 classes' in out
    loaded = load(str(tmp_path / 'orbax'))
    assert loaded.model.num_classes == 10
    kernel = loaded.variables['params']['layer1_0']['conv1']['kernel']
    np.testing.assert_array_equal(kernel, VARIABLES['params']['layer1_0']['conv1']['kernel'])
    data = ('--data', 'digits', '--data-dir', digits_dir, '--json')
    status, out, _ = run(capsys, 'evaluate', tmp_path / 'orbax', *data)
    assert (status, json.loads(out)['examples']) == (0, 360)
    run(capsys, 'convert', tmp_path / 'orbax', tmp_path / 'x.safetensors')
    status, again, _ = run(capsys, 'evaluate', tmp_path / 'x.safetensors', *data)
    assert json.loads(again)['loss'] == pytest.approx(json.loads(out)['loss'])
    data = ('--data', 'digits', '--data-dir', digits_dir)
    assert_refused(capsys, 'evaluate', saved, *data, part='10 classes', notes=1)
    assert_refused(capsys, 'evaluate', saved, part='--data is missing', notes=1)


def test_missing_classifier_is_drawn_with_num_classes(capsys, tmp_path):
    torch.save({k: v for k, v in STATE_DICT.items() if not k.startswith('fc.')}, tmp_path / 'x.pth')
    assert_refused(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', part='has no classifier')
    assert run(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', '--num-classes', 5)[0] == 0
    back = torch.load(tmp_path / 'y.pth', weights_only=True)
    assert back['fc.weight'].shape == (5, 64)
    assert torch.equal(back['conv1.weight'], STATE_DICT['conv1.weight'])


@pytest.mark.parametrize('param_dtype', ['bfloat16', 'float32'])
@pytest.mark.slow
def test_bfloat16_networks_are_converted(capsys, tmp_path, param_dtype):
    settings = ModelConfig(**small.SETTINGS, dtype='bfloat16', param_dtype=param_dtype)
    leaves = jax.tree.map(lambda leaf: jnp.asarray(leaf, param_dtype), VARIABLES['params'])
    variables = {'params': leaves, 'batch_stats': VARIABLES['batch_stats']}
    metadata = make_metadata(settings, (), DataConfig().preprocessing)
    orbax.save_weights(str(tmp_path / 'orbax'), jax.tree.map(jnp.asarray, variables), metadata)
    for through in ('a.pth', 'b.safetensors'):
        status, out, err = run(capsys, 'convert', tmp_path / 'orbax', tmp_path / through, '--verify')
        assert (status, err) == (0, '')
        assert 'verified' in out
        assert 'converted to' not in out
    back = torch.load(tmp_path / 'a.pth', weights_only=True)
    assert str(back['fc.weight'].dtype) == f'torch.{param_dtype}'


def test_invalid_destinations_are_refused(capsys, saved, tmp_path):
    for name in ('x.ckpt', 'x.bin', 'x.tar'):
        assert_refused(capsys, 'convert', saved, tmp_path / name, part='cannot write .')
    assert_refused(capsys, 'convert', saved, tmp_path / 'no' / 'such', part='its folder does not exist')
    (tmp_path / 'folder').mkdir()
    assert_refused(capsys, 'convert', saved, tmp_path / 'folder', part='exists')
    assert_refused(capsys, 'convert', saved, saved, part='same file')
    assert_refused(capsys, 'convert', saved, tmp_path / 'no' / 'such.pth', part='cannot write')
    assert_refused(capsys, 'convert', saved, tmp_path / 'x.pth', '--model', 'epsanet50_large', part='128')
    assert_refused(capsys, 'convert', saved, tmp_path / 'x.pth', '--model', 'epsanet', part='unknown model')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pth.tar', 'folder']


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['epsanet50_small', 'epsanet50_large', 'epsanet101_small', 'epsanet101_large']
)
def test_every_variant_is_converted_and_back_at_224_pixels(capsys, tmp_path, name):
    torch.manual_seed(0)
    twin = torch_model.EPSANet(create_model(name))
    rng = np.random.default_rng(0)
    for key, value in twin.state_dict().items():
        if ('bn' in key or 'downsample.1' in key) and value.is_floating_point():
            value.copy_(torch.from_numpy(rng.uniform(0.5, 1.5, value.shape)))
    torch.save({'state_dict': twin.state_dict(), 'epoch': 1, 'arch': 'epsanet'}, tmp_path / 'a.pth.tar')
    status, out, _ = run(capsys, 'convert', tmp_path / 'a.pth.tar', tmp_path / 'orbax', '--verify')
    assert status == 0
    assert f'model: {name}, 1000 classes\n' in out
    difference = float(out.split('differ by ')[1].split(' ')[0])
    assert difference <= 1e-5
    assert run(capsys, 'convert', tmp_path / 'orbax', tmp_path / 'b.pth')[0] == 0
    back = torch.load(tmp_path / 'b.pth', weights_only=True)
    assert back.keys() == twin.state_dict().keys()
    for key, value in twin.state_dict().items():
        assert torch.equal(back[key], value), key


@pytest.mark.parametrize('kind', ['x.safetensors', pytest.param('orbax', marks=pytest.mark.slow)])
@pytest.mark.slow
def test_correct_model_name_changes_nothing(capsys, tmp_path, kind):
    settings = ModelConfig(**small.SETTINGS, output_stride=8, dtype='bfloat16')
    names = [f'class {i}' for i in range(settings.num_classes)]
    metadata = make_metadata(settings, names, DataConfig(image_size=32, resize_size=36).preprocessing)
    source = tmp_path / kind
    if kind == 'orbax':
        orbax.save_weights(str(source), VARIABLES, metadata)
    else:
        files.write_safetensors(str(source), to_torch(VARIABLES, NET), files.weights_metadata(metadata))
    arguments = ('convert', source, tmp_path / 'y.safetensors', '--model', 'epsanet50_small')
    assert run(capsys, *arguments)[0] == 0
    kept = load(str(tmp_path / 'y.safetensors')).source.metadata
    assert json.dumps({k: kept[k] for k in metadata}) == json.dumps(metadata)
    # The settings of another variant do not fit the tensors.
    other = (*arguments[:-1], 'epsanet101_small', '--overwrite')
    assert_refused(capsys, *other, part='the state dict does not fit the model')


@pytest.mark.parametrize('suffix', ['pth', 'pth.tar', 'safetensors'])
def test_files_keep_settings_class_names_and_preprocessing(capsys, tmp_path, suffix):
    dense, path = small.model(output_stride=8), tmp_path / f'dense.{suffix}'
    names, preprocessing = [f'class {i}' for i in range(7)], Preprocessing(32, 40, std=(0.2, 0.25, 0.3))
    epsanet_jax.save_pretrained(tmp_path / 'dense', dense, VARIABLES, names, preprocessing)
    assert run(capsys, 'convert', tmp_path / 'dense', path)[0] == 0
    network = load(path)
    assert (network.model.output_stride, list(network.class_names)) == (8, names)
    assert network.preprocessing == preprocessing
    if suffix == 'pth':  # for PyTorch it is a plain state dict
        torch_model.EPSANet(dense).load_state_dict(torch.load(path, weights_only=True), strict=True)


def test_an_existing_file_is_replaced_with_overwrite_only(capsys, saved, tmp_path):
    for name in ('a.pth', 'b.safetensors', 'c.pth.tar'):
        (tmp_path / name).write_text('old')
        advice = f'{name} exists; choose another DST, or replace it with --overwrite'
        assert_refused(capsys, 'convert', saved, tmp_path / name, part=advice)
        assert (tmp_path / name).read_text() == 'old'
        assert run(capsys, 'convert', saved, tmp_path / name, '--overwrite')[0] == 0
        assert len(read_checkpoint(tmp_path / name).state_dict) == len(STATE_DICT)
    (tmp_path / 'link.pth').symlink_to('nowhere')
    assert_refused(capsys, 'convert', saved, tmp_path / 'link.pth', part='exists')
    (tmp_path / 'folder.pth').mkdir()
    (tmp_path / 'folder').mkdir()
    for name in ('folder.pth', 'folder'):
        assert_refused(
            capsys, 'convert', saved, tmp_path / name, '--overwrite', part=f'{name} exists; choose'
        )
    assert_refused(capsys, 'convert', saved, saved, '--overwrite', part='same file')
