"""Tars: which members are images, and which tars are refused."""

import gzip
import io
import re
import tarfile

import pytest

from epsanet_jax.data.image_folder import ImageFolder
from epsanet_jax.data.prepare.archives import Notes, list_folder

from .helpers import TRAIN, jpeg, packed, prepared, records, refusal, write


def member(name, kind=tarfile.REGTYPE, **attributes):
    header = tarfile.TarInfo(name)
    header.type = kind
    for key, value in attributes.items():
        setattr(header, key, value)
    return header


def test_items_of_a_folder_have_its_files_sizes_and_times(folder):
    items = list_folder(str(folder / 'train'), '', Notes())
    source = ImageFolder(folder / 'train')
    assert [f'{folder}/train/{item.name}' for item in items] == [
        source.name_of(i) for i in range(len(source))
    ]
    for item in items:
        path = folder / 'train' / item.name
        assert (item.size, item.mtime) == (path.stat().st_size, path.stat().st_mtime_ns)
        assert (item.class_name, item.offset) == (item.name.split('/')[0], -1)


def test_last_of_several_members_with_one_name_counts(tmp_path, capsys):
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode='w') as tar:
        for content in (b'old', jpeg(1)):
            tar.addfile(member('cat/a.jpg', size=len(content)), io.BytesIO(content))
    write(tmp_path / 'in/train.tar', twice.getvalue())
    prepared(capsys, tmp_path / 'in', tmp_path / 'out')
    assert records(tmp_path / 'out', 'train') == [('cat/a.jpg', 'cat', jpeg(1))]


@pytest.mark.parametrize(
    ('header', 'message'),
    [
        (member('/etc/cat/1.jpg'), "holds '/etc/cat/1.jpg', which is outside of the folder"),
        (member('cat/../../1.jpg'), 'which is outside of the folder'),
        (member('cat/2.jpg', tarfile.SYMTYPE, linkname='1.jpg'), "holds 'cat/2.jpg', which is a link"),
        (member('cat/2.jpg', tarfile.LNKTYPE, linkname='cat/1.jpg'), 'which is a link'),
        (member('cat/2.jpg', tarfile.FIFOTYPE), 'which is neither a file nor a folder'),
        (member('cat/2.jpg', tarfile.CHRTYPE), 'which is neither a file nor a folder'),
    ],
)
def test_links_devices_and_names_outside_of_the_folder_are_refused(tmp_path, capsys, header, message):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        tar.addfile(member('cat/1.jpg'))
        tar.addfile(header)
    write(tmp_path / 'in/train.tar', out.getvalue())
    assert message in refusal(capsys, tmp_path / 'in', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


AFTER_TWO = 512 * sum(1 + -(-len(content) // 512) for content in list(TRAIN.values())[:2])  # members


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (gzip.compress(packed(TRAIN)), 'is compressed, which prevents random access: run `gzip -d` on it'),
        (packed(TRAIN).rstrip(b'\0'), 'is not a tar, or damaged: unexpected end of data'),
        (packed(TRAIN)[:AFTER_TWO], f'is truncated or damaged at byte {AFTER_TWO}'),
        (packed(TRAIN)[: AFTER_TWO + 9], f'is truncated or damaged at byte {AFTER_TWO}'),
        (packed(TRAIN)[:AFTER_TWO] + b'x' * 4096, f'is truncated or damaged at byte {AFTER_TWO}'),
        (b'', 'is not a tar, or damaged: empty file'),
    ],
)
def test_compressed_or_damaged_tar_is_refused(tmp_path, capsys, content, message):
    write(tmp_path / 'in/train.tar', content)
    assert re.search(f'error: .*train.tar {message}', refusal(capsys, tmp_path / 'in', tmp_path / 'out'))


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('train.tar', packed({'1.jpg': jpeg(0)}), 'no class folders in .*train.tar'),
        ('train.tar', packed({'n1.tar': b''}), 'no class folders in .*; unpack the tars in it'),
        ('train.tar', packed(TRAIN, ['empty']), 'empty class: .*train.tar: empty holds no image'),
        ('train/cat.tar', packed({'notes.txt': b''}), 'empty class: .*cat.tar holds no image'),
    ],
)
def test_tar_without_classes_or_images_is_refused(tmp_path, capsys, name, content, message):
    write(tmp_path / 'in' / name, content)
    assert re.search(f'error: .*{message}', refusal(capsys, tmp_path / 'in', tmp_path / 'out'))
