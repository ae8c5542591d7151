"""What readers pass over is counted and said; what would hang them or be read twice is not."""

from __future__ import annotations

import io
import os
import shutil
import socket
import subprocess
import tarfile

import pytest
from pictures import no_augmentation, photo, save_photo
from PIL import Image

from datasets import build_dataset
from errors import UserError
from images.tree import endings, is_image


def small_set(root, count=2):
    for half in ("train", "val"):
        for label, name in enumerate(["cat", "dog"]):
            for number in range(count):
                save_photo(root / half / name / f"{number}.png", seed=10 * label + number)
    return root


def packed(root):
    """The folders in tar files, and in shards without labels."""
    for half in ("train", "val"):
        subprocess.run(["tar", "cf", root / f"{half}.tar", half], cwd=root, check=True)
    (root / "shards").mkdir()
    for half in ("train", "val"):
        shutil.copy(root / f"{half}.tar", root / "shards")


FORMS = ["IMNET", "tar", "wds/shards"]


def build(root, data_set="IMNET", is_train=True, **flags):
    return build_dataset(is_train, no_augmentation(data_set=data_set, data_path=str(root), **flags))


@pytest.mark.parametrize("data_set", FORMS)
def test_what_is_passed_over_is_said_by_kind(tmp_path, capsys, data_set):
    small_set(tmp_path)
    for name in ("n.txt", "m.txt", "README", ".hidden.png", "._0.png", "a.mp4", "Thumbs.db", "b.eps"):
        (tmp_path / "train" / "cat" / name).write_bytes(b"no image")
    for folder in ("__MACOSX/cat", ".ipynb_checkpoints"):
        save_photo(tmp_path / "train" / folder / "x.png")
    (tmp_path / "train" / "dog" / "lost").symlink_to("nowhere")
    packed(tmp_path)
    images, classes = build(tmp_path, data_set)
    assert classes == ["cat", "dog"] and len(images) == 4
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped in")]
    assert len(said) == 1
    for kind in ("2 .txt (e.g. ", "1 without an ending (e.g. ", "1 .mp4", "1 .db", "1 .eps", "1 broken links"):
        assert kind in said[0]
    assert "hidden (e.g. " in said[0]


@pytest.mark.parametrize("data_set", FORMS)
def test_nothing_is_said_where_nothing_is_passed_over(tmp_path, capsys, data_set):
    small_set(tmp_path)
    packed(tmp_path)
    build(tmp_path, data_set)
    assert "skipped" not in capsys.readouterr().out


def test_images_in_no_class_folder_are_counted(tmp_path, capsys):
    small_set(tmp_path)
    save_photo(tmp_path / "train" / "loose.png")
    assert len(build(tmp_path)[0]) == 4
    assert "1 images in no class folder (e.g. loose.png)" in capsys.readouterr().out


def test_all_that_pillow_decodes_is_read():
    """One list: every ending under which Pillow writes a picture that it can read again."""
    Image.init()
    for ending, form in Image.registered_extensions().items():
        if form not in Image.SAVE or form not in Image.OPEN:
            continue
        if form == "IM":  # Pillow warns that it will go
            continue
        file = io.BytesIO()
        try:
            photo().resize((64, 64)).save(file, form)
            with Image.open(io.BytesIO(file.getvalue())) as image:
                image.load()
        except (OSError, ValueError, KeyError, NotImplementedError):
            continue
        if form not in ("EPS", "HDF5", "BUFR", "GRIB", "WMF"):  # which another program draws, or none
            assert is_image(f"a{ending.upper()}"), ending
    assert {".jfif", ".avif", ".gif", ".jp2", ".jpe", ".webp", ".mpo"} <= endings()
    assert not any(is_image(name) for name in ("a.txt", "a", ".png", "a.eps", "a.mpg", "a.h5"))


# ------------------------------------------------------------------------------------------------------------
# Circles, special files, links


@pytest.mark.parametrize("links", [1, 3])
def test_folders_that_lead_back_end_in_time(tmp_path, capsys, links):
    small_set(tmp_path)
    for number in range(links):
        (tmp_path / "train" / "cat" / f"again{number}").symlink_to(".")
        (tmp_path / "train" / "dog" / f"up{number}").symlink_to("..")
    images, classes = build(tmp_path)
    assert classes == ["cat", "dog"] and len(images) == 4
    assert "folders that were read already" in capsys.readouterr().out


