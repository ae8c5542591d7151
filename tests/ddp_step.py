"""One process of a two-process run: compares DDP's gradients with the mean of the single-process ones.

Started by tests/test_distributed.py through torchrun. Each process has its own images and its own CNO probes. The
model in DDP does without attention maps and, unless something is differentiated twice, without logits of patches;
it may be compiled and recompute its blocks. What it is compared with is eager, forms both, and keeps its
activations.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from conftest import RECIPE, TINY, random_batch
from timm.utils import ModelEmaV3
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import build
from engine import Finite, Precision, Running, Updater, evaluate, train_one_epoch, unwrap
from errors import TrainingDiverged
from losses import Objective
from mixing.mixup import Mixup
from models import DiverseViT, Needs, build_model
from regularizers import Diversity, parse_spec
from utils import find_launch, init_distributed
from warmup import compile_model

CPU = Precision(torch.device("cpu"))
TWICE = "patch.gradient_diversity=1e-2"  # differentiates twice, at a tensor of which static_graph hands out a copy
EMA_DECAY = 0.75


def plain() -> Mixup:
    """Images as they are, with labels for their patches."""
    return Mixup(0, 0, patch_size=(8, 8))


def gradients(
    model: torch.nn.Module, diversity: Diversity, rank: int, ema: ModelEmaV3 | None = None
) -> dict[str, torch.Tensor]:
    """Gradients after one step of the real loop on this process's batch; with an EMA, of a step that moves."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1 if ema else 0.0)
    mixup = Mixup(patch_size=(8, 8), seed=rank)
    torch.manual_seed(100 + rank)
    batch = random_batch(seed=rank)
    updater = Updater(optimizer, CPU, ema=ema)
    train_one_epoch(model, Objective(diversity=diversity), [(batch[0].double(), batch[1])], updater, mixup)
    return {name: p.grad.clone() for name, p in unwrap(model).backbone.named_parameters()}


def check_ema(model: DiverseViT, ema: ModelEmaV3, before: dict[str, torch.Tensor]) -> None:
    """The average after a step, and that its forward pass captures for itself."""
    after = model.backbone.state_dict()
    for name, value in ema.module.backbone.state_dict().items():
        expected = EMA_DECAY * before[name] + (1 - EMA_DECAY) * after[name]
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14, msg=name)
    images = random_batch()[0].double()
    with torch.no_grad():
        averaged, trained = ema.module(images).tokens[2], model(images).tokens[2]
    assert not torch.equal(averaged, trained)
    model.eval(), ema.module.eval()
    assert evaluate(ema.module, [(images, random_batch()[1])], CPU)["loss"] > 0  # model.eval() between epochs


def check_accumulation(model: DiverseViT, diversity: Diversity, rank: int) -> None:
    """Two batches of each process make one step: the mean of all four, reduced once."""
    batches = [(random_batch(seed=10 * part + rank)[0].double(), random_batch()[1]) for part in range(2)]
    reduced = []

    def count(state, bucket):
        reduced.append(bucket.index())
        return allreduce_hook(dist.group.WORLD, bucket)

    wrapped = DistributedDataParallel(model)
    wrapped.register_comm_hook(None, count)
    found = []
    for network in (wrapped, copy.deepcopy(model)):
        torch.manual_seed(rank)  # CNO's probes
        updater = Updater(torch.optim.SGD(network.parameters(), lr=0.0), CPU, accumulate=2)
        train_one_epoch(network, Objective(diversity=diversity), batches, updater, plain())
        found.append({name: p.grad.clone() for name, p in unwrap(network).backbone.named_parameters()})
    together, alone = found
    for name, grad in alone.items():
        dist.all_reduce(grad)
        torch.testing.assert_close(together[name], grad / 2, rtol=1e-9, atol=1e-12, msg=name)
    assert reduced and len(reduced) == len(set(reduced))  # every bucket once, not once a batch


