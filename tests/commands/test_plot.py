"""`epsanet plot`: curves of runs."""

import json

import pytest
from command import run
from PIL import Image

LINES = [
    *({'split': 'train', 'step': step, 'loss': 2 / step, 'top1': 0.1, 'lr': 0.1, 'images_per_s': 9.0}
      for step in range(1, 7)),
    {'split': 'eval', 'step': 6, 'loss': 1.0, 'top1': 0.25, 'ema_loss': 0.9, 'ema_top1': 0.375},
]  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / 'run'
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in LINES))
    return folder


def test_curves_of_one_run_and_of_several(workdir, tmp_path, capsys):
    status, out, _ = run(capsys, 'plot', workdir)
    assert status == 0
    assert 'top-1 37.50%' in out
    with Image.open(workdir / 'curves.png') as image:
        assert min(image.size) > 500
        assert len(image.convert('RGB').getcolors(2**24)) > 10
    other = tmp_path / 'other'
    other.mkdir()
    (other / 'metrics.jsonl').write_bytes(
        b'{"split": "train", "step": 1, "loss": 2.0, "top1": 0.1, "lr": 0.1}\n'
        b'{"split": "eval\xff", "step": 1}\n'
    )
    target = tmp_path / 'both.svg'
    status, out, _ = run(capsys, 'plot', f'{workdir}/', other, '--out', target)
    assert status == 0
    assert 'other: step 1, not evaluated yet' in out
    assert all(f'>{name}<' in target.read_text() for name in ('run', 'other'))
    assert [path.name for path in tmp_path.iterdir() if 'tmp' in path.name] == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['nowhere'], 'nowhere holds no metrics.jsonl with metrics of a run'),
        (['{workdir}', '--out', 'curves.gif'], '--out must end with .png, .svg, .pdf, got curves.gif'),
        (['{workdir}', '--out', 'no/such/folder.png'], 'cannot write no/such/folder.png'),
        (['{workdir}', '--out', '{workdir}/metrics.jsonl/x.png'], 'metrics.jsonl/x.png'),
    ],
)
def test_curves_that_cannot_be_drawn_give_one_line_and_status_2(workdir, capsys, arguments, message):
    status, out, err = run(capsys, 'plot', *(a.format(workdir=workdir) for a in arguments))
    assert (status, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1


def test_an_existing_file_is_replaced_with_overwrite_only(workdir, tmp_path, capsys):
    out = tmp_path / 'x.svg'
    out.write_text('old')
    status, printed, err = run(capsys, 'plot', workdir, '--out', out)
    assert (status, printed, 'x.svg exists; choose another --out' in err) == (2, '', True)
    assert out.read_text() == 'old'
    assert run(capsys, 'plot', workdir, '--out', out, '--overwrite')[0] == 0
    assert out.read_text() != 'old'
    for _ in range(2):  # curves.png in the workdir is a file of ours
        assert run(capsys, 'plot', workdir)[0] == 0
