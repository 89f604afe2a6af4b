"""Exports networks for other programs: StableHLO, ONNX, safetensors, PyTorch or a Hub folder."""

import dataclasses
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from epsanet_jax import paths
from epsanet_jax.convert import files, onnx_model
from epsanet_jax.convert.stablehlo import to_stablehlo
from epsanet_jax.data.augment import normalize
from epsanet_jax.data.preprocessing import MAX_SIZE
from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import MIN_SIZE
from epsanet_jax.weights.files import load
from epsanet_jax.weights.network import Network, metadata_of, save_pretrained, without_run
from epsanet_jax.weights.save import compare, convert, describe_model, verify_weights

FORMATS = ('stablehlo', 'onnx', 'safetensors', 'torch', 'hub')
VERIFIED_TO = 1e-4  # relative to the largest logit; for narrow types, four roundings
_SUFFIXES = {
    '.stablehlo': 'stablehlo',
    '.onnx': 'onnx',
    files.SAFETENSORS_SUFFIX: 'safetensors',
    **dict.fromkeys(files.TORCH_SUFFIXES, 'torch'),
}
_INPUTS = {
    'float': 'images, resized and cropped, (x / 255 - mean) / std',
    'uint8': 'images, 0 to 255, resized and cropped',
}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `export`.

    Attributes:
        format: one of `FORMATS`; None: from the name of the file or folder.
        input: 'float' (normalised images) or 'uint8' (images that the exported function normalises).
        image_size: H and W in pixels; None: that of the network.
        dtype: type of the computation; None: that of the network.
        step: which checkpoint of a workdir to read: 'latest', 'best' or a number.
        no_ema: whether to read the weights of a run instead of their moving averages.
        ignore: regular expression for names of entries of a file to leave out; '' for none.
        verify: whether to compare logits before writing.
        overwrite: whether to replace existing files.
    """

    format: str | None = None
    input: str = 'float'
    image_size: int | None = None
    dtype: str | None = None
    step: str = 'latest'
    no_ema: bool = False
    ignore: str = ''
    verify: bool = False
    overwrite: bool = False


def export(
    source: Network | str,
    dst: str,
    options: Options | None = None,
    report: Callable[[str], object] = str,
) -> Iterator[str]:
    """Writes a network for other programs and yields the lines of a report.

    Args:
        source: a network, or the path of its weights, see `load`.
        dst: a file or a new folder.
        options: format, input and type of the file; None: the defaults.
        report: called with each line of `Source.notes`.

    Raises:
        InputError: the weights cannot be read, an option does not apply, or `dst` cannot be written.
    """
    options = options or Options()
    kind = options.format or _format_of(dst)
    dst = dst.rstrip('/') or dst
    _check(dst, kind, options)
    if kind in ('safetensors', 'torch'):
        chosen = {'step': options.step, 'ema': not options.no_ema, 'ignore': options.ignore}
        chosen |= {'verify': options.verify, 'overwrite': options.overwrite}
        yield from convert(source, dst, report=report, **chosen)
        return
    given = isinstance(source, Network)
    network = source if given else load(source, options.step, not options.no_ema, ignore=options.ignore)
    for note in () if given else network.source.notes:
        report(note)
    network = _changed(network, options)
    yield f'{network.source.path if given else source}: {describe_model(network)}'
    if kind == 'hub':
        if options.verify:
            yield verify_weights(network, network.state_dict)
        save_pretrained(dst, network)
        yield f'written: {dst}/; complete its README.md before `hf upload`'
        return
    write = _write_stablehlo if kind == 'stablehlo' else _write_onnx
    yield from write(network, dst, options)
    yield f'written: {dst}, {os.path.getsize(dst) / 1e6:.1f} MB'


def _format_of(dst: str) -> str:
    for suffix, kind in _SUFFIXES.items():
        if dst.lower().endswith(suffix):
            return kind
    suffix = os.path.splitext(dst)[1]
    if re.fullmatch(r'\.[a-z][a-z0-9]*', suffix.lower()):  # 'pets-1.2' is a folder
        known = f'{", ".join(_SUFFIXES)}, a folder (without a suffix) or --format={{{",".join(FORMATS)}}}'
        raise InputError(f'{dst}: unknown format {suffix}; use one of {known}')
    return 'hub'


def _check(dst: str, kind: str, options: Options) -> None:
    """Raises InputError if `dst` cannot be written or an option does not apply."""
    if kind in ('safetensors', 'torch') and (known := _format_of(dst)) != kind:
        raise InputError(f'--format={kind}: {dst} has the suffix of {known}; use the suffix of the format')
    written = [dst, *([f'{dst}.json'] if kind == 'stablehlo' else [])]
    paths.check_free(written, options.overwrite, 'DST')
    if not os.path.isdir(os.path.dirname(os.path.abspath(dst))):
        raise InputError(f'cannot write {dst}: its folder does not exist')
    if kind not in ('stablehlo', 'onnx'):
        for option in ('image_size', 'dtype', 'input'):
            if getattr(options, option) != getattr(Options(), option):
                flag = option.replace('_', '-')
                raise InputError(f'--{flag} is only for stablehlo and onnx, not for {kind}')
    if kind == 'onnx' and options.dtype not in (None, 'float32'):
        raise InputError(f'--dtype={options.dtype}: ONNX files compute in float32')
    if options.image_size is not None and not MIN_SIZE <= options.image_size <= MAX_SIZE:
        raise InputError(f'--image-size must be from {MIN_SIZE} to {MAX_SIZE}, got {options.image_size}')


def _changed(network: Network, options: Options) -> Network:
    """Returns the network with the image size and type of the options, without its training run."""
    model, preprocessing = network.model, network.preprocessing
    if options.image_size is not None:
        preprocessing = preprocessing.scaled_to(options.image_size)
    if options.dtype is not None:
        model = model.clone(dtype=options.dtype)
    source = dataclasses.replace(network.source, metadata=without_run(network.source.metadata))
    return dataclasses.replace(network, model=model, preprocessing=preprocessing, source=source)


def _write_stablehlo(network: Network, dst: str, options: Options) -> Iterator[str]:
    settings = network.preprocessing
    pixels = settings if options.input == 'uint8' else None
    exported = to_stablehlo(network.model, network.variables, settings.image_size, pixels=pixels)
    content = bytes(exported.serialize())
    images, logits = exported.in_avals[0], exported.out_avals[0]
    signature = {
        'input': _describe(images, _input(network, options)),
        'output': _describe(logits, 'logits'),
        'platforms': list(exported.platforms),
        'jax_version': jax.__version__,
    }
    yield f'input: {images.dtype.name} {list(images.shape)}, {_input(network, options)}'.replace("'", '')
    if options.verify:
        yield _verify(network, options, jax.jit(jax_export.deserialize(bytearray(content)).call))
    _write(dst, content)
    try:
        _write(f'{dst}.json', f'{json.dumps({**_public(network), **signature}, indent=2)}\n'.encode())
    except InputError:
        os.unlink(dst)  # both or neither
        raise


def _input(network: Network, options: Options) -> str:
    channels = network.model.in_channels
    return f'{"RGB " if channels == 3 else f"{channels}-channel "}{_INPUTS[options.input]}'


def _describe(array: Any, meaning: str) -> dict[str, Any]:
    return {'shape': [str(d) for d in array.shape], 'dtype': array.dtype.name, 'is': meaning}


def _write_onnx(network: Network, dst: str, options: Options) -> Iterator[str]:
    settings = network.preprocessing
    pixels = settings if options.input == 'uint8' else None
    shown = {'input': _input(network, options), **files.weights_metadata(without_run(_public(network)))}
    props = {k: v if isinstance(v, str) else json.dumps(v) for k, v in shown.items()}
    if options.verify:
        onnx_model.require('onnxruntime')  # fails early
    content = onnx_model.to_onnx(network.model, network.variables, settings.image_size, pixels, props)
    kind = 'float32' if pixels is None else 'uint8'
    channels, size = network.model.in_channels, settings.image_size
    yield f'input: {kind} [batch, {channels}, {size}, {size}], {_input(network, options)}'
    if options.verify:
        wide = dataclasses.replace(network, model=network.model.clone(dtype='float32'))

        def call(images: np.ndarray) -> np.ndarray:
            return onnx_model.run_onnx(content, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

        yield _verify(wide, options, call)
    _write(dst, content)


def _public(network: Network) -> dict[str, Any]:
    """Returns the metadata for a file, without the training run, which may contain private paths."""
    metadata = metadata_of(network)
    return {k: metadata[k] for k in ('package', 'version', 'model', 'class_names', 'preprocessing')}


def _verify(network: Network, options: Options, call: Callable[[np.ndarray], Any]) -> str:
    """Compares the logits of the export and of JAX for two random images, and returns a report line."""
    settings, model = network.preprocessing, network.model
    shape = (2, settings.image_size, settings.image_size, model.in_channels)
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    images = normalize(jnp.asarray(pixels), settings.mean, settings.std, at_least_float32(model.dtype))
    expected = np.asarray(jax.jit(model.apply)(dict(network.variables), images))
    got = np.asarray(call(pixels if options.input == 'uint8' else np.asarray(images)))
    # The export may use other convolution algorithms, so results are equal up to rounding.
    limit = max(VERIFIED_TO, 4 * float(jnp.finfo(model.dtype).eps))
    return compare('the export and JAX', got, expected, limit)


def _write(path: str, content: bytes) -> None:
    paths.write_atomically(path, lambda temporary: pathlib.Path(temporary).write_bytes(content))
