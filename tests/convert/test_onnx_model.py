"""ONNX files run with onnxruntime."""

import json

import pytest
from exported import NAMES, assert_close, export, images, ours, pixels, save, source_paths

import epsanet_jax


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('checkpoint') / 'net')


@pytest.mark.parametrize('kind', ['float', 'uint8'])
@pytest.mark.slow
def test_onnxruntime_computes_the_same_logits(capsys, checkpoint, tmp_path, kind):
    import onnxruntime

    path = tmp_path / 'net.onnx'
    verify = ('--verify',) if kind == 'float' else ()
    out = export(capsys, checkpoint, path, '--input', kind, *verify)
    assert 'input: ' in out
    assert ('verified: ' in out) == bool(verify)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    (argument,) = session.get_inputs()
    assert (argument.name, argument.shape) == ('images', ['batch', 3, 32, 32])
    for n in (1, 5):
        x = images(n) if kind == 'float' else pixels(n)
        (logits,) = session.run(['logits'], {'images': x.transpose(0, 3, 1, 2).copy()})
        assert_close(logits, ours(images(n)))
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props['class_names']) == NAMES
    assert json.loads(props['preprocessing'])['image_size'] == 32
    assert json.loads(props['epsanet_jax'])['version'] == epsanet_jax.__version__
    assert not source_paths(path)
