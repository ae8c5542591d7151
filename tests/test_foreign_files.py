"""Checkpoints of others: read, or refused in one line, in bounded time and before anything is made."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import time
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import create_optimizer_v2
from torch import nn

import main
from engine import Precision
from errors import UserError
from mixing.mixup import Mixup
from models import DiverseViT, build_model
from options import config
from runs import build_run
from state import checkpoint, resumption
from state.contents import check_contents, check_optimizer
from state.run_state import RunState
from state.trained import read_trained

RUN = ["--data-set", "DIGITS", "--batch-size", "4", "--device", "cpu", "--warmup-epochs", "0", "--unscale-lr"]
CPU = Precision(torch.device("cpu"))
SECONDS = 5  # for a file of a few kilobytes


@dataclass
class Config:
    lr: float = 1e-3


class Call:
    """Pickled, it is a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Built(Call):
    """A call, whose result is given a state."""

    def __init__(self, state: Any, function: Any, *arguments: Any) -> None:
        super().__init__(function, *arguments)
        self.state = state

    def __reduce__(self) -> tuple[Any, ...]:
        return *self.call, self.state


def refusal(path: Path) -> str:
    """What is said of a file, which takes no longer than it may."""
    start = time.perf_counter()
    with pytest.raises(UserError) as error:
        checkpoint.load(str(path))
    assert time.perf_counter() - start < SECONDS
    assert "\n" not in str(error.value) and len(str(error.value)) < 600 + len(str(path))
    return str(error.value)


def with_pickle(path: Path, content: bytes) -> Path:
    """An archive as torch writes it, with another pickle."""
    buffer = io.BytesIO()
    torch.save({"w": torch.arange(4.0)}, buffer)
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, content if name.endswith("data.pkl") else old.read(name))
    return path


# ------------------------------------------------------------------------------------------------------------
# Intact, but not plain


def nested() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.strided)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: PurePosixPath("runs/1"), "pathlib.PurePosixPath"),
        (lambda: types.SimpleNamespace(lr=1), "types.SimpleNamespace"),
        (Config, "test_foreign_files.Config"),
        (lambda: nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: np.arange(3), "numpy.ndarray"),
        (lambda: np.datetime64("2001-01-01"), "numpy's M8"),
        (lambda: np.dtype("f8"), "numpy.dtype"),
        (lambda: np.complex128(1), "numpy's c16"),
        (lambda: bytearray(b"abc"), "a bytearray"),
        (lambda: Call(os.mkdir, "executed"), "posix.mkdir"),
        (lambda: Call(eval, "1"), "eval"),
        (lambda: torch.eye(3).to_sparse(), "a sparse tensor"),
        (lambda: torch.eye(3).to_sparse_csr(), "a sparse tensor"),
        (lambda: torch.zeros(3, device="meta"), "a meta tensor"),
        (lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8), "a quantized tensor"),
        (nested, "a nested tensor"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning", "ignore:.*nested tensors:UserWarning")
@pytest.mark.filterwarnings("ignore:.*[Qq]uantiz")
def test_the_type_in_the_way_is_named(tmp_path, monkeypatch, make, name):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.zeros(2)}, "x": make()}, "x.pth")
    said = refusal(Path("x.pth"))
    assert said.startswith("x.pth is intact, but") and f": {name} is in the way" in said and "damaged" not in said
    assert "torch.save(model.state_dict(), FILE)" in said
    assert not Path("executed").exists()


def test_a_config_of_a_library_that_is_not_here(tmp_path):
    """As omegaconf writes it."""
    pickled = b"\x80\x02}X\x06\x00\x00\x00configcomegaconf.dictconfig\nDictConfig\n)\x81}bs."
    assert ": omegaconf.dictconfig.DictConfig is in the way" in refusal(with_pickle(tmp_path / "x.pth", pickled))


