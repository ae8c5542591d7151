"""The training loop, precision, evaluation, optimiser and schedule."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import RECIPE, random_batch
from timm.data import Mixup as TimmMixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn

import build
import main
import runs
import schedules
import trainer
from datasets import build_dataset
from engine import Finite, Precision, Running, Updater, evaluate, evaluate_together, train_one_epoch
from errors import TrainingDiverged, UserError
from loaders import build_train_loader
from loggers.progress import Progress
from losses import Objective
from mixing.mixup import Mixup
from models import DiverseViT, Needs
from options import config
from program import Signals
from redundancy.monitor import Monitor
from regularizers import Diversity, parse_spec
from runs import build_run
from state.run_state import RunState

CPU = Precision(torch.device("cpu"))


def batches(count: int = 4, size: int = 4) -> list:
    return [random_batch(size, seed=seed) for seed in range(count)]


def adamw(model: DiverseViT, lr: float = 1e-3) -> torch.optim.Optimizer:
    return create_optimizer_v2(model.backbone, opt="adamw", lr=lr, weight_decay=0.05)


class Watcher:
    """Notes the steps that it is told of."""

    def __init__(self, seen: list[int]) -> None:
        self.after_step = seen.append


def no_mixing(smoothing: float = 0.0) -> Mixup:
    return Mixup(0, 0, smoothing=smoothing)


# ------------------------------------------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("kind", ["mixup", "smoothing", "plain"])
def test_empty_objective_is_plain_deit(tiny, kind):
    """Bit for bit what an ordinary loop over the stock timm model gives, dropout and drop path on."""
    model, diversity = tiny(drop_path_rate=0.3, pos_drop_rate=0.1)
    stock = copy.deepcopy(model.backbone)
    assert isinstance(model.backbone, type(stock)) and not Needs(**diversity.needs)
    mixup = (
        Mixup(0.8, 0, smoothing=0.1, seed=7) if kind == "mixup" else no_mixing(0.1 if kind == "smoothing" else 0)
    )
    criterion = {
        "mixup": SoftTargetCrossEntropy(),
        "smoothing": LabelSmoothingCrossEntropy(0.1),
        "plain": nn.CrossEntropyLoss(),
    }[kind]
    updater = Updater(adamw(model), CPU, ema=ModelEmaV3(model, decay=0.9))
    torch.manual_seed(11)
    means = train_one_epoch(model, Objective(diversity=diversity), batches(), updater, mixup)
    assert set(means) == {"loss", "ce", "lr", "dropped"} and means["loss"] == means["ce"]

    optimizer = create_optimizer_v2(stock, opt="adamw", lr=1e-3, weight_decay=0.05)
    ema = ModelEmaV3(stock, decay=0.9)
    theirs = TimmMixup(0.8, 0, label_smoothing=0.1, num_classes=5) if kind == "mixup" else None
    draws = Mixup(0.8, 0, smoothing=0.1, seed=7)
    torch.manual_seed(11)
    losses = []
    stock.train()
    for images, targets in batches():
        if theirs is not None:
            lam = draws.draw(4, 32, 32)[0].weight
            theirs._params_per_batch = lambda lam=lam: (lam, False)
            images, targets = theirs(images.clone(), targets)
        loss = criterion(stock(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(stock)
        losses.append(loss.item())
    assert means["loss"] == sum(losses) / len(losses)
    for (name, mine), other in zip(model.backbone.named_parameters(), stock.parameters(), strict=True):
        assert torch.equal(mine, other), name
    for mine, other in zip(ema.module.parameters(), updater.ema.module.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_means_are_named_terms(tiny):
    model, diversity = tiny(*RECIPE)
    mixup = Mixup(patch_size=(8, 8))
    means = train_one_epoch(model, Objective(diversity=diversity), batches(), Updater(adamw(model), CPU), mixup)
    coefs = {spec.name: spec.coef for spec in map(parse_spec, RECIPE)}
    label = (means["ce"] + 16 * means["patch.mixing"]) / 17
    rest = sum(coefs[name] * means[name] for name in coefs if name != "patch.mixing")
    assert means["loss"] == pytest.approx(label + rest, rel=1e-6)
    assert means["lr"] == 1e-3


def test_fine_tuning_mode_switches_dropout_off(tiny):
    model, diversity = tiny("patch.cosine@last=0.5", drop_path_rate=0.9)
    seen = []
    model.backbone.blocks[2].register_forward_hook(lambda module, args, out: seen.append(module.training))
    for mode in (True, False):
        updater = Updater(adamw(model), CPU)
        means = train_one_epoch(
            model, Objective(diversity=diversity), batches(1), updater, no_mixing(), training_mode=mode
        )
        assert "patch.cosine@last" in means  # captured in evaluation mode too
    assert seen == [True, False]


def test_clip_grad_bounds_the_step(tiny):
    model, diversity = tiny()
    norms = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            norms.append(
                math.sqrt(sum(p.grad.square().sum().item() for g in self.param_groups for p in g["params"]))
            )
            super().step(closure)

    for clip in (None, 0.01):
        updater = Updater(Spy(model.parameters(), lr=0.0), CPU, clip_grad=clip)
        train_one_epoch(model, Objective(diversity=diversity), batches(1), updater, no_mixing())
    assert norms[0] > 0.1 and norms[1] == pytest.approx(0.01, rel=1e-3)


def test_diverged_loss_names_the_first_term(tiny):
    model, diversity = tiny("patch.cosine@last=1", "attn.cosine@0=1")
    real, calls = diversity.terms[1].function, []

    def breaks_later(x):
        calls.append(1)
        return real(x) * (float("nan") if len(calls) >= 2 else 1.0)

    diversity.terms[1].function = breaks_later
    updater = Updater(adamw(model), CPU)
    with pytest.raises(TrainingDiverged, match=r"3 step\(s\) in a row up to step 4; .* to break was attn.cosine@0"):
        train_one_epoch(
            model,
            Objective(diversity=diversity),
            batches(9),
            updater,
            no_mixing(),
            Running(finite=Finite(patience=3)),
        )
    calls.clear()
    with pytest.raises(TrainingDiverged, match=r"1 step\(s\) in a row up to step 2"):
        train_one_epoch(
            model, Objective(diversity=diversity), batches(9), updater, no_mixing(), Running(finite=Finite("stop"))
        )


@pytest.mark.parametrize("split", [2, 4])
@pytest.mark.parametrize("clip", [None, 0.05])
def test_several_batches_are_one_of_128(tiny, clip, split):
    """Gradient, clipping, EMA and means; with terms of every kind, of which those of weights count once."""
    specs = [*RECIPE, "patch.gradient_diversity=0.1", "patch.mgd=1e-3", "weight.so=1e-4"]
    images, targets = random_batch(128)
    found = []
    for count in (1, split):
        model, diversity = tiny(*specs)
        updater = Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, clip, ModelEmaV3(model, 0.5), count)
        parts = list(zip(images.chunk(count), targets.chunk(count), strict=True))
        torch.manual_seed(5)  # CNO's probes
        means = train_one_epoch(
            *(model, Objective(diversity=diversity), parts, updater),
            Mixup(0, 0, smoothing=0.1, patch_size=(8, 8)),
        )
        gradient = torch.cat([p.grad.flatten() for p in model.parameters()])
        assert clip is None or gradient.norm().item() == pytest.approx(clip, rel=1e-4)
        found.append((gradient, means, updater.ema.module.backbone.head.weight))
    (whole, means, average), (parts, means_of_parts, average_of_parts) = found
    assert (parts - whole).norm() <= 1e-6 * whole.norm()
    assert means_of_parts == pytest.approx(means, rel=1e-5)
    assert torch.allclose(average, average_of_parts, rtol=1e-5, atol=1e-7)


def test_batches_that_make_no_whole_step_are_left_out(tiny):
    model, diversity = tiny()
    seen = []
    updater = Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, accumulate=3)
    train_one_epoch(
        *(model, Objective(diversity=diversity), batches(8), updater, no_mixing()),
        observers=[Watcher(seen)],
    )
    assert seen == [1, 2]


def test_no_step_waits_for_the_device(tiny, monkeypatch):
    """Between prints no tensor is read by the host."""
    model, diversity = tiny(*RECIPE)
    reads = []
    for method in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu"):
        original = getattr(torch.Tensor, method)

        def spy(self, *args, _original=original, _method=method, **kwargs):
            reads.append(_method)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, method, spy)
    updater = Updater(torch.optim.SGD(model.parameters(), 0.1), CPU, ema=ModelEmaV3(model))
    mixup = Mixup(patch_size=(8, 8))
    monkeypatch.setattr(Finite, "verdict", lambda self, step: True)  # reads a copy that is on the host long before
    counts = []
    for steps in (6, 12):
        reads.clear()
        train_one_epoch(
            model, Objective(diversity=diversity), batches(steps), updater, mixup, progress=Progress("", 100)
        )
        counts.append(len(reads))
    assert counts[0] == counts[1]  # only the end of the epoch reads


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_diversity_runs_in_float32_outside_autocast(tiny, dtype):
    model, diversity = tiny(*RECIPE)
    precision = Precision(torch.device("cpu"), dtype)
    images, targets = random_batch()
    images, labels = Mixup(patch_size=(8, 8))(images, targets)
    with precision.autocast():
        captured = model(images)
    assert captured.attention[0].dtype == captured.logits.dtype == getattr(torch, dtype)
    objective = Objective(diversity=diversity)
    terms = objective(captured, labels) | objective.of_weights(model.weights)
    assert {term.value.dtype for term in terms.values()} == {torch.float32}
    updater = Updater(adamw(model), precision)
    means = train_one_epoch(model, Objective(diversity=diversity), batches(), updater, Mixup(patch_size=(8, 8)))
    assert math.isfinite(means["loss"])


@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # torch says it once a process
def test_second_order_optimizers_get_their_graph(tiny, monkeypatch):
    model, diversity = tiny()
    with pytest.raises(
        UserError, match=r"second derivatives, which fused attention does not have: set .*TIMM_FUSED"
    ):
        runs.build_run(run_args("--opt", "adahessian"), model, CPU, no_mixing())
    for block in model.backbone.blocks:
        block.attn.fused_attn = False
    optimizer = runs.build_run(run_args("--opt", "adahessian"), model, CPU, no_mixing()).optimizer
    step, with_graph = optimizer.step, []

    def watched(*args):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        with_graph.append(all(gradient.grad_fn is not None for gradient in gradients))
        return step(*args)

    monkeypatch.setattr(optimizer, "step", watched)
    train_one_epoch(model, Objective(diversity=diversity), batches(2), Updater(optimizer, CPU), no_mixing())
    assert with_graph == [True, True]


# ------------------------------------------------------------------------------------------------------------
# Precision


def test_precision_by_device(monkeypatch):
    assert Precision(torch.device("cpu")).dtype == torch.float32
    assert Precision(torch.device("cpu"), "bfloat16").dtype == torch.bfloat16
    assert not Precision(torch.device("cpu")).scaler.is_enabled()
    with pytest.raises(UserError, match="--amp-dtype float16 needs a CUDA device, not cpu"):
        Precision(torch.device("cpu"), "float16")
    for native, name in ((True, "bfloat16"), (False, "float16")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native)
        monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: ("scaler", device, enabled))
        precision = Precision(torch.device("cuda"))
        assert precision.name == name and precision.scaler == ("scaler", "cuda", name == "float16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_recipe_trains_on_a_gpu(tiny, dtype):
    device = torch.device("cuda")
    model, diversity = tiny(*RECIPE)
    model.to(device)
    updater = Updater(adamw(model), Precision(device, dtype), clip_grad=5.0, ema=ModelEmaV3(model))
    data = batches(1) * 30
    mixup = Mixup(0, 0, patch_size=(8, 8))
    first = train_one_epoch(model, Objective(diversity=diversity), data[:1], updater, mixup)
    train_one_epoch(model, Objective(diversity=diversity), data, updater, mixup)
    last = train_one_epoch(model, Objective(diversity=diversity), data[:1], updater, mixup)
    assert last["loss"] < first["loss"]


@pytest.mark.gpu
def test_gpu_step_equals_cpu_step_in_float32(tiny):
    losses = []
    for name in ("cpu", "cuda"):
        specs = [spec for spec in RECIPE if "cno" not in spec]  # its probes are the device's own
        model, diversity = tiny(*specs)
        model.to(name)
        updater = Updater(adamw(model), Precision(torch.device(name), "float32"))
        mixup = Mixup(patch_size=(8, 8))
        losses.append(train_one_epoch(model, Objective(diversity=diversity), batches(), updater, mixup)["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_evaluation_counts_every_sample_once(tiny):
    model, _ = tiny()
    measure = Diversity([parse_spec("patch.pairwise_cosine@last=1"), parse_spec("weight.cno=1")], depth=3)
    model = DiverseViT(model.backbone, measured=Needs(**measure.needs))
    data = [random_batch(size, seed=size) for size in (5, 5, 3, 1)]
    state = torch.get_rng_state()
    results = evaluate(model, data, CPU, measure)
    assert torch.equal(torch.get_rng_state(), state)  # measuring CNO draws, but training draws the same
    model.eval()
    images, targets = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    with torch.no_grad():
        logits = model.backbone(images)
        shown = model(images, needs=Needs(**measure.needs))
    assert results["acc1"] == pytest.approx(100 * (logits.argmax(1) == targets).double().mean().item())
    assert results["acc5"] == 100.0  # five classes
    assert results["loss"] == pytest.approx(F.cross_entropy(logits, targets).item(), rel=1e-5)
    patches = F.normalize(shown.tokens[2][:, 1:], dim=-1)
    gram = (patches @ patches.mT).abs()
    expected = (gram.sum((1, 2)) - 16).mean() / (16 * 15)
    assert results["patch.pairwise_cosine@last"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["weight.cno@all"] > 0


class Once:
    """Batches that can be read one time only."""

    def __init__(self, data: list) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        data, self.data = self.data, None
        return iter(data)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_models_are_evaluated_in_one_pass(tiny, dtype):
    """Each gives the bits that it gives alone; the first one is measured; training's random numbers stay."""
    precision = Precision(torch.device("cpu"), dtype)
    measure = Diversity([parse_spec("patch.pairwise_cosine@last=1"), parse_spec("weight.cno=1")], depth=3)
    models = [tiny(drop_path_rate=0.5)[0] for _ in range(3)]
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    models[0] = DiverseViT(models[0].backbone, measured=Needs(**measure.needs))
    data = [random_batch(size, seed=size) for size in (5, 5, 3, 1)]
    alone = [evaluate(model, data, precision, None if number else measure) for number, model in enumerate(models)]
    told, state = [], torch.get_rng_state()
    together = evaluate_together(models, Once(data), precision, measure, told.append)
    assert together == alone and len({results["loss"] for results in together}) == 3
    assert list(together[0]) == ["loss", "acc1", "acc5", *measure.names] and len(together[1]) == 3
    assert told == [1, 2, 3, 4] and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("classes", [3, 5, 6, 30])
