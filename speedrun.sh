#!/usr/bin/env bash
# From nothing to a verdict: a full-rank and a low-rank model under the same tokens, batch, schedule and seed, compared in
# $NANOCHAT_BASE_DIR/report/report.html.   bash speedrun.sh
# Every variable below can also be given in the environment: DEPTH=6 MLP_RANK=64 bash speedrun.sh
# A second call reuses what is there: finished runs are skipped, an interrupted one continues.
set -euo pipefail
cd "$(dirname "$0")"
trap : TERM USR1      # a scheduler signals every process: wait for the training to save its state
source dev/setup.sh   # .venv, installation

GPUS=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$GPUS" -gt 0 ]; then                         # a node with GPUs: nanochat's d20 and its data
  : "${DATA:=climbmix}" "${DATA_SHARDS:=120}" "${VOCAB_SIZE:=65536}" "${TOKENIZER_CHARS:=2000000000}"
  : "${DEPTH:=20}" "${MODEL_DIM:=1280}" "${HEAD_DIM:=128}" "${MAX_SEQ_LEN:=2048}"
  : "${ATTN_RANK:=0.25}" "${MLP_RANK:=0.297}"
  : "${DEVICE_BATCH_SIZE:=32}" "${TOTAL_BATCH_SIZE:=524288}" "${NUM_ITERATIONS:=-1}"
  : "${EVAL_EVERY:=250}" "${PPL_THRESHOLDS:=100,50,30,25,20}"
else                                               # a laptop: the same story in miniature, in minutes
  : "${DATA:=stdlib}" "${DATA_SHARDS:=8}" "${VOCAB_SIZE:=2048}" "${TOKENIZER_CHARS:=5000000}"
  : "${DEPTH:=4}" "${MODEL_DIM:=192}" "${HEAD_DIM:=64}" "${MAX_SEQ_LEN:=256}"
  : "${ATTN_RANK:=0.25}" "${MLP_RANK:=0.297}"
  : "${DEVICE_BATCH_SIZE:=16}" "${TOTAL_BATCH_SIZE:=4096}" "${NUM_ITERATIONS:=120}"
  : "${EVAL_EVERY:=25}" "${PPL_THRESHOLDS:=200,100,50}"
fi
: "${MATRIX_RANKS=v=0,o=0}"       # of single matrices, in place of ATTN_RANK or MLP_RANK: v and o stay full; '' = none
: "${FACTOR_ACT:=none}"          # silu: between the factors, which then merge into no matrix
: "${MLP_RATIO:=4}"              # hidden width of the low-rank model's MLP, in widths of the model; full rank's is 4
: "${RANK_SCHEDULE:=constant}"   # constant | linear | step | exponential | quadratic | r0,r1,…
: "${RANK_END:=0}"               # rank of the last layer, for the schedules that change
: "${SEED:=42}"
: "${WANDB_RUN:=dummy}"          # a name logs to wandb as NAME-full and NAME-lowrank
: "${NPROC:=$((GPUS > 0 ? GPUS : 1))}"            # processes on this node
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"   # several nodes: this script on each
: "${EVAL_TOKENS:=$((GPUS > 0 ? 10485760 : 32768))}"
: "${SAVE_EVERY:=$((GPUS > 0 ? 1000 : 50))}"

case "$DATA" in tinystories|climbmix|fineweb-edu|c4) python -m nanochat.dataset --data "$DATA" -n "$DATA_SHARDS" ;; esac
python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOKENIZER_CHARS"
python -m scripts.tok_eval --data "$DATA" --max-chars 2000000

if [ "$NNODES" -gt 1 ]; then
  launch() { torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC" --rdzv_backend=c10d --rdzv_id=speedrun \
                      --rdzv_endpoint="$MASTER_ADDR:$MASTER_PORT" -m "$@"; }
elif [ "$NPROC" -gt 1 ]; then
  launch() { torchrun --standalone --nproc_per_node="$NPROC" -m "$@"; }
else
  launch() { python -m "$@"; }
fi
wandb_name() { [ "$WANDB_RUN" = dummy ] && echo dummy || echo "$WANDB_RUN-$1"; }

# the tag says what was changed, so that another setting is another run
BASE_TAG="$(basename "$DATA")_v${VOCAB_SIZE}_d${DEPTH}_w${MODEL_DIM}_t${MAX_SEQ_LEN}_b${TOTAL_BATCH_SIZE}_n${NUM_ITERATIONS/#-1/auto}_s${SEED}"
FULL="${BASE_TAG}_full"
LOWRANK="${BASE_TAG}_attn${ATTN_RANK}_mlp${MLP_RANK}"
SINGLE="${MATRIX_RANKS//=/}"
LOWRANK="${LOWRANK}${SINGLE:+_${SINGLE//,/_}}"
[ "$FACTOR_ACT" = none ] || LOWRANK="${LOWRANK}_${FACTOR_ACT}"
[ "$MLP_RATIO" = 4 ] || LOWRANK="${LOWRANK}_ratio${MLP_RATIO}"
[ "$RANK_SCHEDULE" = constant ] || LOWRANK="${LOWRANK}_${RANK_SCHEDULE//,/-}_end${RANK_END}"
COMMON=(--data "$DATA" --depth "$DEPTH" --model-dim "$MODEL_DIM" --head-dim "$HEAD_DIM" --max-seq-len "$MAX_SEQ_LEN"
        --device-batch-size "$DEVICE_BATCH_SIZE" --total-batch-size "$TOTAL_BATCH_SIZE" --seed "$SEED"
        --eval-every "$EVAL_EVERY" --eval-tokens "$EVAL_TOKENS" --ppl-thresholds "$PPL_THRESHOLDS"
        --save-every "$SAVE_EVERY" --resume auto)

launch scripts.base_train "${COMMON[@]}" --model-tag "$FULL" --run "$(wandb_name full)" --num-iterations "$NUM_ITERATIONS"
# the same number of steps as the baseline took, also where that was derived from its size
STEPS=$(python -c 'import sys; from nanochat.metrics import load_run, runs_dir; print(load_run(runs_dir() / sys.argv[1]).config["derived"]["num_iterations"])' "$FULL")
launch scripts.base_train "${COMMON[@]}" --model-tag "$LOWRANK" --run "$(wandb_name lowrank)" --num-iterations "$STEPS" \
  --attn-rank "$ATTN_RANK" --mlp-rank "$MLP_RANK" --matrix-ranks "$MATRIX_RANKS" --factor-act "$FACTOR_ACT" --mlp-ratio "$MLP_RATIO" \
  --rank-schedule "$RANK_SCHEDULE" --rank-end "$RANK_END"

for TAG in "$FULL" "$LOWRANK"; do
  launch scripts.base_eval --model-tag "$TAG" --eval-tokens "$EVAL_TOKENS" --device-batch-size "$DEVICE_BATCH_SIZE"
done
OUT="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-lowrank}/report"
[ "$NODE_RANK" -gt 0 ] || python -m scripts.report "$FULL" "$LOWRANK" --out "$OUT"
