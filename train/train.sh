#!/usr/bin/env bash
# Train on this machine, or on many. With nothing set it trains the embedded example; otherwise export or edit these, or give flags
# of train.py:
#
#   MODEL_PATH=/models/Hunyuan-7B-Instruct TRAIN_DATA_FILE=rows.jsonl bash train.sh --max_steps 200
#
# A flag wins over a variable and over the recipe below; `python train.py --help` lists them. The exit code is the training's.
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
STALL_TIMEOUT=${STALL_TIMEOUT:-1800}  # seconds after which a collective that stalls ends the job
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
refuse() { echo "refused: $*" >&2; exit 2; }
"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("torch", "transformers", "peft")))' ||
    refuse "$PYTHON has not all packages: $PYTHON -m pip install -r $(dirname "$HERE")/requirements.txt"
case " $* " in *" --help "* | *" -h "*) exec "$PYTHON" "$HERE/train.py" --help ;; esac

GO_ON_WITH=  # how this run is gone on with: the variables that say where, and this script
for name in HOST_GPU_NUM CUDA_VISIBLE_DEVICES NODE_IP_LIST IP_LIST LOCAL_IP SSH_PORT MASTER_PORT NET_IFNAME FORWARD; do
    [ -z "${!name:-}" ] || GO_ON_WITH+="$name=$(printf %q "${!name}") "
done
GO_ON_WITH+="bash $(printf %q "$0")"
export GO_ON_WITH

