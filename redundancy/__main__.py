"""Measure how redundant vision transformers are.

    python -m redundancy plain=runs/plain/checkpoint_best.pth diverse=runs/diverse/checkpoint_best.pth \\
        --data-path IMAGENET --images 2000 --output report
    torchrun --nproc_per_node 8 -m redundancy deit_small_patch16_224 --data-path IMAGENET --output report

Exit codes: 0 done, 1 another process died, 2 something given cannot work, 75 stopped by a signal, 130 interrupted
from the keyboard.
"""

from __future__ import annotations

import program

if __name__ == "__main__":
    program.begin("redundancy")
    from redundancy.options import answer_at_once

    answer_at_once()  # --help and what is mistyped, before torch is imported

from redundancy.command import main

if __name__ == "__main__":
    program.leave(main())
