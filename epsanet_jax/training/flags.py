"""The command line of train.py: --config=FILE[:ARGUMENT], --config.FIELD=VALUE, --workdir=DIR."""

import re
import runpy
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

from epsanet_jax.errors import InputError, TrainingError, one_line, suggest
from epsanet_jax.training.config import Config, flatten

_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of the run: made, or continued if it holds one.')
_CONFIG = config_flags.DEFINE_config_file('config', None, 'Recipe, for example configs/digits.py.')


def run(main: Callable[[Config, str], None]) -> None:
    """Parses the command line and calls `main(config, workdir)`.

    Bad input ends the process with one line on stderr and exit status 2, a failed training with status 1.
    """

    def guarded(argv: list[str]) -> None:
        del argv
        if not flags.FLAGS['verbosity'].present:
            logging.set_verbosity(logging.WARNING)  # the libraries' INFO lines would drown the run's own
        try:
            main(*_values())
        except InputError as e:
            _exit(e, 2)
        except TrainingError as e:
            _exit(e, 1)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        default = _load_recipe(argv)
        _check_fields(argv, default)
        rest = flags.FLAGS(argv)
        if len(rest) > 1:
            raise InputError(f'unexpected argument {rest[1]!r}; options are written --config.FIELD=VALUE')
        return rest
    except InputError as e:
        _exit(e, 2)
    # config_flags raises flags.Error for values, and what it happens to meet for fields.
    except (flags.Error, KeyError, AttributeError, TypeError, ValueError, IndexError, OSError) as e:
        _exit(str(e).strip('"\'') or type(e).__name__, 2)


def _values() -> tuple[Config, str]:
    if not _CONFIG.present:
        raise InputError('no --config=FILE is given, for example --config=configs/digits.py')
    if not _WORKDIR.value:
        raise InputError('no --workdir=DIR is given')
    return _CONFIG.value, _WORKDIR.value


def _load_recipe(argv: list[str]) -> Any:
    """Runs the recipe once before config_flags does, which would hide what is wrong with it."""
    path, _, argument = (_file(argv) or '').partition(':')
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
    except Exception as e:  # whatever a recipe, somebody's own code, may raise
        own = [frame for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = own[-1].lineno if own else getattr(e, 'lineno', '?')
        raise InputError(f'the recipe {path}, line {line}: {type(e).__name__}: {e}') from e


def _check_fields(argv: list[str], default: Any) -> None:
    """Raises InputError for an override of a field that there is not; config_flags raises a bare KeyError."""
    if not isinstance(default, Config):
        return
    known = tuple(flatten(default))
    sections = {name.split('.')[0] for name in known if '.' in name}
    for argument in argv[1:]:
        match = re.match(r'--?config\.([^=]+)', argument)
        if match and match.group(1) not in known and match.group(1) not in sections:
            raise InputError(f'unknown field config.{match.group(1)}{suggest(match.group(1), known)}')


def _file(argv: list[str]) -> str | None:
    for i, argument in enumerate(argv):
        if re.fullmatch(r'--?config', argument):
            return argv[i + 1] if i + 1 < len(argv) else None
        match = re.match(r'--?config=(.*)', argument)
        if match:
            return match.group(1)
    return None


def _exit(error: Exception | str, status: int) -> NoReturn:
    print(f'error: {one_line(error, limit=None)}', file=sys.stderr)
    sys.exit(status)
