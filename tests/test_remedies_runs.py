"""Remedies in whole runs: in processes, compiled, in shards, killed and resumed, fine-tuned, exported, reported."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import forks
import pytest
import timm
import torch
import torch._dynamo as dynamo
from conftest import random_batch
from small_runs import FLAGS, make_images, saved, train
from test_resume import assert_same_run, interrupt
from torch import nn

import main
from engine import unwrap
from errors import UserError
from export import to_onnx, to_timm, to_torch
from models import DiverseViT, Needs, build_model
from models.remedies import REMEDIES, install_remedies
from redundancy.command import main as redundancy
from regularizers import MEASURES, Diversity, parse_spec, total
from regularizers.specs import all_names
from state.trained import read_trained

ENV = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "RANK", "WORLD_SIZE"))}
ENV |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
# What can stand in one model, with what it has of terms.
TOGETHER = ["attnscale", "gfsa@last", "featscale", "contranorm:learnable", "neutreno", "qk_norm", "registers"]
TOGETHER += ["layerscale:init=0.1"]
WITH_MAP = ["talking_heads:random", "reattention"]
SETS = {"together": TOGETHER, "with the map": WITH_MAP, "differential": ["differential", "featscale:paper"]}
COMPILED = ["attnscale", "contranorm", "featscale"]
KWARGS = ["patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"]
TERMS = ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--attn_cos_within_coef", "1e-2"]
TERMS += ["--weight_mha_cond_orth_coef", "5e-4"]
SIZES: dict[str, Any] = {
    "img_size": 8,
    "patch_size": 4,
    "embed_dim": 12,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 2,
}
SHAPE = (3, 8, 8)


def given(remedies: list[str]) -> list[str]:
    return [word for remedy in remedies for word in ("--remedy", remedy)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 to train on, 32 to evaluate."""
    return make_images(tmp_path_factory.mktemp("data"), per_class=16)


def model(*remedies: str, seed: int = 0, **sizes: Any) -> nn.Module:
    torch.manual_seed(seed)
    backbone = build_model("deit_tiny_patch16_224", **{**SIZES, **sizes})
    install_remedies(backbone, remedies)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return backbone


# ------------------------------------------------------------------------------------------------------------
# Runs


@pytest.mark.parametrize(
    ("which", "processes", "more"),
    [
        ("together", 2, []),
        ("with the map", 2, ["--drop", "0.1"]),
        ("differential", 1, []),
        ("compiled", 2, ["--torchcompile", "aot_eager", "--model-kwargs", *KWARGS, "depth=1"]),
    ],
)
def test_killed_and_resumed(images: Path, tmp_path: Path, which: str, processes: int, more: list[str]) -> None:
    """In the middle of an epoch, with an EMA and terms on the map: the same checkpoints, bit for bit."""
    steps, remedies = 32 // 4 // processes, SETS.get(which, COMPILED)
    words = [
        *FLAGS,
        *(TERMS if which in SETS else []),
        *given(remedies),
        *more,
        "--data-path",
        str(images),
        "--epochs",
        "2",
    ]
    words += ["--save-interval-steps", "2", "--print-freq", "1", "--resume", "auto", "--output_dir"]
    done = forks.run(processes, "main.py", *words, str(tmp_path / "whole"), env=ENV)
    assert done.returncode == 0, done.stderr[-3000:]
    place = f"Epoch 2/2  [3/{steps}]"
    code, text = interrupt(processes, [*words, str(tmp_path / "killed")], place, forks.Group.kill)
    assert code == -signal.SIGKILL and place in text, text[-3000:]
    done = forks.run(processes, "main.py", *words, str(tmp_path / "killed"), env=ENV)
    assert done.returncode == 0 and "resumed" in done.stdout, done.stderr[-3000:]
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    weights = torch.load(tmp_path / "whole" / "checkpoint.pth", weights_only=True)
    assert weights["args"]["remedy"] == remedies
    own = {name for name in weights["model"] if ".remedies." in name}
    assert own <= set(weights["model_ema"])


def test_shards_agree_with_ddp(images: Path, tmp_path: Path) -> None:
    """All that have no batch norm; re-attention is refused."""
    remedies = [*TOGETHER[:-2], "talking_heads:random@0", "registers"]
    words = [*FLAGS, *TERMS, *given(remedies), "--data-path", str(images), "--epochs", "2", "--output_dir"]
    for flags, folder in (([], "ddp"), (["--fsdp"], "shards")):
        done = forks.run(2, "main.py", *words, str(tmp_path / folder), *flags, env=ENV)
        assert done.returncode == 0, done.stderr[-3000:]
    logs = [(tmp_path / folder / "log.txt").read_text().splitlines() for folder in ("ddp", "shards")]
    for expected, found in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert found == pytest.approx(expected, rel=1e-3)
    done = forks.run(2, "main.py", *words, str(tmp_path / "no"), "--fsdp", *given(["reattention"]), env=ENV)
    assert done.returncode != 0 and "--fsdp would let the batch norms" in done.stderr