def test_top_1_and_top_5(tiny, classes):
    """Against ranks counted one by one; with at most five classes every image is among the first five."""
    model, _ = tiny(num_classes=classes)
    images, targets = random_batch(40, classes=classes)
    results = evaluate(model, [(images[:25], targets[:25]), (images[25:], targets[25:])], CPU)
    with torch.no_grad():
        logits = model.backbone.eval()(images).tolist()
    ranks = [sum(other > row[label] for other in row) for row, label in zip(logits, targets.tolist(), strict=True)]
    assert results["acc1"] == pytest.approx(100 * sum(rank < 1 for rank in ranks) / 40)
    assert results["acc5"] == pytest.approx(100 * sum(rank < 5 for rank in ranks) / 40)


def test_evaluation_of_a_distilled_student_averages_its_heads(tiny):
    model, _ = tiny(name="deit_tiny_distilled_patch16_224")
    model.backbone.set_distilled_training(True)
    images, targets = random_batch()
    model.train()
    shown = model(images)
    assert shown.dist_logits.shape == (4, 5)
    results = evaluate(model, [(images, targets)], CPU)
    expected = F.cross_entropy((shown.logits + shown.dist_logits) / 2, targets)
    assert results["loss"] == pytest.approx(expected.item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------------------
# Optimiser and schedule


def run_args(*argv: str):
    return config.resolve(["--data-set", "DIGITS", "--device", "cpu", *argv])


def rates(*argv: str) -> list[float]:
    """The learning rate of every epoch, through main's own schedule and loop."""
    args = run_args("--input-size", "16", "--num_workers", "0", *argv)
    seen = []

    def train_one_epoch(wrapped, objective, loader, updater, *others, **options):
        seen.append(updater.optimizer.param_groups[0]["lr"])
        return {"loss": 0.0}

    def evaluate_together(networks, *others):
        return [{"acc1": 0.0, "acc5": 0.0, "loss": 0.0} for _ in networks]

    val_set, _ = build_dataset(False, args)
    train_set, _ = build_dataset(True, args)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "train_one_epoch", train_one_epoch)
        patch.setattr(main, "evaluate_together", evaluate_together)
        model = DiverseViT(nn.Linear(2, 2))
        monitor, trackers = Monitor(args, model.backbone, val_set), trainer.build_trackers(args)
        mixing, loader = Mixup(), build_train_loader(args, train_set, 1, 0, CPU.device)
        run_state = build_run(args, model, CPU, mixing, loader)
        task = main.Classification(args, val_set, len(train_set), Diversity([], 0), monitor, CPU)
        work = trainer.Work(args, run_state, Objective(), mixing, loader, CPU)
        trainer.train(work, task, Signals(), trackers)
    return seen


