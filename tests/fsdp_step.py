"""One of several gloo processes: a model in shards takes the steps that DDP takes, in float64.

Run it with `python -m torch.distributed.run --nproc_per_node 2 tests/fsdp_step.py` from the project's root.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from conftest import RECIPE, TINY, random_batch
from families import FAMILIES
from families import build as build_family
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from build import use_grad_checkpointing
from engine import Finite, Precision, Running, Updater, evaluate, train_one_epoch
from errors import TrainingDiverged, UserError
from losses import Objective
from mixing.mixup import Mixup
from models import DiverseViT, Needs, build_model, find_layout
from models.sharding import check_shards, shard, weights_of, whole
from regularizers import Diversity, parse_spec, total
from state.run_state import RunState
from utils import find_launch, init_distributed, print_main, rank

CPU = torch.device("cpu")
CLOSE = {"rtol": 1e-9, "atol": 1e-12}


@dataclass
class Run:
    """A model in training: with FSDP, DDP, or by itself."""

    state: RunState
    wrapped: nn.Module
    diversity: Diversity
    updater: Updater

    def train(self, *seeds: int, finite: Finite | None = None) -> None:
        """Steps on this process's own batches, each drawn and mixed from a seed."""
        model, diversity, updater = self.wrapped, self.diversity, self.updater
        for seed in seeds:
            torch.manual_seed(100 * seed + rank())  # CNO's probes
            images = [random_batch(seed=10 * seed + 2 * i + rank()) for i in range(updater.accumulate)]
            loader = [(x.to(next(model.parameters()).dtype), y) for x, y in images]
            mixup = Mixup(patch_size=(8, 8), seed=seed + rank())
            running = Running(finite=finite or Finite())
            train_one_epoch(model, Objective(diversity=diversity), loader, updater, mixup, running)

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: whole(p.grad) for name, p in self.state.model.backbone.named_parameters()}

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the model and its average."""
        assert self.state.ema is not None
        networks = {"model": self.state.model, "ema": self.state.ema.module}
        return whole({f"{k}.{n}": p.detach() for k, net in networks.items() for n, p in net.named_parameters()})


def start(
    how: str,
    *,
    accumulate: int = 1,
    checkpointing: bool = False,
    clip: float | None = None,
    lr: float = 1e-2,
    dtype: torch.dtype = torch.float64,
    precision: Precision | None = None,
) -> Run:
    """A run of the recipe's five terms with AdamW and an EMA: 'fsdp', 'ddp' or 'alone'.

    The last forms attention maps and the logits of all patches, the others do without.
    """
    torch.manual_seed(0)
    diversity = Diversity([parse_spec(spec) for spec in RECIPE], depth=3)
    odd = {**TINY, "embed_dim": 27}  # 81 neurons of q, k and v: shards of 41 and 40
    backbone = build_model("deit_tiny_patch16_224", **odd).to(dtype)
    model = DiverseViT(backbone, Needs(**diversity.needs), patch_loss=diversity.patch_loss)
    if checkpointing:
        use_grad_checkpointing(model.backbone)
    if how != "alone":
        model.find_shortcuts((3, 32, 32))
    ema = ModelEmaV3(model, decay=0.75)
    if how == "fsdp":
        shard(model, CPU)
        shard(ema.module, CPU)
    optimizer = create_optimizer_v2(model.backbone, opt="adamw", lr=lr, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, num_epochs=5)
    precision = precision or Precision(CPU)
    state = RunState(model, optimizer, schedule, precision.scaler, ema, {})
    wrapped = DistributedDataParallel(model) if how == "ddp" else model
    return Run(state, wrapped, diversity, Updater(optimizer, precision, clip, ema, accumulate))


def compare(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], **close: float) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(close or CLOSE), msg=lambda text, name=name: name + text)


def check_gradients() -> None:
    """Against DDP's, and against the mean of what the processes find alone."""
    for accumulate, checkpointing in ((1, False), (2, False), (1, True), (2, True)):
        options = {"accumulate": accumulate, "lr": 0.0}
        sharded = start("fsdp", checkpointing=checkpointing, **options)
        runs = [sharded, start("ddp", **options), start("alone", **options)]
        assert all(isinstance(p, DTensor) for p in sharded.state.model.parameters())
        for run in runs:
            run.train(1)
        found, expected, alone = (run.gradients() for run in runs)
        compare(found, expected)
        apart = max((gradient - found[name]).abs().max().item() for name, gradient in alone.items())
        assert apart > 1e-6  # the two processes really had different gradients
        for gradient in alone.values():
            dist.all_reduce(gradient)
            gradient /= 2
        compare(found, alone)