# ------------------------------------------------------------------------------------------------------------
# Compiled, recomputed


def gradients(student: DiverseViT, diversity: Diversity, images: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(2)
    student.train().zero_grad()
    captured = student(images)
    loss = captured.logits.square().mean() + total(diversity(captured, student.weights))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in student.parameters() if p.grad is not None)]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, in its compiler
@pytest.mark.parametrize("method", REMEDIES)
def test_compiled_and_recomputed(method: str) -> None:
    """One graph, whose numbers are the eager ones; and so are those of blocks that run twice."""
    specs = ["patch.cosine@all=0.5"]
    if method != "differential":
        specs.append("attn.cosine@last=0.3")
    diversity = Diversity([parse_spec(spec) for spec in specs], depth=2)
    images, _ = random_batch(4, pixels=8)
    backbone = model(method)
    expected = gradients(DiverseViT(copy.deepcopy(backbone), Needs(**diversity.needs)), diversity, images)
    dynamo.reset()
    compiled = DiverseViT(copy.deepcopy(backbone), Needs(**diversity.needs))
    compiled.compile(backend="aot_eager", fullgraph=True)
    for found, number in zip(gradients(compiled, diversity, images), expected, strict=True):
        torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-6)
    dynamo.reset()
    if method in ("neutreno", "reattention"):
        return
    recomputed = DiverseViT(copy.deepcopy(backbone), Needs(**diversity.needs))
    recomputed.backbone.set_grad_checkpointing(True)
    for found, number in zip(gradients(recomputed, diversity, images), expected, strict=True):
        torch.testing.assert_close(found, number, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("method", "why"), [("neutreno", "hands values"), ("reattention", "would count")])
def test_not_recomputed(images: Path, capsys: pytest.CaptureFixture[str], method: str, why: str) -> None:
    assert train(images, None, "--remedy", method, "--grad-checkpointing") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"--grad-checkpointing runs each block twice, and {method} {why}" in line


@pytest.mark.parametrize("which", SETS)
def test_every_regularizer(which: str) -> None:
    """All of one layer or two, at once, on a model with remedies: finite, and every parameter gets its gradient."""
    takes = {name: MEASURES[name.partition(".")[2]].takes for name in all_names()}
    specs = [parse_spec(f"{name}=1e-3") for name, kind in takes.items() if kind in ("set", "pair")]
    diversity = Diversity(specs, depth=2)
    student = DiverseViT(model(*SETS[which]), Needs(**diversity.needs))
    images, _ = random_batch(4, pixels=8)
    for gradient in gradients(student, diversity, images):
        assert gradient.isfinite().all()
    assert all(parameter.grad is not None for parameter in student.parameters())


@pytest.mark.parametrize("more", [["--remedy", "contranorm"], ["--model-kwargs", *KWARGS, "global_pool=map"]])
def test_second_derivatives(images: Path, more: list[str]) -> None:
    """What attends after the blocks leaves the fused kernel, which has none."""
    terms = ["--reg", "patch.gradient_diversity=0.1", "--mixing_coef", "1"]
    assert train(images, None, "--epochs", "1", *terms, *more) == 0


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # timm's RmsNorm, told by torch
@pytest.mark.parametrize("which", SETS)
def test_bfloat16(images: Path, which: str) -> None:
    terms = ["--reg", "attn.cosine@all=0.1"] if which != "differential" else []
    assert train(images, None, "--epochs", "1", "--amp-dtype", "bfloat16", *terms, *given(SETS[which])) == 0


def test_the_map_stays_in_autocasts_precision() -> None:
    """So that a remedy does not double its memory."""
    student = DiverseViT(model("attnscale", "gfsa"), Needs(attention=frozenset({0, 1})))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = student(torch.randn(2, *SHAPE))
    plain = DiverseViT(model(), Needs(attention=frozenset({0, 1})))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = plain(torch.randn(2, *SHAPE))
    assert [a.dtype for a in captured.attention.values()] == [a.dtype for a in expected.attention.values()]