def cosine_rate(epoch: int, epochs: int = 300) -> float:
    """The reference's sequence, which lags one epoch: the rate of epoch e is the schedule at e - 1."""
    t = max(epoch - 1, 0)
    if t < 5:
        return 1e-6 + t * (1e-3 - 1e-6) / 5
    return 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + math.cos(math.pi * t / epochs))


def test_learning_rates_of_all_300_epochs(monkeypatch, capsys):
    """8 processes x 128 images: 5e-4 * 1024 / 512 = 1e-3."""
    monkeypatch.setattr(schedules, "world_size", lambda: 8)
    monkeypatch.setattr(trainer, "distribute", lambda model, device: model)
    seen = rates("--no-model-ema")
    assert len(seen) == 300
    assert seen == pytest.approx([cosine_rate(epoch) for epoch in range(300)], rel=1e-9)
    published = [1e-6, 1e-6, 2.008e-4, 4.006e-4, 6.004e-4, 8.002e-4, 9.993e-4, 9.990e-4]
    assert seen[:8] == pytest.approx(published, rel=1e-4)
    assert seen[-1] == pytest.approx(1.0109e-5, rel=1e-4)


def test_cooldown_epochs_never_run(capsys):
    """As in the reference: exactly --epochs epochs are trained, at the same rates."""
    assert rates("--epochs", "4", "--cooldown-epochs", "50") == rates("--epochs", "4", "--cooldown-epochs", "0")