def test_other_forms_of_pickles_are_named(tmp_path):
    torch.save({"w": torch.zeros(2)}, tmp_path / "x.pth", pickle_protocol=4)
    assert ": a pickle of protocol 4, of which torch reads 2 is in the way" in refusal(tmp_path / "x.pth")
    torch.save({"w": torch.zeros(2), "b": b"bytes"}, tmp_path / "x.pth", pickle_protocol=3)
    assert ": a pickle of another form than torch's is in the way" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_numbers_of_numpy_are_pythons(tmp_path, zipped):
    numbers = {
        "acc": np.float64(71.5),
        "lr": np.float32(0.5),
        "half": np.float16(2),
        "epoch": np.int64(-3),
        "big": np.uint8(200),
        "is_best": np.bool_(True),
        "name": np.str_("naïve"),
        "swapped": np.array([1.5], ">f8")[0],
        "list": [np.int32(1), (np.float64("nan"),)],
    }
    path = tmp_path / "x.pth"
    torch.save(numbers, path, _use_new_zipfile_serialization=zipped)
    found = checkpoint.load(str(path))
    nan = found["list"].pop()[0]
    assert type(nan) is float and nan != nan
    expected = {"acc": 71.5, "lr": 0.5, "half": 2.0, "epoch": -3, "big": 200, "is_best": True, "name": "naïve"}
    assert found == expected | {"swapped": 1.5, "list": [1]}
    assert {key: type(value) for key, value in found.items()} == {
        **dict.fromkeys(["acc", "lr", "half", "swapped"], float),
        **dict.fromkeys(["epoch", "big"], int),
        **{"is_best": bool, "name": str, "list": list},
    }


def test_numbers_of_an_older_numpy_are_read(tmp_path):
    pickled = pickle.dumps({"acc": np.float64(71.5)}, protocol=2)
    assert b"numpy._core.multiarray" in pickled
    older = pickled.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert checkpoint.load(str(with_pickle(tmp_path / "x.pth", older))) == {"acc": 71.5}


def test_a_number_of_numpy_that_holds_an_object_is_refused(tmp_path):
    made = np.float64(1).__reduce__()[0]
    pickled = pickle.dumps({"acc": Call(made, np.dtype("O"), [1])}, protocol=2)
    assert "numpy's O8 is in the way" in refusal(with_pickle(tmp_path / "x.pth", pickled))


# ------------------------------------------------------------------------------------------------------------
# Small files that ask for much


def shared(make: Callable[[Any], Any], levels: int = 60) -> Any:
    """2 to the power of `levels` values, in as many objects as there are levels."""
    value = make("ha")
    for _ in range(levels):
        value = make(value)
    return value


def deep(make: Callable[[Any], Any], levels: int) -> Any:
    value = make(None)
    for _ in range(levels):
        value = make(value)
    return value


def circle() -> list[Any]:
    one: list[Any] = []
    one.append(one)
    return one


def chain(levels: int) -> bytes:
    """A tuple in a tuple in a tuple, as the key of a dict: its hash is computed by a function that calls itself."""
    return b"\x80\x02})" + b"\x85" * levels + b"Ns."


LISTS = "lists that contain one another again and again"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: {"log": shared(lambda x: [x, x])}, LISTS),
        (lambda: {"args": {"reg": shared(lambda x: {"a": x, "b": x})}}, LISTS),
        (lambda: {"args": shared(lambda x: (x, x))}, "tuples that contain one another"),
        (lambda: {"log": circle()}, "lists"),
        (lambda: {"log": deep(lambda x: [x], 300)}, "lists in lists, deeper than 100"),
        (lambda: {"w": torch.zeros(1).expand(2**40)}, "a tensor of more values than it has at w"),
        (lambda: {"w": Call(torch.Tensor, 2**28)}, "tensors of more values than it has"),
        (lambda: {"w": Call(bytearray, 2**40)}, "a bytearray"),
    ],
)
def test_a_small_file_stays_small(tmp_path, state, message):
    torch.save(state(), tmp_path / "x.pth")
    assert (tmp_path / "x.pth").stat().st_size < 20_000
    assert message in refusal(tmp_path / "x.pth")


