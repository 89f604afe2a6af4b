"""PyTorch files: what is read without running code, and the reason why others are not."""

import argparse
import io
import pathlib
import pickle
import zipfile

import numpy as np
import pytest
import torch

from epsanet_jax import InputError
from epsanet_jax.convert.torch_file import read_torch

WEIGHT = torch.arange(3.0)


class Evil:
    """Unpickling this creates a file, if code may run."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (self.trace, 'w'))


@pytest.mark.parametrize('zipped', [True, False])
def test_options_and_numbers_of_numpy_are_read(tmp_path, zipped):
    numbers = {'a': np.float64(1.5), 'b': np.float32(2.5), 'c': np.int64(3), 'd': np.bool_(True)}
    content = {
        'w': WEIGHT,
        'args': argparse.Namespace(lr=0.1, name='x', inner=argparse.Namespace(y=1)),
        **numbers,
    }
    torch.save(content, tmp_path / 'x.pth', _use_new_zipfile_serialization=zipped)
    read = read_torch(str(tmp_path / 'x.pth'))
    assert torch.equal(read['w'], WEIGHT)
    assert (read['args'].lr, read['args'].name, read['args'].inner.y) == (0.1, 'x', 1)
    assert {name: read[name] for name in numbers} == numbers


def test_code_does_not_run_inside_options(tmp_path):
    trace = tmp_path / 'trace'
    torch.save({'args': argparse.Namespace(x=Evil(str(trace)))}, tmp_path / 'x.pth')
    with pytest.raises(
        InputError, match=r'contains (builtins|io|_io)\.open, no tensor: .*no code in the file was run'
    ):
        read_torch(str(tmp_path / 'x.pth'))
    assert not trace.exists()


def script(path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def program(path):
    """Writes members as torch.export does, which would take seconds."""
    with zipfile.ZipFile(path, 'w') as archive:
        for name in ('archive_format', 'models/model.json', 'data/weights/weight_0'):
            archive.writestr(f'x/{name}', b'pt2')


def arrays(path):
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    path.write_bytes(buffer.getvalue())


@pytest.mark.filterwarnings('ignore::DeprecationWarning')
@pytest.mark.parametrize(
    ('write', 'reason'),
    [
        (script, 'is a TorchScript archive, which holds code: save only its state_dict'),
        (program, 'is a program of torch.export, not weights: save only'),
        (arrays, 'is an archive of NumPy arrays: save only'),
        (
            lambda p: p.write_bytes(pickle.dumps({'w': np.zeros(2)})),
            'is a pickle that torch.save does not write',
        ),
        (
            lambda p: p.write_bytes(pickle.dumps({'w': 1}, protocol=2)),
            'is a pickle that torch.save does not write',
        ),
        (
            lambda p: torch.save({'w': WEIGHT}, p, pickle_protocol=4),
            'is a pickle that torch.save does not write',
        ),
        (lambda p: torch.save({'p': pathlib.Path('x')}, p), r'contains pathlib\.\w+, no tensor'),
        (
            lambda p: torch.save(torch.nn.Linear(2, 2), p),
            r'contains torch.nn.modules.linear.Linear, no tensor',
        ),
        (lambda p: p.write_bytes(b'PK\x03\x04 damaged'), 'is not a PyTorch checkpoint, or it is damaged'),
    ],
)
def test_the_reason_is_one_line(tmp_path, write, reason):
    write(tmp_path / 'x.pt2')
    with pytest.raises(InputError, match=reason) as error:
        read_torch(str(tmp_path / 'x.pt2'))
    assert '\n' not in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), '')) < 400