def test_rate_scaling_and_its_switch(capsys):
    assert rates("--epochs", "1", "--warmup-epochs", "0", "--batch-size", "256") == [pytest.approx(2.5e-4)]
    assert rates("--epochs", "1", "--warmup-epochs", "0", "--unscale-lr") == [pytest.approx(5e-4)]


def test_start_epoch_continues_the_schedule(capsys):
    full = rates("--epochs", "9", "--unscale-lr", "--no-model-ema")
    late = rates("--epochs", "9", "--unscale-lr", "--no-model-ema", "--start_epoch", "6")
    assert late == full[6:]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--sched", "constant"], [1.0] * 5),
        (["--sched", "step", "--decay-epochs", "2", "--decay-rate", "0.5"], [1, 1, 1, 0.5, 0.5]),
        (["--sched", "poly", "--min-lr", "0", "--decay-rate", "1"], [1, 1, 0.8, 0.6, 0.4]),
        (["--sched", "tanh"], None),
        (["--sched", "multistep"], [1] * 5),
    ],
)
def test_other_schedules(flags, expected, capsys):
    seen = rates("--epochs", "5", "--lr", "1", "--unscale-lr", "--warmup-epochs", "0", *flags)
    if expected is None:
        assert seen[-1] < seen[0]
    else:
        assert seen == pytest.approx(expected)


