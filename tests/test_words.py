"""Words from files and flags: escaped where they are shown, refused in one line where they are none."""

from __future__ import annotations

import os
import tarfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import main
from errors import UserError, escaped, reason, shown
from options import config
from options.flags import Args, get_args_parser
from options.parser import declared
from options.paths import PATHS, usable
from segmentation.options import Flags

SECONDS = 10
RED, LEFT, ODD = "\x1b[31m", "\u202e", "\udcff"  # a colour, a mark that turns the direction, a byte that is no text
WILD = f"a{RED}b\rc\nd{LEFT}e\x9bf"
TAMED = r"a\x1b[31mb\rc\nd\u202ee\x9bf"


def text_of(error: UserError) -> str:
    """What a user reads, once it is known to be one line that does nothing to a terminal."""
    assert str(error).isprintable() and len(str(error)) < 3000
    return str(error)


# ------------------------------------------------------------------------------------------------------------
# Escapes


def test_a_terminal_obeys_nothing():
    assert shown(WILD) == TAMED
    assert escaped(WILD) == TAMED.replace(r"\n", "\n")
    assert shown(ODD) == r"\udcff" and shown("naïve 名前 C:\\x") == "naïve 名前 C:\\x"
    assert shown("a" * 1000, 9) == "aa ... aa"
    assert reason(ValueError(f"one\n  two{RED}")) == r"one two\x1b[31m"


@given(st.text(st.characters(exclude_categories=[])), st.integers(9, 300))
def test_what_is_shown_is_short_and_printable(text, limit):
    once = shown(text, limit)
    assert once.isprintable() and len(once) <= limit
    assert shown(once, limit) == once
    assert once == text or not text.isprintable() or len(text) > limit
    assert all(line.isprintable() for line in escaped(text).split("\n"))


# ------------------------------------------------------------------------------------------------------------
# Names in data sets


def image() -> bytes:
    file = BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, BytesIO(content))


def folders(root: Path, **classes: str) -> None:
    """train/ and val/ with a class folder each for a name; 'empty' ones hold no image."""
    for kind, name in classes.items():
        for half in ("train", "val"):
            (root / half / name).mkdir(parents=True)
            if kind != "empty":
                (root / half / name / "1.png").write_bytes(image())


def check(root: Path, data_set: str, capfd: Any) -> tuple[int, str]:
    """The exit code of --check-data, and all that was printed, which must be lines of harmless text."""
    code = main.main(["--data-path", str(root), "--data-set", data_set, "--check-data", "--num_workers", "0"])
    output, errors = capfd.readouterr()
    assert all(line.isprintable() for line in (output + errors).split("\n"))
    assert errors.count("\n") <= 1
    return code, output + errors


def test_an_empty_class_folder(tmp_path, capfd):
    folders(tmp_path, cat="cat", dog="dog", empty=WILD)
    code, said = check(tmp_path, "IMNET", capfd)
    assert code == 2 and f"class folder {TAMED} of" in said


def test_class_folders_of_one_half_alone(tmp_path, capfd):
    folders(tmp_path, cat="cat", dog="dog")
    (tmp_path / "val" / WILD).mkdir()
    code, said = check(tmp_path, "IMNET", capfd)
    assert code == 2 and TAMED in said


def test_what_is_passed_over(tmp_path, capfd):
    folders(tmp_path, cat="cat", dog="dog")
    (tmp_path / "train" / "cat" / f"{WILD}.t{RED}xt").touch()
    (tmp_path / "train" / "cat" / f"x.{ODD}").touch()
    code, said = check(tmp_path, "IMNET", capfd)
    assert code == 0 and TAMED in said and r".t\x1b[31mxt" in said


def test_members_of_shards(tmp_path, capfd):
    for half in ("train", "val"):
        write_tar(tmp_path / "data" / f"{half}-0.tar", {f"{WILD}.png": image(), "b.png": image(), "b.cls": b"1"})
    code, said = check(tmp_path, "wds/data", capfd)
    assert code == 2 and f"has {TAMED}.png without {TAMED}.cls" in said


