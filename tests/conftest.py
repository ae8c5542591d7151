"""What several test files share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import DiverseViT, Needs, build_model
from regularizers import Diversity, parse_spec

RECIPE = ("patch.mixing=1", "patch.cosine=0.5", "patch.contrastive=0.5", "attn.cosine=1e-4", "weight.cno=5e-4")
TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}


# The files that take longest start first, so that both processes of script/test.sh end at about the same time
LONGEST = ["test_compile", "test_resumption", "test_resume", "test_loaders", "test_redundancy", "test_tables_runs"]
LONGEST += [
    "test_run_state",
    "test_remedies_runs",
    "test_distributed",
    "test_export",
    "test_fsdp",
    "test_benchmarks",
]
LONGEST += ["test_segmentation_export", "test_using_elsewhere", "test_hubconf", "test_trackers", "test_program"]
LONGEST += ["test_submitit", "test_families", "test_main", "test_scripts", "test_redundancy_report"]
LONGEST += ["test_tables_runner", "test_tables_segmentation", "test_measures", "test_segmentation_runs"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


Tiny = Callable[..., tuple[DiverseViT, Diversity]]


@pytest.fixture
def tiny() -> Tiny:
    """Builds a 3-block ViT for 32-pixel images with 16 patches, and an objective from specs."""

    def build(*specs: str, name: str = "deit_tiny_patch16_224", seed: int = 0, **overrides) -> tuple:
        torch.manual_seed(seed)
        backbone = build_model(name, **{**TINY, **overrides})
        diversity = Diversity([parse_spec(spec) for spec in specs], depth=len(backbone.blocks))
        return DiverseViT(backbone, Needs(**diversity.needs)), diversity

    return build


def random_batch(size: int = 4, classes: int = 5, seed: int = 1, pixels: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.randint(classes, (size,), generator=generator)
