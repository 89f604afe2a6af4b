"""What `epsanet prepare` takes: tars in every layout, ImageNet's own, and what is refused."""

import gzip
import io
import re
import tarfile

import numpy as np
import pytest
import scipy.io
import tensorflow_datasets as tfds
from command import run
from PIL import Image

from epsanet_jax.data.sources import ImageFolder

SYNSETS = ('n01440764', 'n02102040', 'n03888257')


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


@pytest.fixture
def imagenet(tmp_path):
    """ImageNet's two tars, with two pictures a synset, and four to validate."""
    root = tmp_path / 'imagenet'
    inner = {
        f'{s}.tar': packed({f'{s}_{j}.JPEG': jpeg(2 * i + j) for j in (1, 0)}) for i, s in enumerate(SYNSETS)
    }
    write(root / 'ILSVRC2012_img_train.tar', packed(dict(reversed(inner.items()))))
    names = [f'ILSVRC2012_val_0000000{i}.JPEG' for i in (4, 1, 3, 2)]
    write(root / 'ILSVRC2012_img_val.tar', packed({name: jpeg(int(name[-6])) for name in names}))
    return root


TRUTH = {1: SYNSETS[2], 2: SYNSETS[0], 3: SYNSETS[0], 4: SYNSETS[1]}  # by number of the file


def kit(numbers=(3, 1, 1, 2)):
    """The development kit, which numbers the synsets in another order than the sorted one."""
    own = {1: SYNSETS[0], 2: SYNSETS[1], 3: SYNSETS[2]}
    own = {3: own[3], 1: own[1], 2: own[2], 1001: 'n00001740'}
    rows = np.array(list(own.items()), dtype=[('ILSVRC2012_ID', object), ('WNID', object)])
    table = io.BytesIO()
    scipy.io.savemat(table, {'synsets': rows})
    truth = ''.join(f'{n}\n' for n in numbers).encode()
    return {'ILSVRC2012_validation_ground_truth.txt': truth, 'meta.mat': table.getvalue()}


def check_imagenet(out):
    train, validation = records(out, 'train'), records(out, 'validation')
    assert [(name, label) for name, label, _ in train] == [
        (f'{s}_{j}.JPEG', s) for s in SYNSETS for j in (0, 1)
    ]
    assert [image for _, _, image in train] == [jpeg(i) for i in range(6)]
    assert {(name, label, image) for name, label, image in validation} == {
        (f'ILSVRC2012_val_0000000{i}.JPEG', s, jpeg(i)) for i, s in TRUTH.items()
    }
    assert [label for _, label, _ in validation] == sorted(TRUTH.values())  # class by class, as in folders


def test_imagenet_with_a_list_of_synsets(imagenet, tmp_path, capsys):
    labels = ''.join(f'{TRUTH[i]}\n' for i in (1, 2, 3, 4))
    write(imagenet / 'imagenet_2012_validation_synset_labels.txt', labels.encode())
    out = prepared(capsys, imagenet, tmp_path / 'out')
    assert '--config=configs/imagenet.py --config.data.source=records' in out
    check_imagenet(tmp_path / 'out')
    assert tfds.builder_from_directory(tmp_path / 'out').name == 'imagenet2012'


@pytest.mark.parametrize('form', ['folder', 'tar', 'numbers'])
def test_imagenet_with_the_development_kit(imagenet, tmp_path, capsys, form):
    files = {f'ILSVRC2012_devkit_t12/data/{name}': content for name, content in kit().items()}
    arguments = ()
    if form == 'tar':
        write(imagenet / 'ILSVRC2012_devkit_t12.tar.gz', gzip.compress(packed(files)))
    else:
        for name, content in files.items():
            write((imagenet if form == 'folder' else tmp_path) / name, content)
    if form == 'numbers':
        arguments = ('--labels', tmp_path / next(iter(files)))
    prepared(capsys, imagenet, tmp_path / 'out', *arguments)
    check_imagenet(tmp_path / 'out')


@pytest.mark.parametrize(
    ('labels', 'message'),
    [
        ('3\n1\n1\n2\n', 'holds class numbers, and no meta.mat lies beside it'),
        ('n01440764\n' * 3, 'has 3 labels, .*ILSVRC2012_img_val.tar has 4 pictures'),
        ('', 'has 0 labels'),
        (
            'n01440764\n' * 3 + 'n09999999\n',
            'names 1 synsets that ILSVRC2012_img_train.tar has not: n09999999',
        ),
        ('n01440764\nn01440764\ntench\nn01440764\n', "line 3: expected a synset .*got 'tench'"),
        ('ILSVRC2012_val_00000001.JPEG 3\n', 'line 1: expected a synset'),
        (b'\xff\xfe\x00', 'is no text'),
        (None, 'cannot read the labels in'),
    ],
)
def test_labels_that_cannot_be_right_are_refused(imagenet, tmp_path, capsys, labels, message):
    path = tmp_path / 'labels.txt'
    if labels is not None:
        write(path, labels if isinstance(labels, bytes) else labels.encode())
    line = refusal(capsys, imagenet, tmp_path / 'out', '--labels', path)
    assert re.search(f'error: .*{message}', line)


def test_a_kit_that_is_not_right_is_refused(imagenet, tmp_path, capsys):
    assert 'no labels of the validation pictures' in refusal(capsys, imagenet, tmp_path / 'out')
    for name, content in kit(numbers=(3, 1, 1, 7)).items():
        write(tmp_path / 'kit/data' / name, content)
    line = refusal(capsys, imagenet, tmp_path / 'out', '--labels', tmp_path / 'kit')
    assert "line 4: no such class in meta.mat: '7'" in line
    write(tmp_path / 'kit/data/meta.mat', b'MATLAB 5.0 no more')
    assert 'cannot read meta.mat' in refusal(capsys, imagenet, tmp_path / 'out', '--labels', tmp_path / 'kit')
    write(tmp_path / 'kit.tar.gz', gzip.compress(packed({'data/readme.txt': b''})))
    line = refusal(capsys, imagenet, tmp_path / 'out', '--labels', tmp_path / 'kit.tar.gz')
    assert 'is not the development kit' in line


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
        ('ILSVRC2012_img_train.tar', packed({'1.jpg': jpeg(0)}), "holds '1.jpg': expected one tar a synset"),
        (
            'ILSVRC2012_img_train.tar',
            packed({'n01440764.tar': packed({'1.JPEG': jpeg(0)})[:600]}),
            'n01440764.tar is truncated',
        ),
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