def test_labels_of_shards(tmp_path, capfd):
    label = f"c{RED}".encode()
    for half in ("train", "val"):
        write_tar(tmp_path / "data" / f"{half}-0.tar", {"a.png": image(), "a.cls": label + half.encode()})
    code, said = check(tmp_path, "wds/data", capfd)
    assert code == 2 and r"c\x1b[31mval" in said


@pytest.mark.parametrize("label", ["99999999999", "9" * 999])
def test_a_label_beyond_all_classes(tmp_path, capfd, label):
    for half in ("train", "val"):
        write_tar(tmp_path / "data" / f"{half}-0.tar", {"a.png": image(), "a.cls": label.encode()})
    code, said = check(tmp_path, "wds/data", capfd)
    assert code == 2 and "class indices are less than 100,000" in said


# ------------------------------------------------------------------------------------------------------------
# YAML


def read(folder: Path, content: str | bytes) -> config.Resolved:
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    start = time.perf_counter()
    try:
        return config.resolve(["--config", str(path)])
    finally:
        assert time.perf_counter() - start < SECONDS


def laughs(levels: int) -> str:
    """9 to the power of `levels` values, in a few hundred bytes."""
    lines = ["l0: &l0 [ha]"] + [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, levels + 1)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    lines = ["l0: &l0 {a: 1}"]
    lines += [f"l{i}: &l{i} {{<<: [{', '.join([f'*l{i - 1}'] * 9)}]}}" for i in range(1, levels + 1)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("lr: 2001-99-99", "'2001-99-99' is no timestamp"),
        ("lr: !!int abc", "'abc' is no int"),
        ("lr: !!int ''", "'' is no int"),
        ("lr: 0b_", "'0b_' is no int"),
        ("lr: !!float abc", "'abc' is no float"),
        ("lr: !!bool abc", "'abc' is no bool"),
        ("lr: !!timestamp x", "'x' is no timestamp"),
        ("lr: !!binary x", "base64"),
        (f"seed: {'9' * 5000}", "is no int"),
        (f"model_kwargs: {{depth: 0x{'f' * 5000}}}", "is no int (too large)"),
        ("model_kwargs: {1: 2}", "model_kwargs must map names to values"),
        ("epochs: 1\nepochs: 2\n", "'epochs' is given twice"),
        ("model_kwargs: {depth: 1, depth: 2}", "'depth' is given twice"),
        ("a: " + "[" * 100_000, "lists in lists, deeper than 50"),
        ("- " * 5000, "lists in lists, deeper than 50"),
        (laughs(9), "repeats its anchors"),
        (merges(12), "repeats its anchors"),
        ("measure: &a [*a]", "repeats its anchors"),
        (b"lr: \xff", "is not YAML"),
        (f"{RED}: 1".replace(RED, r'"\e[31m"'), r"unknown key '\x1b[31m'"),
        (r'lr: "\e[31m\u202e"', r"not '\x1b[31m\u202e'"),
        (r'data_path: "a\0b"', "has bytes that are no text"),
        (r'output_dir: "\udcff"', "has bytes that are no text"),
        (f"output_dir: {'x' * 300}", "too long"),
        *((f'{name}: "\\u2028"', r"\u2028: no such file") for name in ("resume", "finetune", "val_labels")),
        ('teacher_path: "\\e[31m.pth"', r"\x1b[31m.pth: no such file"),
        (f"resume: {'x/' * 3000}", "too long"),
        ("resume: ~nobody-lives-here/x.pth", "no home of this name"),
        ("resume: https://", "not an https address"),
        ("teacher_path: 'https://['", "not an https address"),
        ("finetune: https://host/..", "its last part is no name of a file"),
        (f"finetune: https://host/{'x' * 300}", "its last part is no name of a file"),
    ],
)
def test_what_yaml_cannot_say(tmp_path, content, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in text_of(error.value)


def test_what_yaml_may_say(tmp_path, monkeypatch):
    """Anchors, and merged keys that are given anew."""
    monkeypatch.setenv("HOME", str(tmp_path))
    content = "model_kwargs: &a {depth: 2, x: &b [1, *c]}".replace("*c", "2")
    args = read(tmp_path, f"{content}\nopt_betas: &d [0.9, 0.99]\noutput_dir: ~/runs\n")
    assert args.model_kwargs == {"depth": 2, "x": [1, 2]} and args.opt_betas == [0.9, 0.99]
    assert args.output_dir == f"{tmp_path}/runs"
    assert read(tmp_path, "<<: &a {lr: 1, seed: 2}\nlr: 3\nmodel_kwargs: {<<: {x: 1}, x: 2}").lr == 3
    names = [f"class {i}" for i in range(5000)]
    assert list(read(tmp_path, yaml.safe_dump({"class_names": names})).class_names) == names


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    for path in (str(tmp_path / "fifo"), "/dev/zero", str(tmp_path), "x" * 300, f"{tmp_path}/{ODD}", "a\0b"):
        with pytest.raises(UserError):
            config.resolve(["--config", path])
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="more than such a file can need"):
        config.resolve(["--config", str(tmp_path / "large")])


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10) | st.dates()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | scalars, inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from([*sorted(declared(Args)), "regularizers"])
odd_scalars = st.sampled_from(
    [
        "2001-99-99",
        "!!int x",
        "!!binary x",
        "!!set {a}",
        "0b_",
        "*a",
        "&a x",
        "~",
        "!x",
        "'",
        "[",
        "0o9",
        "1:99",
        "=",
        "<<",
    ]
)
lines = st.tuples(keys, odd_scalars | st.text(st.characters(codec="utf-8"), max_size=12)).map(": ".join)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(keys, values, max_size=3).map(yaml.safe_dump) | st.lists(lines, max_size=3).map("\n".join))
def test_any_yaml_is_read_or_refused_in_one_line(tmp_path_factory, content):
    folder = tmp_path_factory.mktemp("yaml")
    try:
        read(folder, content)
    except UserError as error:
        text_of(error)
    assert [path.name for path in folder.iterdir()] == ["c.yaml"]


