"""Networks as files that run without this package: StableHLO here, ONNX by `convert.onnx_model`."""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from epsanet_jax import hub, paths
from epsanet_jax.convert import command, files, onnx_model, to_torch
from epsanet_jax.data.augment import normalize
from epsanet_jax.errors import InputError
from epsanet_jax.models.dtypes import at_least_float32
from epsanet_jax.models.epsanet import MIN_SIZE, EPSANet
from epsanet_jax.models.folding import fold_batch_norm
from epsanet_jax.models.zoo import Preprocessing
from epsanet_jax.training import loading, pretrained
from epsanet_jax.training.config import DTYPES, model_config
from epsanet_jax.training.metadata import MAX_SIZE

PLATFORMS = ('cpu', 'cuda', 'tpu')
FORMATS = ('stablehlo', 'onnx', 'safetensors', 'torch', 'hub')
VERIFIED_TO = 1e-4  # of the largest logit; of narrow types four roundings
_SUFFIXES = {
    '.stablehlo': 'stablehlo',
    '.onnx': 'onnx',
    files.SAFETENSORS_SUFFIX: 'safetensors',
    **dict.fromkeys(files.TORCH_SUFFIXES, 'torch'),
}


def to_stablehlo(
    model: EPSANet,
    variables: Mapping[str, Any],
    image_size: int,
    *,
    pixels: Preprocessing | None = None,
    platforms: Sequence[str] = PLATFORMS,
) -> jax_export.Exported:
    """Exports inference with the weights inside: images [batch, H, W, 3] to logits [batch, num_classes].

    The batch may be of any size, and the convolutions are those chosen for each platform. Their precision is
    that of `jax.default_matmul_precision` at this call, not where the file is used. BatchNorm is folded into
    them (`models.fold_batch_norm`).

    Args:
        model: the network.
        variables: its parameters and statistics.
        image_size: H and W, pixels.
        pixels: if given, the function takes uint8 pictures and normalises them so; otherwise normalised
            images, float32 or of the network's type if that is wider.
        platforms: of `jax.export`.

    Returns:
        What `.serialize()` turns into the content of a file.

    Raises:
        InputError: the network computes in float64, which is not switched on.
    """
    if model.dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise InputError('exporting a float64 network needs the environment variable JAX_ENABLE_X64=1')
    model, variables = fold_batch_norm(model.clone(remat=False), variables)
    variables = jax.tree.map(np.asarray, variables)  # wherever they lie, the file has them once

    def epsanet(images: jax.Array) -> jax.Array:
        if pixels is not None:
            images = normalize(images, pixels.mean, pixels.std, model.dtype)
        return model.apply(variables, images, train=False)  # pyright: ignore[reportReturnType]

    dtype = at_least_float32(model.dtype) if pixels is None else jnp.uint8
    shape = jax_export.symbolic_shape(f'batch, {image_size}, {image_size}, 3')
    with _without_source_places():
        return jax_export.export(jax.jit(epsanet), platforms=platforms)(jax.ShapeDtypeStruct(shape, dtype))


@contextlib.contextmanager
def _without_source_places() -> Iterator[None]:
    """Keeps the places of source lines out of what is lowered: they name folders of this machine."""
    option = 'jax_traceback_in_locations_limit'
    before = getattr(jax.config, option)
    jax.config.update(option, 0)
    try:
        yield
    finally:
        jax.config.update(option, before)


@dataclasses.dataclass(frozen=True)
class Options:
    """What becomes of a checkpoint.

    Attributes:
        format: one of `FORMATS`; None: told by the name of the file.
        input: 'float' (normalised images) or 'uint8' (pictures, normalised by the exported function).
        image_size: pixels; None: the checkpoint's.
        dtype: of the computation; None: the checkpoint's.
        step: which checkpoint of a workdir.
        no_ema: whether to take a run's weights themselves, not their moving average.
        verify: whether to compare logits before anything is written.
    """

    format: str | None = None
    input: str = 'float'
    image_size: int | None = None
    dtype: str | None = None
    step: str = 'latest'
    no_ema: bool = False
    verify: bool = False


