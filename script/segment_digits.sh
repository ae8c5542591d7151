#!/usr/bin/env bash
# Train UperNet on a canvas of handwritten digits, on the backbones of script/quickstart.sh, and compare their mIoU.
# Some minutes on two CPU cores; no download of data. Small scale.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-segmentation.txt

folder=experiment/segmentation
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
for name in plain diverse paper; do
    backbone="experiment/quickstart/$name/checkpoint.pth"
    if [[ ! -f $backbone ]]; then
        echo "segment_digits.sh: error: no $backbone: run ./script/quickstart.sh first" >&2
        exit 2
    fi
    rm -rf "${folder:?}/$name"
    python -m segmentation --config configs/segmentation/digits.yaml --backbone "$backbone" \
        --output_dir "$folder/$name"
    python -m segmentation --config "$folder/$name/args.yaml" --eval --resume "$folder/$name/checkpoint.pth" \
        --predictions "$folder/$name/predictions"
done
