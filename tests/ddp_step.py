"""One process of a two-process run: compares DDP's gradients with the mean of the single-process ones.

Started by tests/test_distributed.py through torchrun. Each process has its own images and its own CNO probes.
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.distributed as dist
from conftest import RECIPE, TINY, random_batch
from torch.nn.parallel import DistributedDataParallel

from engine import Precision, Updater, evaluate, train_one_epoch, unwrap
from losses import LabelLoss
from mixup import Mixup
from models import DiverseViT, build_model
from regularizers import Diversity, parse_spec
from utils import TrainingDiverged, find_launch, init_distributed


def gradients(model: torch.nn.Module, diversity: Diversity, rank: int) -> dict[str, torch.Tensor]:
    """Gradients after one step of the real loop on this process's batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mixup = Mixup(patch_size=(8, 8), seed=rank)
    torch.manual_seed(100 + rank)
    batch = random_batch(seed=rank)
    updater = Updater(optimizer, Precision(torch.device("cpu")))
    train_one_epoch(model, LabelLoss(diversity.mixing), diversity, [(batch[0].double(), batch[1])], updater, mixup)
    return {name: p.grad.clone() for name, p in unwrap(model).backbone.named_parameters()}


def main(static_graph: bool) -> None:
    launch = find_launch()
    init_distributed(launch, torch.device("cpu"))
    torch.manual_seed(launch.rank)  # processes start apart, as in main.py; DDP makes them equal
    # gradient diversity differentiates at a tensor that static_graph hides behind a copy
    specs = RECIPE if static_graph else (*RECIPE, "patch.gradient_diversity=1e-2")
    diversity = Diversity([parse_spec(spec) for spec in specs], depth=3)
    model = DiverseViT(build_model("deit_tiny_patch16_224", **TINY), diversity.needs).double()
    wrapped = DistributedDataParallel(model, static_graph=static_graph)

    together = gradients(wrapped, diversity, launch.rank)
    alone = gradients(copy.deepcopy(model), diversity, launch.rank)
    apart = 0.0
    for name, grad in alone.items():
        apart = max(apart, (grad - together[name]).abs().max().item())
        dist.all_reduce(grad)
        torch.testing.assert_close(together[name], grad / 2, rtol=1e-9, atol=1e-12, msg=name)
    assert apart > 1e-6  # the two processes really had different gradients

    # a NaN in one process's images stops both, at the same print
    images, targets = random_batch(seed=launch.rank)
    images = images.double() * (float("nan") if launch.rank == 1 else 1.0)
    updater = Updater(torch.optim.SGD(wrapped.parameters(), lr=0.0), Precision(torch.device("cpu")))
    try:
        train_one_epoch(wrapped, LabelLoss(0), Diversity([], 0), [(images, targets)], updater, Mixup(0, 0))
    except TrainingDiverged as error:
        assert "first term to break was ce" in str(error)
    else:
        raise AssertionError("a NaN in one process went unnoticed in the other")

    # a process without samples takes part in the evaluation all the same
    share = [] if launch.rank else [(random_batch()[0].double(), random_batch()[1])]
    assert 0 <= evaluate(model, share, Precision(torch.device("cpu")))["acc1"] <= 100
    dist.destroy_process_group()


if __name__ == "__main__":
    main(static_graph="--static-graph" in sys.argv)
