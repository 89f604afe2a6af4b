import os

import pytest

from epsanet_jax import InputError
from epsanet_jax.paths import is_remote, resolve


def test_buckets_stay_uris_and_local_paths_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert str(resolve('gs://bucket/run')) == 'gs://bucket/run'
    assert is_remote(resolve('gs://bucket/run'))
    assert str(resolve('runs/a')) == f'{tmp_path}/runs/a'
    assert str(resolve('~/a')) == os.path.expanduser('~/a')
    assert not is_remote(resolve('runs/a'))


def test_an_unknown_kind_of_uri_is_refused():
    with pytest.raises(InputError, match='cannot use the path foo://bucket/run'):
        resolve('foo://bucket/run')
