"""Names of classes: order, spelling, and the outputs of a model that they stand for."""

import unicodedata

import pytest

from epsanet_jax import InputError
from epsanet_jax.data.classes import composed, distinct, in_order, match, single

CAFE, DECOMPOSED = 'café', unicodedata.normalize('NFD', 'café')


@pytest.mark.parametrize(
    ('names', 'ordered'),
    [
        (['b', 'B', 'a'], ['B', 'a', 'b']),
        (['10', '2', '1', '0', *map(str, range(3, 10))], list(map(str, range(11)))),
        (['01', '00', '02'], ['00', '01', '02']),
        (['1', '10', '2'], ['1', '10', '2']),  # not from 0
        (['0', '00', '1'], ['0', '00', '1']),  # 0 twice
        (['\u0661', '\u0660'], ['\u0660', '\u0661']),  # not ASCII digits
    ],
)
def test_order_of_the_labels(names, ordered):
    assert in_order(names) == tuple(ordered)


def test_names_are_matched_in_either_spelling():
    assert composed(DECOMPOSED) == CAFE != DECOMPOSED
    assert match([DECOMPOSED, 'a'], ['a', 'x', CAFE], 3) == ([2, 0], '')
    assert match([CAFE], ['a', DECOMPOSED], 2) == ([1], '')
    with pytest.raises(
        InputError, match='classes that the model does not know: b; the 2 classes of the model: a, c'
    ):
        match(['a', 'b'], ['a', 'c'], 2)


def test_a_name_of_two_classes_is_ambiguous_unless_it_comes_with_its_number():
    cranes = ['crane', 'dog', 'crane']
    assert distinct(cranes) == ['crane (0)', 'dog', 'crane (2)']
    assert match(['dog'], cranes, 3) == ([1], '')
    assert match(cranes, cranes, 3) == ([0, 1, 2], '')
    assert match(['crane (2)', 'crane (0)'], cranes, 3) == ([2, 0], '')
    with pytest.raises(InputError, match=r"2 classes named 'crane': name the class crane \(0\), crane \(2\)"):
        match(['crane', 'dog'], cranes, 3)


def test_outputs_without_names_are_the_numbers_or_the_sorted_names():
    by_text = ['0', '1', '10', *map(str, range(2, 10))]
    labels, assumption = match(by_text, (), 11)
    assert (labels[2], assumption) == (10, 'the model has no class names: class folder k is output k')
    assert match(['7', '03'], (), 11)[0] == [7, 3]
    labels, assumption = match(['ant', 'bee'], (), 2)
    assert labels == [0, 1]
    assert assumption == 'the model has no class names: its outputs are taken as ant, bee in this order'
    for names in (['ant', 'bee'], ['1', '11']):
        with pytest.raises(InputError, match='the data has 2 classes, the model has 11 without names'):
            match(names, (), 11)


def test_one_class_only_is_a_warning():
    assert single(['a'], 'here') == "warning: here has one class only, 'a': nothing can be learned"
    assert single(['a', 'b'], 'here') == ''
