"""Several runs of main.py, one after the other, in one of several gloo processes: with DDP, in shards, continued.

test_fsdp.py starts it as `torchrun --nproc_per_node 2 tests/fsdp_runs.py FOLDER` would, and looks at what is then
in the folder. A process that starts once for all runs saves most of their time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import count
from pathlib import Path

import main
from state.run_state import RunState
from state.saver import Saver
from utils import rank

FLAGS = [
    "--data-set",
    "DIGITS",
    "--model",
    "deit_tiny_patch16_224_diverse",
    "--input-size",
    "16",
    "--device",
    "cpu",
]
FLAGS += ["--model-kwargs", "patch_size=4", "embed_dim=24", "depth=2", "num_heads=2", "--num_workers", "0"]
FLAGS += ["--mixing_coef", "1", "--emb_cos_within_coef", "0.5", "--emb_contrast_cross_coef", "0.5"]
FLAGS += ["--attn_cos_within_coef", "1e-4", "--weight_mha_cond_orth_coef", "5e-4", "--model-ema-decay", "0.9"]
FLAGS += ["--measure", "patch.cno@last", "--measure", "weight.so@all", "--drop", "0.1", "--clip-grad", "1"]
FLAGS += ["--lr", "2e-3", "--unscale-lr", "--warmup-epochs", "0", "--epochs", "2"]
FLAGS += ["--save-interval-steps", "7", "--checkpoint-hist", "4"]
TWO = ["--batch-size", "64"]  # ten steps an epoch
SHARDS = ["--fsdp", "--grad-checkpointing"]
RUNS = count()


def run(*argv: object, stop: Callable[[RunState], bool] = lambda state: False) -> int:
    """A run's exit code; the second process wishes to stop when `stop` says so."""
    os.environ["TORCHELASTIC_RESTART_COUNT"] = str(next(RUNS))  # a part of the launcher's store for each run
    wish = Saver.wish
    Saver.wish = lambda self: Saver.STOP if rank() == 1 and stop(self.run_state) else wish(self)
    try:
        return main.main([*FLAGS, *TWO, *map(str, argv)])
    finally:
        Saver.wish = wish


def all_runs(folder: Path) -> None:
    assert run("--output_dir", folder / "ddp") == 0
    assert run(*SHARDS, "--output_dir", folder / "shards", "--resume", "auto") == 0

    parts = [*SHARDS, "--output_dir", folder / "parts", "--resume", "auto"]
    assert run(*parts, stop=lambda state: state.running.step == 3) == 75  # within an epoch
    assert run(*parts, stop=lambda state: state.running.step == 10) == 75  # within its evaluation
    assert run(*parts) == 0

    in_the_second_epoch = "checkpoint.1.pth"
    assert run("--resume", folder / "shards" / in_the_second_epoch, "--output_dir", folder / "shards_then_ddp") == 0
    assert (
        run(*SHARDS, "--resume", folder / "ddp" / in_the_second_epoch, "--output_dir", folder / "ddp_then_shards")
        == 0
    )

    assert run("--fsdp", "--eval", "--resume", folder / "shards" / "checkpoint.pth") == 0


if __name__ == "__main__":
    all_runs(Path(sys.argv[1]))
