"""Put Fashion-MNIST's files where `--data-set torch/fashion_mnist --data-path FOLDER` reads them.

    python script/fashion_mnist.py FOLDER
    python main.py --config configs/fashion.yaml --data-path FOLDER

The four files go, unpacked, to FOLDER/FashionMNIST/raw. What is missing there comes from the first of these places:

1. FOLDER/FashionMNIST/raw itself, where the files lie packed (.gz);
2. Debian's package dataset-fashion-mnist, if it is installed;
3. the same package, downloaded by apt-get and unpacked in a temporary folder. It is not installed, and root is not
   needed.

Size and SHA-256 of each file are checked, also of those that were there before. A file has its name only once it is
whole. Needs Python 3.10 alone. Exit codes: 0 done, 2 something given cannot work, 130 interrupted.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from errors import UserError, escaped, reason
from options.parser import Parser
from program import outlive_readers

PACKAGE = "dataset-fashion-mnist"
IN_PACKAGE = Path("usr/share/datasets/fashion-mnist")
ROOT_OF_PACKAGES = Path("/")
# Of the unpacked files: Debian packs them anew, so that its packed ones are not those whose MD5 torchvision knows.
FILES = {
    "train-images-idx3-ubyte": (47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
    "train-labels-idx1-ubyte": (60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
    "t10k-images-idx3-ubyte": (7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
    "t10k-labels-idx1-ubyte": (10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
}


def lay_out(folder: Path) -> str:
    """Put into `folder` what it lacks. Returns what was done, in one line.

    Raises:
        UserError: no source has the files, a file is damaged, or `folder` cannot be written to.
    """
    raw = folder / "FashionMNIST" / "raw"
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with one_at_a_time(raw):
            missing = [name for name in FILES if not is_there(raw / name)]
            if not missing:
                return f"{raw} holds Fashion-MNIST already: nothing to do"
            with source(raw, missing) as (packed, where):
                for name in missing:
                    put(raw / name, unpacked(packed / f"{name}.gz", name))
    except OSError as error:
        raise UserError(f"Fashion-MNIST cannot be put into {folder}: {reason(error)}") from error
    return f"{raw} holds Fashion-MNIST: {len(missing)} of 4 files from {where}"


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for another process that works on the folder, where its file system knows locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def is_there(path: Path) -> bool:
    """Whether a file is there; a damaged one is refused, since someone may want to see it."""
    if not path.exists():
        return False
    check(path, path.read_bytes(), path.name)
    return True


def check(path: Path, content: bytes, name: str) -> None:
    """Refuse what is not the file `name` of Fashion-MNIST; it was read from `path`."""
    expected, found = FILES[name], (len(content), hashlib.sha256(content).hexdigest())
    if found != expected:
        said, wanted = (f"{size:,} bytes of SHA-256 {digest}" for size, digest in (found, expected))
        raise UserError(f"{path} is damaged: {said}, where {wanted} should be; remove or replace it")


def unpacked(path: Path, name: str) -> bytes:
    """The content of a .gz file, checked."""
    try:
        content = gzip.decompress(path.read_bytes())
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        size = path.stat().st_size
        raise UserError(
            f"{path} is damaged: {size:,} bytes that cannot be unpacked ({reason(error)}); remove or replace it"
        ) from error
    check(path, content, name)
    return content


def put(path: Path, content: bytes) -> None:
    """Write a file that has its name only once it is whole, and on the disk."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def source(raw: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    """The first folder that has these files packed, and what it is."""
    installed = ROOT_OF_PACKAGES / IN_PACKAGE
    for folder, where in ((raw, "the .gz files beside them"), (installed, f"the installed package {PACKAGE}")):
        if all((folder / f"{name}.gz").exists() for name in names):
            yield folder, where
            return
    with tempfile.TemporaryDirectory() as temporary:
        download(Path(temporary))
        yield Path(temporary) / IN_PACKAGE, f"the package {PACKAGE}, downloaded by apt-get"


def download(folder: Path) -> None:
    """Download the package, and unpack it into the folder."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise no_source("apt-get and dpkg-deb are not here")
    print(f"downloading the package {PACKAGE} (31 MB)", flush=True)
    run(folder, "apt-get", "download", PACKAGE)
    archives = sorted(folder.glob("*.deb"))
    if len(archives) != 1:
        raise no_source(f"apt-get left {len(archives)} packages where one was expected")
    run(folder, "dpkg-deb", "-x", str(archives[0]), str(folder))


def run(folder: Path, *command: str) -> None:
    """Run a command in a folder."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
        raise no_source(f"{' '.join(command[:2])} failed ({said[-1].strip()}; perhaps apt-get update helps)")


def no_source(why: str) -> UserError:
    """What to do where nothing has the files."""
    return UserError(
        f"no source of Fashion-MNIST was found: the package {PACKAGE} is not installed, and {why}. main.py's own "
        "--download fetches the files from the data set's site: python main.py --config configs/fashion.yaml "
        "--data-path FOLDER --download"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    parser = Parser(prog="fashion_mnist.py", description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="made if need be; main.py's --data-path")
    try:
        print(escaped(lay_out(parser.parse_args(argv).folder)))
    except UserError as error:
        print(escaped(f"fashion_mnist.py: error: {error}"), file=sys.stderr, flush=True)
        return 2
    except KeyboardInterrupt:
        print("\nfashion_mnist.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    outlive_readers()
    sys.exit(main())