def check_steps() -> None:
    """Weights, EMA and optimizer after some steps, checkpoints in both directions, and steps from there."""
    options = {"accumulate": 2, "clip": 0.5}
    sharded, ddp = (start(how, **options) for how in ("fsdp", "ddp"))
    for run in (sharded, ddp):
        run.train(1, 2, 3)
    compare(sharded.weights(), ddp.weights())
    exact = sharded.weights()
    saved = [run.state.state_dict() for run in (sharded, ddp)]
    if rank() == 0:
        check_same_format(*saved)
    dist.broadcast_object_list(saved, src=0)
    of_shards, of_ddp = saved
    again = [start(how, lr=0.5, **options) for how in ("fsdp", "ddp", "fsdp")]
    for run, content in zip(again, (of_shards, of_shards, of_ddp), strict=True):
        run.state.load_state_dict(copy.deepcopy(content), "x.pth")
    compare(again[0].weights(), exact, rtol=0, atol=0)
    for run in (sharded, *again):
        run.train(4, 5)
    compare(again[0].weights(), sharded.weights(), rtol=0, atol=0)
    for run in again[1:]:
        compare(run.weights(), sharded.weights())


def check_same_format(one: dict, other: dict) -> None:
    """Two checkpoints but for rounding: equal in everything but the values of floating-point tensors."""

    def skeleton(value: object) -> object:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            assert kind is torch.Tensor
            known = None if value.is_floating_point() and value.ndim else value.tolist()
            return kind, value.dtype, list(value.shape), value.requires_grad, known
        if isinstance(value, dict):
            attributes = skeleton(vars(value)) if hasattr(value, "__dict__") else None
            return kind, [(key, skeleton(item)) for key, item in value.items()], attributes
        if isinstance(value, (list, tuple)):
            return kind, [skeleton(item) for item in value]
        return kind, value

    assert list(one) == list(other)
    for key in one:
        assert skeleton(one[key]) == skeleton(other[key]), key
    compare(one["model"], other["model"])
    compare(one["model_ema"], other["model_ema"])
    for index, values in one["optimizer"]["state"].items():
        compare(values, other["optimizer"]["state"][index])


def check_evaluation() -> None:
    """Model and EMA, on shares of different sizes, with measures; training goes on."""
    sharded, ddp = (start(how, dtype=torch.float32) for how in ("fsdp", "ddp"))
    for run in (sharded, ddp):
        run.train(1)
    names = ("patch.pairwise_cosine@last", "weight.so:fc1@1")
    measure = Diversity([parse_spec(name, with_coef=False) for name in names], depth=3)
    batches = [random_batch(size, seed=size) for size in (4, 3, 1)]
    for shares in ([batches, []], [batches[:2], batches[2:]], [[], batches]):
        for network in ("model", "ema"):
            found = [
                evaluate(
                    run.state.model if network == "model" else run.state.ema.module,
                    shares[rank()],
                    Precision(CPU),
                    measure,
                )
                for run in (sharded, ddp)
            ]
            assert found[0].keys() == found[1].keys() and "weight.so:fc1@1" in found[0]
            for name, value in found[0].items():
                assert abs(value - found[1][name]) <= 1e-6 * abs(value), name
    for run in (sharded, ddp):
        run.train(2)
    compare(sharded.weights(), ddp.weights(), rtol=1e-4, atol=1e-6)


def check_faults() -> None:
    """What is not finite on one process stops both: a loss, scaled gradients, weights that are to be saved."""
    run, broken = start("fsdp"), Finite()
    before = run.weights()
    whole_term = run.diversity.terms[1].of_batch
    run.diversity.terms[1].of_batch = lambda *given: whole_term(*given) * (float("nan") if rank() else 1)
    run.train(1, finite=broken)
    assert broken.dropped == 1
    compare(run.weights(), before, rtol=0, atol=0)

    precision = Precision(CPU)
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaled, plain = start("fsdp", precision=precision, clip=0.5), start("fsdp", clip=0.5)
    for each in (scaled, plain):
        each.train(1)
    compare(scaled.weights(), plain.weights())
    before = whole(dict(scaled.state.model.named_parameters()))
    scaled.updater.optimizer.zero_grad()
    precision.scaler.scale(scaled.wrapped(random_batch()[0].double()).logits.sum()).backward()
    gradient = scaled.state.model.backbone.norm.weight.grad
    if rank() == 1:
        gradient.to_local().fill_(torch.inf)
    scaled.updater.step(scaled.wrapped)
    assert precision.scaler.get_scale() == 2.0**9
    compare(whole(dict(scaled.state.model.named_parameters())), before)

    weight = scaled.state.model.backbone.norm.weight
    if rank() == 1:
        weight.to_local().detach().fill_(torch.nan)
    try:
        scaled.state.check_weights()
    except TrainingDiverged as error:
        assert "norm.weight is no longer finite" in str(error)
    else:
        raise AssertionError("a NaN in one process went unnoticed")


