"""Check a folder of images and masks as one of several processes. Started by tests/test_segmentation_check.py."""

from __future__ import annotations

import sys

import torch

from errors import UserError
from segmentation.check import check_pairs
from segmentation.images import SegmentedImages
from segmentation.sets import Options, find_pairs
from segmentation.transforms import RECIPES, Training, Whole
from utils import find_launch, init_distributed

if __name__ == "__main__":
    init_distributed(find_launch(), torch.device("cpu"))
    recipe, options = RECIPES["FOLDER"], Options(("sky", "sea", "a|b\x1b", "sand"))
    halves = {
        half: SegmentedImages(find_pairs("FOLDER", sys.argv[1], is_train, options), Training(recipe), Whole(recipe))
        for half, is_train in (("training", True), ("validation", False))
    }
    try:
        check_pairs(halves, int(sys.argv[2]), seconds=300)
    except UserError as error:
        sys.exit(f"error: {error}")