def test_hashes_and_words_of_shared_values_are_not_computed(tmp_path):
    tuples = b"X\x01\x00\x00\x00a\x85" + b"".join(b"q%c" % i + b"h%c\x86" % i for i in range(60))
    assert "tuples that" in refusal(with_pickle(tmp_path / "x.pth", b"\x80\x02}" + tuples + b"Ns."))
    assert "tuples that" in refusal(with_pickle(tmp_path / "x.pth", chain(10**6)))
    lists = b"]q\x00" + b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(60))
    assert "is not a checkpoint" in refusal(with_pickle(tmp_path / "x.pth", b"\x80\x02" + lists + b")R."))


def test_what_a_real_checkpoint_shares_is_read(tmp_path):
    """Tied weights, the same betas in many groups, and many values of a log."""
    weight, betas = torch.arange(4.0), (0.9, 0.999)
    state = {
        "model": OrderedDict(a=weight, b=weight, c=weight.view(2, 2).mT, d=weight[:1].expand(3)),
        "groups": [{"betas": betas} for _ in range(1000)],
        "losses": [0.5] * 100_000,
    }
    torch.save(state, tmp_path / "x.pth")
    found = checkpoint.load(str(tmp_path / "x.pth"))
    assert found["groups"] == state["groups"] and found["losses"] == state["losses"]
    assert all(torch.equal(found["model"][name], state["model"][name]) for name in "abcd")


def test_attributes_that_a_file_hangs_on_its_parts_are_dropped(tmp_path):
    """They would stand in place of methods."""
    weight = torch.arange(4.0)
    weight.isfinite = 3  # type: ignore[assignment, method-assign]
    state = {"model": Built({"items": 3, "values": 4}, OrderedDict), "w": weight}
    torch.save(state, tmp_path / "x.pth")
    found = checkpoint.load(str(tmp_path / "x.pth"))
    assert dict(found["model"].items()) == {} and bool(found["w"].isfinite().all())