def check_half_precision() -> None:
    """bfloat16 autocast; without its cache, since the head's two gradients are else added in bfloat16."""
    precision = Precision(CPU, "bfloat16", keep_casts=False)
    runs = [start(how, dtype=torch.float32, lr=0.0, precision=precision) for how in ("fsdp", "ddp")]
    for run in runs:
        run.train(1)
    compare(*(run.gradients() for run in runs), rtol=1e-5, atol=1e-6)


def check_families() -> None:
    """Grids, which are views; two streams; joint projections; positions that all blocks share."""
    for name in ("swin", "tnt", "vit_parallel", "relpos_shared"):
        torch.manual_seed(0)
        backbone = build_family(name)
        specs = [parse_spec(spec) for spec in ("patch.cosine@first,all=0.5", "weight.so:v,fc1@all=1e-3")]
        diversity = Diversity(specs, find_layout(backbone).depth)
        model = DiverseViT(backbone, Needs(**diversity.needs))
        alone = copy.deepcopy(model)
        shard(model, CPU)
        for network in (model, alone):
            torch.manual_seed(rank())
            captured = network.train()(FAMILIES[name].images(seed=rank()))
            of_batch = total(diversity.of_batch(captured)) + captured.logits.square().mean()
            total(diversity.of_weights(weights_of(network))).backward()
            of_batch.backward()
        for (key, found), expected in zip(model.named_parameters(), alone.parameters(), strict=True):
            gradient = torch.zeros_like(expected) if expected.grad is None else expected.grad
            dist.all_reduce(gradient)
            found = torch.zeros_like(expected) if found.grad is None else whole(found.grad)
            torch.testing.assert_close(found, gradient / 2, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")


def check_refusals() -> None:
    """Models that cannot be sharded, and optimizers that do not work on shards, or in another way."""
    backbones = [build_family("levit"), build_family("vit_diff"), build_model("resnet10t", num_classes=5)]
    for backbone, reason in zip(backbones, ("batch norms of Levit", "lambda_a", "block by block"), strict=True):
        assert reason in refusal(lambda backbone=backbone: shard(DiverseViT(backbone), CPU))
    torch.manual_seed(rank())
    before = torch.get_rng_state()
    for name in ("adamw", "momentum", "lamb", "lion", "lookahead_adamw"):
        check_shards(name, partial(create_optimizer_v2, opt=name, lr=0.1, weight_decay=0.05), CPU)
    assert torch.equal(torch.get_rng_state(), before)
    for name, reason in (
        ("adamp", "does not work with --fsdp (aten."),
        ("adafactor", "does not work with --fsdp (aten."),
        ("adafactorbv", "does not work with --fsdp (aten."),  # on position embeddings, which are one row
        ("adahessian", "does not work with --fsdp (it needs second derivatives): choose another one"),
        ("muon", "takes other steps with --fsdp than without it"),
    ):
        assert f"--opt {name} {reason}" in refusal(
            lambda name=name: check_shards(name, partial(create_optimizer_v2, opt=name, lr=0.1), CPU)
        )


def refusal(call: Callable[[], None]) -> str:
    try:
        call()
    except UserError as error:
        assert "\n" not in str(error)
        return str(error)
    raise AssertionError("not refused")


def main() -> None:
    warnings.simplefilter("error")
    init_distributed(find_launch(), CPU)
    checks = (
        *(check_gradients, check_steps, check_evaluation, check_faults),
        *(check_half_precision, check_families, check_refusals),
    )
    for check in checks:
        started = time.perf_counter()
        check()
        print_main(f"{check.__name__} {time.perf_counter() - started:.1f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
