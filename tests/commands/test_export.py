"""The options of the command `epsanet export`; its files are tested in tests/weights."""

import pytest
from command import run
from exported import save


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    return save(tmp_path_factory.mktemp('checkpoint') / 'net')


@pytest.mark.parametrize('options', [('--step', 'best'), ('--no-ema',)])
def test_choice_of_weights_is_refused_for_one_set_of_weights(capsys, checkpoint, tmp_path, options):
    status, _, err = run(capsys, 'export', checkpoint, tmp_path / 'x.onnx', *options)
    assert status == 2
    assert 'has one set of weights' in err


def test_existing_files_are_replaced_with_overwrite_only(capsys, checkpoint, tmp_path):
    for name in ('x.safetensors', 'x.stablehlo', 'x.stablehlo.json'):
        (tmp_path / name).write_text('old')
    for name in ('x.safetensors', 'x.stablehlo'):
        status, _, err = run(capsys, 'export', checkpoint, tmp_path / name)
        assert (status, err.count('\n'), 'or replace it with --overwrite' in err) == (2, 1, True)
        assert run(capsys, 'export', checkpoint, tmp_path / name, '--overwrite')[0] == 0
    assert all(path.stat().st_size > 100 for path in tmp_path.iterdir())
    (tmp_path / 'hub').mkdir()
    assert run(capsys, 'export', checkpoint, tmp_path / 'hub', '--overwrite')[0] == 2
