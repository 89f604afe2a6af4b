"""The process that talks to a tracker; `training.tracker` starts it as a script.

The first line of stdin is the JSON of `tracker.Tracker`, each further line is a line of metrics. It prints a
line on stdout when the tracker has accepted the run, or 'error: ' and the reason. It ends when stdin ends,
which also happens if the training is killed.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

Log = Callable[[dict[str, float], int], None]


def main() -> None:
    """Passes lines on until stdin ends."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):  # the end of stdin is the signal to finish
        signal.signal(number, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # trackers print too
    try:
        settings = json.loads(sys.stdin.readline())
        place, log, finish = {'wandb': _wandb, 'trackio': _trackio}[settings['kind']](settings)
        print(place, file=answers, flush=True)
        for text in sys.stdin:
            line = json.loads(text)
            split, step = line.pop('split'), line.pop('step')
            log({f'{split}/{k}': v for k, v in line.items() if v is not None}, step)
        finish()
    except BaseException as e:
        reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:300]
        print(f'error: {reason}', file=answers, flush=True)
        # Not sys.exit: a service that is gone or hangs would delay it.
        os._exit(1)


def _wandb(settings: dict[str, Any]) -> tuple[str, Log, Callable[[], None]]:
    import wandb

    run = wandb.init(
        project=settings['project'],
        name=settings['name'],
        id=settings['id'],
        resume='allow',
        config=settings['config'],
        dir=settings['dir'],
        settings=wandb.Settings(console='off', silent=True, x_stats_pid=settings['pid']),
    )
    place = run.dir if run.settings._offline else run.url

    def log(values: dict[str, float], step: int) -> None:
        run.log(values, step=step)  # W&B ignores a step before the last one that it has

    return str(place), log, run.finish


def _trackio(settings: dict[str, Any]) -> tuple[str, Log, Callable[[], None]]:
    import trackio  # pyright: ignore[reportMissingImports]
    from trackio.sqlite_storage import SQLiteStorage  # pyright: ignore[reportMissingImports]

    name = f'{settings["name"]}-{settings["id"]}'  # a run of trackio is found by its name
    run = trackio.init(
        project=settings['project'], name=name, resume='allow', config=settings['config'], embed=False
    )
    stored = {(row['step'], key) for row in SQLiteStorage.get_logs(settings['project'], name) for key in row}

    def log(values: dict[str, float], step: int) -> None:
        new = {key: value for key, value in values.items() if (step, key) not in stored}
        if new:
            run.log(new, step=step)

    return name, log, run.finish


if __name__ == '__main__':
    main()
