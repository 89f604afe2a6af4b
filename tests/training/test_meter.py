"""Sums and speed between two lines of metrics, and images that cannot be decoded."""

import pytest
from runs import (
    assert_equal_runs,
    lines,
    recipe,
    signal_at,
)

from epsanet_jax import InputError
from epsanet_jax.errors import Interrupted
from epsanet_jax.training import loop


@pytest.mark.slow
def test_an_interruption_between_two_lines_changes_no_line(tmp_path, monkeypatch):
    config = recipe(steps=8, eval_every_epochs=0.0, log_every_steps=6)
    loop.train(config, str(tmp_path / 'whole'))
    with monkeypatch.context() as patch:
        signal_at(patch, 'train_batches', 1)
        with pytest.raises(Interrupted):
            loop.train(config, str(tmp_path / 'cut'))
    assert not lines(tmp_path / 'cut')
    loop.train(config, str(tmp_path / 'cut'))
    assert_equal_runs(tmp_path / 'cut', tmp_path / 'whole', 8)


def test_bad_images_skipped_in_training_are_named_and_counted(bad_folder, capsys):
    config, path = bad_folder
    (path / 'data/train/a/4.png').write_bytes(b'no image')
    config.data.on_bad = 'skip'
    loop.train(config, str(path / 'run'))
    output = capsys.readouterr().out
    assert output.count('train/a/4.png: cannot decode') == 1
    assert '(1 so far)' in output
    assert 'skipped: ' in output


def test_too_many_bad_images_stop_the_run(bad_folder):
    config, path = bad_folder
    for name in ('a/0.png', 'a/4.png', 'b/1.png'):
        (path / 'data/train' / name).write_bytes(b'no image')
    config.data.on_bad, config.data.max_bad_images, config.steps = 'skip', 2, 4
    config.log_every_steps = 1
    with pytest.raises(InputError, match=r'3 images cannot .* config.data.max_bad_images=2; check the data'):
        loop.train(config, str(path / 'run'))
    config.data.max_bad_images = 3
    loop.train(config, str(path / 'run'))
    loop.train(config, str(path / 'whole'))
    shown = [
        [(x['step'], x['loss']) for x in lines(path / name) if x['split'] == 'train']
        for name in ('run', 'whole')
    ]
    assert shown[0] == shown[1]
