#!/usr/bin/env bash
# DeiT-B on ImageNet-1k, diversified at the patch, attention and weight level.
# The same as configs/deit_base_diverse.yaml.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

launch \
    --model deit_base_patch16_224_diverse \
    --batch-size 128 \
    --num_workers 32 \
    --mixing_coef 1 \
    --emb_cos_within_coef 0.5 \
    --emb_contrast_cross_coef 0.5 \
    --attn_cos_within_coef 1e-4 \
    --weight_mha_cond_orth_coef 5e-4 \
    --output_dir "$ROOT/experiment/deit_base_diverse" \
    --data-path "$DATA" "$@"
