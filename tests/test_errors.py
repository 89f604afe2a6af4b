import pytest

from epsanet_jax.errors import one_line, some, suggest


def test_message_becomes_one_line_of_limited_length():
    assert one_line(ValueError('first\n  second\tthird')) == 'first second third'
    assert one_line('x' * 400) == 'x' * 300
    assert one_line('x' * 400, limit=None) == 'x' * 400


def test_similar_name_is_suggested():
    known = ['epsanet50_small', 'epsanet50_large', 'resnet50']
    assert suggest('epsanet50_smal', known) == " (did you mean 'epsanet50_small'?)"
    assert suggest('vgg', known) == ''


@pytest.mark.parametrize(
    ('number', 'text'), [(0, ''), (2, '0, 1'), (3, '0, 1, 2'), (5, '0, 1, 2 and 2 more')]
)
def test_long_lists_are_shortened(number, text):
    assert some([str(i) for i in range(number)], most=3) == text
