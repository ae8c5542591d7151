"""Train and evaluate semantic segmentation on a trained backbone.

    python -m segmentation --config configs/segmentation/digits.yaml --backbone runs/x/checkpoint_best.pth
    torchrun --nproc_per_node 8 -m segmentation --config configs/segmentation/ade20k_deit_small.yaml \\
        --data-path ADE20K --backbone runs/x/checkpoint_best.pth --output_dir runs/ade20k

Exit codes: as main.py's.
"""

from __future__ import annotations

import program

if __name__ == "__main__":
    program.begin("segmentation")
    from options.flags import answer_at_once
    from segmentation.options import PROGRAM, get_args_parser

    answer_at_once(None, get_args_parser, PROGRAM)  # --help and what is mistyped, before torch is imported

from segmentation.command import main

if __name__ == "__main__":
    program.leave(main())
