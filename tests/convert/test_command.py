"""Files and the command `epsanet convert`."""

import json
import pickle
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
import small
import torch
from command import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from epsanet_jax import create_model
from epsanet_jax.commands.main import main
from epsanet_jax.convert import files, from_torch, read_checkpoint, to_torch, torch_model
from epsanet_jax.weights import load, orbax
from epsanet_jax.weights.metadata import make_metadata

NET = small.model()
VARIABLES = small.random_variables(NET, dtype=np.float32)
STATE_DICT = {k: torch.from_numpy(v) for k, v in to_torch(VARIABLES, NET).items()}
REFERENCE = {
    'epoch': 31,
    'arch': 'epsanet50',
    'best_prec1': torch.tensor(12.5),
    'state_dict': {f'module.{k}': v for k, v in STATE_DICT.items()},
}


def assert_refused(capsys, *arguments, part=''):
    status, _, err = run(capsys, *arguments)
    assert status == 2, err
    assert err.startswith('error: ')
    assert err.count('\n') == 1
    assert part in err


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(REFERENCE, path)
    return path


@pytest.mark.parametrize(
    'content',
    [
        REFERENCE,
        STATE_DICT,
        {'model': STATE_DICT, 'epoch': 3},
        {'state_dict_ema': STATE_DICT},
        {'model_state_dict': STATE_DICT, 'optimizer_state_dict': {}, 'epoch': 3},
        {'state_dict': STATE_DICT, 'state_dict_ema': {'x': torch.zeros(1)}},
    ],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_weights_are_found_wherever_training_scripts_put_them(tmp_path, content, zipped):
    path = tmp_path / 'x.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    chex.assert_trees_all_equal(from_torch(read_checkpoint(path).state_dict, NET), VARIABLES)


def test_a_path_may_begin_at_home(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved.parent))
    assert read_checkpoint(f'~/{saved.name}').epoch == 31
    assert load(f'~/{saved.name}', with_checkpoint=True).source.checkpoint.epoch == 31


def test_what_the_reference_saves_besides_weights(saved):
    read = read_checkpoint(saved)
    assert (read.epoch, read.arch, read.best_prec1, read.optimizer) == (31, 'epsanet50', 12.5, None)


@pytest.mark.parametrize('through', ['a.pth', 'a.pt', 'a.pth.tar', 'a.safetensors', 'orbax'])
def test_there_and_back_again_bit_for_bit(capsys, saved, tmp_path, through):
    middle, end = tmp_path / through, tmp_path / 'end.pth'
    status, out, err = run(capsys, 'convert', saved, middle, '--verify')
    assert (status, err) == (0, '')
    for part in ('epoch 31', f'{small.SETTINGS["num_classes"]} classes', 'verified: logits', 'written: '):
        assert part in out
    assert run(capsys, 'convert', middle, end)[0] == 0
    back = torch.load(end, weights_only=True)
    torch_model.EPSANet(NET).load_state_dict(back, strict=True)
    assert list(back) == list(STATE_DICT)
    for name, tensor in STATE_DICT.items():
        assert torch.equal(back[name], tensor), name
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([saved.name, through, 'end.pth'])


def test_a_reference_checkpoint_comes_back_whole(capsys, saved, tmp_path):
    assert run(capsys, 'convert', saved, tmp_path / 'back.pth.tar')[0] == 0
    back = torch.load(tmp_path / 'back.pth.tar', weights_only=True)
    assert (back['epoch'], back['arch'], back['best_prec1']) == (31, 'epsanet50', 12.5)
    assert set(back['state_dict']) == set(STATE_DICT)


def test_safetensors_say_what_they_are_and_need_no_torch(capsys, saved, tmp_path):
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


def test_bfloat16_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in STATE_DICT.items()}
    save_file(half, tmp_path / 'x.safetensors')
    variables = from_torch(read_checkpoint(tmp_path / 'x.safetensors').state_dict, NET)
    expected = half['fc.weight'].float().numpy().T
    np.testing.assert_array_equal(variables['params']['fc']['kernel'], expected)


def test_a_converted_checkpoint_is_one_to_evaluate_and_to_start_from(capsys, saved, tmp_path, digits_dir):
    status, out, _ = run(capsys, 'convert', saved, tmp_path / 'orbax', '--num-classes', 10)
    assert status == 0
    assert 'the classifier of 7 classes; a new one of 10' in out
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
    assert_refused(capsys, 'evaluate', saved, '--data', 'digits', '--data-dir', digits_dir, part='10 classes')
    assert_refused(capsys, 'evaluate', saved, part='--data must name')


