"""Train a table's runs, side by side and after any interruption, and write what came out.

    python script/reproduce_table.py configs/tables/digits.yaml --jobs 2
    python script/reproduce_table.py configs/tables/imagenet_main.yaml --data-path IMAGENET --nproc 8 --dry-run

What stands in a table's file, and what comes out: docs/tables.md.

Exit codes: 0 all runs are finished; 1 some failed, and are named; 2 something given cannot work; 75 stopped by
SIGTERM or SIGUSR1, 130 from the keyboard: the runs have saved, and the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import program

if __name__ == "__main__":
    program.begin("reproduce_table.py")
    from tables.options import answer_at_once

    answer_at_once()  # --help and what is mistyped, before torch is imported

from tables.command import main

if __name__ == "__main__":
    program.leave(main())
