#!/usr/bin/env bash
# Train on this machine, or on many. With nothing set it trains the embedded example; otherwise export or edit these, or give flags
# of train.py:
#
#   MODEL_PATH=/models/Hunyuan-7B-Instruct TRAIN_DATA_FILE=rows.jsonl bash train.sh --max_steps 200
#
# A flag wins over a variable and over the recipe below; `bash train.sh --help` lists them. The exit code is the training's.
[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@"  # started as `sh train.sh`
set -euo pipefail

# ------------------------------------------------------------------------------------------------- what to train
MODEL_PATH=${MODEL_PATH:-}            # model directory; empty: the embedded example
TOKENIZER_PATH=${TOKENIZER_PATH:-}    # tokenizer directory; empty: MODEL_PATH
TRAIN_DATA_FILE=${TRAIN_DATA_FILE:-}  # jsonl of conversations; must be given with a MODEL_PATH
OUTPUT_DIR=${OUTPUT_DIR:-}            # where everything goes; empty: train/output/<name of MODEL_PATH>[-lora]
DS_CONFIG=${DS_CONFIG:-}              # ds_zero2_no_offload.json, ds_zero3_no_offload.json, ds_zero3_offload.json, a path, or none;
                                      # empty: ds_zero3_no_offload.json on GPUs, none on a CPU

# ------------------------------------------------------------------------------------------------ where to train
HOST_GPU_NUM=${HOST_GPU_NUM:-}        # processes on each node; empty: one a GPU, or one on a CPU
NODE_IP_LIST=${NODE_IP_LIST:-}        # several machines: ip:processes,ip:processes…; this one, the chief, is LOCAL_IP
LOCAL_IP=${LOCAL_IP:-}                # address of this machine; empty: the first of NODE_IP_LIST
NODES=${NODES:-}                      # number of machines, and of all processes: derived from NODE_IP_LIST, and
NODE_NUM=${NODE_NUM:-}                #   refused where they contradict it
SSH_PORT=${SSH_PORT:-}                # empty: what ssh's own configuration says
MASTER_PORT=${MASTER_PORT:-}          # where the processes meet; empty: a free port on one machine, 29500 on several
NET_IFNAME=${NET_IFNAME:-}            # network interface for NCCL and gloo; empty: the one that leads to the chief
STALL_TIMEOUT=${STALL_TIMEOUT:-}      # seconds after which a collective that stalls ends the job; empty: 1800
MAX_RESTARTS=${MAX_RESTARTS:-}        # how often a run that failed goes on by itself from its newest whole checkpoint; empty: 0
FORWARD=${FORWARD:-}                  # names of further variables that reach every machine: NAME,NAME

# -------------------------------------------------------------------------------------------------------- the recipe
RECIPE=(
    --bf16  # on GPUs
    --gradient_checkpointing
    --per_device_train_batch_size 1
    --gradient_accumulation_steps 1
    --max_seq_length 4096
    --num_train_epochs 1
    --learning_rate 1e-5  # with --use_lora 1e-4
    --min_lr 1e-6         # with --use_lora 1e-5
    --lr_scheduler_type cosine_with_min_lr
    --warmup_ratio 0.01
    --logging_steps 1
    --save_steps 100
    --save_total_limit 2
)
LORA_RECIPE=(--learning_rate 1e-4 --min_lr 1e-5)
EXAMPLE_RECIPE=(  # a small MoE of the A13B architecture, from random weights
    --num_layers 4 --hidden_size 128 --intermediate_size 32 --num_attention_heads 8 --num_key_value_heads 8
    --num_experts 4 --moe_topk 2 --max_position_embeddings 1024 --max_seq_length 1024
    --max_steps 800 --per_device_train_batch_size 16 --learning_rate 4e-3 --min_lr 1e-4 --adam_beta2 0.95
    --lr_scheduler_type cosine_with_min_lr --warmup_steps 50 --logging_steps 10 --save_steps 400 --save_total_limit 1
)
# ------------------------------------------------------------------------------------------------------------------

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PYTHON=$(command -v python3 || command -v python) || { echo "refused: no python3 on the PATH" >&2; exit 2; }

export MODEL_PATH TOKENIZER_PATH TRAIN_DATA_FILE OUTPUT_DIR DS_CONFIG HOST_GPU_NUM NODE_IP_LIST LOCAL_IP NODES NODE_NUM
export SSH_PORT MASTER_PORT NET_IFNAME STALL_TIMEOUT MAX_RESTARTS FORWARD PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH}
exec "$PYTHON" -m sft.start "$0" "${RECIPE[@]}" -- "${LORA_RECIPE[@]}" -- "${EXAMPLE_RECIPE[@]}" -- "$@"
