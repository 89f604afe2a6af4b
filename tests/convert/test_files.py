"""Reading and writing weight files."""

import argparse
import pickle
import shutil

import chex
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch_files import NET, REFERENCE, STATE_DICT, VARIABLES, assert_refused

from epsanet_jax import InputError
from epsanet_jax.commands.main import main
from epsanet_jax.convert import from_torch, read_checkpoint
from epsanet_jax.weights import load

# As timm's training script writes it, with options, NumPy numbers and moving averages.
TIMM = {
    'epoch': 31,
    'arch': 'epsanet50',
    'state_dict': {name: torch.zeros_like(value) for name, value in STATE_DICT.items()},
    'state_dict_ema': {f'module.{name}': value for name, value in STATE_DICT.items()},
    'args': argparse.Namespace(model='epsanet50', lr=np.float64(0.1), aa=None),
    'metric': np.float32(77.5),
    'version': 2,
}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'checkpoint.pth.tar'
    torch.save(REFERENCE, path)
    return path


@pytest.mark.parametrize(
    'content',
    [
        TIMM,
        REFERENCE,
        STATE_DICT,
        {'model': STATE_DICT, 'epoch': 3},
        {'state_dict_ema': STATE_DICT},
        {'model_state_dict': STATE_DICT, 'optimizer_state_dict': {}, 'epoch': 3},
        {'state_dict': STATE_DICT, 'state_dict_ema': {'x': torch.zeros(1)}},
    ],
)
@pytest.mark.parametrize('zipped', [True, False])
def test_weights_are_found_in_checkpoints_of_training_scripts(tmp_path, content, zipped):
    path = tmp_path / 'x.pth'
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    chex.assert_trees_all_equal(from_torch(read_checkpoint(path).state_dict, NET), VARIABLES)


def test_tilde_in_path_is_expanded(saved, monkeypatch):
    monkeypatch.setenv('HOME', str(saved.parent))
    assert read_checkpoint(f'~/{saved.name}').epoch == 31
    assert load(f'~/{saved.name}', with_checkpoint=True).source.checkpoint.epoch == 31


def test_epoch_arch_and_accuracy_of_reference_checkpoint_are_read(saved):
    read = read_checkpoint(saved)
    assert (read.epoch, read.arch, read.best_prec1, read.optimizer) == (31, 'epsanet50', 12.5, None)


@pytest.mark.parametrize('suffix', ['.ckpt', '.bin', '.pkl', '.pt2', '.PTH', '.weights', '', '.safetensors'])
def test_content_decides_and_not_the_suffix(tmp_path, saved, suffix):
    shutil.copy(saved, tmp_path / f'x{suffix}')
    chex.assert_trees_all_equal(load(tmp_path / f'x{suffix}').variables, VARIABLES)


def test_safetensors_are_read_from_a_file_of_any_name(tmp_path):
    from safetensors.torch import save_file

    save_file({f'model.{k}': v for k, v in STATE_DICT.items()}, tmp_path / 'x.bin')
    read = read_checkpoint(tmp_path / 'x.bin')
    chex.assert_trees_all_equal(from_torch(read.state_dict, NET), VARIABLES)
    assert read.notes == ("the prefix 'model.' of the names removed",)


@pytest.mark.parametrize('start', [b'\x80', b'\x80\x02'])
def test_safetensors_may_begin_with_the_bytes_of_a_pickle(tmp_path, start):
    from safetensors.torch import save

    # The size of the header comes first; its bytes can be any.
    content = save(STATE_DICT)
    size = int.from_bytes(content[:8], 'little')
    wanted = int.from_bytes(start, 'little')
    while wanted < size:
        wanted += 256 ** len(start)
    header = content[8 : 8 + size] + b' ' * (wanted - size)
    data = wanted.to_bytes(8, 'little') + header + content[8 + size :]
    assert data.startswith(start)
    for name in ('x.safetensors', 'x.bin'):
        (tmp_path / name).write_bytes(data)
        variables = from_torch(read_checkpoint(tmp_path / name).state_dict, NET)
        chex.assert_trees_all_equal(variables, VARIABLES)


def test_safetensors_of_float8_are_refused_in_one_line(capsys, tmp_path):
    from safetensors.torch import save_file

    save_file({'x': torch.zeros(2).to(torch.float8_e4m3fn)}, tmp_path / 'x.safetensors')
    part = 'x.safetensors holds tensors of type F8_E4M3: convert them to float32 or bfloat16'
    assert_refused(capsys, 'convert', tmp_path / 'x.safetensors', tmp_path / 'y.pth', part=part)


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'is empty'),
        (b'<!DOCTYPE html>', 'is a web page, not weights'),
        (b'version https://git-lfs.github.com/spec/v1', 'is a pointer of Git LFS'),
        (b'{"a": 1}', 'is JSON, not weights'),
        (b'\x1f\x8b\x08', 'is compressed with gzip'),
        (b'\x89HDF\r\n', 'is an HDF5 file'),
        (b'hello', "is no PyTorch or safetensors file: it starts with b'hello'"),
    ],
)
def test_other_files_are_refused_with_what_they_are(tmp_path, content, reason):
    (tmp_path / 'x.ckpt').write_bytes(content)
    with pytest.raises(InputError, match=f'x.ckpt {reason}'):
        read_checkpoint(tmp_path / 'x.ckpt')


