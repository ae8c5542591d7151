"""`python -m redundancy`: build each model, draw the images, measure, and write the report."""

from __future__ import annotations

import importlib.util
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from datasets import LabelledImages, build_dataset, named
from ending import finish
from errors import UserError, reason, shown
from images.found import digest
from loaders import build_eval_loader
from loggers.meters import Meters
from loggers.progress import Progress
from options.config import check_limits, provenance
from options.flags import Args
from program import leaving_nothing
from redundancy.assessment import assess
from redundancy.examples import Look
from redundancy.metrics.registry import choose
from redundancy.metrics.streams import draw, shares
from redundancy.options import Options, read_options
from redundancy.presentation import wording
from redundancy.report import Report
from redundancy.subjects import Loaded, Subject, find_subjects, load
from regularizers import parse_spec
from utils import (
    broadcast_object,
    find_launch,
    init_distributed,
    pick_device,
    print_main,
    rank,
    world_size,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    return finish("redundancy", lambda: run(read_options(argv)))


def run(options: Options) -> None:
    """Check everything that can be checked, then measure one model after the other."""
    args = options.args
    check_limits(args)
    choose(options.metrics)
    for text in options.measures:
        parse_spec(text, with_coef=False)
    subjects = find_subjects(options.words)
    check_used(options, subjects)
    launch = find_launch(args.world_size)
    device = pick_device(args.device, launch.local_rank)
    init_distributed(launch, device, args.dist_url, args.dist_timeout)
    broadcast_object(lambda: check_output(options.output))
    for subject in subjects:
        _check_one(subject, options)
    report: Report | None = None
    for subject in subjects:
        measured = measure(subject, options, device)
        report = measured if report is None else report + measured
    assert report is not None
    print_main(f"\n{printable(report.table())}\n")
    with leaving_nothing("redundancy"):
        broadcast_object(lambda: report.save(options.output) if report is not None else None)
    print_main(f"report: {options.output / 'report.html'}")


def _check_one(subject: Subject, options: Options) -> None:
    """Build a subject's model and the images once, so that nothing is measured for one that cannot be."""
    loaded = _load(subject, options)
    build_dataset(False, flags_for(loaded, options.args))
    if loaded.says_model and options.model and options.model != loaded.about["model"]:
        print_main(f"note: {shown(subject.source)} says itself that it holds {loaded.about['model']}")


def _load(subject: Subject, options: Options) -> Loaded:
    size, classes = options.input_size, options.num_classes
    return load(subject, options.args, options.pretrained, options.model, size, classes)


def flags_for(loaded: Loaded, args: Args) -> Args:
    """The flags, with the size and preprocessing of a model's images; what was given holds."""
    channels, *size = loaded.image_shape
    own: dict[str, Any] = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in loaded.preprocessing._asdict().items()
        if getattr(args, name) is None
    }
    return replace(args, in_chans=channels, input_size=size, dist_eval=False, **own)


# ------------------------------------------------------------------------------------------------------------
# One model


def measure(subject: Subject, options: Options, device: torch.device) -> Report:
    """Load a model, and measure it on this process's share of the images."""
    loaded = _load(subject, options)
    args = flags_for(loaded, options.args)
    images, classes = build_dataset(False, args)
    drawn = draw(len(images), options.images, args.seed)
    own = shares(len(drawn), world_size())[rank()]
    progress = Progress(f"Measuring {shown(subject.label, 40)}", args.print_freq)
    loader: Any = []
    if len(own):
        share: Any = Subset(images, [int(index) for index in drawn[own.start : own.stop]])
        loader = build_eval_loader(args, share, 1, 0, device)
    with showing(progress, len(loader)) as after_batch:
        report = assess(
            loaded.backbone.to(device),
            loader,
            label=subject.label,
            metrics=options.metrics,
            measures=options.measures,
            about=about_model(loaded),
            look=Look(options.examples, options.patch, args.mean or (), args.std or (), classes),
            classes=other_classes(loaded, classes),
            first=own.start,
            places=[int(index) for index in drawn[own.start : own.stop]],
            after_batch=after_batch,
        )
    return replace(report, about=about_run(options, images, len(drawn), device))


