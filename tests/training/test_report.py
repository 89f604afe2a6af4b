"""Lines of metrics: written once, also after a crash or without disk space."""

import pytest
from runs import (
    Killed,
    assert_equal_runs,
    finish,
    kill_after,
    lines,
    recipe,
    start,
    start_without_space,
)

from epsanet_jax.analysis import plot
from epsanet_jax.training import loop
from epsanet_jax.training.config import (
    CheckpointConfig,
)


@pytest.mark.slow
def test_lines_after_the_last_checkpoint_are_replaced(tmp_path, monkeypatch):
    config = recipe(eval_every_epochs=0.0, checkpoint=CheckpointConfig(every_steps=3, every_minutes=0))
    with monkeypatch.context() as patch:
        kill_after(patch, 5)
        with pytest.raises(Killed):
            loop.train(config, str(tmp_path))
    assert [line['step'] for line in lines(tmp_path)] == [2, 4]
    with (tmp_path / 'metrics.jsonl').open('a') as f:
        f.write('{"split": "train", "st')  # a line cut off by the crash
    loop.train(config, str(tmp_path))
    assert [(x['split'], x['step']) for x in lines(tmp_path)] == [
        ('train', 2), ('train', 4), ('train', 6), ('eval', 6)
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('tensorboard', [False, True])
def test_a_full_disk_for_metrics_ends_the_run_with_one_line_and_it_can_continue(tiny, tmp_path, tensorboard):
    more = (
        '--config.steps=60',
        '--config.log_every_steps=1',
        '--config.eval_every_epochs=0',
        '--config.checkpoint.every_steps=0',
        f'--config.tensorboard={tensorboard}',
    )
    process = start_without_space(8, tiny, tmp_path / 'full', *more)
    _, err = finish(process, status=1)
    assert err.startswith(f'error: cannot write metrics to {tmp_path}')
    assert err.count('\n') == 1, err
    finish(start(tiny, tmp_path / 'full', *more))
    finish(start(tiny, tmp_path / 'whole', *more))
    assert_equal_runs(tmp_path / 'full', tmp_path / 'whole', 60)


OTHERS = (
    '{"step": 1}',
    '{"split": "eval", "step": 4}',
    '{"split": "eval", "step": "4", "loss": 1.0, "top1": 0.5, "top5": 0.5, "examples": 3}',
    '{"split": "eval", "step": 4, "loss": 1.0, "top1": "high", "top5": 0.5, "examples": 3}',
    '{"split": "eval", "step": 4, "loss": 1.0, "top1": null, "top5": 0.5, "examples": 3, "ema_top1": null}',
    '{"split": "train", "step": 3}',
    '{"split": "train", "step": 3, "images_per_s": [1]}',
    '{"split": ["train"], "step": 3, "images_per_s": 1}',
    '{"split": "train", "step": true, "images_per_s": 1}',
    '[' * 100_000,
)


def test_lines_of_other_programs_do_not_disturb_a_run(tmp_path):
    config = recipe(steps=4)
    loop.train(config, str(tmp_path))
    path = tmp_path / 'metrics.jsonl'
    result = loop.train(config, str(tmp_path))
    path.write_text('\n'.join([*OTHERS, path.read_text(), *OTHERS, '']))
    assert loop.train(config, str(tmp_path)).best == result.best
    assert loop.train(recipe(steps=6), str(tmp_path)).step == 6
    assert plot.plot([str(tmp_path)], str(tmp_path / 'curves.svg'))
