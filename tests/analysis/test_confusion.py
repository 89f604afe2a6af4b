"""Confusion matrices and the figures of each class."""

import csv

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, precision_score, recall_score

from epsanet_jax import InputError
from epsanet_jax.analysis import confusion
from epsanet_jax.training.metrics import mean_class_accuracy

NAMES = ['cat, or dog', 'bee', '$x$', 'ünï']


@pytest.fixture
def decided(rng):
    """Labels of unbalanced classes, and predictions that are often right."""
    labels = rng.choice(4, 300, p=(0.6, 0.3, 0.08, 0.02))
    return labels, np.where(rng.random(300) < 0.6, labels, rng.integers(0, 4, 300))


def test_figures_of_each_class_equal_those_of_scikit_learn(decided):
    rows = confusion.per_class(confusion_matrix(*decided), NAMES)
    assert [row['class'] for row in rows] == NAMES
    np.testing.assert_allclose([row['accuracy'] for row in rows], recall_score(*decided, average=None))
    np.testing.assert_allclose([row['precision'] for row in rows], precision_score(*decided, average=None))
    assert [row['images'] for row in rows] == np.bincount(decided[0]).tolist()
    assert mean_class_accuracy(*decided) == pytest.approx(balanced_accuracy_score(*decided))


def test_a_class_without_images_or_predictions_has_no_figures():
    rows = confusion.per_class(np.array([[3, 0, 2], [0, 0, 0], [1, 0, 0]]), ['a', 'b', 'c'])
    assert [row['accuracy'] for row in rows] == [0.6, None, 0.0]
    assert [row['precision'] for row in rows] == [0.75, None, 0.0]
    assert [(row['confused_with'], row['confused']) for row in rows] == [('c', 2), (None, 0), ('a', 1)]


def test_a_csv_file_holds_the_names_and_numbers(tmp_path, decided):
    matrix = confusion_matrix(*decided)
    confusion.write(str(tmp_path / 'x.csv'), matrix, NAMES)
    with (tmp_path / 'x.csv').open(encoding='utf-8', newline='') as f:
        head, *rows = csv.reader(f)
    assert head == ['class', *NAMES]
    assert [row[0] for row in rows] == NAMES
    np.testing.assert_array_equal([list(map(int, row[1:])) for row in rows], matrix)


def test_a_figure_shows_names_and_numbers(tmp_path, decided):
    confusion.write(str(tmp_path / 'x.PNG'), confusion_matrix(*decided), NAMES)
    with Image.open(tmp_path / 'x.PNG') as image:
        assert len(image.convert('RGB').getcolors(2**24)) > 10
    figure = confusion.draw(np.array([[5, 0], [4, 12]]), ['a', '$x$'])
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts] == ['5', '4', '12']
    assert [label.get_text() for label in axes.get_yticklabels()] == ['a', '$x$']
    many = confusion.draw(np.eye(100, dtype=int), list(map(str, range(100))))
    assert not many.axes[0].texts


def test_an_unknown_suffix_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r'--confusion must end with .csv, .png, .svg, .pdf, got .*x.gif'):
        confusion.write(str(tmp_path / 'x.gif'), np.eye(2), NAMES[:2])
    assert not list(tmp_path.iterdir())
