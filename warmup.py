"""Between building and the first step: what --torchcompile compiles, and a pass through all that a run calls.

Compiled are the model's forward pass with its hooks, once for training and once for evaluation, the label loss, the
terms of a batch, the terms of the weights, and a teacher. The EMA is evaluated as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from engine import Updater, evaluate, terms_of_batch, unwrap
from errors import UserError, did_you_mean
from losses import Objective
from mixing import Mixing
from models import DiverseViT
from regularizers import Diversity, total
from utils import set_streams, streams


class Batches(NamedTuple):
    """The shapes of a run's batches.

    Attributes:
        image_shape: channels, height and width.
        train: images in a batch of training.
        test: images in the batches of evaluation, each size once; none: it is not gone through.
        label_shape: of what is the label of one image: nothing of a class, height and width of a mask.
    """

    image_shape: tuple[int, int, int]
    train: int
    test: Sequence[int]
    label_shape: Sequence[int] = ()


def compile_model(backend: str, model: DiverseViT) -> None:
    """Compile the forward pass in place, so that parameter names, DDP and the EMA see the model they know.

    Blocks that are computed again in the backward pass form their attention maps: once they are compiled, nobody
    sees their queries and keys.

    Raises:
        UserError: an unknown backend.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(
            f"unknown --torchcompile backend {backend!r}.{did_you_mean(backend, backends)} "
            f"Known: {', '.join(torch.compiler.list_backends())}"
        )
    if any(getattr(part, "grad_checkpointing", False) for part in model.modules()):
        model.avoid_shortcuts(of_patches=False)
    model.compile(backend=backend, fullgraph=True)


def warm_up(
    model: nn.Module,
    objective: Objective,
    measure: Diversity,
    updater: Updater,
    mixing: Mixing,
    batches: Batches,
    training_mode: bool = True,
) -> float:
    """Go through all that a run will call, with blank images, and leave no trace; seconds that it took.

    Afterwards nothing is compiled any more: training has one batch size, and evaluation those that it is told. The
    first batch of another size compiles a graph for all sizes. Training goes twice, for models that keep something
    from their first pass. Weights do not move; buffers, gradients and random streams are put back.

    DDP arranges its buckets anew after its first backward pass, and the arrangement decides in which order three
    processes or more add up a gradient. After this, a resumed run adds them in the order of the uninterrupted one.

    Args:
        model: as it will be trained: DDP around a DiverseViT splits a compiled graph, to send gradients early.
        measure: the terms that evaluation measures.
        batches: the shapes of what comes.
        training_mode: False trains with dropout and drop path off.
    """
    start = time.perf_counter()
    device = updater.precision.device
    before = streams(device, mixing.random)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def blank(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros(count, *batches.image_shape, device=device)
        return images, torch.zeros(count, *batches.label_shape, dtype=torch.long, device=device)

    model.train(training_mode)
    for _ in range(2):
        terms = terms_of_batch(model, objective, blank(batches.train), mixing, updater)
        terms |= objective.of_weights(unwrap(model).weights)
        updater.backward(total(terms))
        updater.optimizer.zero_grad()
    if batches.test:
        evaluate(unwrap(model), [blank(count) for count in batches.test], updater.precision, measure)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    set_streams(before, device, mixing.random)
    return time.perf_counter() - start
