"""Arguments, progress and output that several commands share."""

import argparse
import io
import sys

import pytest

from epsanet_jax import InputError
from epsanet_jax.commands import common


@pytest.mark.parametrize('text', ['0', '-1', '1.5', 'ten', ''])
def test_positive_refuses_what_is_not_a_positive_integer(text):
    assert common.positive('12') == 12
    with pytest.raises(argparse.ArgumentTypeError, match='expected a positive integer, got'):
        common.positive(text)


def test_progress_bar_is_shown_on_a_terminal_only(monkeypatch, image_folder):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for terminal, bar in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, 'stderr', terminal)
        assert list(common.progress(range(5), [str(image_folder)])) == list(range(5))
        assert ('/5' in terminal.getvalue()) is bar


def test_skipped_images_are_reported_and_counted(capsys):
    skipped = common.Skipped()
    skipped('a.jpg: broken\nfile')
    assert capsys.readouterr().err == ''  # it may become the error of the command
    assert list(skipped.counted([1, 2])) == [1, 2]
    skipped('b.jpg: broken')
    skipped.finish()
    assert capsys.readouterr().err.splitlines() == [
        'skipped: a.jpg: broken file',
        'skipped: b.jpg: broken',
        'skipped 2 of 4 images',
    ]


def test_command_fails_if_all_images_are_skipped(capsys):
    one, two = common.Skipped(), common.Skipped()
    one('a.jpg: broken')
    with pytest.raises(InputError, match='^a.jpg: broken$'):
        one.finish()
    assert capsys.readouterr().err == ''
    two('a.jpg: broken')
    two('b.jpg: broken')
    with pytest.raises(InputError, match='none of the 2 images can be decoded'):
        two.finish()
    assert capsys.readouterr().err == 'skipped: a.jpg: broken\nskipped: b.jpg: broken\n'


def test_names_that_cannot_be_printed_are_escaped():
    assert common.shown('ünï "x"') == 'ünï "x"'
    assert common.shown('line\nbreak') == repr('line\nbreak')