def export(checkpoint: str, dst: str, options: Options) -> Iterator[str]:
    """Writes a checkpoint as a file for other programs, or as a folder for the Hub; yields a report's lines.

    Args:
        checkpoint: workdir, Orbax checkpoint, PyTorch or safetensors file, or a folder as the Hub has it.
        dst: a new file or folder.
        options: see there.

    Raises:
        InputError: the checkpoint cannot be read or does not go with the options, or DST cannot be written.
    """
    kind = options.format or _format_of(dst)
    dst = dst.rstrip('/') or dst
    _check(dst, kind, options)
    if kind in ('safetensors', 'torch'):
        yield from command.convert(
            checkpoint, dst, None, None, options.step, options.verify, not options.no_ema
        )
        return
    loaded = pretrained.load(checkpoint, options.step, ema=not options.no_ema)
    loaded = _changed(loaded, options)
    yield f'{checkpoint}: {command.describe_settings(model_config(loaded.metadata["model"]))}'
    if kind == 'hub':
        state_dict = to_torch(loaded.variables, loaded.model)
        if options.verify:
            size = loaded.metadata['preprocessing']['image_size']
            yield command.verify_weights(state_dict, loaded.variables, loaded.model, size)
        hub.write_folder(dst, state_dict, loaded.metadata)
        yield f'written: {dst}/, ready for `hf upload` when its README.md is completed'
        return
    write = _write_stablehlo if kind == 'stablehlo' else _write_onnx
    yield from write(loaded, dst, options)
    yield f'written: {dst}, {os.path.getsize(dst) / 1e6:.1f} MB'


def _format_of(dst: str) -> str:
    for suffix, kind in _SUFFIXES.items():
        if dst.lower().endswith(suffix):
            return kind
    suffix = os.path.splitext(dst)[1]
    if re.fullmatch(r'\.[a-z][a-z0-9]*', suffix.lower()):  # a folder may well be called pets-1.2
        raise InputError(
            f'{dst}: no format is known for {suffix}; choose one of {", ".join(_SUFFIXES)}, a folder '
            f'(without such an ending) or --format={{{",".join(FORMATS)}}}'
        )
    return 'hub'


def _check(dst: str, kind: str, options: Options) -> None:
    """Refuses before the work what could not be written or would not do what is asked."""
    if kind in ('safetensors', 'torch') and (known := _format_of(dst)) != kind:
        raise InputError(f'--format={kind}: {dst} is named as {known}; its name would not say how to read it')
    for path in (dst, *([f'{dst}.json'] if kind == 'stablehlo' else [])):
        if os.path.lexists(path):
            raise InputError(f'{path} exists; choose another DST')
    if not os.path.isdir(os.path.dirname(os.path.abspath(dst))):
        raise InputError(f'cannot write {dst}: there is no such folder')
    if kind not in ('stablehlo', 'onnx'):
        for option in ('image_size', 'dtype', 'input'):
            if getattr(options, option) != getattr(Options(), option):
                flag = option.replace('_', '-')
                raise InputError(f'--{flag} goes with stablehlo and onnx, not with weights alone ({kind})')
    if kind == 'onnx' and options.dtype not in (None, 'float32'):
        raise InputError(f'--dtype={options.dtype}: ONNX files compute in float32')
    if options.image_size is not None and not MIN_SIZE <= options.image_size <= MAX_SIZE:
        raise InputError(f'--image-size must be from {MIN_SIZE} to {MAX_SIZE}, got {options.image_size}')


def _changed(loaded: loading.Loaded, options: Options) -> loading.Loaded:
    """Returns a checkpoint with another size of images or type of computation, and without its run."""
    preprocessing, settings = dict(loaded.metadata['preprocessing']), dict(loaded.metadata['model'])
    model = loaded.model
    if options.image_size is not None:
        scale = options.image_size / preprocessing['image_size']  # of what is cut off around the centre
        preprocessing['resize_size'] = round(preprocessing['resize_size'] * scale)
        preprocessing['image_size'] = options.image_size
    if options.dtype is not None:
        settings['dtype'], model = options.dtype, model.clone(dtype=DTYPES[options.dtype])
    changed = {'preprocessing': preprocessing, 'model': settings, 'config': None, 'identity': None}
    return dataclasses.replace(loaded, model=model, metadata={**loaded.metadata, **changed})


