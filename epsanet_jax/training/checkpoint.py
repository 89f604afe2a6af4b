"""The checkpoints of a run. Only this module and `weights.orbax` use Orbax.

A checkpoint holds the variables ('model'), their moving averages if the run keeps them ('ema'), the
optimizer's state and step ('optimizer'), and what is needed to use the weights ('metadata'): model settings,
class names, preprocessing, configuration, package version.
"""

import contextlib
import itertools
import json
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from epsanet_jax.errors import InputError, Interrupted, TrainingError, one_line
from epsanet_jax.paths import replacing
from epsanet_jax.training import distributed
from epsanet_jax.training.state import TrainState
from epsanet_jax.weights.orbax import FirstErrorOnly
from epsanet_jax.workdir import CHECKPOINTS, DAMAGED_CHECKPOINTS, best_by


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether a workdir holds a complete checkpoint; a bucket may also hold incomplete ones."""
    folder = workdir / CHECKPOINTS
    return folder.is_dir() and any(
        entry.name.isdigit() and ocp.utils.is_checkpoint_finalized(entry) for entry in folder.iterdir()
    )


def _arrays(state: TrainState) -> dict[str, Any]:
    """Returns the items of a checkpoint that hold arrays."""
    items = {'model': state.variables, 'optimizer': {'step': state.step, 'state': state.opt_state}}
    return items if state.ema is None else {**items, 'ema': state.ema}


class Checkpoints:
    """The checkpoints of a run: the latest few, and the one with the best top-1.

    Saving is asynchronous: `save` returns as soon as the arrays are copied from the devices. `keep` is the
    number of latest checkpoints to keep in the workdir's folder 'checkpoints'.
    """

    def __init__(self, workdir: epath.Path, keep: int = 2):
        kept = [checkpoint_managers.LatestN(keep), checkpoint_managers.BestN(get_metric_fn=best_by, n=1)]
        options = ocp.CheckpointManagerOptions(
            # With best_fn alone, max_to_keep would delete the newest checkpoint if it is not among the best.
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
            best_fn=best_by,
            best_mode='max',
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(workdir / CHECKPOINTS, options=options)
        self._first_error = FirstErrorOnly()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, metadata: dict[str, Any], metrics: dict[str, float] | None) -> None:
        """Saves a checkpoint of the state's step, unless it exists already.

        `metadata` is from `weights.metadata.make_metadata`; `metrics` is of an evaluation at this step.
        """
        step = int(state.step)
        if step == self.latest_step:
            if metrics and not self._manager.metrics(step):
                self._add_metrics(step, metrics)
            return
        items = {k: ocp.args.StandardSave(tree) for k, tree in _arrays(state).items()}
        args = ocp.args.Composite(**items, metadata=ocp.args.JsonSave(metadata))
        with self._saving():
            self._manager.save(step, args=args, metrics=metrics or {})

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of a late evaluation to a checkpoint, so that the best one is kept."""
        with self._saving():
            self._manager.wait_until_finished()
            if jax.process_index() == 0:  # the file that Orbax wrote without metrics
                file = self._manager.directory / str(step) / 'metrics' / 'metrics'
                with replacing(file) as temporary:
                    temporary.write_text(json.dumps(metrics))
        distributed.barrier('the metrics of a checkpoint are added')
        self._manager.reload()

    def check(self) -> None:
        """Raises TrainingError if writing in the background failed."""
        with self._saving():
            self._manager.check_for_errors()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as e:
            raise TrainingError(
                f'cannot write a checkpoint to {self._manager.directory}: {one_line(e)}; free disk space or '
                'fix permissions, then the same command continues at the last complete checkpoint'
            ) from e

    def restore(self, abstract: TrainState, log: Callable[[str], None]) -> tuple[TrainState, dict[str, Any]]:
        """Returns the newest undamaged state and its metadata.

        `abstract` is a state of ShapeDtypeStructs with the shardings to restore to. Damaged checkpoints that
        are newer are moved to the folder 'checkpoints-damaged', and `log` is called with a line for each.

        Raises:
            InputError: all checkpoints are damaged; nothing was moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            saved, reason = None, 'another process could not read it'
            try:
                saved = self._restore(step, abstract)
            except Exception as e:  # damaged files make Orbax raise anything
                reason = one_line(e)
            if not distributed.all_agree(saved is not None):
                saved = None
            if saved is None:
                damaged[step] = reason
                continue
            for number, reason in damaged.items():
                log(f'checkpoint {number} is damaged, moved to {DAMAGED_CHECKPOINTS}: {reason}')
            if damaged:
                self._move_damaged(list(damaged))
            step, opt_state = (saved['optimizer'][k] for k in ('step', 'state'))
            state = TrainState(step, **saved['model'], opt_state=opt_state, ema=saved.get('ema'))
            return state, saved['metadata']
        newest = max(damaged)
        raise InputError(
            f'all checkpoints in {self._manager.directory} are damaged; newest: {newest}: {damaged[newest]}'
        )

    def _restore(self, step: int, abstract: TrainState) -> Any:
        items = {k: ocp.args.StandardRestore(tree) for k, tree in _arrays(abstract).items()}
        args = ocp.args.Composite(**items, metadata=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)

    def _move_damaged(self, numbers: list[int]) -> None:
        if jax.process_index() == 0:
            folder = self._manager.directory.parent / DAMAGED_CHECKPOINTS
            folder.mkdir(exist_ok=True)
            for number in numbers:
                names = itertools.chain([str(number)], (f'{number}-{i}' for i in itertools.count(2)))
                free = next(folder / name for name in names if not (folder / name).exists())
                (self._manager.directory / str(number)).rename(free)
        distributed.barrier('damaged checkpoints are moved')
        self._manager.reload()

    def __enter__(self) -> Self:
        self._first_error.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        """Waits until everything is written."""
        if error is not None and not isinstance(error, Interrupted) and jax.process_count() > 1:
            return  # Orbax would wait for the other processes, which may be gone
        failure = None
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as e:
            failure = e
        finally:
            self._manager.close()
        self._first_error.__exit__(kind, error or failure, where)
        if failure is not None and error is None:  # an earlier error matters more
            with self._saving():
                raise failure