def test_plateau_follows_the_accuracy(capsys):
    flags = ["--sched", "plateau", "--patience-epochs", "1", "--dr", "0.5", "--warmup-epochs", "1", "--epochs", "8"]
    seen = rates("--lr", "1", "--unscale-lr", *flags)  # the accuracy never improves
    assert seen == pytest.approx([1e-6, 1e-6, 1, 1, 1, 0.5, 0.5, 0.25])


def test_warmup_and_noise_flags(capsys):
    base = ["--epochs", "4", "--lr", "1", "--unscale-lr", "--sched", "constant"]
    assert rates(*base, "--warmup-epochs", "2", "--warmup-lr", "0.5") == pytest.approx([0.5, 0.5, 0.75, 1.0])
    noisy = rates(
        *base, "--warmup-epochs", "0", "--lr-noise", "0.2", "0.9", "--lr-noise-std", "0.5", "--lr-noise-pct", "0.3"
    )
    assert any(rate != 1 for rate in noisy) and all(abs(rate - 1) <= 0.3 for rate in noisy)


def test_the_terms_choose_the_mixing_scheme(tiny, monkeypatch):
    """The scheme whose labels a term takes; of two only one can mix a batch."""

    class Other:
        def __init__(self, **options):
            self.options = options

    monkeypatch.setitem(build.SCHEMES, "patch.other", build.Scheme(Other, build.OwnHead))
    model, diversity = tiny("patch.mixing=1")
    mixing = build.build_mixing(run_args("--seed", "3"), model.backbone, diversity)
    assert isinstance(mixing, Mixup) and mixing.patch_size == (8, 8)
    monkeypatch.setattr(Diversity, "labelled", ["patch.other:soft"])
    other = build.build_mixing(run_args("--mixup", "0.3", "--seed", "3"), model.backbone, diversity)
    assert isinstance(other, Other) and (other.options["mixup_alpha"], other.options["seed"]) == (0.3, 3)
    monkeypatch.setattr(Diversity, "labelled", ["patch.mixing", "patch.other"])
    with pytest.raises(UserError, match=r"patch.mixing and patch.other mix images in different ways: drop one"):
        build.find_scheme(diversity.labelled)
    monkeypatch.setattr(Diversity, "labelled", ["patch.unknown"])
    with pytest.raises(ValueError, match=r"patch.unknown takes labels, but has no line in build.SCHEMES"):
        build.find_scheme(diversity.labelled)
    monkeypatch.setattr(Diversity, "labelled", [])
    assert build.build_mixing(run_args(), model.backbone, diversity).patch_size is None


def test_optimizer_flags(tiny):
    model, _ = tiny()
    args = run_args(
        "--opt", "adamw", "--opt-eps", "1e-6", "--opt-betas", "0.8", "0.9", "--weight-decay", "0.1", "--lr", "1"
    )
    optimizer = runs.build_run(args, model, CPU, no_mixing()).optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0.1 for p in group["params"]}
    for name, parameter in model.backbone.named_parameters():
        spared = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) != spared, name
    for group in optimizer.param_groups:
        assert group["eps"] == 1e-6 and tuple(group["betas"]) == (0.8, 0.9)
    sgd = runs.build_run(run_args("--opt", "momentum", "--momentum", "0.5"), model, CPU, no_mixing()).optimizer
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["momentum"] == 0.5


def test_ema_flags(tiny):
    model, _ = tiny()
    assert runs.build_run(run_args("--no-model-ema"), model, CPU, no_mixing()).ema is None
    ema = runs.build_run(run_args("--model-ema-decay", "0.5", "--model-ema-force-cpu"), model, CPU, no_mixing()).ema
    assert ema.decay == 0.5 and next(ema.module.parameters()).device.type == "cpu"
    assert isinstance(runs.build_run(run_args(), model, CPU, no_mixing()), RunState)
