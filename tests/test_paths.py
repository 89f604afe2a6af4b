import os

import pytest

from epsanet_jax import InputError
from epsanet_jax.paths import is_remote, replacing, resolve, write_atomically


def test_uris_are_unchanged_and_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(resolve('gs://bucket/run')) == 'gs://bucket/run'
    assert is_remote(resolve('gs://bucket/run'))
    assert str(resolve('runs/a')) == f'{tmp_path}/runs/a'
    assert str(resolve('~/a')) == os.path.expanduser('~/a')
    assert not is_remote(resolve('runs/a'))


def test_unknown_uri_scheme_is_refused():
    with pytest.raises(InputError, match='cannot use the path foo://bucket/run'):
        resolve('foo://bucket/run')


def test_failed_write_keeps_the_old_file(tmp_path):
    path = tmp_path / 'x'
    path.write_text('old')

    def interrupted():
        with replacing(path) as temporary:
            temporary.write_text('half')
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [p.read_text() for p in tmp_path.iterdir()] == ['old']
    with replacing(path) as temporary:
        temporary.write_text('new')
    assert [p.read_text() for p in tmp_path.iterdir()] == ['new']


def test_path_that_cannot_be_written_is_reported(tmp_path):
    with pytest.raises(InputError, match='cannot write .*no/x'):
        write_atomically(str(tmp_path / 'no' / 'x'), lambda temporary: open(temporary, 'w').close())
