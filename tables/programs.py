"""The programs whose runs a table holds: main.py trains classifiers, and segmentation starts on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from images.transforms import Preprocessing
from options import config
from options.config import Resolved
from segmentation import settings
from tables import spec, trials
from tables.trials import Data, Size

OF_IMAGES = ("data_set", "data_path", "image_key", "target_key", "val_labels", "single_class", "class_names")


@dataclass(frozen=True)
class Program:
    """What a cell is a run of. Its log.txt, args.yaml, checkpoints, locks and exit codes are main.py's.

    Attributes:
        name: in a table's file.
        called: in messages, its own ones included.
        words: its command, behind `python` or torchrun's flags.
        resolve: its flags with nothing left to interpret, from a command line.
        filled: the flags that a run fills in, where they are not given.
        of_data: the flags that say what data is opened.
        follow: (flags, those of the backbone's run if there are any) -> flags with what the weights say.
        open: (flags, whether the data must be there) -> its size.
        build: (flags, data, processes of a run) -> the size of the model, built and tried.
    """

    name: str
    called: str
    words: tuple[str, ...]
    resolve: Callable[[Sequence[str]], Resolved]
    filled: tuple[str, ...]
    of_data: tuple[str, ...]
    follow: Callable[[Resolved, Resolved | None], Resolved]
    open: Callable[[Resolved, bool], Data]
    build: Callable[[Resolved, Data, int], Size]


def _resolve_segmentation(argv: Sequence[str]) -> Resolved:
    """A record is read where no backbone lies, so files need not be there; `trials` looks for them."""
    return settings.resolve(argv, with_files=False)


MAIN = Program(
    name=spec.MAIN,
    called="main.py",
    words=("main.py",),
    resolve=config.resolve,
    filled=("class_names", *Preprocessing._fields),
    of_data=(*OF_IMAGES, "inat_category", "in_chans", "input_size", "pretrained", "finetune", "model"),
    follow=trials.follow_main,
    open=trials.open_main,
    build=trials.build_main,
)
SEGMENTATION = Program(
    name="segmentation",
    called="segmentation",
    words=("-m", "segmentation"),
    resolve=_resolve_segmentation,
    filled=("class_names", "mean", "std", "model", "model_kwargs", "remedy", "in_chans"),
    of_data=("data_set", "data_path", "class_file", "class_names", "ignore_label", "reduce_zero_label"),
    follow=trials.follow_backbone,
    open=trials.open_pairs,
    build=trials.build_segmentation,
)
PROGRAMS = {program.name: program for program in (MAIN, SEGMENTATION)}