def check_faults(wrapped: torch.nn.Module, model: DiverseViT, diversity: Diversity, rank: int) -> None:
    """A NaN in one term of one process drops the step in both; a process without samples still evaluates."""
    batches = [(random_batch(seed=10 * step + rank)[0].double(), random_batch()[1]) for step in range(3)]
    start = copy.deepcopy(model.backbone.state_dict())
    objective = Objective(diversity=diversity)
    broken, whole = diversity.terms[1], diversity.terms[1].of_batch

    def train(steps: list[int], planted: int | None, finite: Finite) -> dict[str, torch.Tensor]:
        model.backbone.load_state_dict(start)
        ema = ModelEmaV3(model, decay=EMA_DECAY)
        updater = Updater(torch.optim.SGD(wrapped.parameters(), lr=0.1), CPU, ema=ema)
        left = list(steps)

        def of_batch(*given):
            step = left.pop(0)
            torch.manual_seed(step)  # CNO's probes, drawn later in the step
            return whole(*given) * (float("nan") if rank == 1 and step == planted else 1.0)

        broken.of_batch = of_batch
        chosen = [batches[step] for step in steps]
        train_one_epoch(wrapped, objective, chosen, updater, plain(), Running(finite=finite))
        return {**copy.deepcopy(model.backbone.state_dict()), **dict(ema.module.named_parameters(prefix="ema"))}

    watch = Finite(patience=2)
    skipped, without = train([0, 1, 2], 1, watch), train([0, 2], None, Finite())
    assert watch.dropped == 1 and watch.in_a_row == 0
    for name, value in without.items():
        assert torch.equal(skipped[name], value), name
    try:
        train([0, 1], 1, Finite("stop"))
    except TrainingDiverged as error:
        assert f"up to step 2; the first term to break was {broken.spec.name}" in str(error)
    else:
        raise AssertionError("a NaN in one process went unnoticed in the other")
    broken.of_batch = whole
    share = [] if rank else [(random_batch()[0].double(), random_batch()[1])]
    assert 0 <= evaluate(model, share, CPU)["acc1"] <= 100


def main(args: argparse.Namespace) -> None:
    launch = find_launch()
    init_distributed(launch, torch.device("cpu"))
    torch.manual_seed(launch.rank)  # processes start apart, as in main.py; DDP makes them equal
    specs = RECIPE if args.static_graph or args.torchcompile else (*RECIPE, TWICE)
    diversity, together_terms = (Diversity([parse_spec(spec) for spec in specs], depth=3) for _ in range(2))
    needs = Needs(**diversity.needs)
    backbone = build_model("deit_tiny_patch16_224", **TINY).double()
    model = DiverseViT(backbone, needs, patch_loss=diversity.patch_loss)
    if args.grad_checkpointing:
        build.use_grad_checkpointing(model.backbone)
    model.find_shortcuts((3, 32, 32))
    if args.torchcompile:
        compile_model(args.torchcompile, model)
        together_terms.compile(args.torchcompile)
    wrapped = DistributedDataParallel(model, static_graph=args.static_graph)
    eager = copy.deepcopy(model)  # deepcopy leaves the compiled forward behind
    eager.backbone.set_grad_checkpointing(False)
    eager.avoid_shortcuts()
    ema, before = ModelEmaV3(model, decay=EMA_DECAY), copy.deepcopy(model.backbone.state_dict())

    together = gradients(wrapped, together_terms, launch.rank, ema)
    alone = gradients(eager, diversity, launch.rank)
    apart = 0.0
    for name, grad in alone.items():
        apart = max(apart, (grad - together[name]).abs().max().item())
        dist.all_reduce(grad)
        torch.testing.assert_close(together[name], grad / 2, rtol=1e-9, atol=1e-12, msg=name)
    assert apart > 1e-6  # the two processes really had different gradients
    check_ema(model, ema, before)
    if not args.static_graph:  # a static graph cannot change its terms
        check_faults(wrapped, model, diversity, launch.rank)
        check_accumulation(model, diversity, launch.rank)
    dist.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--static-graph", action="store_true")
    parser.add_argument("--torchcompile", default="")
    parser.add_argument("--grad-checkpointing", action="store_true")
    main(parser.parse_args())
