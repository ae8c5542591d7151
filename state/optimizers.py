"""What a checkpoint holds of an optimizer beside its state_dict, and a trial of whether it can go on from that."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from errors import BAD_ARGUMENT, UserError, reason
from state import checkpoint

STEPS = 3  # of the trial, before and after it is continued


def generator_state(optimizer: Optimizer) -> Tensor | None:
    """Where the optimizer's own random stream stands (adahessian has one), which its state_dict leaves out."""
    generator = getattr(optimizer, "generator", None)
    return generator.get_state() if isinstance(generator, torch.Generator) else None


def set_generator(optimizer: Any, state: Tensor | None) -> None:
    """Put it back, on the device of the parameters."""
    if state is not None and isinstance(getattr(optimizer, "generator", None), torch.Generator):
        optimizer.generator = torch.Generator(optimizer.param_groups[0]["params"][0].device)
        optimizer.generator.set_state(state)


def try_optimizer(name: str, build: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
    """Train a small layer for some steps, save, and continue what was saved: before a run relies on it.

    Raises:
        UserError: it cannot be saved, or takes other steps when it is continued.
    """
    advice = "choose another one, e.g. adamw, or train without --output_dir"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            with torch.compiler.set_stance("force_eager"):  # what is compiled takes minutes
                exact = _continues_exactly(build, device)
        except BAD_ARGUMENT as error:
            raise UserError(f"--opt {name} cannot be saved and continued ({reason(error)}): {advice}") from error
    if not exact:
        raise UserError(f"--opt {name} takes other steps when it is continued from a checkpoint: {advice}")


def _continues_exactly(build: Callable[[nn.Module], Optimizer], device: torch.device) -> bool:
    torch.manual_seed(0)
    layer = nn.Linear(48, 64, device=device)  # large enough for those that treat small matrices apart
    optimizer = build(layer)
    _take_steps(layer, optimizer, first=0)
    saved = {"optimizer": optimizer.state_dict(), "generator": generator_state(optimizer)}
    state = checkpoint.try_out(saved)
    again = copy.deepcopy(layer)
    continued = build(again)
    continued.load_state_dict(state["optimizer"])
    set_generator(continued, state["generator"])
    _take_steps(layer, optimizer, first=STEPS)
    _take_steps(again, continued, first=STEPS)
    return all(map(torch.equal, layer.parameters(), again.parameters()))


def _take_steps(layer: nn.Module, optimizer: Optimizer, first: int) -> None:
    for step in range(first, first + STEPS):
        torch.manual_seed(step)
        inputs = torch.randn(8, 48).to(next(layer.parameters()).device)
        optimizer.zero_grad()
        second_order = getattr(optimizer, "is_second_order", False)
        layer(inputs).pow(2).mean().backward(create_graph=second_order)
        optimizer.step()