def _write_stablehlo(loaded: loading.Loaded, dst: str, options: Options) -> Iterator[str]:
    settings = hub.preprocessing_of(loaded.metadata)
    pixels = settings if options.input == 'uint8' else None
    exported = to_stablehlo(loaded.model, loaded.variables, settings.image_size, pixels=pixels)
    content = bytes(exported.serialize())
    images, logits = exported.in_avals[0], exported.out_avals[0]
    signature = {
        'input': {
            'shape': [str(d) for d in images.shape],
            'dtype': images.dtype.name,
            'is': _meaning(options),
        },
        'output': {'shape': [str(d) for d in logits.shape], 'dtype': logits.dtype.name, 'is': 'logits'},
        'platforms': list(exported.platforms),
        'jax_version': jax.__version__,
    }
    yield f'input: {images.dtype.name} {list(images.shape)}, {_meaning(options)}'.replace("'", '')
    if options.verify:
        yield _verify(loaded, options, jax.jit(jax_export.deserialize(bytearray(content)).call))
    text = json.dumps({**_public(loaded), **signature}, indent=2) + '\n'
    _write_new(dst, content)
    try:
        _write_new(f'{dst}.json', text.encode())
    except InputError:
        os.unlink(dst)  # both or neither
        raise


def _write_onnx(loaded: loading.Loaded, dst: str, options: Options) -> Iterator[str]:
    settings = hub.preprocessing_of(loaded.metadata)
    pixels = settings if options.input == 'uint8' else None
    shown = files.weights_metadata({**_public(loaded), 'config': None, 'identity': None})
    shown = {'input': _meaning(options), **shown}
    props = {k: v if isinstance(v, str) else json.dumps(v) for k, v in shown.items()}
    if options.verify:
        onnx_model.require('onnxruntime')  # before the work
    content = onnx_model.to_onnx(loaded.model, loaded.variables, settings.image_size, pixels, props)
    kind = 'float32' if pixels is None else 'uint8'
    yield f'input: {kind} [batch, 3, {settings.image_size}, {settings.image_size}], {_meaning(options)}'
    if options.verify:
        loaded = dataclasses.replace(loaded, model=loaded.model.clone(dtype=jnp.float32))

        def call(images: np.ndarray) -> np.ndarray:
            return onnx_model.run_onnx(content, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))

        yield _verify(loaded, options, call)
    _write_new(dst, content)


def _meaning(options: Options) -> str:
    if options.input == 'uint8':
        return 'RGB pictures, 0 to 255, resized and cropped'
    return 'RGB pictures, resized and cropped, (x / 255 - mean) / std'


def _public(loaded: loading.Loaded) -> dict[str, Any]:
    """What goes along with a file: not the run, which may name folders of this machine."""
    return {k: loaded.metadata[k] for k in ('package', 'version', 'model', 'class_names', 'preprocessing')}


def _verify(loaded: loading.Loaded, options: Options, call: Callable[[np.ndarray], Any]) -> str:
    """Compares the exported logits of two pictures with ours, and says how far they are apart."""
    settings = hub.preprocessing_of(loaded.metadata)
    shape = (2, settings.image_size, settings.image_size, 3)
    pictures = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    dtype = at_least_float32(loaded.model.dtype)
    images = normalize(jnp.asarray(pictures), settings.mean, settings.std, dtype)
    expected = np.asarray(jax.jit(loaded.model.apply)(dict(loaded.variables), images))
    got = np.asarray(call(pictures if options.input == 'uint8' else np.asarray(images)))
    difference = np.abs(got - expected).max() / np.abs(expected).max()
    # An export may take other convolutions than two pictures do here: equal but for rounding.
    if not difference <= max(VERIFIED_TO, 4 * float(jnp.finfo(loaded.model.dtype).eps)):
        raise InputError(f'--verify: logits differ by {difference:.1e} of the largest; nothing was written')
    return f'verified: the exported logits and ours differ by {difference:.1e} of the largest'


def _write_new(path: str, content: bytes) -> None:
    def write(temporary: str) -> None:
        with open(temporary, 'wb') as f:
            f.write(content)

    paths.write_atomically(path, write)
