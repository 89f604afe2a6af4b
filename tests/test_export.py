"""The command `epsanet export`, from outside: what it writes is run without this package."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from command import run

import epsanet_jax
from epsanet_jax.convert.stablehlo import to_stablehlo
from epsanet_jax.data.augment import normalize
from epsanet_jax.data.preprocessing import Preprocessing

NET = small.model(layers=(1, 1), planes=(8, 16))  # an exported network is compiled several times here
VARIABLES = small.random_variables(NET, dtype=np.float32)
NAMES = ['cat', 'dog', 'château', 'd', 'e', 'f', 'g']
SETTINGS = Preprocessing(32, 40, std=(0.2, 0.25, 0.3))
CLOSE = 1e-4  # of the largest logit


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp('checkpoint') / 'net'
    epsanet_jax.save_pretrained(folder, NET, VARIABLES, NAMES, SETTINGS)
    return folder


def pictures(n, size=32):
    return np.random.default_rng(n).integers(0, 256, (n, size, size, 3), np.uint8)


def images(n, size=32):
    return np.asarray(normalize(jnp.asarray(pictures(n, size)), SETTINGS.mean, SETTINGS.std))


def ours(x, net=NET):
    return np.asarray(jax.jit(net.apply)(VARIABLES, jnp.asarray(x)))


def assert_close(logits, expected, limit=CLOSE):
    assert logits.shape == expected.shape
    assert logits.dtype == expected.dtype == np.float32
    assert np.abs(logits - expected).max() <= limit * np.abs(expected).max()


DOCS = pathlib.Path(__file__).parents[1] / 'docs' / 'export.md'
EXAMPLE = next(
    b for b in re.findall(r'```python\n(.*?)```', DOCS.read_text(), re.DOTALL) if 'deserialize' in b
)
START = """
import sys
import numpy as np
sys.modules['epsanet_jax'] = None  # whatever is installed
try:
    import epsanet_jax
except ImportError:
    pass
else:
    sys.exit('epsanet_jax was imported')