def test_nothing_is_kept_after_a_forward_pass() -> None:
    backbone: Any = model("neutreno")
    backbone(torch.randn(2, *SHAPE))
    remedies = [block.attn.remedies.neutreno for block in backbone.blocks]
    assert all(remedy.first.tensor is None and remedy.dropped.tensor is None for remedy in remedies)
    assert unwrap(DiverseViT(backbone)).backbone is backbone


# ------------------------------------------------------------------------------------------------------------
# Weights that come and go


@pytest.fixture(scope="module")
def runs(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A plain run, and one of each set."""
    folder = tmp_path_factory.mktemp("runs")
    for name, remedies in {"plain": [], **SETS, "timm's": ["qk_norm", "registers", "layerscale:init=0.1"]}.items():
        assert train(images, folder / name, "--epochs", "1", *given(remedies)) == 0
    return {path.name: path / "checkpoint.pth" for path in folder.iterdir()}


def test_fine_tuning_from_stock_weights(images: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    """Stock weights are loaded before the remedies, those of a run with the same remedies into them."""
    rate = ["--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]
    for name, start in (("stock", "plain"), ("own", "together"), ("more", "together")):
        remedies = [*TOGETHER, *(["talking_heads"] if name == "more" else [])]
        assert train(images, tmp_path / name, *rate, "--finetune", str(runs[start]), *given(remedies)) == 0
        before, after = torch.load(runs[start], weights_only=True)["model"], saved(tmp_path / name)["model"]
        same = {key for key in before if before[key].shape == after[key].shape}
        assert set(before) - same == ({"pos_embed"} if start == "plain" else set())  # registers have rows in it
        assert all(torch.equal(before[key], after[key]) for key in same)
        assert ("blocks.0.attn.remedies.talking_heads.proj_pre.weight" in after) == (name == "more")


def test_weights_of_another_model(images: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    together, plain = str(runs["together"]), str(runs["plain"])
    cases = (
        (["--finetune", together], "is of a model with --remedy attnscale, and this one has none: give it too"),
        (["--finetune", together, *given([*TOGETHER[:-2], "registers:count=2", TOGETHER[-1]])], "give the same"),
        (
            ["--finetune", together, *given(["attnscale@0", *TOGETHER[1:]])],
            "and this one has attnscale@0: give",
        ),
        (["--eval", "--resume", together], "was trained with --remedy attnscale --remedy gfsa@last"),
        (["--eval", "--resume", plain, "--remedy", "neutreno"], "was trained with no --remedy, and this model has"),
        (["--resume", plain, "--remedy", "gfsa", "--epochs", "2"], "not gfsa: keep it"),
    )
    for flags, says in cases:
        assert train(images, None, *flags) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line


def test_registers_come_after_weights_that_have_none(images: Path, tmp_path: Path) -> None:
    """Positions of patches stay theirs, also where other remedies come with the weights."""
    assert train(images, tmp_path / "old", "--epochs", "1", *given(["attnscale"])) == 0
    rate = ["--epochs", "1", "--lr", "0", "--warmup-lr", "0", "--min-lr", "0"]
    flags = ["--finetune", str(tmp_path / "old" / "checkpoint.pth"), *given(["registers:count=3", "attnscale"])]
    assert train(images, tmp_path / "new", *rate, *flags) == 0
    before, after = (saved(tmp_path / name)["model"] for name in ("old", "new"))
    assert torch.equal(after["pos_embed"][:, 4:], before["pos_embed"][:, 1:])
    assert (
        torch.equal(after["pos_embed"][:, :1], before["pos_embed"][:, :1]) and not after["pos_embed"][:, 1:4].any()
    )
    name = "blocks.1.attn.remedies.attnscale.lamb"
    assert torch.equal(after[name], before[name])


def test_other_options_are_named(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(images, tmp_path, "--epochs", "1", *given(["neutreno:weight=0.3"])) == 0
    checkpoint = str(tmp_path / "checkpoint.pth")
    assert train(images, None, "--epochs", "1", "--finetune", checkpoint, *given(["neutreno"])) == 0
    assert "was trained with --remedy neutreno:weight=0.3, from here on neutreno" in capsys.readouterr().out
    assert train(images, None, "--eval", "--resume", checkpoint, *given(["neutreno"])) == 2
    assert "was trained with --remedy neutreno:weight=0.3, and this model has" in capsys.readouterr().err


def test_new_batch_norms_while_fine_tuning(
    images: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--epochs", "1", "--finetune", str(runs["plain"]), *given(["reattention"])]
    assert train(images, None, *flags) == 0
    assert "note: the batch norm of reattention keeps its statistics; --train-mode" in capsys.readouterr().out


def test_evaluated_again(images: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.load(runs["with the map"], weights_only=True)
    last = json.loads(state["log"][-1])
    assert train(images, None, "--eval", "--resume", str(runs["with the map"]), *given(WITH_MAP)) == 0
    assert f"Acc@1 {last['test_acc1']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("which", ["timm's", "differential"])
def test_timm_builds_what_it_has(runs: dict[str, Path], tmp_path: Path, which: str) -> None:
    """LayerScale is folded away; the rest is told to timm, which needs nothing of this project."""
    trained = read_trained(str(runs[which]), "raw")
    if which == "differential":
        trained = read_trained(str(runs[which]), "raw")
        with pytest.raises(UserError, match=re.escape("timm has no featscale:paper")):
            to_timm(trained.backbone, tmp_path / "x", SHAPE, trained.model_args, remedies=trained.remedies)
        assert not (tmp_path / "x").exists()
        return
    to_timm(trained.backbone, tmp_path / "x", SHAPE, trained.model_args, remedies=trained.remedies)
    config = json.loads((tmp_path / "x" / "config.json").read_text())["model_args"]
    assert config["reg_tokens"] == 4 and config["qk_norm"] is True and "init_values" not in config
    again = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    assert not any("ls1" in name or "remedies" in name for name in again.state_dict())
    batch = torch.randn(3, *SHAPE)
    torch.testing.assert_close(again(batch), trained.backbone(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "hiera_tiny_224"])
def test_layer_scale_is_folded_away(tmp_path: Path, name: str) -> None:
    """What is left is the stock model: timm loads it with no argument more."""
    sizes = {"img_size": 64, "num_classes": 2, "depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 16}
    if name.startswith("hiera"):
        sizes = {"img_size": 64, "num_classes": 2, "embed_dim": 12, "num_heads": 1, "stages": (1, 1, 1, 1)}
    backbone = build_model(name, **sizes)
    stock = set(backbone.state_dict())
    install_remedies(backbone, ["layerscale:init=0.5"])
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    expected = backbone.eval()(torch.ones(1, 3, 64, 64))
    to_timm(backbone, tmp_path, (3, 64, 64), sizes, remedies=["layerscale:init=0.5"])
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert set(again.state_dict()) == stock
    torch.testing.assert_close(again(torch.ones(1, 3, 64, 64)), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(backbone(torch.ones(1, 3, 64, 64)), expected)  # left as it was


@pytest.mark.parametrize("method", REMEDIES)
def test_a_program_needs_torch_alone(tmp_path: Path, method: str) -> None:
    """Hooks of the remedies go along; those that only watched do not."""
    student = DiverseViT(model(method), Needs(tokens=frozenset({0})))
    exported = to_torch(student, tmp_path, SHAPE)
    assert exported.difference < 1e-5
    batch = torch.randn(5, *SHAPE)
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(batch), student.eval()(batch).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("specs", [TOGETHER, WITH_MAP])
def test_onnx(tmp_path: Path, specs: list[str]) -> None:
    assert to_onnx(model(*specs), tmp_path, SHAPE).difference < 1e-4


def test_the_report_shows_the_model_with_its_remedies(images: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    argv = [
        "--data-path",
        str(images),
        "--output",
        str(tmp_path / "report"),
        "--num_workers",
        "0",
        "--device",
        "cpu",
    ]
    argv += ["--metrics", "patch.cosine", "attn.cosine_abs", "attn.entropy", "output"]
    assert redundancy([f"plain={runs['plain']}", f"mixed={runs['with the map']}", *argv]) == 0
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert "talking_heads:random, reattention" in json.dumps(report)


def test_knowledge_of_a_teacher_with_remedies(images: Path, runs: dict[str, Path]) -> None:
    """Its checkpoint says which it has."""
    kwargs = ["--teacher-model-kwargs", "patch_size=4", "embed_dim=12", "depth=2", "num_heads=2"]
    teacher = ["--teacher-model", "deit_tiny_patch16_224", "--teacher-path", str(runs["together"]), *kwargs]
    assert train(images, None, "--teacher-eval", *teacher) == 0


def test_a_bad_remedy_is_one_line(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is built."""
    for remedy, says in (
        ("atnscale", "unknown remedy 'atnscale'"),
        ("attnscale@9", "layer 9 is out of range"),
        ("gfsa:order", "order takes a whole number"),
    ):
        assert main.main([*FLAGS, "--data-path", str(images), "--remedy", remedy]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert says in line