def check_used(options: Options, subjects: Sequence[Subject]) -> None:
    """Refuse flags that are for another kind of models than those that are given.

    Raises:
        UserError: with the kind.
    """
    files = any(subject.is_file for subject in subjects)
    names = not all(subject.is_file for subject in subjects)
    chosen = options.args.weights != "auto"
    of_files = {"--model": options.model, "--num-classes": options.num_classes, "--weights": chosen}
    for flag in (flag for flag, value in of_files.items() if value and not files):
        raise UserError(f"{flag} is for checkpoints, and all models are given by name: drop it")
    if not options.pretrained and not names:
        raise UserError("--no-pretrained is for models by name, and all models are checkpoints: drop it")


def printable(text: str) -> str:
    """The table for terminals that have no more than ASCII."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        plain = text
        for sign, written in ((wording.PLUS_MINUS, "+-"), (wording.MINUS, "-"), (wording.NOTHING, "-")):
            plain = plain.replace(sign, written)
        return plain.encode("ascii", "backslashreplace").decode()
    return text


@contextmanager
def showing(progress: Progress, batches: int) -> Iterator[Callable[[int], None]]:
    """A function that is told of each batch that is done, and shows where the work stands."""
    steps = progress.over(1, batches, Meters())
    next(steps, None)

    def after_batch(batch: int) -> None:
        next(steps, None)

    yield after_batch


def other_classes(loaded: Loaded, classes: Sequence[str]) -> str:
    """Why the model's classes are not the data's; empty if they are, as far as can be known."""
    model, data = loaded.backbone.num_classes, len(classes)
    if model != data:
        return f"the model knows {model} classes, the data has {data}"
    if loaded.class_names and named(classes) and list(loaded.class_names) != list(classes):
        return "the model's classes have other names than the data's"
    return ""


# ------------------------------------------------------------------------------------------------------------
# What the report says of itself


def about_model(loaded: Loaded) -> dict[str, Any]:
    """Of a model."""
    shape = " x ".join(map(str, loaded.image_shape))
    return {**loaded.about, "images": shape, "preprocessing": str(loaded.preprocessing)}


def about_run(options: Options, images: LabelledImages, drawn: int, device: torch.device) -> dict[str, str]:
    """Of the whole: command, revision, versions, data and checksum, device, date."""
    args = options.args
    data = f"{args.data_set} {args.data_path or ''}".strip()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    launcher = ["python"] if world_size() == 1 else ["torchrun", "--nproc_per_node", str(world_size())]
    return {
        **provenance(),
        "command": shlex.join([*launcher, "-m", "redundancy", *options.argv]),
        "data": f"{drawn:,} of the {len(images):,} evaluation images of {data}, drawn with seed {args.seed}",
        "data sha256": f"{digest(images.samples)} (of all labels and, where they have any, names and sizes)",
        "device": f"{name}, {world_size()} process(es)",
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
    }


def check_output(folder: Path) -> None:
    """Refuse what would fail only when all is measured.

    Raises:
        UserError: the folder exists, or cannot be made; matplotlib is not installed.
    """
    if os.path.lexists(folder):
        raise UserError(f"--output {folder} exists; give another one")
    parent = next(path for path in folder.absolute().parents if os.path.lexists(path))
    try:
        os.rmdir(tempfile.mkdtemp(prefix=".redundancy-", dir=parent))
    except OSError as error:
        why = f"{parent} is no folder that can be written to ({error.strerror or reason(error)})"
        raise UserError(f"--output {folder} cannot be made: {why}") from error
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("the report's figures need matplotlib: pip install -r requirements-quickstart.txt")
