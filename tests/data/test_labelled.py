"""Classes and numbers from labels, and the bytes of an image from each kind of place."""

import pytest
from labelled_files import image, write_parquet, write_tar

from epsanet_jax import InputError
from epsanet_jax.data.contents import Contents, Part, Place
from epsanet_jax.data.labelled import Labelled, read_place
from epsanet_jax.data.tars import members


def contents(labels, names=()):
    count = len(labels)
    made = Contents([Part('x.tar', [f'{i}.jpg' for i in range(count)], range(count), [1] * count)], '')
    made.labels, made.class_names = labels, names
    return made


@pytest.mark.parametrize(
    ('labels', 'declared', 'names', 'numbers'),
    [
        (['ox', 'ape', 'ox'], (), ('ape', 'ox'), [1, 0, 1]),
        ([2, 0, 1], (), ('0', '1', '2'), [2, 0, 1]),
        (['2', '0', 1], (), ('0', '1', '2'), [2, 0, 1]),
        ([' ox ', 'ox'], (), ('ox',), [0, 0]),
        ([1, 0, 1], ('ox', 'ape'), ('ox', 'ape'), [1, 0, 1]),
        (['ape', 'ox'], ('ox', 'ape', 'bee'), ('ox', 'ape', 'bee'), [1, 0]),
    ],
)
def test_declared_names_keep_their_order_and_others_are_sorted(labels, declared, names, numbers):
    rows = Labelled(contents(labels, declared))
    assert (rows.class_names, rows.labels.tolist(), len(rows)) == (names, numbers, len(labels))


def test_one_name_in_two_forms_of_unicode_is_one_class():
    assert Labelled(contents(['caf\u00e9', 'cafe\u0301'])).class_names == ('caf\u00e9',)


def test_fingerprint_depends_on_labels_and_class_names():
    fingerprints = {
        Labelled(contents(labels, names)).fingerprint
        for labels, names in [([0, 1], ()), ([1, 0], ()), ([0, 1], ('a', 'b')), ([0, 1], ('b', 'a'))]
    }
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ('labels', 'declared', 'message'),
    [
        (['ox', None], (), 'x.tar: 1.jpg has no label: add it, or remove the image'),
        (['ox', ''], ('ox',), 'x.tar: 1.jpg has no label'),
        ([0, -1], (), 'x.tar: 1.jpg: the label -1 is neither a class name nor a class number'),
        ([0, 2], ('ox', 'ape'), r'1.jpg: the label 2 is not one of the 2 declared classes \(ox, ape\)'),
        (['ox', 'cow'], ('ox', 'ape'), "1.jpg: the label 'cow' is not one of the 2 declared classes"),
        (['ox', 'ape', 3], (), "0.jpg has the label 'ox' and x.tar: 2.jpg has the label 3: use"),
        ([0], ('ox', 'ox'), 'two of the declared classes have one name: ox, ox'),
    ],
)
def test_wrong_labels_are_named(labels, declared, message):
    with pytest.raises(InputError, match=message):
        Labelled(contents(labels, declared))


def test_images_are_read_from_files_tars_and_parquet(tmp_path):
    images = [image(i) for i in range(3)]
    (tmp_path / 'a.jpg').write_bytes(images[0])
    write_tar(tmp_path / 'a.tar', [('a.jpg', images[0]), ('b.jpg', images[1])])
    write_parquet(tmp_path / 'a.parquet', images, [0, 1, 2], rows=2)
    member = list(members(str(tmp_path / 'a.tar')))[1]
    places = [
        Place(str(tmp_path), 'a.jpg', -1, 0),
        Place(str(tmp_path / 'a.tar'), member.name, member.offset, member.size),
        Place(str(tmp_path / 'a.parquet'), 'row 2', 2, 0),
    ]
    assert [read_place(place) for place in places] == images
    with pytest.raises(OSError, match='missing'):
        read_place(Place(str(tmp_path), 'missing.jpg', -1, 0))
