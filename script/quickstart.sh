#!/usr/bin/env bash
# Train a small vision transformer on scikit-learn's digits twice, plain and with all five diversity terms, compare
# the two, and measure their redundancy head to toe. A few minutes on two CPU cores once the requirements are
# installed; no download of data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-quickstart.txt

folder=experiment/quickstart
rm -rf "$folder/plain" "$folder/diverse" "$folder/redundancy"
# At this size a second thread gains nothing, and where it shares its core with other work it costs much.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

# Show a command, then run it.
show() {
    echo
    echo "\$ OMP_NUM_THREADS=$OMP_NUM_THREADS $*"
    "$@"
}

start=$SECONDS
show python main.py --config configs/digits.yaml --output_dir "$folder/plain"
middle=$SECONDS
show python main.py --config configs/digits_diverse.yaml --output_dir "$folder/diverse"
end=$SECONDS

echo
python script/quickstart_report.py "$folder" --seconds $((middle - start)) $((end - middle))

show python -m redundancy "plain=$folder/plain/checkpoint.pth" "diverse=$folder/diverse/checkpoint.pth" \
    --data-set DIGITS --images 360 --output "$folder/redundancy"
