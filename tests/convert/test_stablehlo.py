"""StableHLO files run without this package."""

import json
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exported import (
    NAMES,
    NET,
    SETTINGS,
    VARIABLES,
    assert_close,
    export,
    images,
    ours,
    pixels,
    save,
    source_paths,
)

import epsanet_jax
from epsanet_jax.convert.stablehlo import to_stablehlo

DOCS = pathlib.Path(__file__).parents[2] / 'docs' / 'export.md'
EXAMPLE = next(
    b for b in re.findall(r'```python\n(.*?)```', DOCS.read_text(), re.DOTALL) if 'deserialize' in b
)
START = """
import sys
import numpy as np
sys.modules['epsanet_jax'] = None  # even if it is installed
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


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('checkpoint') / 'net')


def run_elsewhere(path, folder, *inputs):
    """Runs the example of docs/export.md in a process that cannot import this package."""
    np.savez(folder / 'inputs.npz', *inputs)
    code = START + EXAMPLE.replace('pets.stablehlo', str(path)) + END
    command = [sys.executable, '-I', '-W', 'error', '-c', code]
    process = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return list(np.load(folder / 'outputs.npz').values())


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
    assert not source_paths(path)
    assert sorted(p.name for p in tmp_path.iterdir() if 'puts' not in p.name) == [
        path.name,
        path.name + '.json',
    ]


def test_uint8_images_of_another_size(capsys, checkpoint, tmp_path):
    path = tmp_path / 'net.stablehlo'
    out = export(capsys, checkpoint, path, '--input', 'uint8', '--image-size', 48)
    assert 'input: uint8 [batch, 48, 48, 3]' in out
    (logits,) = run_elsewhere(path, tmp_path, pixels(3, 48))
    assert_close(logits, ours(images(3, 48)))
    described = json.loads((tmp_path / 'net.stablehlo.json').read_text())
    assert (described['preprocessing']['image_size'], described['preprocessing']['resize_size']) == (48, 60)


def test_export_is_lowered_for_every_platform():
    """This test lowers the export for accelerators, but compiles nothing for them."""
    exported = to_stablehlo(NET, VARIABLES, 32)
    assert exported.platforms == ('cpu', 'cuda', 'tpu')
    traced = jax.jit(exported.call).trace(jax.ShapeDtypeStruct((3, 32, 32, 3), jnp.float32))
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in exported.platforms}
    assert all(text.count('stablehlo.convolution') >= 9 for text in texts.values())
    with pytest.raises(ValueError, match='platform'):
        traced.lower(lowering_platforms=('rocm',))


def test_precision_is_fixed_at_export():
    def text():
        return str(to_stablehlo(NET, VARIABLES, 32, platforms=('cpu',)).mlir_module())

    assert 'HIGHEST' not in text()
    with jax.default_matmul_precision('highest'):
        assert 'HIGHEST' in text()


@pytest.mark.slow
def test_bfloat16_network(capsys, checkpoint, tmp_path):
    path = tmp_path / 'half.stablehlo'
    out = export(capsys, checkpoint, path, '--dtype', 'bfloat16')
    assert 'dtype bfloat16' in out
    (logits,) = run_elsewhere(path, tmp_path, images(2))
    half = ours(images(2), NET.clone(dtype=jnp.bfloat16))
    assert_close(logits, half, limit=2**-6)  # other algorithms round differently
    assert np.abs(half - ours(images(2))).max() > 1e-3 * np.abs(half).max()  # bfloat16 was used