class Evil:
    """Whoever unpickles this with code allowed leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, 'w'))


def test_files_that_are_not_what_they_seem(capsys, saved, tmp_path):
    trace = tmp_path / 'trace'
    good = saved.read_bytes()
    files = {
        'evil.pth': lambda p: torch.save({'state_dict': Evil(str(trace))}, p),
        'evil.pt': lambda p: p.write_bytes(pickle.dumps(Evil(str(trace)))),
        'model.pt': lambda p: torch.save(torch.nn.Linear(2, 2), p),
        'list.pth': lambda p: torch.save([torch.zeros(2)], p),
        'nothing.pth': lambda p: torch.save({}, p),
        'other.pth': lambda p: torch.save({'weight': torch.zeros(2)}, p),
        'nested.pth': lambda p: torch.save({'net': STATE_DICT, 'step': 3}, p),
        'truncated.pth.tar': lambda p: p.write_bytes(good[: len(good) // 2]),
        'empty.pth': lambda p: p.write_bytes(b''),
        'page.pth': lambda p: p.write_text('<!DOCTYPE html><title>404</title>'),
        'page.safetensors': lambda p: p.write_text('<!DOCTYPE html><title>404</title>'),
        'torch.safetensors': lambda p: p.write_bytes(good),
        'folder.pth': lambda p: p.mkdir(),
    }
    for name, make in files.items():
        make(tmp_path / name)
        assert_refused(capsys, 'convert', tmp_path / name, tmp_path / 'out.safetensors', part=name)
    assert_refused(capsys, 'convert', tmp_path / 'gone.pth', tmp_path / 'out.pth', part='no such file')
    assert_refused(capsys, 'convert', tmp_path / 'gone', tmp_path / 'out.pth', part='no such checkpoint')
    assert not trace.exists()
    assert not (tmp_path / 'out.safetensors').exists()


METADATA = ['[]', 'null', '[' * 100_000, '{}', '{"package": "epsanet_jax"}', 'no json']


def damaged_metadata():
    """Metadata of a safetensors file with one entry of another kind each."""
    import copy

    from epsanet_jax.training.config import DataConfig, ModelConfig

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
        (('config',), {'data': {}, 'optimizer': {}}),
        (('config',), {'data': {}, 'optimizer': {}, 'label_smoothing': 'x'}),
        (('config',), {'data': {}, 'optimizer': {}, 'label_smoothing': 1.5}),
    ):
        bad = copy.deepcopy(good)
        node = bad
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        yield json.dumps(bad)


@pytest.mark.parametrize('metadata', [*METADATA, *damaged_metadata()], ids=lambda text: text[:20])
def test_metadata_may_be_anything(capsys, tmp_path, metadata):
    from safetensors.numpy import save_file

    state_dict = {k: v.numpy() for k, v in STATE_DICT.items()}
    save_file(state_dict, tmp_path / 'x.safetensors', metadata={'epsanet_jax': metadata})
    assert_refused(capsys, 'convert', tmp_path / 'x.safetensors', tmp_path / 'y.pth', part='x.safetensors')


def test_a_network_without_classifier_gets_one_if_asked(capsys, tmp_path):
    torch.save({k: v for k, v in STATE_DICT.items() if not k.startswith('fc.')}, tmp_path / 'x.pth')
    assert_refused(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', part='holds no classifier')
    assert run(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', '--num-classes', 5)[0] == 0
    back = torch.load(tmp_path / 'y.pth', weights_only=True)
    assert back['fc.weight'].shape == (5, 64)
    assert torch.equal(back['conv1.weight'], STATE_DICT['conv1.weight'])


def odd_tensors():
    name = 'layer1.0.conv1.weight'
    weight = STATE_DICT[name]
    yield name, weight.to_sparse()
    yield name, weight.to(torch.float8_e4m3fn)
    yield name, weight.double() * 1e300
    yield name, weight.to(torch.complex64)
    yield 'fc.weight', torch.tensor(1.0)
    yield 'layer1.0.conv2.se.fc1.weight', torch.zeros(3, 4, 1, 1)
    yield 'layer1.0.conv2.conv_1.weight', torch.zeros(2, 0, 3, 3)


@pytest.mark.parametrize(('name', 'tensor'), list(odd_tensors()))
def test_tensors_that_cannot_be_weights(capsys, tmp_path, name, tensor):
    torch.save({**STATE_DICT, name: tensor}, tmp_path / 'x.pth')
    assert_refused(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', '--num-classes', 7)


@pytest.mark.parametrize('damage', ['metadata', 'model/_METADATA', 'model/manifest.ocdbt', 'model/d'])
def test_a_damaged_checkpoint_is_refused(capsys, saved, tmp_path, damage):
    run(capsys, 'convert', saved, tmp_path / 'orbax')
    path = tmp_path / 'orbax' / '0' / damage
    for file in path.iterdir() if path.is_dir() else [path]:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    arguments = ('convert', tmp_path / 'orbax', tmp_path / 'y.pth')
    command = [sys.executable, '-m', 'epsanet_jax', *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr.startswith('error: ')
    assert process.stderr.count('\n') == 1  # and no tracebacks of Orbax's other reads
    assert not (tmp_path / 'y.pth').exists()
    assert_refused(capsys, *arguments, '--step', '\u00b2', part='step must')


@pytest.mark.parametrize('param_dtype', ['bfloat16', 'float32'])
def test_networks_that_compute_in_bfloat16(capsys, tmp_path, param_dtype):
    import jax.numpy as jnp

    from epsanet_jax.training.config import DataConfig, ModelConfig

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


def test_destinations_that_cannot_be(capsys, saved, tmp_path):
    for name in ('x.ckpt', 'x.bin', 'x.tar'):
        assert_refused(capsys, 'convert', saved, tmp_path / name, part='cannot write .')
    assert_refused(capsys, 'convert', saved, tmp_path / 'no' / 'such', part='there is no such folder')
    (tmp_path / 'folder').mkdir()
    assert_refused(capsys, 'convert', saved, tmp_path / 'folder', part='exists')
    assert_refused(capsys, 'convert', saved, saved, part='same file')
    assert_refused(capsys, 'convert', saved, tmp_path / 'no' / 'such.pth', part='cannot write')
    assert_refused(capsys, 'convert', saved, tmp_path / 'x.pth', '--model', 'epsanet50_large', part='128')
    assert_refused(capsys, 'convert', saved, tmp_path / 'x.pth', '--model', 'epsanet', part='unknown model')
    assert sorted(p.name for p in tmp_path.iterdir()) == ['checkpoint.pth.tar', 'folder']


def test_a_write_that_fails_leaves_the_old_file(capsys, saved, tmp_path, monkeypatch):
    target = tmp_path / 'x.pth'
    target.write_text('old')

    def full_disk(content, file):
        file.write(b'half')
        raise RuntimeError('No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    assert_refused(capsys, 'convert', saved, target, part='No space left')
    assert target.read_text() == 'old'
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope='module')
def bytes_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bytes')
    torch.save(REFERENCE, folder / 'zip.pth')
    torch.save(REFERENCE, folder / 'old.pth', _use_new_zipfile_serialization=False)
    main(['convert', str(folder / 'zip.pth'), str(folder / 'x.safetensors')])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(['zip.pth', 'old.pth', 'x.safetensors']),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)
def test_a_damaged_file_is_an_error_or_reads_the_same_names(tmp_path, bytes_of, kind, cut, damage):
    """Truncated at any byte, or bytes changed anywhere: status 2, or a model of the right shapes."""
    data = bytearray(bytes_of[kind])
    del data[int(cut * len(data)) :]
    for place, value in damage:
        if data:
            data[min(len(data) - 1, int(place * len(data)))] = value
    path = tmp_path / kind
    path.write_bytes(bytes(data))
    target = tmp_path / 'out.pth'
    target.unlink(missing_ok=True)
    status = main(['convert', str(path), str(target)])  # never another exception
    assert status in (0, 2)
    assert target.exists() == (status == 0)
    if status == 0:
        assert cut > 0.99 or kind == 'zip.pth', 'half a file was read as a whole one'
        shapes = {k: v.shape for k, v in torch.load(target, weights_only=True).items()}
        assert shapes == {k: v.shape for k, v in STATE_DICT.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    'name', ['epsanet50_small', 'epsanet50_large', 'epsanet101_small', 'epsanet101_large']
)
def test_every_variant_there_and_back_with_logits_at_224_pixels(capsys, tmp_path, name):
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


@pytest.mark.parametrize('kind', ['x.safetensors', 'orbax'])
def test_naming_the_model_that_it_is_changes_nothing(capsys, tmp_path, kind):
    from epsanet_jax.training.config import DataConfig, ModelConfig

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
    assert {k: kept[k] for k in metadata} == json.loads(json.dumps(metadata))
    # Another network keeps none of this one's structure, which is then told.
    assert_refused(capsys, *arguments[:-1], 'epsanet101_small', part='the state dict does not fit the model')


def test_what_pytorch_files_do_not_keep_is_said(capsys, tmp_path):
    import epsanet_jax

    dense = small.model(output_stride=8)
    epsanet_jax.save_pretrained(tmp_path / 'dense', dense, VARIABLES)
    status, out, _ = run(capsys, 'convert', tmp_path / 'dense', tmp_path / 'dense.pth')
    assert status == 0
    assert 'lost: output_stride 8, which PyTorch files do not keep' in out
    status, out, _ = run(capsys, 'convert', tmp_path / 'dense', tmp_path / 'dense.safetensors')
    assert status == 0
    assert 'lost' not in out
    assert 'output_stride 8' in out