images, *others = np.load('inputs.npz').values()
"""
END = """
np.savez('outputs.npz', logits, *(network(images) for images in others))
assert not [name for name in sys.modules if name.startswith(('epsanet_jax.', 'flax'))]
"""


def run_elsewhere(path, folder, *inputs):
    """Runs the example of the documentation in a process that has jax and numpy alone."""
    np.savez(folder / 'inputs.npz', *inputs)
    code = START + EXAMPLE.replace('pets.stablehlo', str(path)) + END
    command = [sys.executable, '-I', '-W', 'error', '-c', code]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return list(np.load(folder / 'outputs.npz').values())


def export(capsys, *arguments):
    status, out, err = run(capsys, 'export', *arguments)
    assert (status, err) == (0, '')
    return out


def names_of_places(path):
    return re.findall(rb'[\w/.-]+\.py\b|/[\w.-]+/epsanet_jax', pathlib.Path(path).read_bytes())


def test_stablehlo_runs_where_this_package_cannot_be_imported(capsys, checkpoint, tmp_path):
    path = tmp_path / 'net.stablehlo'
    out = export(capsys, checkpoint, path, '--verify')
    assert 'input: float32 [batch, 32, 32, 3]' in out
    assert 'verified: ' in out
    few, more = run_elsewhere(path, tmp_path, images(2), images(5))
    assert_close(few, ours(images(2)))
    assert_close(more, ours(images(5)))
    described = json.loads((tmp_path / 'net.stablehlo.json').read_text())
    assert described['class_names'] == NAMES
    assert described['preprocessing']['std'] == list(SETTINGS.std)
    assert described['version'] == epsanet_jax.__version__
    assert described['platforms'] == ['cpu', 'cuda', 'tpu']
    assert described['input']['shape'] == ['batch', '32', '32', '3']
    assert not names_of_places(path)
    assert sorted(p.name for p in tmp_path.iterdir() if 'puts' not in p.name) == [
        path.name,
        path.name + '.json',
    ]


def test_stablehlo_of_pictures_of_another_size(capsys, checkpoint, tmp_path):
    path = tmp_path / 'net.stablehlo'
    out = export(capsys, checkpoint, path, '--input', 'uint8', '--image-size', 48)
    assert 'input: uint8 [batch, 48, 48, 3]' in out
    (logits,) = run_elsewhere(path, tmp_path, pictures(3, 48))
    assert_close(logits, ours(images(3, 48)))
    described = json.loads((tmp_path / 'net.stablehlo.json').read_text())
    assert (described['preprocessing']['image_size'], described['preprocessing']['resize_size']) == (48, 60)


def test_one_export_holds_what_each_platform_computes():
    """It is lowered for accelerators here, and compiled for the CPU alone."""
    exported = to_stablehlo(NET, VARIABLES, 32)
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    traced = jax.jit(exported.call).trace(jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in exported.platforms}
    assert all(text.count('stablehlo.convolution') >= 9 for text in texts.values())
    with pytest.raises(ValueError, match='platform'):
        traced.lower(lowering_platforms=('rocm',))


def test_the_precision_is_that_of_the_export():
    def text():
        return str(to_stablehlo(NET, VARIABLES, 32, platforms=('cpu',)).mlir_module())

    assert 'HIGHEST' not in text()
    with jax.default_matmul_precision('highest'):
        assert 'HIGHEST' in text()


def test_bfloat16(capsys, checkpoint, tmp_path):
    path = tmp_path / 'half.stablehlo'
    out = export(capsys, checkpoint, path, '--dtype', 'bfloat16')
    assert 'dtype bfloat16' in out
    (logits,) = run_elsewhere(path, tmp_path, images(2))
    half = ours(images(2), NET.clone(dtype=jnp.bfloat16))
    assert_close(logits, half, limit=2**-6)  # other convolutions, or another CPU, may round otherwise
    assert np.abs(half - ours(images(2))).max() > 1e-3 * np.abs(half).max()  # it is another computation
    epsanet_jax.save_pretrained(tmp_path / 'half', NET.clone(dtype=jnp.bfloat16), VARIABLES)
    export(capsys, tmp_path / 'half', tmp_path / 'half.pth')  # PyTorch and ONNX then compute in float32
    assert_close(run_torch(tmp_path / 'half.pth', images(2)), ours(images(2)))


def run_torch(path, x):
    import torch

    from epsanet_jax.convert.torch_model import EPSANet

    network = EPSANet(NET).eval()
    network.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        return network(torch.from_numpy(x.copy()).permute(0, 3, 1, 2)).numpy()


def test_pytorch_and_safetensors(capsys, checkpoint, tmp_path):
    out = export(capsys, checkpoint, tmp_path / 'net.pth', '--verify')
    assert 'verified: logits of PyTorch and JAX' in out
    assert_close(run_torch(tmp_path / 'net.pth', images(3)), ours(images(3)))
    export(capsys, checkpoint, tmp_path / 'net.safetensors')
    net = epsanet_jax.convert.read_checkpoint(tmp_path / 'net.safetensors')
    assert json.loads(net.metadata['class_names']) == NAMES
    np.testing.assert_array_equal(net.state_dict['fc.bias'], VARIABLES['params']['fc']['bias'])


@pytest.mark.parametrize('kind', ['float', 'uint8'])
def test_onnx_by_onnxruntime(capsys, checkpoint, tmp_path, kind):
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
        x = images(n) if kind == 'float' else pictures(n)
        (logits,) = session.run(['logits'], {'images': x.transpose(0, 3, 1, 2).copy()})
        assert_close(logits, ours(images(n)))
    props = session.get_modelmeta().custom_metadata_map
    assert json.loads(props['class_names']) == NAMES
    assert json.loads(props['preprocessing'])['image_size'] == 32
    assert json.loads(props['epsanet_jax'])['version'] == epsanet_jax.__version__
    assert not names_of_places(path)


def test_what_cannot_be_exported(capsys, checkpoint, tmp_path):
    (tmp_path / 'old.onnx').write_text('old')
    (tmp_path / 'old.stablehlo.json').write_text('old')
    (tmp_path / 'folder').mkdir()
    for arguments, part in (
        ((checkpoint, tmp_path / 'old.onnx'), 'exists'),
        ((checkpoint, tmp_path / 'old.stablehlo'), 'old.stablehlo.json exists'),
        ((checkpoint, tmp_path / 'folder'), 'exists'),
        ((checkpoint, tmp_path / 'no/such.onnx'), 'there is no such folder'),
        ((checkpoint, tmp_path / 'x.tflite'), 'no format is known for .tflite'),
        ((checkpoint, tmp_path / 'x.bin', '--format', 'torch'), 'no format is known for .bin'),
        ((checkpoint, tmp_path / 'x.onnx', '--format', 'torch'), 'named as onnx'),
        ((checkpoint, tmp_path / 'x.onnx', '--format', 'tf'), 'invalid choice'),
        ((checkpoint, tmp_path / 'x.pth', '--input', 'uint8'), '--input goes with'),
        ((checkpoint, tmp_path / 'hub', '--image-size', '64'), '--image-size goes with'),
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
def test_packages_that_are_not_installed(
    capsys, checkpoint, tmp_path, monkeypatch, missing, dst, arguments, advice
):
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / dst, *arguments)
    assert (status, err.count('\n')) == (2, 1)
    assert advice in err
    assert not list(tmp_path.iterdir())


def test_a_difference_is_told_and_nothing_written(capsys, checkpoint, tmp_path, monkeypatch):
    from epsanet_jax.convert import onnx_model

    monkeypatch.setattr(onnx_model, 'to_onnx', lambda *arguments: b'')
    monkeypatch.setattr(onnx_model, 'run_onnx', lambda content, x: np.ones((len(x), 7), np.float32))
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.onnx', '--verify')
    assert (status, err.count('\n')) == (2, 1)
    assert 'logits differ by' in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('name', ['epsanet50_small', 'epsanet50_large', 'resnet50'])
@pytest.mark.parametrize('kind', ['stablehlo', 'onnx'])
def test_published_networks_at_224_pixels(capsys, tmp_path, name, kind):
    net = epsanet_jax.create_model(name)
    epsanet_jax.save_pretrained(tmp_path / 'net', net, small.random_variables(net, dtype=np.float32))
    out = export(capsys, tmp_path / 'net', tmp_path / f'net.{kind}', '--verify')
    assert float(out.split('differ by ')[1].split(' ')[0]) <= CLOSE


def test_the_file_and_its_description_are_written_both_or_neither(capsys, checkpoint, tmp_path, monkeypatch):
    write = epsanet_jax.paths.write_atomically

    def full(path, content):
        if str(path).endswith('.json'):
            raise epsanet_jax.InputError(f'cannot write {path}: No space left on device')
        write(path, content)

    monkeypatch.setattr(epsanet_jax.paths, 'write_atomically', full)
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.stablehlo')
    assert (status, err.count('\n')) == (2, 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('options', [('--step', 'best'), ('--no-ema',)])
def test_there_is_nothing_to_choose_from_in_one_set_of_weights(capsys, checkpoint, tmp_path, options):
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.onnx', *options)
    assert status == 2
    assert 'holds one set of weights' in err
