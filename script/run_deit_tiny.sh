#!/usr/bin/env bash
# DeiT-Ti on ImageNet-1k, plain: the baseline of the diverse recipe.
# The same as configs/deit_tiny.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --model deit_tiny_patch16_224 \
    --batch-size 128 \
    --num_workers 32 \
    --output_dir "$ROOT/experiment/deit_tiny" \
    --data-path "$DATA" "$@"
