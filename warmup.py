"""Between building and the first step: what --torchcompile compiles, and a pass through all that a run calls.

Compiled are the model's forward pass with its hooks, once for training and once for evaluation, the label loss, the
terms of a batch, the terms of the weights, and a teacher. The EMA is evaluated as it is.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import nn

from engine import Updater, evaluate, objective, unwrap
from errors import UserError, did_you_mean
from losses import LabelLoss
from mixing.mixup import Mixup
from models import DiverseViT
from regularizers import Diversity, total
from utils import set_streams, streams


def compile_model(backend: str, model: DiverseViT) -> None:
    """Compile the forward pass in place, so that parameter names, DDP and the EMA see the model they know.

    Raises:
        UserError: an unknown backend.
    """
    backends = torch.compiler.list_backends(exclude_tags=())
    if backend not in backends:
        raise UserError(
            f"unknown --torchcompile backend {backend!r}.{did_you_mean(backend, backends)} "
            f"Known: {', '.join(torch.compiler.list_backends())}"
        )
    model.compile(backend=backend, fullgraph=True)


def compile_objective(backend: str, label_loss: LabelLoss, diversity: Diversity) -> None:
    """Compile the terms of the loss, in place.

    Raises:
        UserError: a term that differentiates twice.
    """
    if diversity.differentiates_twice:
        raise UserError(
            "patch.gradient_diversity differentiates twice, which compiled models cannot: drop --torchcompile"
        )
    label_loss.compile(backend)
    diversity.compile(backend)


def warm_up(
    model: nn.Module,
    label_loss: LabelLoss,
    diversity: Diversity,
    measure: Diversity,
    updater: Updater,
    mixup: Mixup,
    image_size: int,
    train_batch: int,
    test_batches: Sequence[int],
    training_mode: bool = True,
) -> float:
    """Go through all that a run will call, with blank images, and leave no trace; seconds that it took.

    Afterwards nothing is compiled any more: training has one batch size, and evaluation those that it is told. The
    first batch of another size compiles a graph for all sizes. Training goes twice, for models that keep something
    from their first pass. Weights do not move; buffers, gradients and random streams are put back.

    DDP arranges its buckets anew after its first backward pass, and the arrangement decides in which order three
    processes or more add up a gradient. After this a run that is continued adds as the one that was not stopped.

    Args:
        model: as it will be trained: DDP around a DiverseViT splits a compiled graph, to send gradients early.
        measure: the terms that evaluation measures.
        train_batch: images in a batch of training.
        test_batches: images in the batches of evaluation, each size once.
        training_mode: False trains with dropout and drop path off.
    """
    start = time.perf_counter()
    device = updater.precision.device
    before = streams(device, mixup.random)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def blank(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        images = torch.zeros(size, 3, image_size, image_size, device=device)
        return images, torch.zeros(size, dtype=torch.long, device=device)

    model.train(training_mode)
    for _ in range(2):
        terms = objective(model, label_loss, diversity, blank(train_batch), mixup, updater)
        terms |= diversity.of_weights(unwrap(model).weights)
        updater.backward(total(terms))
        updater.optimizer.zero_grad()
    evaluate(unwrap(model), [blank(size) for size in test_batches], updater.precision, measure)
    with torch.no_grad():
        for buffer, value in buffers:
            buffer.copy_(value)
    set_streams(before, device, mixup.random)
    return time.perf_counter() - start
