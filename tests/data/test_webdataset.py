"""WebDataset shards: keys, labels, the kept index, and damage."""

import json
import os

import pytest
from labelled_files import image, write_tar

from epsanet_jax import InputError
from epsanet_jax.data import tars
from epsanet_jax.data.formats import SHARDS, Found, open_labelled
from epsanet_jax.data.webdataset import is_shard

IMAGES = [image(i) for i in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
    return tmp_path / 'cache/epsanet_jax/shards'


def source(*paths, column=''):
    return open_labelled(Found(SHARDS, tuple(map(str, paths))), column)[0]


def pairs(labels, kind='cls', image_kind='jpg'):
    for i, label in enumerate(labels):
        yield f'{i:03d}.{image_kind}', IMAGES[i]
        yield f'{i:03d}.{kind}', label.encode()


@pytest.mark.parametrize(
    ('kind', 'labels', 'expected'),
    [
        ('cls', ['2', '0\n', '1', '2'], ('0', '1', '2')),
        ('txt', ['ox', 'ape', 'cow', 'ox'], ('ape', 'cow', 'ox')),
        ('json', ['{"label": 2}', '{"label": 0}', '{"label": 1}', '{"label": 2}'], ('0', '1', '2')),
        ('json', ['2', '0', '1', '2'], ('0', '1', '2')),
    ],
)
def test_labels_are_in_members_of_three_kinds(tmp_path, kind, labels, expected):
    write_tar(tmp_path / 'x.tar', pairs(labels, kind))
    rows = source(tmp_path / 'x.tar')
    assert rows.class_names == expected
    assert [rows[i]['label'] for i in range(4)] == [2, 0, 1, 2]
    assert [rows[i]['image'] for i in (3, 1)] == [IMAGES[3], IMAGES[1]]
    assert rows.name_of(3) == f'{tmp_path}/x.tar: 003.jpg'


def test_keys_end_at_the_first_dot_and_may_be_in_folders(tmp_path):
    members = [('b/0.JPEG', IMAGES[0]), ('b/0.seg.png', b''), ('b/0.cls', b'1'), ('c/0.cls', b'0')]
    write_tar(tmp_path / 'x.tar', [*members, ('c/0.webp', IMAGES[1]), ('__key__', b'')])
    rows = source(tmp_path / 'x.tar')
    assert [(rows[i]['image'], rows[i]['label']) for i in range(2)] == [(IMAGES[0], 1), (IMAGES[1], 0)]


def test_first_kind_of_label_counts_and_the_key_of_json_can_be_chosen(tmp_path):
    members = [
        (f'{i}.{kind}', c) for i in '01' for kind, c in (('png', IMAGES[0]), ('txt', b'text'), ('cls', b'7'))
    ]
    write_tar(tmp_path / 'x.tar', members)
    assert source(tmp_path / 'x.tar').class_names == ('7',)
    write_tar(tmp_path / 'y.tar', pairs([json.dumps({'fine': 'a', 'coarse': 'b'})] * 2, 'json'))
    with pytest.raises(InputError, match=r'y.tar: 000.json: fine, coarse has no usual name of the label'):
        source(tmp_path / 'y.tar')
    assert source(tmp_path / 'y.tar', column='fine').class_names == ('a',)
    assert source(tmp_path / 'y.tar', column='coarse').class_names == ('b',)


def test_index_is_kept_until_the_shard_changes(tmp_path, cache, monkeypatch):
    path, read = tmp_path / 'x.tar', []
    original = tars.members

    def counting(path, *more):
        read.append(path)
        return original(path, *more)

    monkeypatch.setattr(tars, 'members', counting)
    write_tar(path, pairs(['0', '1']))
    before = source(path).fingerprint
    assert (len(read), source(path).fingerprint, len(read)) == (1, before, 1)
    os.utime(path, (1, 1))
    assert (source(path).fingerprint, len(read)) == (before, 2)
    write_tar(path, pairs(['1', '0', '1']))
    assert ([source(path)[i]['label'] for i in range(3)], len(read)) == ([1, 0, 1], 3)
    for damage in (b'{', b'[]', b'{"key": 1}'):
        (stored,) = cache.iterdir()
        stored.write_bytes(damage)
        assert len(source(path)) == 3
    assert len(read) == 6


def test_index_that_cannot_be_kept_is_built_each_time(tmp_path, monkeypatch):
    (tmp_path / 'file').write_bytes(b'')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    write_tar(tmp_path / 'x.tar', pairs(['0', '1']))
    assert len(source(tmp_path / 'x.tar')) == len(source(tmp_path / 'x.tar')) == 2


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ([*pairs(['0', '1']), ('001.png', b'')], r'x.tar: 001.jpg and 001.png are two images with one key'),
        ([*pairs(['0', '1']), ('000.jpg', b'')], r'x.tar: 000.jpg and 000.jpg are two images with one key'),
        ([*pairs(['0', '1']), ('000.cls', b'1')], 'x.tar holds 000.cls twice'),
        (
            [*pairs(['0', '1']), ('002.jpg', b'')],
            r'x.tar: 002.jpg has no label: .cls, .json or .txt is missing',
        ),
        (
            [*pairs(['0', '1']), ('2.jpg', b''), ('2.txt', b'0')],
            r'000.jpg has its label in .cls and .*2.jpg .* .txt',
        ),
        (
            [*pairs(['0', 'cat'])],
            r"x.tar: 000.jpg has the label '0' and .*x.tar: 001.jpg has the label 'cat': use",
        ),
        ([*pairs(['0', ''])], r'x.tar: 001.jpg has no label'),
        ([*pairs(['0', '-1'])], r"x.tar: 001.jpg: the label '-1' is neither a class name nor a class number"),
        ([*pairs(['{', '1'], 'json')], r'x.tar: 000.json is not JSON'),
        ([*pairs(['{"label": [1]}'], 'json')], r'x.tar: 000.json: the label \[1\] is neither'),
        ([('a.txt', b'text')], 'x.tar holds no image'),
    ],
)
def test_wrong_members_are_named(tmp_path, members, message):
    write_tar(tmp_path / 'x.tar', members)
    with pytest.raises(InputError, match=message):
        source(tmp_path / 'x.tar')


def test_truncated_shard_is_named_also_after_it_was_indexed(tmp_path):
    path = tmp_path / 'x.tar'
    write_tar(path, pairs(['0', '1', '0', '1']))
    assert len(source(path)) == 4
    content = path.read_bytes()
    place = content.index(IMAGES[2]) + 5
    path.write_bytes(content[:place])
    with pytest.raises(InputError, match=r"x.tar is truncated in '002.jpg': download or copy it again"):
        source(path)


def test_shard_is_told_from_other_tars(tmp_path):
    write_tar(tmp_path / 'shard.tar', pairs(['0'], 'json', 'png'))
    write_tar(tmp_path / 'class.tar', [('1.jpg', IMAGES[0]), ('2.jpg', IMAGES[1]), ('labels.txt', b'')])
    (tmp_path / 'text.tar').write_bytes(b'text')
    names = ('shard', 'class', 'text', 'missing')
    assert [is_shard(str(tmp_path / f'{name}.tar')) for name in names] == [True, False, False, False]
