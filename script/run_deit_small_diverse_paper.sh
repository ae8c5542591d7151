#!/usr/bin/env bash
# DeiT-S on ImageNet-1k, diversified at the patch, attention and weight level, in the papers' form.
# The same as configs/deit_small_diverse_paper.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --model deit_small_patch16_224_diverse \
    --batch-size 128 \
    --num_workers 32 \
    --reg patch.mixing=1 \
    --reg patch.pairwise_cosine@last=0.5 \
    --reg patch.contrastive@first:last=0.5 \
    --reg attn.pairwise_cosine@0=1e-4 \
    --reg weight.cno@all=5e-4 \
    --output_dir "$ROOT/experiment/deit_small_diverse_paper" \
    --data-path "$DATA" "$@"
