"""Members of tars: where they are, and which tars are refused; more of them in prepare/test_archives.py."""

import io
import tarfile

import pytest
from labelled_files import write_tar

from epsanet_jax import InputError
from epsanet_jax.data.decode import BadImageError
from epsanet_jax.data.tars import members, read_member

FILES = [('a/1.jpg', b'one'), ('./a/2.jpg', b''), ('b.jpg', b'x' * 1000)]


def test_members_are_read_at_their_places(tmp_path):
    path = str(tmp_path / 'x.tar')
    write_tar(tmp_path / 'x.tar', FILES)
    found = list(members(path))
    assert [(m.name, m.size) for m in found] == [('a/1.jpg', 3), ('a/2.jpg', 0), ('b.jpg', 1000)]
    assert [read_member(path, m.offset, m.size) for m in found] == [content for _, content in FILES]


def test_folders_have_no_place(tmp_path):
    with tarfile.open(tmp_path / 'x.tar', 'w') as tar:
        folder = tarfile.TarInfo('cat')
        folder.type = tarfile.DIRTYPE
        folder.mtime = 5
        tar.addfile(folder)
    (only,) = members(str(tmp_path / 'x.tar'))
    assert only == ('cat', 0, 5 * 10**9, -1)


def test_members_of_a_tar_in_a_tar_have_places_in_the_outer_one(tmp_path):
    write_tar(tmp_path / 'inner.tar', FILES)
    write_tar(tmp_path / 'outer.tar', [('x', b'x'), ('inner.tar', (tmp_path / 'inner.tar').read_bytes())])
    path = str(tmp_path / 'outer.tar')
    inner = list(members(path))[1]
    found = list(members(path, inner.offset, inner.size, 'outer.tar: inner.tar'))
    assert [read_member(path, m.offset, m.size) for m in found] == [content for _, content in FILES]
    with pytest.raises(InputError, match=r"outer.tar: inner.tar is truncated in 'b.jpg'"):
        list(members(path, inner.offset, 2400, 'outer.tar: inner.tar'))


def test_damage_and_other_files_are_named(tmp_path):
    write_tar(tmp_path / 'x.tar', FILES)
    whole = (tmp_path / 'x.tar').read_bytes()
    for content, message in [
        (whole[:2400], "x.tar is truncated in 'b.jpg': download or copy it again"),
        (whole[:3072], 'x.tar is truncated or damaged at byte 3072'),
        (b'text' * 500, 'x.tar is not a tar, or damaged'),
        (b'\x28\xb5\x2f\xfd' + whole, 'x.tar is compressed, .* run `zstd -d` on it first'),
    ]:
        (tmp_path / 'x.tar').write_bytes(content)
        with pytest.raises(InputError, match=message):
            list(members(str(tmp_path / 'x.tar')))
    with pytest.raises(InputError, match=r'cannot read .*none.tar: No such file'):
        list(members(str(tmp_path / 'none.tar')))


def test_member_that_is_not_whole_is_a_bad_image(tmp_path):
    (tmp_path / 'x.tar').write_bytes(b'0123456789')
    assert read_member(str(tmp_path / 'x.tar'), 4, 6) == b'456789'
    with pytest.raises(BadImageError, match='the tar ends within it'):
        read_member(str(tmp_path / 'x.tar'), 4, 7)


def test_sparse_files_are_refused(tmp_path):
    header = tarfile.TarInfo('cat/1.jpg')
    header.type = tarfile.GNUTYPE_SPARSE
    with tarfile.open(tmp_path / 'x.tar', 'w', format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(header, io.BytesIO())
    with pytest.raises(InputError, match="holds 'cat/1.jpg', which is neither a file nor a folder"):
        list(members(str(tmp_path / 'x.tar')))