# ------------------------------------------------------------------------------------------------------------
# Flags


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("output_dir", "x" * 300, "too long"),
        ("output_dir", "/".join(["x" * 200] * 30), "too long"),
        ("data_path", f"{ODD}{RED}", r"--data-path \udcff\x1b[31m: has bytes that are no text"),
        ("model_kwargs", {"a": [{"b": ODD}]}, "has bytes that are no text"),
        ("resume", "~nobody-lives-here/x", "no home of this name"),
        ("resume", "https://[", "not an https address"),
        ("finetune", "https://host/", "its last part is no name of a file"),
    ],
)
def test_flags_that_name_nothing(name, value, message):
    with pytest.raises(UserError) as error:
        usable({name: value})
    assert message in text_of(error.value)


def test_flags_that_name_something(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = {
        "resume": "auto",
        "output_dir": "~/out",
        "data_path": "./~x",
        "lr": 1.0,
        "finetune": "https://h/a.pth?b",
    }
    assert usable(given) == given | {"output_dir": "/home/me/out"}
    assert usable({"output_dir": "~"}) == {"output_dir": "/home/me"}
    assert set(PATHS) <= {*declared(Args), *declared(Flags)}


anything = st.text(st.characters(exclude_categories=[]), max_size=20)


@settings(deadline=None, max_examples=100)
@given(st.dictionaries(st.sampled_from(PATHS), anything | anything.map("https://{}".format), max_size=3))
def test_any_path_or_address_is_usable_or_refused(given):
    try:
        found = usable(given)
    except UserError as error:
        text_of(error)
        return
    for text in found.values():
        assert "\0" not in text and len(os.fsencode(text)) <= 4095


names = get_args_parser().long_names().items()
flags = st.sampled_from(sorted(name for name, action in names if action.dest != "help"))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(flags, anything), min_size=1, max_size=3))
def test_any_flags_are_read_or_refused(given):
    argv = [word for pair in given for word in pair]
    try:
        config.resolve(argv)
    except UserError as error:
        assert escaped(str(error)).replace("\n", "").isprintable()
