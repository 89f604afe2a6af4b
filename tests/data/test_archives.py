"""What `epsanet prepare` takes: tars in every layout, ImageNet's own, and what is refused."""

import gzip
import io
import re
import tarfile

import numpy as np
import pytest
import tensorflow_datasets as tfds
from command import run
from PIL import Image

from epsanet_jax.data.sources import ImageFolder


def jpeg(seed):
    out = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(out, 'JPEG')
    return out.getvalue()


def packed(files, folders=()):
    """A tar of files, in the order given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        for name in folders:
            header = tarfile.TarInfo(name)
            header.type = tarfile.DIRTYPE
            tar.addfile(header)
        for name, content in files.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return out.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def records(folder, split):
    builder = tfds.builder_from_directory(folder)
    names = builder.info.features['label'].names
    source = builder.as_data_source(split, decoders={'image': tfds.decode.SkipDecoding()})
    return [(r['file_name'].decode(), names[int(r['label'])], r['image']) for r in source]


def prepared(capsys, *arguments):
    """Runs the command, which must succeed."""
    status, out, err = run(capsys, 'prepare', *arguments, '--workers', 1)
    assert status == 0, err
    return out


def refusal(capsys, *arguments):
    """Runs the command, which must refuse in one line, and returns that line."""
    status, out, err = run(capsys, 'prepare', *arguments, '--workers', 1)
    assert (status, out) == (2, ''), err
    return err.splitlines()[-1]


# In no order.
TRAIN = {
    name: jpeg(i)
    for i, name in enumerate(
        ['dog/9.jpg', 'cat/z.jpg', 'dog/10.jpg', 'cat/more/b.jpeg', 'cat/a.JPG', 'Ox/ü.jpg']
    )
}
VAL = {'dog/1.jpg': jpeg(10), 'cat/1.jpg': jpeg(11)}


@pytest.fixture
def folder(tmp_path):
    for split, files in (('train', TRAIN), ('val', VAL)):
        for name, content in files.items():
            write(tmp_path / 'folder' / split / name, content)
    return tmp_path / 'folder'


def tar_a_split(root):
    write(root / 'train.tar', packed({**TRAIN, 'cat/notes.txt': b'', 'stray.jpg': b''}, ['cat', 'dog', 'Ox']))
    write(root / 'val.tar', packed({f'./{name}': content for name, content in VAL.items()}, ['.', './dog']))


def tar_a_split_with_its_folder(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        write(root / f'{split}.tar', packed({f'{split}/{n}': c for n, c in files.items()}, [split]))


def tar_a_class(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        for class_name in {name.split('/')[0] for name in files}:
            own = {n.partition('/')[2]: c for n, c in files.items() if n.startswith(f'{class_name}/')}
            write(root / split / f'{class_name}.tar', packed(own))


def tar_a_class_with_its_folder(root):
    for split, files in (('train', TRAIN), ('val', VAL)):
        for class_name in {name.split('/')[0] for name in files}:
            own = {n: c for n, c in files.items() if n.startswith(f'{class_name}/')}
            write(root / split / f'{class_name}.tar', packed(own))


@pytest.mark.parametrize(
    'pack', [tar_a_split, tar_a_split_with_its_folder, tar_a_class, tar_a_class_with_its_folder]
)
def test_tars_give_the_files_that_folders_give(folder, tmp_path, capsys, pack):
    pack(tmp_path / 'tars')
    prepared(capsys, folder, tmp_path / 'from_folder')
    prepared(capsys, tmp_path / 'tars', tmp_path / 'from_tars')
    for path in sorted((tmp_path / 'from_folder').glob('*array_record*')):
        assert (tmp_path / 'from_tars' / path.name).read_bytes() == path.read_bytes()
    source = ImageFolder(folder / 'train')
    found = records(tmp_path / 'from_tars', 'train')
    assert [(source.name_of(i), source[i]['image']) for i in range(len(source))] == [
        (str(folder / 'train' / name), image) for name, _, image in found
    ]


def test_of_members_with_one_name_the_last_counts(tmp_path, capsys):
    twice = io.BytesIO()
    with tarfile.open(fileobj=twice, mode='w') as tar:
        for content in (b'old', jpeg(1)):
            header = tarfile.TarInfo('cat/a.jpg')
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    write(tmp_path / 'in/train.tar', twice.getvalue())
    prepared(capsys, tmp_path / 'in', tmp_path / 'out')
    assert records(tmp_path / 'out', 'train') == [('cat/a.jpg', 'cat', jpeg(1))]


def member(name, kind=tarfile.REGTYPE, **attributes):
    header = tarfile.TarInfo(name)
    header.type = kind
    for key, value in attributes.items():
        setattr(header, key, value)
    return header


@pytest.mark.parametrize(
    ('header', 'message'),
    [
        (member('/etc/cat/1.jpg'), "holds '/etc/cat/1.jpg', which leads out of the folder"),
        (member('cat/../../1.jpg'), 'which leads out of the folder'),
        (member('cat/2.jpg', tarfile.SYMTYPE, linkname='1.jpg'), "holds 'cat/2.jpg', which is a link"),
        (member('cat/2.jpg', tarfile.LNKTYPE, linkname='cat/1.jpg'), 'which is a link'),
        (member('cat/2.jpg', tarfile.FIFOTYPE), 'which is neither file nor folder'),
        (member('cat/2.jpg', tarfile.CHRTYPE), 'which is neither file nor folder'),
    ],
)
def test_members_that_are_no_files_of_the_folder_are_refused(tmp_path, capsys, header, message):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w') as tar:
        tar.addfile(member('cat/1.jpg'))
        tar.addfile(header)
    write(tmp_path / 'in/train.tar', out.getvalue())
    assert message in refusal(capsys, tmp_path / 'in', tmp_path / 'out')
    assert not (tmp_path / 'out').exists()


AFTER_TWO = 512 * sum(1 + -(-len(content) // 512) for content in list(TRAIN.values())[:2])  # members


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('train.tar.gz', b'', 'is compressed and has no random access: decompress it first'),
        ('train/cat.tgz', b'', 'is compressed and has no random access: decompress it first'),
        (
            'train.tar',
            gzip.compress(packed(TRAIN)),
            'is compressed and has no random access: `gzip -d` it first',
        ),
        ('train.tar', packed(TRAIN).rstrip(b'\0'), 'is no tar, or damaged: unexpected end of data'),
        ('train.tar', packed(TRAIN)[:AFTER_TWO], f'is truncated or damaged at byte {AFTER_TWO}'),
        ('train.tar', packed(TRAIN)[: AFTER_TWO + 9], f'is truncated or damaged at byte {AFTER_TWO}'),
        ('train.tar', packed(TRAIN)[:AFTER_TWO] + b'x' * 4096, f'damaged at byte {AFTER_TWO}'),
        ('train.tar', b'', 'is no tar, or damaged: empty file'),
        ('train.tar', packed({'1.jpg': jpeg(0)}), 'no class folders in .*train.tar'),
        ('train.tar', packed({'n1.tar': b''}), 'the tars in it must be unpacked'),
        ('train.tar', packed(TRAIN, ['bare']), 'empty class: .*train.tar: bare holds no image'),
        ('train/cat.tar', packed({'notes.txt': b''}), 'empty class: .*cat.tar holds no image'),
    ],
)
def test_a_tar_that_will_not_do_is_named(tmp_path, capsys, name, content, message):
    write(tmp_path / 'in' / name, content)
    assert re.search(f'error: .*{message}', refusal(capsys, tmp_path / 'in', tmp_path / 'out'))


def test_linked_folders_are_followed_and_cycles_skipped(folder, tmp_path, capsys):
    write(tmp_path / 'elsewhere/9.jpg', jpeg(9))
    (folder / 'train/cat/link').symlink_to(tmp_path / 'elsewhere')
    prepared(capsys, folder, tmp_path / 'out')
    source, found = ImageFolder(folder / 'train'), records(tmp_path / 'out', 'train')
    assert [image for *_, image in found] == [source[i]['image'] for i in range(len(source))]
    assert 'cat/link/9.jpg' in [name for name, *_ in found]
    (folder / 'train/cat/loop').symlink_to(folder / 'train/cat')
    status, out, err = run(capsys, 'prepare', folder, tmp_path / 'out')
    assert (status, 'is there already; nothing was done' in out) == (0, True)
    line = f'skipped 1 entry in {folder}: train/cat/loop: link to a folder that contains it'
    assert line in err.splitlines()


def test_a_class_that_training_does_not_know_is_refused(folder, tmp_path, capsys):
    write(folder / 'val/zebra/1.jpg', jpeg(0))
    assert "'val' has classes that train has not: zebra" in refusal(capsys, folder, tmp_path / 'out')


def test_both_a_folder_and_a_tar_of_a_split_are_refused(folder, tmp_path, capsys):
    write(folder / 'val.tar', packed(VAL))
    assert 'holds both val and val.tar' in refusal(capsys, folder, tmp_path / 'out')
    (folder / 'val.tar').unlink()
    write(folder / 'train/dog.tar', packed({'1.jpg': jpeg(0)}))
    assert 'holds folders (Ox ...) and tars (dog.tar ...)' in refusal(capsys, folder, tmp_path / 'out')


def test_an_empty_class_and_a_name_of_two_lines_are_refused(folder, tmp_path, capsys):
    (folder / 'train/bare').mkdir()
    assert 'empty class: ' in refusal(capsys, folder, tmp_path / 'out')
    (folder / 'train/bare').rename(folder / 'train/two\nlines')
    write(folder / 'train/two\nlines/1.jpg', jpeg(0))
    assert 'cannot be kept as a line of text: rename it' in refusal(capsys, folder, tmp_path / 'out')
