"""Two models, evaluated in one pass and one after the other: equal bits, also in shards (test_distributed.py)."""

from __future__ import annotations

import torch
from conftest import TINY, random_batch

from engine import Precision, evaluate, evaluate_together
from models import DiverseViT, Needs, build_model
from models.sharding import shard
from regularizers import Diversity, parse_spec
from utils import find_launch, init_distributed, rank

CPU = torch.device("cpu")


def check(sharded: bool) -> None:
    names = ("patch.pairwise_cosine@last", "weight.so:fc1@1")
    measure = Diversity([parse_spec(name, with_coef=False) for name in names], depth=3)
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = DiverseViT(build_model("deit_tiny_patch16_224", **TINY), measured=Needs(**measure.needs))
        if sharded:
            shard(model, CPU)
        models.append(model)
    batches = [random_batch(size, seed=size) for size in (4, 3, 1)]
    for shares in ([batches, []], [batches[:2], batches[2:]], [[], batches]):
        share, precision = shares[rank()], Precision(CPU)
        first, second = evaluate(models[0], share, precision, measure), evaluate(models[1], share, precision)
        assert evaluate_together(models, share, precision, measure) == [first, second]
        assert first["loss"] != second["loss"] and names[1] in first


def run() -> None:
    init_distributed(find_launch(), CPU)
    check(sharded=False)
    check(sharded=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run()
