"""A network with its weights and everything that their use needs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from epsanet_jax.convert.files import Checkpoint
from epsanet_jax.convert.state_dict import draw_classifier, to_torch, to_torch_layout
from epsanet_jax.data.preprocessing import Preprocessing
from epsanet_jax.models.epsanet import EPSANet


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the weights of a network come from.

    Attributes:
        path: file or folder that they were read from; '' for weights made in memory.
        step: training step at which a run saved them; 0 for weights that are not of a run.
        averaged: whether they are the moving averages that a run kept.
        metadata: everything that was stored with them, see `weights.metadata`.
        checkpoint: the same weights under PyTorch's names, with the optimizer state and the epoch; None
            unless `load` was asked for it.
        no_optimizer: why `checkpoint` lacks the optimizer state of a run; '' if it has it or is of no run.
    """

    path: str = ''
    step: int = 0
    averaged: bool = False
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: Checkpoint | None = None
    no_optimizer: str = ''

    @property
    def config(self) -> dict[str, Any] | None:
        """The configuration of the run, as nested dicts; None for weights that are not of a run."""
        return self.metadata.get('config')


@dataclasses.dataclass(frozen=True)
class Network:
    """A network with its weights and everything that their use needs.

    Attributes:
        model: `model.apply(variables, images)` returns the logits.
        variables: {'params', 'batch_stats'}.
        class_names: in the order of the logits; empty if they are not known.
        preprocessing: what images go through before the network.
        source: where the weights come from.
    """

    model: EPSANet
    variables: dict[str, Any]
    class_names: tuple[str, ...] = ()
    preprocessing: Preprocessing = dataclasses.field(default_factory=Preprocessing)
    source: Source = dataclasses.field(default_factory=Source)

    @property
    def labels(self) -> list[str]:
        """A name for each output: the class names, or the numbers if they are not known."""
        return list(self.class_names) or [str(i) for i in range(self.model.num_classes)]

    @property
    def state_dict(self) -> Mapping[str, Any]:
        """The weights under PyTorch's names: as they were read if they were kept, else converted."""
        checkpoint = self.source.checkpoint
        return to_torch(self.variables, self.model) if checkpoint is None else checkpoint.state_dict


def with_new_classifier(network: Network, num_classes: int, key: jax.Array) -> Network:
    """Returns the network with a newly drawn classifier, and without what belonged to the old one.

    Args:
        network: with or without a classifier.
        num_classes: outputs of the new classifier.
        key: random key that it is drawn from.
    """
    model = network.model.clone(num_classes=num_classes)
    params = {**network.variables['params'], 'fc': jax.tree.map(np.asarray, draw_classifier(model, key))}
    metadata = {**network.source.metadata, 'config': None, 'identity': None}
    checkpoint = network.source.checkpoint
    if checkpoint is not None:
        drawn = {'fc.weight': to_torch_layout(params['fc']['kernel']), 'fc.bias': params['fc']['bias']}
        checkpoint = Checkpoint({**checkpoint.state_dict, **drawn}, arch=checkpoint.arch)
    source = dataclasses.replace(network.source, metadata=metadata, checkpoint=checkpoint)
    return Network(model, {**network.variables, 'params': params}, (), network.preprocessing, source)