def test_a_folder_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    """Nothing of it is left out; the tests' user may read everything, so the system's answer is played."""
    small_set(tmp_path)
    look = os.scandir

    def scandir(folder):
        if str(folder).endswith("train/dog"):
            raise PermissionError(13, "Permission denied", str(folder))
        return look(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cannot read the folder .*train/dog: Permission denied; make it readable"):
        build(tmp_path)


def test_a_top_that_leads_to_itself_alone(tmp_path):
    for half in ("train", "val"):
        (tmp_path / half).mkdir()
        (tmp_path / half / "again").symlink_to(".")
    with pytest.raises(UserError, match="holds no images"):
        build(tmp_path)


def special(path, kind):
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        own = socket.socket(socket.AF_UNIX)
        folder = os.getcwd()
        os.chdir(path.parent)  # the names of sockets are short
        own.bind(path.name)
        os.chdir(folder)
        own.close()
    else:
        path.symlink_to("nowhere")


@pytest.mark.parametrize(
    ("kind", "called"),
    [("FIFO", "a FIFO"), ("device", "a device"), ("socket", "a socket"), ("link", "a link that leads nowhere")],
)
def test_special_files_are_refused_not_opened(tmp_path, kind, called):
    small_set(tmp_path)
    special(tmp_path / "train" / "cat" / "x.png", kind)
    with pytest.raises(UserError, match=rf"train/cat/x\.png is {called}, not a file: repair or remove it"):
        build(tmp_path)
    (tmp_path / "shards").mkdir()
    special(tmp_path / "shards" / "train-0.tar", kind)
    with pytest.raises(UserError, match=rf"shards/train-0\.tar is {called}, not a file"):
        build(tmp_path, "wds/shards")
    special(tmp_path / "train.tar", kind)
    with pytest.raises(UserError, match=r"no file .*/train\.tar"):
        build(tmp_path, "tar")


@pytest.mark.parametrize("data_set", ["tar", "wds/shards"])
@pytest.mark.parametrize("kind", [tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_special_members_are_refused(tmp_path, data_set, kind):
    small_set(tmp_path)
    packed(tmp_path)
    for path in (tmp_path / "train.tar", tmp_path / "shards" / "train.tar"):
        with tarfile.open(path, "a") as tar:
            member = tarfile.TarInfo("train/cat/x.png")
            member.type = kind
            tar.addfile(member)
    with pytest.raises(UserError, match=r"train\.tar:train/cat/x\.png is a device or a FIFO"):
        build(tmp_path, data_set)


def test_files_with_holes_are_refused(tmp_path):
    small_set(tmp_path)
    with open(tmp_path / "train" / "cat" / "0.png", "r+b") as file:
        file.truncate(2**20)
    subprocess.run(["tar", "-c", "--sparse", "-f", "train.tar", "train"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"cat/0\.png is stored with holes \(tar --sparse\)"):
        build(tmp_path, "tar")


# ------------------------------------------------------------------------------------------------------------
# Tar files in part


@pytest.mark.parametrize("data_set", ["tar", "wds/shards"])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (
            lambda content: content[: content.rindex(b"train/dog/1.png")],
            "it ends at byte 5120 without a mark of its end",
        ),
        (
            lambda content: content + content,
            "it goes on after its end at byte .*; join tar files with tar --concat",
        ),
        (
            lambda content: content.replace(b"train/dog/0.png", b"train\xffdog/0.png"),
            "its header at byte .* is damaged",
        ),
    ],
    ids=["cut off", "joined by cat", "a bad header"],
)
def test_tar_files_are_never_read_in_part(tmp_path, data_set, damage, said):
    """Python's tarfile would end without a word at each of these places."""
    small_set(tmp_path)
    packed(tmp_path)
    for path in (tmp_path / "train.tar", tmp_path / "shards" / "train.tar"):
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=rf"cannot read the tar file .*train\.tar: {said}") as caught:
        build(tmp_path, data_set)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--gzip", "--bzip2", "--xz"])
def test_compressed_tar_files_say_what_to_do(tmp_path, option):
    small_set(tmp_path)
    (tmp_path / "shards").mkdir()
    ending = {"--gzip": "gz", "--bzip2": "bz2", "--xz": "xz"}[option]
    for half in ("train", "val"):
        subprocess.run(["tar", option, "-cf", f"{half}.tar.{ending}", half], cwd=tmp_path, check=True)
        shutil.copy(tmp_path / f"{half}.tar.{ending}", tmp_path / "shards")
    with pytest.raises(UserError, match=rf"no file .*train\.tar; train\.tar\.{ending} is compressed, unpack it"):
        build(tmp_path, "tar")
    with pytest.raises(
        UserError, match=rf"the shard .*\.tar\.{ending} is compressed.*: unpack it to a plain \.tar"
    ):
        build(tmp_path, "wds/shards")
    for half in ("train", "val"):
        shutil.move(tmp_path / f"{half}.tar.{ending}", tmp_path / f"{half}.tar")
    with pytest.raises(
        UserError, match=r"train\.tar: it is compressed, so that its images cannot be read one by one"
    ):
        build(tmp_path, "tar")


def test_compressed_classes_in_a_tar_file(tmp_path):
    small_set(tmp_path)
    for name in ("cat", "dog"):
        subprocess.run(["tar", "czf", f"{name}.tar.gz", "-C", "train", name], cwd=tmp_path, check=True)
    subprocess.run(["tar", "cf", "train.tar", "cat.tar.gz", "dog.tar.gz"], cwd=tmp_path, check=True)
    with pytest.raises(UserError, match=r"train\.tar: cat\.tar\.gz in it is compressed; unpack it first"):
        build(tmp_path, "tar")


def test_shards_of_neither_half_are_said(tmp_path, capsys):
    small_set(tmp_path)
    packed(tmp_path)
    shutil.copy(tmp_path / "train.tar", tmp_path / "shards" / "data-0.tar")
    build(tmp_path, "wds/shards")
    assert "1 tar files of neither half (e.g. data-0.tar)" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------------
# Shards


def write_halves(root, png, **labels):
    """A shard for each half, with a picture for each label."""
    for half, texts in labels.items():
        members = [(f"{n}.png", png()) for n in range(len(texts))]
        write_shard(
            root / f"{half}.tar", [*members, *((f"{n}.cls", text.encode()) for n, text in enumerate(texts))]
        )


def write_shard(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def png():
    def make(seed=0):
        file = io.BytesIO()
        photo(seed).save(file, "PNG")
        return file.getvalue()

    return make


def test_keys_with_dots(tmp_path, png):
    """WebDataset would end these keys at the first dot, and call the label `v1.cls`."""
    for half in ("train", "val"):
        members = [("a.v1.png", png()), ("a.v1.cls", b"0"), ("b.v1.png", png()), ("b.v1.cls", b"1")]
        write_shard(tmp_path / f"{half}.tar", members)
    images, classes = build(tmp_path, "wds/")
    assert classes == ["0", "1"] and [label for _, label in images.samples] == [0, 1]


def test_further_images_of_a_sample_are_counted(tmp_path, png, capsys):
    for half in ("train", "val"):
        further = [(f"{key}.{kind}", b"?") for key in "ab" for kind in ("mask.png", "json")]
        members = [("a.png", png()), ("a.cls", b"0"), ("b.png", png()), ("b.cls", b"1")]
        write_shard(tmp_path / f"{half}.tar", [*further, *members])
    assert len(build(tmp_path, "wds/")[0]) == 2
    said = capsys.readouterr().out
    assert "2 further images of a sample (e.g. a.mask.png)" in said and "2 .json" in said


def test_members_stored_twice_count_once_the_last_one(tmp_path, png):
    for half in ("train", "val"):
        pair = [("a.png", png(1)), ("a.cls", b"0"), ("b.png", png(2)), ("b.cls", b"1")]
        write_shard(tmp_path / f"{half}.tar", [*pair, ("./a.png", png(3)), ("a.cls", b"1"), ("b.cls", b"0")])
    images, _ = build(tmp_path, "wds/")
    assert sorted(label for _, label in images.samples) == [0, 1]
    pixels = {label: images.read(source).tobytes() for source, label in images.samples}
    assert pixels == {1: photo(3).tobytes(), 0: photo(2).tobytes()}


def test_halves_share_their_classes(tmp_path, png):
    """A half that lacks the highest class has it nevertheless."""
    write_halves(tmp_path, png, train="019", val="10")
    assert len(build(tmp_path, "wds/", is_train=False)[1]) == len(build(tmp_path, "wds/")[1]) == 10


@pytest.mark.parametrize(
    ("train", "val", "said"),
    [
        (("cat", "dog"), ("dog", "emu"), "have images of class emu, .*'cat', 'dog'.*'dog', 'emu'"),
        (("0", "1"), ("cat", "dog"), "labelled in different ways: '0', '1' and 'cat', 'dog'"),
        (("0", "cat"), ("0", "0"), "of the train shards in .* are class indices, but also 'cat'"),
        (("0", "-1"), ("0", "0"), "class indices, but also '-1'"),
        (("0", "1.5"), ("0", "0"), "class indices, but also '1.5'"),
        (("0", ""), ("0", "0"), r"the label 1.cls in the shard .*train\.tar is empty"),
    ],
)
def test_labels_that_cannot_be_meant(tmp_path, png, train, val, said):
    write_halves(tmp_path, png, train=train, val=val)
    for is_train in (True, False):
        with pytest.raises(UserError, match=said):
            build(tmp_path, "wds/", is_train=is_train)


def test_names_in_other_orders_mean_the_same(tmp_path, png):
    write_halves(tmp_path, png, train=["dog", "cat", "eel"], val=["eel", "dog"])
    assert [label for _, label in build(tmp_path, "wds/")[0].samples] == [1, 0, 2]
    images, classes = build(tmp_path, "wds/", is_train=False)
    assert classes == ["cat", "dog", "eel"] and [label for _, label in images.samples] == [2, 1]
