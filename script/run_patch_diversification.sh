#!/usr/bin/env bash
# Both stages of Patch Diversification's released recipe: 300 epochs at the drop path of the config (0.5), then 100
# more at 0.75 with a fresh optimizer, on the schedule of 400 epochs. Whatever stops it, the same command goes on.
#
#   RECIPE  a config of configs/patch_diversification_*.yaml without folder and ending (..._deit_small), but neither
#           the paper's form nor those that fine-tune (..._in22k*), which have one stage
#   OUTPUT  the folder of both stages (experiment/$RECIPE)
#   EPOCHS  where the two stages end ("300 400")
#   FLAGS   go to both stages; --epochs, --drop-path, --resume and --output_dir are the script's own.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"

RECIPE="${RECIPE:-patch_diversification_deit_small}"
OUTPUT="${OUTPUT:-$ROOT/experiment/$RECIPE}"
read -r first last <<<"${EPOCHS:-300 400}"
if ! [[ "$first" =~ ^[0-9]+$ && "$last" =~ ^[0-9]+$ && "$last" -gt "$first" && "$first" -gt 0 ]]; then
    echo "$0: EPOCHS is where the two stages end, e.g. '300 400', not '${EPOCHS:-}'" >&2
    exit 2
fi
if [[ "$RECIPE" == *_in22k* || "$RECIPE" == *_paper ]]; then
    echo "$0: $RECIPE has one stage: python main.py --config configs/$RECIPE.yaml" >&2
    exit 2
fi

# A subshell, since launch does not come back.
(launch --config "$ROOT/configs/$RECIPE.yaml" --data-path "$DATA" "$@" \
    --epochs "$first" --output_dir "$OUTPUT/stage1" --resume auto)

goes_on=(--resume auto)
if ! compgen -G "$OUTPUT/stage2/checkpoint*.pth" >/dev/null; then
    goes_on=(--resume "$OUTPUT/stage1/checkpoint.pth" --no-resume-opt)
fi
launch --config "$ROOT/configs/$RECIPE.yaml" --data-path "$DATA" "$@" \
    --epochs "$last" --drop-path 0.75 --output_dir "$OUTPUT/stage2" "${goes_on[@]}"