# flag NAME: the value that the command line gives --NAME (the last one; "true" where it has none), else nothing
flag() {
    local name value="" i args=("${@:2}")
    for ((i = 0; i < ${#args[@]}; i++)); do
        name=${args[i]%%=*} && name=${name//-/_}
        [ "$name" = "__$1" ] || continue
        if [[ ${args[i]} == *=* ]]; then value=${args[i]#*=}
        elif [[ ${args[i+1]:---} == --* ]]; then value=true
        else value=${args[i+1]}; fi
    done
    printf %s "$value"
}
given() { [[ -n $1 && ${1,,} != false && $1 != 0 && ${1,,} != no ]]; }

# choose NAME VALUE WHY: give a variable that is empty its value, and remember to say so
CHOICES=()
choose() { [ -z "${!1}" ] || return 0; printf -v "$1" %s "$2"; CHOICES+=("$1 = $2 ($3)"); }

# 1. What the flags say about the variables.
for pair in MODEL_PATH:model_name_or_path TOKENIZER_PATH:tokenizer_name_or_path TRAIN_DATA_FILE:train_data_file \
            OUTPUT_DIR:output_dir DS_CONFIG:deepspeed; do
    value=$(flag "${pair#*:}" "$@"); [ -z "$value" ] || printf -v "${pair%%:*}" %s "$value"
done
RESUME=$(flag resume_from_checkpoint "$@")
LORA=$(flag use_lora "$@")

# 2. The machine.
if given "$(flag use_cpu "$@")"; then GPUS=0
else GPUS=$(PYTHONPATH=$HERE "$PYTHON" -c 'import os; from sft.nodes.examine import number_of_gpus; print(number_of_gpus(dict(os.environ)))'); fi
if [ "$GPUS" = None ]; then  # there are some
    [ -n "$HOST_GPU_NUM$NODE_IP_LIST${IP_LIST:-}" ] ||
        refuse "the number of GPUs is not known: nvidia-smi -L does not answer. Set HOST_GPU_NUM, or run: nvidia-smi -pm 1"
    GPUS=${HOST_GPU_NUM:-1}
fi
if [ "$GPUS" -gt 0 ]; then
    [ -n "$NODE_IP_LIST${IP_LIST:-}" ] || choose HOST_GPU_NUM "$GPUS" "the GPUs of this machine"
    [ -n "$RESUME" ] || choose DS_CONFIG ds_zero3_no_offload.json "the default on GPUs"
else
    [ -n "$NODE_IP_LIST${IP_LIST:-}" ] || choose HOST_GPU_NUM 1 "no GPU"
    [ -n "$RESUME" ] || choose DS_CONFIG none "no GPU: DeepSpeed compiles for minutes on a CPU"
fi
[[ ${HOST_GPU_NUM:-1} =~ ^[1-9][0-9]{0,6}$ ]] || refuse "HOST_GPU_NUM=$HOST_GPU_NUM: must be a number from 1"
[ "$GPUS" -eq 0 ] || [ "${HOST_GPU_NUM:-1}" -le "$GPUS" ] || refuse "HOST_GPU_NUM=$HOST_GPU_NUM: only $GPUS GPUs are visible"
[[ $STALL_TIMEOUT =~ ^[1-9][0-9]{0,8}$ ]] || refuse "STALL_TIMEOUT=$STALL_TIMEOUT: must be a number of seconds"

# 3. The model and its rows.
EXAMPLE=$HERE/example
FLAGS=("${RECIPE[@]}")
given "$LORA" && FLAGS+=("${LORA_RECIPE[@]}")
if [ -n "$RESUME" ]; then
    FLAGS=()  # they are the checkpoint's
    [ -n "$TRAIN_DATA_FILE" ] || refuse "TRAIN_DATA_FILE is not set: with --resume_from_checkpoint the rows must be given"
    choose OUTPUT_DIR "$(dirname "$(realpath -m -- "$RESUME")")" "the folder of the checkpoint"
elif [ -n "$MODEL_PATH" ]; then
    [ -n "$TRAIN_DATA_FILE" ] || refuse "TRAIN_DATA_FILE is not set: the rows to train $MODEL_PATH on"
    NAME=$(basename "$(realpath -m -- "$MODEL_PATH")")
    choose OUTPUT_DIR "$HERE/output/$NAME$(given "$LORA" && echo -lora || true)" "the name of MODEL_PATH"
elif given "$LORA"; then
    choose MODEL_PATH "$HERE/output/example" "the trained example"
    ls "$MODEL_PATH"/model*.safetensors >/dev/null 2>&1 || refuse "--use_lora without MODEL_PATH adapts the trained example, which is not there: run first: bash $0"
    [ -n "$OUTPUT_DIR" ] || FLAGS+=(--overwrite_output_dir)
    choose OUTPUT_DIR "$HERE/output/example-lora" "an adapter of the example"
else
    FLAGS=("${EXAMPLE_RECIPE[@]}" --overwrite_output_dir --probe_file "$EXAMPLE/prompts.jsonl")
    [ "$GPUS" -eq 0 ] || FLAGS+=(--bf16)
    CHOICES+=("model = the embedded example (MODEL_PATH is not set)")
    choose TOKENIZER_PATH "$EXAMPLE/tokenizer" "the example's"
    choose OUTPUT_DIR "$HERE/output/example" "the example"
fi
choose TRAIN_DATA_FILE "$EXAMPLE/rows.jsonl" "the example's"

# 4. A flag that excludes a part of the recipe takes that part out.
# without NAME: drop --NAME and its value from FLAGS
without() {
    local out=() f skip=
    for f in "${FLAGS[@]}"; do
        [[ $f != --* ]] || { [ "$f" = "--$1" ] && skip=1 || skip=; }
        [ -n "$skip" ] || out+=("$f")
    done
    FLAGS=("${out[@]}")
}
[ "$GPUS" -gt 0 ] || without bf16
given "$(flag fp16 "$@")" && without bf16
[ -z "$(flag warmup_steps "$@")" ] || without warmup_ratio
RATE=$(flag learning_rate "$@")
if [ -n "$RATE" ] && [ -z "$(flag min_lr "$@")" ]; then  # the recipe's lowest rate may be above the rate that is given
    LOWEST=$(flag min_lr "${FLAGS[@]}")
    "$PYTHON" -c "import sys; sys.exit(float(sys.argv[1]) < float(sys.argv[2]))" "$RATE" "$LOWEST" 2>/dev/null || without min_lr
fi

FLAGS+=(--train_data_file "$TRAIN_DATA_FILE" --output_dir "$OUTPUT_DIR" --ddp_timeout "$STALL_TIMEOUT")
[ -z "$DS_CONFIG" ] || FLAGS+=(--deepspeed "$DS_CONFIG")
[ -z "$MODEL_PATH" ] || FLAGS+=(--model_name_or_path "$MODEL_PATH")
[ -z "$TOKENIZER_PATH" ] || FLAGS+=(--tokenizer_name_or_path "$TOKENIZER_PATH")

# 5. Run: output also in a log file, signals passed on, the exit code kept.
MADE=() PARENT=$OUTPUT_DIR
while [ ! -e "$PARENT" ]; do MADE+=("$PARENT"); PARENT=$(dirname -- "$PARENT"); done
mkdir -p -- "$OUTPUT_DIR" 2>/dev/null && [ -w "$OUTPUT_DIR" ] || refuse "OUTPUT_DIR=$OUTPUT_DIR: is not a directory that can be written"
LOG=$OUTPUT_DIR/log_$(date +%Y%m%d-%H%M%S).txt
[ ! -e "$LOG" ] || LOG=${LOG%.txt}-$$.txt
exec > >(trap '' INT TERM HUP; exec tee -a "$LOG") 2>&1
TEE=$!
[ ${#CHOICES[@]} -eq 0 ] || printf '%s\n' "${CHOICES[@]}"
export TQDM_MININTERVAL=${TQDM_MININTERVAL:-1}  # seconds; the bar goes to the log too
export HOST_GPU_NUM NODE_IP_LIST LOCAL_IP NODES NODE_NUM SSH_PORT MASTER_PORT NET_IFNAME FORWARD
# a refusal leaves nothing behind
finish() {
    exec >&- 2>&-; wait "$TEE"
    [ "$1" -ne 2 ] || { rm -f -- "$LOG"; rmdir -- "${MADE[@]}" || true; } 2>/dev/null
    exit "$1"
}
launch() { PYTHONPATH=$HERE${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" -m sft.nodes.launch "$@"; }
(launch --visit) || finish $?  # hosts that ssh does not know: it asks, and reads the answer, here
set -m  # the training in a process group of its own, with SIGINT not ignored
launch --log "$LOG" "$HERE/train.py" "${FLAGS[@]}" "$@" &
TRAINING=$!
for signal in INT TERM HUP; do trap "kill -$signal $TRAINING 2>/dev/null || true" $signal; done
set +e
while kill -0 $TRAINING 2>/dev/null; do wait $TRAINING; CODE=$?; done
wait $TRAINING; LAST=$?
[ $LAST -eq 127 ] || CODE=$LAST
finish "$CODE"
