"""For what does not fit on one GPU: parameters, gradients, optimizer and EMA in shards, one per process (FSDP2).

`shard` replaces every parameter by a DTensor, of which a process holds some rows. A block is whole for its forward
and its backward pass only; what is outside the blocks (embeddings, norm, head) from the forward pass to the end of
the backward pass. Everything else sees the model it knows: the names, hooks and numbers of DDP, and checkpoints of
whole tensors.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, distribute_tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from errors import BAD_ARGUMENT, UserError, reason
from models import DiverseViT, find_layout
from utils import world_size

if TYPE_CHECKING:
    from models.captured import Weights


def is_sharded(model: nn.Module) -> bool:
    return isinstance(model, FSDPModule)


def shard(model: DiverseViT, device: torch.device) -> None:
    """Keep this process's shard of every parameter, on the device. Optimizers are built afterwards.

    Raises:
        UserError: the model cannot be sharded.
    """
    try:
        blocks = find_layout(model.backbone).blocks
    except UserError as error:
        raise UserError(f"--fsdp shards block by block, and {error}") from error
    name = type(model.backbone).__name__
    for key, parameter in model.backbone.named_parameters():
        if parameter.ndim == 0:
            raise UserError(f"--fsdp cannot shard {key} of {name}, which is a single number: drop --fsdp")
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise UserError(f"--fsdp would let the batch norms of {name} drift apart between processes: drop --fsdp")
    mesh = _mesh(device)
    for module in (*blocks, model):
        module.register_forward_hook(_no_views)
        fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)


def _mesh(device: torch.device) -> DeviceMesh:
    return init_device_mesh(device.type, (world_size(),))


def _no_views(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    """FSDP hangs hooks on what a module returns; an operation in place on a view would lose them."""
    return tree_map_only(Tensor, lambda tensor: tensor if tensor._base is None else tensor.clone(), output)


def weights_of(model: DiverseViT) -> Weights:
    """Block, kinds -> the block's matrices of these kinds, for the weight terms of one step.

    Sharded parameters are gathered, each once; their gradients become means over the processes.
    """
    return partial(model.weights, whole=cache(_gather)) if is_sharded(model) else model.weights


def _gather(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.full_tensor(grad_placements=[Partial("avg")])


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: those of a run without shards, whose optimizer numbers its parameters. (What gathers and scatters in
# torch.distributed.checkpoint.state_dict goes by their names instead.)


def whole(state: Any, keep: bool = True) -> Any:
    """A state with whole tensors in place of its shards. All processes must ask for it together.

    Args:
        state: nested dicts, lists and tuples.
        keep: whether this process wants the tensors; they come to host memory, one after the other.
    """
    if isinstance(state, DTensor):
        gathered = state.full_tensor()
        return gathered.cpu() if keep else None
    if isinstance(state, OrderedDict):  # of a module: carries versions as well
        for key, value in state.items():
            state[key] = whole(value, keep)
        return state
    if isinstance(state, dict):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(whole(value, keep) for value in state)
    return state


def like(own: Any, value: Any) -> Any:
    """A whole tensor in shards, if the one that it belongs to is."""
    if not (isinstance(own, DTensor) and isinstance(value, Tensor) and value.ndim > 0):
        return value
    placements = own.placements if value.shape == own.shape else None  # None: whole, on every process
    shards = distribute_tensor(value, own.device_mesh, placements, src_data_rank=None)
    return shards.clone()  # a view would keep the whole alive


def optimizer_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimizer's state_dict of whole tensors, in shards where its parameters are."""
    own = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_each = {
        index: {key: like(own[index], value) for key, value in values.items()}
        for index, values in state["state"].items()
    }
    return {**state, "state": of_each}


# ------------------------------------------------------------------------------------------------------------
# Optimizers


def check_shards(name: str, build: Callable[[nn.Module], Optimizer], device: torch.device) -> None:
    """Try three steps of an optimizer on a small layer, whole, in shards, and continued from a checkpoint.

    Raises:
        UserError: they fail, or do not agree.
    """
    advice = "choose another one, e.g. adamw, or drop --fsdp"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            agree = _steps_agree(build, device)
        except BAD_ARGUMENT as error:
            first = reason(error).partition(". ")[0]
            raise UserError(f"--opt {name} does not work with --fsdp ({first}): {advice}") from error
    if not agree:
        raise UserError(f"--opt {name} takes other steps with --fsdp than without it: {advice}")


def _steps_agree(build: Callable[[nn.Module], Optimizer], device: torch.device) -> bool:
    torch.manual_seed(0)  # on all processes
    plain = nn.Linear(48, 64, device=device)  # large enough for those that treat small matrices apart
    plain.register_parameter(
        "position", nn.Parameter(torch.zeros(1, 17, 48, device=device))
    )  # on one process alone
    layers = [plain, copy.deepcopy(plain), copy.deepcopy(plain)]
    mesh = _mesh(device)
    for layer in layers[1:]:
        fully_shard(layer, mesh=mesh)
    optimizers = [build(layer) for layer in layers]
    if getattr(optimizers[0], "is_second_order", False):
        raise NotImplementedError("it needs second derivatives")
    for step in range(3):
        if step == 2:
            layers[2].load_state_dict(layers[1].state_dict())
            saved = copy.deepcopy(whole(optimizers[1].state_dict()))
            optimizers[2].load_state_dict(optimizer_state(optimizers[2], saved))
        for layer, optimizer in zip(layers, optimizers, strict=True):
            torch.manual_seed(step)
            for parameter in layer.parameters():
                parameter.grad = like(parameter, torch.randn(parameter.shape).to(device))
            optimizer.step()
    ends = [[whole(parameter.detach()).cpu() for parameter in layer.parameters()] for layer in layers]
    return all(
        torch.equal(sharded, continued) and torch.allclose(sharded, expected, rtol=1e-4, atol=1e-6)
        for expected, sharded, continued in zip(*ends, strict=True)
    )