def test_a_fifo_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pth")
    assert "it is a device, a FIFO or a socket, not a file" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "address",
    [
        *("https://", "https://[", "https://host", "https://host/", "https://host/a/", "https://host/a/.."),
        *("https://:80/x.pth", "https://host:port/x.pth", "https://host:99999/x.pth", "https://a..b/x.pth"),
        *("https://host/\x1b[31m.pth", "https://host/a b.pth", "https://host/\udcff.pth"),
        f"https://host/{'x' * 300}.pth",
    ],
)
def test_addresses_that_are_none(tmp_path, monkeypatch, address):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    with pytest.raises(UserError) as error:
        checkpoint.load(address)
    said = str(error.value)
    assert said.isprintable() and len(said) < 400 and ("not an https address" in said or "its last part" in said)
    assert not any(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------
# Malformed: refused before anything is made


def fresh_model() -> DiverseViT:
    torch.manual_seed(0)
    return DiverseViT(build_model("deit_tiny_patch16_224", **TINY | {"depth": 1}))


def one_step(run: RunState) -> None:
    for parameter in run.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    run.optimizer.step()
    run.running.meters.update({"loss": torch.tensor(1.0)})
    run.lr_scheduler.step(run.epoch + 1, 50.0)


@pytest.fixture(scope="module")
def good() -> dict[str, Any]:
    """What a run holds in the middle of its second epoch."""
    run = build_run(config.resolve([*RUN, "--epochs", "3"]), fresh_model(), CPU, Mixup())
    one_step(run)
    run.epoch, run.running.step, run.log = 0, 1, ['{"epoch": 0}']
    return run.state_dict()


def go_on(path: Path) -> None:
    """Continue the run of a file, and take a step."""
    args = config.resolve([*RUN, "--epochs", "3", "--resume", str(path)])
    earlier = resumption.find(args)
    assert earlier is not None
    run = build_run(resumption.in_force(args, earlier), fresh_model(), CPU, Mixup(), earlier=earlier)
    run.restore_streams()
    one_step(run)
    assert isinstance(json.dumps(run.log), str) and run.place


def put(*keys: Any, value: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        state[keys[-1]] = value

    return change


def drop(*keys: Any) -> Callable[[Any], None]:
    def change(state: Any) -> None:
        for key in keys[:-1]:
            state = state[key]
        del state[keys[-1]]

    return change


OWN = "processes", 0
ADAM = "optimizer", "state", 0
MALFORMED = [
    *(put("epoch", value=value) for value in ("1", 1.5, True, None, -2, 10**30, float("nan"), [1], torch.ones(2))),
    *(put("step", value=value) for value in ("1", 1.5, True, None, -1, 10**30, [1])),
    *(put("max_acc", value=value) for value in ("71", None, float("nan"), [1], True, 10**400)),
    *(put("log", value=value) for value in ("{}", [1], ["no JSON"], ["[1]"], {"a": 1}, ['{"a":\r1}'])),
    *(put("args", value=value) for value in ([1], "args", {1: 2})),
    *(put("args", "epochs", value=value) for value in ("1", -3, [1], None, float("inf"))),
    put("args", "model_kwargs", value={"depth": torch.zeros(3)}),
    put("args", "reg", value=[3]),
    put("args", "class_names", value=3),
    *(put("processes", value=value) for value in ([], [{}], {}, [3], "two")),
    *(put(*OWN, "streams", value=value) for value in (None, {}, [1])),
    put(*OWN, "streams", "python", value=[3, torch.zeros(2), None]),
    put(*OWN, "streams", "python", 2, value="half"),
    put(*OWN, "streams", "python", value=[]),
    put(*OWN, "streams", "numpy", "state", "pos", value=10**9),
    put(*OWN, "streams", "torch", value=torch.zeros(3)),
    put(*OWN, "streams", "device", value="cuda"),
    put(*OWN, "meters", value={"names": "ab", "sums": None, "count": 0}),
    put(*OWN, "meters", value={"names": ["a"], "sums": torch.zeros(2), "count": 1}),
    put(*OWN, "meters", value={"names": ["a"], "sums": torch.zeros(1), "count": 0}),
    put(*OWN, "finite", "in_a_row", value="none"),
    put(*OWN, "replaced", value=torch.tensor([-1])),
    put(*OWN, "replaced", value=[1]),
    *(put("model", value=value) for value in ({"w": 1}, [torch.zeros(1)], {1: torch.zeros(1)})),
    put("model", "cls_token", value=torch.zeros(1, 1, 24, dtype=torch.complex64)),
    put("optimizer", value=[1]),
    put("optimizer", "state", value=[1]),
    put("optimizer", "state", 10**6, value={}),
    put("optimizer", "param_groups", value=[]),
    put("optimizer", "param_groups", 0, "params", value=3),
    put("optimizer", "param_groups", 0, "params", value=[0, 0]),
    put("optimizer", "param_groups", 0, "lr", value="fast"),
    put("optimizer", "param_groups", 0, "betas", value=(0.9,)),
    drop("optimizer", "param_groups", 0, "betas"),
    put(*ADAM, "exp_avg", value=torch.zeros(3, 3)),
    put(*ADAM, "exp_avg", value=3),
    drop(*ADAM, "exp_avg_sq"),
    put(*ADAM, "step", value=torch.tensor(-1.0)),
    put(*ADAM, "step", value="one"),
    put("lr_scheduler", value=[1]),
    put("lr_scheduler", "t_initial", value="ten"),
    put("lr_scheduler", "base_values", value=[]),
    put("lr_scheduler", "noise_range_t", value=[]),
    put("lr_scheduler", "get_lr", value=3),
    put("lr_scheduler", "param_group_field", value="rate"),
    put("scaler", value={"scale": "big"}),
    put("best", value={"epoch": "first"}),
    put("best", value={"places": 3}),
    put("updates", value="many"),
    put("changes", value=[1]),
    put("checksum", value="md5:0"),
]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_checkpoint_is_one_line(good, tmp_path, change):
    state = copy.deepcopy(good)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="with --finetune") as error:
        go_on(tmp_path / "x.pth")
    assert "x.pth" in str(error.value) and str(error.value).isprintable()


def test_the_good_one_goes_on(good, tmp_path):
    torch.save(good, tmp_path / "x.pth")
    go_on(tmp_path / "x.pth")


@pytest.mark.parametrize("change", [put("step", value="1"), put("processes", value=[{}])])
def test_nothing_is_made_of_a_malformed_one(good, tmp_path, capsys, change):
    state = copy.deepcopy(good)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    command = [*RUN, "--epochs", "3", "--resume", str(tmp_path / "x.pth"), "--output_dir", str(tmp_path / "out")]
    assert main.main(command) == 2
    said = capsys.readouterr().err
    assert said.startswith("main.py: error: ") and "x.pth is malformed" in said and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x.pth"]


@pytest.mark.parametrize(("name", "rule"), [("aa", "middle of an epoch"), ("model", "was trained with")])
def test_a_flag_of_a_file_is_shown_escaped(good, tmp_path, name, rule):
    state = copy.deepcopy(good)
    put("args", name, value="\uaac3\x1b[31m" + "x" * 900)(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=rule) as error:
        go_on(tmp_path / "x.pth")
    assert str(error.value).isprintable() and "\\uaac3" in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        put("args", "model", value=3),
        put("args", "model_kwargs", value=[1]),
        put("args", "model_kwargs", value={1: 2}),
        put("args", "input_size", value="large"),
        put("args", "class_names", value=[1]),
        put("args", "remedy", value=3),
        put("args", "remedy", value=[3]),
        put("args", value=[1]),
    ],
)
def test_a_model_that_is_described_wrongly_is_one_line(good, tmp_path, change):
    """Where a file is to be exported."""
    state = copy.deepcopy(good)
    change(state)
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x.pth is malformed, its args") as error:
        read_trained(str(tmp_path / "x.pth"))
    assert str(error.value).isprintable()


