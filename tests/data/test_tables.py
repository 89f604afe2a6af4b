"""Tables of labels: CSV and JSON lines, where their images are, and what is wrong with them."""

import json

import pytest
from labelled_files import image, write_csv

from epsanet_jax import InputError
from epsanet_jax.data.formats import find, open_labelled

NAMES = ('a.jpg', 'deep/b.jpg', 'c.png')
LABELS = ('cat', 'ape', 'cat')
ROWS = [*zip(NAMES, LABELS, strict=True)]


def source(path, split='.', column=''):
    return open_labelled(find(str(path), split, column), column)[0]


@pytest.fixture
def folder(tmp_path):
    write_images(tmp_path)
    return tmp_path


def write_images(root):
    for i, name in enumerate(NAMES):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image(i))


def labels_of(rows):
    return [(rows.class_names[rows[i]['label']], rows[i]['image']) for i in range(len(rows))]


EXPECTED = [(label, image(i)) for i, label in enumerate(LABELS)]


@pytest.mark.parametrize(
    'rows',
    [
        ROWS,
        [('path', 'label'), *ROWS],
        [('File_Name ', 'breed'), *ROWS],
        [('id', 'label', 'filename'), *((i, label, name) for i, (name, label) in enumerate(ROWS))],
        [('file', 'class', 'label'), *((name, 'x', label) for name, label in ROWS)],
    ],
)
def test_csv_with_and_without_a_header(folder, rows):
    write_csv(folder / 'labels.csv', rows)
    assert labels_of(source(folder / 'labels.csv')) == EXPECTED


def test_bom_spaces_quotes_and_numbers(folder):
    text = '\ufeffpath, label\r\n"a.jpg", 10\r\n./deep/b.jpg, 9\r\n\r\nc.png, 10\r\n'
    (folder / 'labels.csv').write_text(text)
    rows = source(folder / 'labels.csv')
    assert (rows.class_names, [rows[i]['label'] for i in range(3)]) == (('10', '9'), [0, 1, 0])
    assert rows.name_of(2) == f'{folder}/labels.csv line 5: c.png'


def test_json_lines_in_the_folder_of_the_split(tmp_path):
    write_images(tmp_path / 'train')
    text = '\n'.join(json.dumps({'file_name': name, 'label': label, 'n': 1}) for name, label in ROWS)
    (tmp_path / 'train/metadata.jsonl').write_text(text + '\n\n')
    assert labels_of(source(tmp_path, 'train')) == EXPECTED


@pytest.mark.parametrize(
    ('table', 'place'),
    [('train.csv', 'train'), ('labels.csv', 'images'), ('labels.csv', 'pets'), ('labels.csv', '')],
)
def test_images_are_beside_the_table_or_in_a_folder_beside_it(tmp_path, table, place):
    write_images(tmp_path / place)
    write_csv(tmp_path / table, ROWS)
    assert labels_of(source(tmp_path / table)) == EXPECTED


def test_one_table_of_several_splits(tmp_path):
    write_images(tmp_path / 'Training')
    write_images(tmp_path / 'val')
    rows = [(f'{split}/{name}', label) for split in ('Training', 'val') for name, label in ROWS]
    write_csv(tmp_path / 'metadata.csv', [('file_name', 'label'), *rows[:5]])
    assert labels_of(source(tmp_path / 'metadata.csv', 'train')) == EXPECTED
    assert labels_of(source(tmp_path / 'metadata.csv', 'val')) == EXPECTED[:2]
    assert len(source(tmp_path / 'metadata.csv')) == 5
    with pytest.raises(InputError, match=r'metadata.csv has no path that begins with test/: give its folder'):
        source(tmp_path / 'metadata.csv', 'test')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (
            'path,label\na.jpg,cat\nno.jpg,cat\n',
            r'labels.csv line 3: no.jpg does not exist in .*: correct or',
        ),
        (
            'path,label\na.jpg,cat\n./a.jpg,ape\n',
            'line 3: a.jpg is listed twice, first as .* line 2: a.jpg',
        ),
        ('path,label\na.jpg,cat\nc.png,\n', 'labels.csv line 3: c.png has no label'),
        (
            'path,label\na.jpg,cat\nc.png,3\n',
            "line 2: a.jpg has the label 'cat' and .* line 3: c.png .* '3': use",
        ),
        ('path,label\na.jpg,cat\nc.png\n', 'labels.csv line 3: 1 values for 2 columns'),
        ('path,label\na.jpg,cat\n,ape\n', "labels.csv line 3: expected the path of an image, got ''"),
        ('path,label\n"a.jpg,cat\n', r'labels.csv line \d is not CSV'),
        (
            'path,path\na.jpg,cat\n',
            'labels.csv line 1: expected different names of columns, separated by commas',
        ),
        (
            'path;label\na.jpg;cat\n',
            r'labels.csv has no column of paths \(file_name, .*\); it has path;label',
        ),
        ('path,one,two\na.jpg,cat,ape\n', 'one, two has no usual name of the label: set the column'),
        ('path,class,target\na.jpg,cat,ape\n', 'the columns class, target may be the label: set the column'),
        ('path,label\n', 'labels.csv has no row'),
        ('', 'labels.csv has no row'),
    ],
)
def test_wrong_rows_of_csv_are_named(folder, text, message):
    (folder / 'labels.csv').write_text(text)
    with pytest.raises(InputError, match=message):
        source(folder / 'labels.csv')


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('{"file_name": "a.jpg", "label": 0}\n{', 'labels.jsonl line 2 is not JSON'),
        ('{"file_name": "a.jpg", "label": 0}\n[]', 'labels.jsonl line 2 is not a JSON object'),
        (
            '{"file_name": "a.jpg", "label": 0}\n{"file_name": "c.png"}',
            'labels.jsonl line 2: c.png has no label',
        ),
        ('{"file_name": "a.jpg", "label": 0.5}', 'labels.jsonl line 1: the label 0.5 is neither'),
        ('{"file_name": "a.jpg", "label": true}', 'labels.jsonl line 1: the label True is neither'),
        (
            '{"file_name": 3, "label": 1}',
            'labels.jsonl line 1: expected the path of an image, got 3',
        ),
        ('\xff', 'labels.jsonl is not UTF-8 text'),
    ],
)
def test_wrong_rows_of_json_are_named(folder, text, message):
    (folder / 'labels.jsonl').write_text(text, encoding='latin-1')
    with pytest.raises(InputError, match=message):
        source(folder / 'labels.jsonl')


def test_column_of_labels_can_be_chosen(folder):
    write_csv(folder / 'labels.csv', [('path', 'one', 'two'), *((n, 'x', label) for n, label in ROWS)])
    assert labels_of(source(folder / 'labels.csv', column='two')) == EXPECTED
