#!/usr/bin/env bash
# Merge a LoRA adapter into its base model: bash merge_lora_weight.sh [flags for merge_lora_weight.py ...]
#
# Export these or edit them here; a flag on the command line wins. Relative paths are relative to where you call it.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh merge_lora_weight.sh`
BASE_MODEL_PATH=${BASE_MODEL_PATH:-}        # the base; unset: the one that the adapter's adapter_config.json names
ADAPTER_MODEL_PATH=${ADAPTER_MODEL_PATH:-}  # the adapter; unset: the newest under train/output
OUTPUT_PATH=${OUTPUT_PATH:-}                # where the merged model goes; unset: <adapter>-merged
SAVE_DTYPE=${SAVE_DTYPE:-}                  # fp16, bf16 or fp32; unset: the base's dtype

script=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/merge_lora_weight.py
python=python3
command -v "$python" >/dev/null || python=python

# An unset variable gives no flag. The command line comes last: of a flag given twice the last one counts.
exec "$python" "$script" \
    ${BASE_MODEL_PATH:+--base_model_path "$BASE_MODEL_PATH"} \
    ${ADAPTER_MODEL_PATH:+--adapter_model_path "$ADAPTER_MODEL_PATH"} \
    ${OUTPUT_PATH:+--output_path "$OUTPUT_PATH"} \
    ${SAVE_DTYPE:+--save_dtype "$SAVE_DTYPE"} \
    "$@"
