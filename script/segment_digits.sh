#!/usr/bin/env bash
# Train UperNet on a canvas of handwritten digits, on backbones of script/quickstart.sh, two at a time, and compare
# their mIoU. Without names: plain and diverse. No download of data. Small scale.
#
#   script/segment_digits.sh [plain] [diverse] [paper]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-segmentation.txt

folder=experiment/segmentation
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
names=("$@")
[[ $# -gt 0 ]] || names=(plain diverse)
for name in "${names[@]}"; do
    if [[ ! -f experiment/quickstart/$name/checkpoint.pth ]]; then
        echo "segment_digits.sh: error: no experiment/quickstart/$name/checkpoint.pth: run ./script/quickstart.sh" >&2
        exit 2
    fi
done

# Train and evaluate one; what it prints goes to a file.
segment() {
    local output="$folder/$1"
    rm -rf "$output"
    mkdir -p "$output"
    {
        python -m segmentation --config configs/segmentation/digits.yaml \
            --backbone "experiment/quickstart/$1/checkpoint.pth" --output_dir "$output"
        python -m segmentation --config "$output/args.yaml" --eval --resume "$output/checkpoint.pth" \
            --predictions "$output/predictions"
    } > "$output/output.txt" 2>&1 || { cat "$output/output.txt" >&2; return 1; }
    echo "$1: done in $SECONDS s"
}

# If one fails, or this script is told to end, no other goes on in the background.
set -m  # a process group for each
pids=()
stop() {
    for pid in "${pids[@]}"; do kill -- "-$pid" 2> /dev/null || true; done
}
trap stop EXIT
trap 'exit 75' TERM
trap 'exit 130' INT

for ((i = 0; i < ${#names[@]}; i += 2)); do
    pids=()
    for name in "${names[@]:i:2}"; do
        echo "training on $name; its output: $folder/$name/output.txt"
        segment "$name" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid"; done
done
pids=()
predicted=()
for name in "${names[@]}"; do predicted+=("$name=$folder/$name/predictions"); done
python script/compare_masks.py "${predicted[@]}" --data-set DIGITS --output "$folder/masks.html"