def test_bfloat16_safetensors_are_read(tmp_path):
    from safetensors.torch import save_file

    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in STATE_DICT.items()}
    save_file(half, tmp_path / 'x.safetensors')
    variables = from_torch(read_checkpoint(tmp_path / 'x.safetensors').state_dict, NET)
    expected = half['fc.weight'].float().numpy().T
    np.testing.assert_array_equal(variables['params']['fc']['kernel'], expected)


class Evil:
    """Unpickling this creates a file, if code may run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, 'w'))


def test_invalid_files_are_refused_and_run_no_code(capsys, saved, tmp_path):
    trace = tmp_path / 'trace'
    good = saved.read_bytes()
    invalid = {
        'evil.pth': lambda p: torch.save({'state_dict': Evil(str(trace))}, p),
        'evil.pt': lambda p: p.write_bytes(pickle.dumps(Evil(str(trace)))),
        'model.pt': lambda p: torch.save(torch.nn.Linear(2, 2), p),
        'list.pth': lambda p: torch.save([torch.zeros(2)], p),
        'nothing.pth': lambda p: torch.save({}, p),
        'other.pth': lambda p: torch.save({'weight': torch.zeros(2)}, p),
        'nested.pth': lambda p: torch.save({'a': {'b': {'c': {'d': STATE_DICT}}}}, p),
        'truncated.pth.tar': lambda p: p.write_bytes(good[: len(good) // 2]),
        'empty.pth': lambda p: p.write_bytes(b''),
        'page.pth': lambda p: p.write_text('<!DOCTYPE html><title>404</title>'),
        'page.safetensors': lambda p: p.write_text('<!DOCTYPE html><title>404</title>'),
        'folder.pth': lambda p: p.mkdir(),
    }
    for name, make in invalid.items():
        make(tmp_path / name)
        assert_refused(capsys, 'convert', tmp_path / name, tmp_path / 'out.safetensors', part=name)
    assert_refused(capsys, 'convert', tmp_path / 'gone.pth', tmp_path / 'out.pth', part='no such file')
    assert_refused(capsys, 'convert', tmp_path / 'gone', tmp_path / 'out.pth', part='no such checkpoint')
    assert not trace.exists()
    assert not (tmp_path / 'out.safetensors').exists()


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
def test_invalid_tensors_are_refused(capsys, tmp_path, name, tensor):
    torch.save({**STATE_DICT, name: tensor}, tmp_path / 'x.pth')
    assert_refused(capsys, 'convert', tmp_path / 'x.pth', tmp_path / 'y.pth', '--num-classes', 7)


def test_failed_write_keeps_the_old_file(capsys, tmp_path, monkeypatch):
    saved, target = tmp_path / 'saved.pth', tmp_path / 'x.pth'
    torch.save(STATE_DICT, saved)
    target.write_text('old')

    def full_disk(content, file):
        file.write(b'half')
        raise RuntimeError('No space left on device')

    monkeypatch.setattr(torch, 'save', full_disk)
    assert_refused(capsys, 'convert', saved, target, '--overwrite', part='No space left')
    assert target.read_text() == 'old'
    assert len(list(tmp_path.iterdir())) == 2


@pytest.fixture(scope='module')
def bytes_of(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bytes')
    torch.save(REFERENCE, folder / 'zip.pth')
    torch.save(REFERENCE, folder / 'old.pth', _use_new_zipfile_serialization=False)
    torch.save(TIMM, folder / 'timm.ckpt')
    torch.save(TIMM, folder / 'timm_old.pkl', _use_new_zipfile_serialization=False)
    main(['convert', str(folder / 'zip.pth'), str(folder / 'x.safetensors')])
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    kind=st.sampled_from(['zip.pth', 'old.pth', 'x.safetensors', 'timm.ckpt', 'timm_old.pkl']),
    cut=st.floats(0, 1),
    damage=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
)
def test_damaged_file_is_refused_or_has_the_same_names(tmp_path, bytes_of, kind, cut, damage):
    """Truncated anywhere, or with changed bytes: exit status 2, or a model of the right shapes."""
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
        assert cut > 0.99 or kind in ('zip.pth', 'timm.ckpt'), 'a truncated file was read'
        shapes = {k: v.shape for k, v in torch.load(target, weights_only=True).items()}
        assert shapes == {k: v.shape for k, v in STATE_DICT.items()}
