"""Exports networks to ONNX through the PyTorch twin, and runs ONNX files."""

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from epsanet_jax.convert.state_dict import to_torch
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.errors import InputError, one_line
from epsanet_jax.models.epsanet import EPSANet

INPUT, OUTPUT = 'images', 'logits'


def to_onnx(
    model: EPSANet,
    variables: Mapping[str, Any],
    image_size: int,
    pixels: Preprocessing | None,
    metadata: Mapping[str, str],
) -> bytes:
    """Returns the content of an ONNX file: float32 images [batch, 3, H, W] to float32 logits, any batch.

    The ONNX network always computes in float32.

    Args:
        model: the network.
        variables: {'params', 'batch_stats'}.
        image_size: H and W in pixels.
        pixels: if given, the network takes uint8 images and normalises them with this mean and std.
        metadata: the `metadata_props` of the file.

    Raises:
        InputError: torch, onnx or onnxscript is not installed, or PyTorch cannot export the network.
    """
    torch, onnx, _ = (require(name) for name in ('torch', 'onnx', 'onnxscript'))
    from epsanet_jax.convert import torch_model

    model = model.clone(dtype=jnp.float32, param_dtype=jnp.float32)
    arrays = {name: np.array(array, np.float32) for name, array in to_torch(variables, model).items()}
    network = torch_model.EPSANet(model)
    network.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    if pixels is not None:
        network = torch_model.FromPixels(network, pixels.mean, pixels.std)
    dtype = torch.float32 if pixels is None else torch.uint8
    # Two images, because PyTorch would make a batch size of one a constant.
    example = torch.zeros(2, model.in_channels, image_size, image_size, dtype=dtype)
    with _quiet():
        try:
            program = torch.onnx.export(
                network.eval(),
                (example,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim('batch', min=1)},),
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as e:
            raise InputError(f'PyTorch cannot export this network to ONNX: {one_line(e)}') from e
    content = program.model_proto
    _remove_source_locations(content)
    onnx.helper.set_model_props(content, dict(metadata))
    onnx.checker.check_model(content)
    return content.SerializeToString()


def run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    """Returns the logits that onnxruntime computes on the CPU for images [N, 3, H, W].

    Raises:
        InputError: onnxruntime is not installed.
    """
    runtime = require('onnxruntime')
    session = runtime.InferenceSession(content, providers=['CPUExecutionProvider'])
    return session.run([OUTPUT], {INPUT: images})[0]


def require(name: str) -> Any:
    """Imports an optional package, or raises an InputError that says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise InputError(f"ONNX needs {name}: pip install 'epsanet_jax[onnx]'") from e


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides warnings from within PyTorch that a user cannot fix."""
    logger = logging.getLogger('torch.onnx._internal.exporter._registration')
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns that torchvision is missing, which is not needed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                'ignore', r'`isinstance\(treespec, LeafSpec\)` is deprecated', FutureWarning
            )
            yield
    finally:
        logger.setLevel(level)


def _remove_source_locations(content: Any) -> None:
    """Removes stack traces from a graph: they are large and contain private paths."""
    graph = content.graph
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.doc_string = ''
    del graph.metadata_props[:], content.functions[:]
