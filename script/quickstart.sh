#!/usr/bin/env bash
# Train a small vision transformer on scikit-learn's digits three times: plain, with the five diversity terms as the
# reference's code has them, and with the paper's absolute cosines. Compare the three, and measure their redundancy head
# to toe. Five to eight minutes on two CPU cores once the requirements are installed; no download of data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-quickstart.txt

folder=experiment/quickstart
rm -rf "$folder/plain" "$folder/diverse" "$folder/paper" "$folder/redundancy"
# At this size a second thread gains nothing, and where it shares its core with other work it costs much.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Show a command, then run it.
show() {
    echo
    echo "\$ OMP_NUM_THREADS=$OMP_NUM_THREADS $*"
    "$@"
}

seconds=()
for run in plain:digits diverse:digits_diverse paper:digits_diverse_paper; do
    start=$SECONDS
    show python main.py --config "configs/${run#*:}.yaml" --output_dir "$folder/${run%:*}"
    seconds+=($((SECONDS - start)))
done

echo
python script/quickstart_report.py "$folder" --seconds "${seconds[@]}"

show python -m redundancy "plain=$folder/plain/checkpoint.pth" "diverse=$folder/diverse/checkpoint.pth" \
    "paper=$folder/paper/checkpoint.pth" --data-set DIGITS --images 360 --output "$folder/redundancy"