def places(state: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a state, with each of its keys."""
    items = list(state.items()) if isinstance(state, dict) else list(enumerate(state))
    for key, item in items:
        yield state, key
        if isinstance(item, (dict, list)):
            yield from places(item)


tensors = st.sampled_from(
    [
        *(torch.zeros(()), torch.zeros(0), torch.zeros(2, 3), torch.full((1,), float("nan")), torch.tensor(2**40)),
        *(torch.zeros(3, dtype=torch.uint8), torch.zeros(1, dtype=torch.complex64), torch.zeros(1).bool()),
    ]
)
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | tensors
anything = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_part_may_be_anything(good, tmp_path_factory, data):
    state = copy.deepcopy(good)
    found = [(container, key) for container, key in places(state) if container is not state["model"]]
    container, key = found[data.draw(st.integers(0, len(found) - 1))]
    if isinstance(container, list) or data.draw(st.booleans()):
        container[key] = data.draw(anything)
    else:
        del container[key]
    path = tmp_path_factory.mktemp("any") / "x.pth"
    torch.save(state, path)
    start = time.perf_counter()
    try:
        go_on(path)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 600 + len(str(path))
    assert time.perf_counter() - start < SECONDS


# ------------------------------------------------------------------------------------------------------------
# Optimizers


# One of each kind; a step of `kron` by itself takes seconds
OPTIMIZERS = ["adafactor", "adafactorbv", "adahessian", "adamp", "adamw", "adan", "lamb", "lion", "madgrad", "muon"]
OPTIMIZERS += ["nadamw", "novograd", "rmsproptf", "sgd", "sgdp", "lookahead_adamw"]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_moments_are_compared_with_the_parameters(name):
    """An optimizer's own are taken after any step, others are not."""
    layer = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
    optimizer = create_optimizer_v2(layer, opt=name, lr=1e-3, weight_decay=0.01)
    check_optimizer(optimizer.state_dict(), optimizer, "x.pth")
    if getattr(optimizer, "is_second_order", False):
        return  # it needs a graph of gradients
    for _ in range(7):
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()
        fresh = create_optimizer_v2(layer, opt=name, lr=1e-3, weight_decay=0.01)
        check_contents({"optimizer": optimizer.state_dict()}, "x.pth")
        check_optimizer(optimizer.state_dict(), fresh, "x.pth")
    saved = copy.deepcopy(optimizer.state_dict())
    moments = [
        (values, key)
        for values in saved["state"].values()
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.ndim
    ]
    for values, key in moments[:1]:
        values[key] = torch.zeros(3, 3, 3)
        with pytest.raises(UserError, match=rf"x.pth: {key} of the optimizer's parameter \d+ is a tensor of shape"):
            check_optimizer(saved, fresh, "x.pth")
