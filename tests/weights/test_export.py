"""Exports of every kind: their content, and what is refused."""

import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import small
import torch
from command import run
from exported import CLOSE, NAMES, NET, VARIABLES, assert_close, export, images, ours, save

import epsanet_jax
from epsanet_jax.convert import onnx_model
from epsanet_jax.convert.torch_model import EPSANet


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('checkpoint') / 'net')


def run_torch(path, x):
    network = EPSANet(NET).eval()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        return network(torch.from_numpy(x.copy()).permute(0, 3, 1, 2)).numpy()


def test_pytorch_and_safetensors_files(capsys, checkpoint, tmp_path):
    out = export(capsys, checkpoint, tmp_path / 'net.pth', '--verify')
    assert 'verified: logits of PyTorch and JAX' in out
    assert_close(run_torch(tmp_path / 'net.pth', images(3)), ours(images(3)))
    export(capsys, checkpoint, tmp_path / 'net.safetensors')
    net = epsanet_jax.convert.read_checkpoint(tmp_path / 'net.safetensors')
    assert json.loads(net.metadata['class_names']) == NAMES
    np.testing.assert_array_equal(net.state_dict['fc.bias'], VARIABLES['params']['fc']['bias'])


def test_bfloat16_network_is_exported_to_pytorch(capsys, tmp_path):
    epsanet_jax.save_pretrained(tmp_path / 'half', NET.clone(dtype=jnp.bfloat16), VARIABLES)
    export(capsys, tmp_path / 'half', tmp_path / 'half.pth')
    assert_close(run_torch(tmp_path / 'half.pth', images(2)), ours(images(2)))


def test_invalid_exports_are_refused(capsys, checkpoint, tmp_path):
    (tmp_path / 'old.onnx').write_text('old')
    (tmp_path / 'old.stablehlo.json').write_text('old')
    (tmp_path / 'folder').mkdir()
    for arguments, part in (
        ((checkpoint, tmp_path / 'old.onnx'), 'exists'),
        ((checkpoint, tmp_path / 'old.stablehlo'), 'old.stablehlo.json exists'),
        ((checkpoint, tmp_path / 'folder'), 'exists'),
        ((checkpoint, tmp_path / 'no/such.onnx'), 'its folder does not exist'),
        ((checkpoint, tmp_path / 'x.tflite'), 'unknown format .tflite'),
        ((checkpoint, tmp_path / 'x.bin', '--format', 'torch'), 'unknown format .bin'),
        ((checkpoint, tmp_path / 'x.onnx', '--format', 'torch'), 'has the suffix of onnx'),
        ((checkpoint, tmp_path / 'x.onnx', '--format', 'tf'), 'invalid choice'),
        ((checkpoint, tmp_path / 'x.pth', '--input', 'uint8'), '--input is only for stablehlo and onnx'),
        ((checkpoint, tmp_path / 'hub', '--image-size', '64'), '--image-size is only for stablehlo and onnx'),
        ((checkpoint, tmp_path / 'x.onnx', '--dtype', 'bfloat16'), 'compute in float32'),
        ((checkpoint, tmp_path / 'x.onnx', '--image-size', '8'), 'from 32'),
        ((tmp_path / 'gone', tmp_path / 'x.onnx'), 'no such checkpoint'),
        ((tmp_path / 'folder', tmp_path / 'x.stablehlo'), 'no checkpoint in'),
    ):
        status, _, err = run(capsys, 'export', *arguments)
        assert (status, err.count('\n'), err.startswith('error: ')) == (2, 1, True), err
        assert part in err
    assert (tmp_path / 'old.onnx').read_text() == 'old'
    assert sorted(p.name for p in tmp_path.iterdir()) == ['folder', 'old.onnx', 'old.stablehlo.json']


@pytest.mark.parametrize(
    ('missing', 'dst', 'arguments', 'advice'),
    [
        ('torch', 'x.onnx', (), "ONNX needs torch: pip install 'epsanet_jax[onnx]'"),
        ('onnx', 'x.onnx', (), "ONNX needs onnx: pip install 'epsanet_jax[onnx]'"),
        ('onnxscript', 'x.onnx', (), "ONNX needs onnxscript: pip install 'epsanet_jax[onnx]'"),
        ('onnxruntime', 'x.onnx', ('--verify',), "ONNX needs onnxruntime: pip install 'epsanet_jax[onnx]'"),
        ('torch', 'x.pth', (), 'pip install torch'),
        ('torch', 'hub', ('--verify',), 'pip install torch'),
    ],
)
def test_missing_packages_are_reported(
    capsys, checkpoint, tmp_path, monkeypatch, missing, dst, arguments, advice
):
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / dst, *arguments)
    assert (status, err.count('\n')) == (2, 1)
    assert advice in err
    assert not list(tmp_path.iterdir())


def test_different_logits_are_reported_and_nothing_is_written(capsys, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_model, 'to_onnx', lambda *arguments: b'')
    monkeypatch.setattr(onnx_model, 'run_onnx', lambda content, x: np.ones((len(x), 7), np.float32))
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.onnx', '--verify')
    assert (status, err.count('\n')) == (2, 1)
    assert 'logits of the export and JAX differ by' in err
    assert not list(tmp_path.iterdir())


def test_file_and_description_are_written_both_or_not_at_all(capsys, checkpoint, tmp_path, monkeypatch):
    write = epsanet_jax.paths.write_atomically

    def full(path, content):
        if str(path).endswith('.json'):
            raise epsanet_jax.InputError(f'cannot write {path}: No space left on device')
        write(path, content)

    monkeypatch.setattr(epsanet_jax.paths, 'write_atomically', full)
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.stablehlo')
    assert (status, err.count('\n')) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['epsanet50_small', 'epsanet50_large', 'resnet50'])
@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
def test_published_networks_at_224_pixels(capsys, tmp_path, name, kind):
    net = epsanet_jax.create_model(name)
    epsanet_jax.save_pretrained(tmp_path / 'net', net, small.random_variables(net, dtype=np.float32))
    out = export(capsys, tmp_path / 'net', tmp_path / f'net.{kind}', '--verify')
    assert float(out.split('differ by ')[1].split(' ')[0]) <= CLOSE
