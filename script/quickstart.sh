#!/usr/bin/env bash
# Train a small vision transformer on scikit-learn's digits twice, plain and with all five diversity terms, and
# compare the two. A few minutes on two CPU cores once the requirements are installed; no download of data.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-quickstart.txt

folder=experiment/quickstart
rm -rf "$folder/plain" "$folder/diverse"
# At this size a second thread gains nothing, and where it shares its core with other work it costs much.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"

train() {
    echo
    echo "\$ OMP_NUM_THREADS=$OMP_NUM_THREADS python main.py --config $1 --output_dir $2"
    python main.py --config "$1" --output_dir "$2"
}

start=$SECONDS
train configs/digits.yaml "$folder/plain"
middle=$SECONDS
train configs/digits_diverse.yaml "$folder/diverse"
end=$SECONDS

echo
python script/quickstart_report.py "$folder" --seconds $((middle - start)) $((end - middle))
