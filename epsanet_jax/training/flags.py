"""The command line of train.py: --config=FILE[:ARGUMENT], --config.FIELD=VALUE, --workdir=DIR."""

import re
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from epsanet_jax.console import Console
from epsanet_jax.data.decode import ignore_pillow_warnings
from epsanet_jax.errors import INTERRUPTED, InputError, Interrupted, TrainingError, one_line, suggest
from epsanet_jax.training import distributed
from epsanet_jax.training.config import Config, flatten

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run; a run that it holds is continued.')
_COORDINATOR = flags.DEFINE_string('coordinator', None, 'HOST:PORT of process 0, for several processes.')
_NUM_PROCESSES = flags.DEFINE_integer('num_processes', None, 'Number of processes of the run.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Number of this process, from 0.')
_JOIN_TIMEOUT = flags.DEFINE_integer('join_timeout', distributed.TIMEOUT, 'Seconds to wait for the others.')
_NO_CONFIG = 'no --config=FILE is given, for example --config=configs/digits.py'


def run(main: Callable[[Config, str], None]) -> None:
    """Parses the command line and calls `main(config, workdir)`.

    Ends the process with one line on stderr and exit status 2 if the input is invalid, 1 if the training
    fails, 75 if the run was asked to stop.
    """

    def guarded(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # INFO lines of libraries would hide those of the run
        ignore_pillow_warnings()
        try:
            if not recipe.present:
                raise InputError(_NO_CONFIG)
            if not _WORKDIR.value:
                raise InputError('no --workdir=DIR is given')
            distributed.join(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _JOIN_TIMEOUT.value)
            main(recipe.value, _WORKDIR.value)
        except (InputError, TrainingError) as e:
            _exit(e, 2 if isinstance(e, InputError) else 1)
        except Interrupted as e:
            print(e, file=sys.stderr)
            sys.exit(INTERRUPTED)  # not `leave`: the other processes save too and end by themselves
        except Exception as e:
            if not jax.distributed.is_initialized():
                raise
            if isinstance(e, jax.errors.JaxRuntimeError):
                lost = f'another process of this run failed or was lost ({one_line(e, 200)})'
                _exit(f'{lost}; start all processes again to continue at the last checkpoint', 1)
            traceback.print_exc()
            distributed.leave('error: this process failed, see above', 1)

    with Console():
        try:
            recipe = config_flags.DEFINE_config_file('config', None, 'Recipe, for example configs/digits.py.')
        except flags.Error as e:  # it reads --flagfile
            _exit(e, 2)
        app.run(guarded, flags_parser=_parse)


def read_config(arguments: Sequence[str]) -> Config:
    """Returns the configuration given by --config=FILE[:ARGUMENT] and --config.FIELD=VALUE.

    Raises:
        InputError: the file, a field or a value is invalid.
    """
    argv = ['epsanet', *arguments]
    config = _load_recipe(argv)
    if config is None:
        raise InputError(_NO_CONFIG)
    if not isinstance(config, Config):
        return config  # `validate` reports it
    _check_fields(argv, config)
    values, fields = flags.FlagValues(), [a for a in argv if not re.match('--?config=', a)]
    holder = config_flags.DEFINE_config_dataclass('config', config, flag_values=values, sys_argv=fields)
    _parse_with(values, fields)
    return holder.value


def _parse(argv: list[str]) -> list[str]:
    try:
        _check_fields(argv, _load_recipe(argv))
        return _parse_with(flags.FLAGS, argv)
    except InputError as e:
        _exit(e, 2)


def _parse_with(values: flags.FlagValues, argv: list[str]) -> list[str]:
    try:
        rest = values(argv)
    # config_flags raises flags.Error for values, and various errors for fields.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, IndexError, OSError) as e:
        raise InputError(str(e).strip('"\'') or type(e).__name__) from e
    if len(rest) > 1:
        raise InputError(f'unexpected argument {rest[1]!r}; options are written --config.FIELD=VALUE')
    return rest


def _load_recipe(argv: list[str]) -> Any:
    """Returns what the recipe returns. config_flags, which runs it again, would hide its errors."""
    path, _, argument = _file(argv).partition(':')
    if not path:
        return None
    try:
        get_config = runpy.run_path(path).get('get_config')
        if get_config is None:
            raise InputError(f'--config={path} defines no get_config()')
        return get_config(argument) if argument else get_config()
    except InputError:
        raise
    except OSError as e:
        raise InputError(f'cannot read --config={path}: {e.strerror or e}') from e
    except Exception as e:  # a recipe is the user's code and may raise anything
        own = [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = own[-1].lineno if own else getattr(e, 'lineno', '?')
        raise InputError(f'the recipe {path}, line {line}: {type(e).__name__}: {e}') from e


def _check_fields(argv: list[str], default: Any) -> None:
    """Raises InputError if an option names an unknown field; config_flags raises a bare KeyError."""
    if not isinstance(default, Config):
        return
    known = tuple(flatten(default))
    sections = {name.split('.')[0] for name in known if '.' in name}
    for argument in argv[1:]:
        match = re.match(r'--?config\.([^=]+)', argument)
        if match and match[1] not in known and match[1] not in sections:
            raise InputError(f'unknown field config.{match[1]}{suggest(match[1], known)}')


def _file(argv: list[str]) -> str:
    """Returns the value of --config, or an empty string."""
    for argument, following in zip(argv, [*argv[1:], ''], strict=True):
        match = re.fullmatch(r'--?config(?:=(.*))?', argument)
        if match:
            return following if match[1] is None else match[1]
    return ''


def _exit(error: Exception | str, status: int) -> NoReturn:
    distributed.leave(f'error: {one_line(error, limit=None)}', status)
