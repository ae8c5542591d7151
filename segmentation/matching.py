"""Which image and which mask belong together: files below a folder, by their names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from errors import UserError, shown
from images.folders import list_images
from images.tree import few, split
from utils import print_main

MASK = ".png"


def list_below(top: Path, inner: str, layout: str) -> list[str]:
    """All images below a folder, as paths below `top`; other files are passed over, and told of.

    Args:
        layout: what the user has to be told where there are none.
    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not (top / inner).is_dir():
        raise UserError(f"no folder {shown(str(top / inner))}; {layout}")
    found, _, passed = list_images(top / inner)
    if not found:
        raise UserError(f"{shown(str(top / inner))} holds no images; {layout}")
    if passed.counts:
        print_main(f"skipped in {top / inner}: {passed}")
    return [f"{inner}/{path}" for path in sorted(found)]


def masks_of(paths: Iterable[str]) -> list[str]:
    """Those that are masks, by their names."""
    return [path for path in paths if split(path)[1] == MASK]


def by_stem(paths: Iterable[str], folder: str, ending: str | None = None) -> dict[str, str]:
    """Name below a folder, without its ending -> path; those of another ending are left out.

    Raises:
        UserError: two files have one name.
    """
    named: dict[str, str] = {}
    for path in paths:
        if ending is None:
            stem = split(path)[0]
        elif path.endswith(ending):
            stem = path.removesuffix(ending)
        else:
            continue
        stem = stem.removeprefix(f"{folder}/")
        if stem in named:
            raise UserError(
                f"{shown(named[stem])} and {shown(path)} differ in their endings alone; remove one of them"
            )
        named[stem] = path
    return named


def pair(
    top: Path, images: Mapping[str, str], masks: Mapping[str, str], layout: str, missing: str = MASK
) -> tuple[list[str], list[str]]:
    """Images and masks of the same names, in the order of the images.

    Args:
        top: the folder that holds both.
        images, masks: name -> path.
        layout: what the user has to be told where there are none.
        missing: what the name of a mask ends in.
    Raises:
        UserError: there are none, or some have no partner.
    """
    if not images:
        raise UserError(f"no image in {shown(str(top))} has a name as it should be; {layout}")
    alone = [path for stem, path in images.items() if stem not in masks]
    if alone:
        raise UserError(
            f"{len(alone)} of {len(images)} images in {shown(str(top))} have no mask (the same name with "
            f"{missing}), e.g. {few(alone)}; add the masks, or remove the images"
        )
    left = [path for stem, path in masks.items() if stem not in images]
    if left:
        raise UserError(
            f"{len(left)} of {len(masks)} masks in {shown(str(top))} have no image, e.g. {few(left)}; add the "
            "images, or remove the masks"
        )
    return list(images.values()), [masks[stem] for stem in images]
