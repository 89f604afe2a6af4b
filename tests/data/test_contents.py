"""Where images are and what their labels are called: parts, places, names, columns."""

import pytest

from epsanet_jax import InputError
from epsanet_jax.data.contents import Contents, Part, Place, checked_label, label_column

PARQUET = Part('data/a.parquet', (), (4, 7), (10, 20))
SHARD = Part('b.tar', ('x.jpg', 'y.png'), (512, 2048), (100, 200))
TABLE = Part('images', ('u.jpg',), table='labels.csv', lines=(3,))
PARTS = (PARQUET, SHARD, TABLE)


def test_images_of_all_parts_are_numbered_in_order():
    contents = Contents(PARTS, 'about')
    assert [contents.place_of(i) for i in range(len(contents))] == [
        Place('data/a.parquet', 'row 4', 4, 10),
        Place('data/a.parquet', 'row 7', 7, 20),
        Place('b.tar', 'x.jpg', 512, 100),
        Place('b.tar', 'y.png', 2048, 200),
        Place('images', 'u.jpg', -1, 0),
    ]
    for index in (-1, 5):
        with pytest.raises(IndexError):
            contents.place_of(index)


def test_names_for_messages_have_the_file_and_the_row_line_or_member():
    contents = Contents(PARTS, '')
    names = ['data/a.parquet: row 4', 'b.tar: y.png', 'labels.csv line 3: u.jpg']
    assert [contents.name_of(i) for i in (0, 3, 4)] == names


def test_identity_depends_on_images_and_order_but_not_on_the_folder():
    def identity(*parts):
        return list(Contents(parts, '').identity())

    before = identity(*PARTS)
    assert identity(PARQUET._replace(container='elsewhere/a.parquet'), SHARD, TABLE) == before
    for changed in (
        PARQUET._replace(container='data/b.parquet'),
        PARQUET._replace(offsets=(4,), sizes=(10,)),
        PARQUET._replace(sizes=(10, 21)),
    ):
        assert identity(changed, SHARD, TABLE) != before
    assert identity(SHARD, PARQUET, TABLE) != before


@pytest.mark.parametrize('value', ['cat', 0, 12, None, ''])
def test_names_numbers_and_missing_labels_are_labels(value):
    assert checked_label(value, 'here') == value


@pytest.mark.parametrize('value', [True, 0.5, [1], {}])
def test_other_values_are_no_labels(value):
    with pytest.raises(InputError, match='^here: the label .* is neither a class name nor a class number'):
        checked_label(value, 'here')


@pytest.mark.parametrize(
    ('names', 'wanted', 'column'),
    [
        (('image', 'label'), '', 'label'),
        (('image', 'Class '), '', 'Class '),
        (('target', 'label', 'class'), '', 'label'),
        (('label', 'breed'), 'breed', 'breed'),
    ],
)
def test_column_of_labels_is_the_wanted_or_the_usual_one(names, wanted, column):
    assert label_column(names, wanted, 'here') == column


@pytest.mark.parametrize(
    ('names', 'wanted', 'message'),
    [
        (('image', 'label'), 'breed', "here has no column 'breed' of labels; it has image, label"),
        (('image', 'breed'), '', 'here: image, breed has no usual name of the label: set the column'),
        (('class', 'target'), '', 'here: the columns class, target may be the label: set the column'),
    ],
)
def test_column_of_labels_is_not_guessed(names, wanted, message):
    with pytest.raises(InputError, match=message):
        label_column(names, wanted, 'here')
