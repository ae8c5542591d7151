#!/usr/bin/env bash
# DeiT-S with 24 blocks on ImageNet-1k, plain: the baseline of the diverse recipe.
# The same as configs/deit_small_24layer.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --model deit_small_layer24_patch16_224 \
    --batch-size 128 \
    --num_workers 32 \
    --output_dir "$ROOT/experiment/deit_small_24layers" \
    --data-path "$DATA" "$@"
