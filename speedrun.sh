#!/usr/bin/env bash
# From nothing to a verdict: train a full-rank and a low-rank model with the same tokens, batch, schedule and
# seed, and compare them in $NANOCHAT_BASE_DIR/report/report.html.
#   bash speedrun.sh
# Every variable below can be set in the environment:
#   DEPTH=6 MLP_RANK=64 bash speedrun.sh
# A second call reuses what is there: finished runs are skipped, an interrupted one is resumed.
[ -n "${BASH_VERSION:-}" ] || { echo "error: speedrun.sh is written for bash: bash speedrun.sh" >&2; exit 2; }
{   # bash reads this block to its end before it runs it, so the file may be edited for the next run meanwhile
set -euo pipefail
{ : <&0; } 2>/dev/null || exec </dev/null   # if standard input is closed
for NAME in NPROC NNODES NODE_RANK MASTER_PORT; do
  case "${!NAME:-0}" in
    *[!0-9]*) printf 'error: %s=%q: give a whole number\n' "$NAME" "${!NAME}" >&2; exit 2 ;;
  esac
done

# Relative paths start at the folder of the call. This script changes to its own. A quoted ~ means home too.
absolute() {
  case "$1" in
    ''|/*|'~'[!/]*) echo "$1" ;;
    '~'*) echo "${HOME:-~}${1#'~'}" ;;
    *) echo "$PWD/$1" ;;
  esac
}
if [ -n "${NANOCHAT_BASE_DIR:-}" ]; then
  NANOCHAT_BASE_DIR=$(absolute "$NANOCHAT_BASE_DIR")
  export NANOCHAT_BASE_DIR
fi
case "${DATA:-}" in
  stdlib|tinystories|climbmix|fineweb-edu|c4) ;;
  *) DATA=$(absolute "${DATA:-}")
     [ ! -d "$DATA" ] || DATA=$(cd -- "$DATA" && pwd) ;;   # its real name, also for . and ..
esac
CDPATH='' cd -- "$(dirname -- "$0")"
source dev/setup.sh   # makes .venv and installs what is missing

# A signal may reach this shell alone, or every process. The shell passes it on and waits until the training
# has saved its state.
PROCESS=
SIGNALS=0
INTERRUPTS=0
FORWARDED=0
# a second Ctrl-C kills; other signals may come twice, from a closing terminal or a scheduler
forward_signal() {
  [ "$FORWARDED" = 1 ] || kill -TERM "$PROCESS" 2>/dev/null || :
  FORWARDED=1
  [ "$INTERRUPTS" -lt 2 ] || kill -KILL "$PROCESS" 2>/dev/null || :
}
on_signal() {
  SIGNALS=$((SIGNALS + 1))
  [ -z "$PROCESS" ] || forward_signal
}
trap on_signal TERM HUP QUIT USR1 USR2
trap 'INTERRUPTS=$((INTERRUPTS + 1)); on_signal' INT
run() {
  local code=75 before
  [ "$SIGNALS" = 0 ] || exit "$code"
  "$@" <&0 &
  PROCESS=$!
  [ "$SIGNALS" = 0 ] || forward_signal     # a signal came before the process was known
  while :; do
    before=$SIGNALS
    code=0
    wait "$PROCESS" || code=$?
    [ "$SIGNALS" != "$before" ] || break   # a signal ends `wait` early, with a code of its own
  done
  PROCESS=
  if [ "$SIGNALS" -gt 0 ]; then            # start nothing more
    [ "$code" != 0 ] || code=75
    exit "$code"
  fi
  return "$code"
}
# signals that torchrun passes on, if its version has --signals-to-handle; any other one kills it
export PET_SIGNALS_TO_HANDLE="${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}"
# seconds in which torchrun lets its processes save, from torch 2.13 on; before, these are 30
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

GPUS=$(python -m nanochat.devices)
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
: "${MATRIX_RANKS=v=0,o=0}"       # ranks of single matrices; v and o are full rank (0); '' = none
: "${FACTOR_ACT:=none}"          # silu: an activation between the factors, which then cannot be merged
: "${MLP_RATIO:=4}"              # MLP width of the low-rank model, in model widths; full rank has 4
: "${RANK_SCHEDULE:=constant}"   # constant | linear | step | exponential | quadratic | r0,r1,…
: "${RANK_END:=0}"               # rank of the last layer, for the schedules that change
: "${SEED:=42}"
: "${WANDB_RUN:=dummy}"          # NAME: log to wandb, as NAME-full and NAME-lowrank
: "${NPROC:=$((GPUS > 0 ? GPUS : 1))}"            # processes on this node
: "${NNODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=127.0.0.1}" "${MASTER_PORT:=29500}"
                                 # several nodes: run this script on each; it uses MASTER_PORT and the next 3
: "${EVAL_TOKENS:=$((GPUS > 0 ? 10485760 : 32768))}"
: "${SAVE_EVERY:=$((GPUS > 0 ? 1000 : 50))}"

if [ "$NPROC" = 0 ] || [ "$NNODES" -le "$NODE_RANK" ]; then
  echo "error: NPROC=$NPROC NNODES=$NNODES NODE_RANK=$NODE_RANK:" \
       "give a process or more, and count nodes from 0" >&2
  exit 2
fi

# on several nodes each of these takes a lock: one node does the work, the others wait and then find it done
case "$DATA" in
  tinystories|climbmix|fineweb-edu|c4) run python -m nanochat.dataset --data "$DATA" -n "$DATA_SHARDS" ;;
esac
run python -m scripts.tok_train --data "$DATA" --vocab-size "$VOCAB_SIZE" --max-chars "$TOKENIZER_CHARS"
[ "$NODE_RANK" -gt 0 ] || run python -m scripts.tok_eval --data "$DATA" --max-chars 2000000

PORT=$MASTER_PORT   # each launch has its own port, so that an early node cannot join the launch before
launch() {          # launch MODULE FLAGS…
  local module=$1
  shift
  if [ "$NNODES" -gt 1 ]; then
    run torchrun --nnodes="$NNODES" --node_rank="$NODE_RANK" --nproc_per_node="$NPROC" \
                 --master_addr="$MASTER_ADDR" --master_port="$PORT" -m "$module" -- "$@"
    PORT=$((PORT + 1))
  elif [ "$NPROC" -gt 1 ]; then
    run torchrun --standalone --nproc_per_node="$NPROC" -m "$module" -- "$@"
  else
    run python -m "$module" "$@"
  fi
}
wandb_name() { [ "$WANDB_RUN" = dummy ] && echo dummy || echo "$WANDB_RUN-$1"; }

# the tag names the settings, so that another setting is another run
NAME=${DATA##*/}
# characters that a folder's name may have and a run's name may not
FORBIDDEN='[]!"#$%&*:;<>?[\\^`{|}~'"'"']'
NAME=${NAME//$FORBIDDEN/-}
NAME=${NAME//[[:cntrl:]]/-}
BASE_TAG="${NAME/#[ .-]/_}_v${VOCAB_SIZE}_d${DEPTH}_w${MODEL_DIM}_t${MAX_SEQ_LEN}_b${TOTAL_BATCH_SIZE}"
BASE_TAG="${BASE_TAG}_n${NUM_ITERATIONS/#-1/auto}_s${SEED}"
FULL="${BASE_TAG}_full"
LOWRANK="${BASE_TAG}_attn${ATTN_RANK}_mlp${MLP_RANK}"
SINGLE="${MATRIX_RANKS//=/}"
SINGLE="${SINGLE//[,\/]/_}"
LOWRANK="${LOWRANK}${SINGLE:+_$SINGLE}"
[ "$FACTOR_ACT" = none ] || LOWRANK="${LOWRANK}_${FACTOR_ACT}"
[ "$MLP_RATIO" = 4 ] || LOWRANK="${LOWRANK}_ratio${MLP_RATIO}"
[ "$RANK_SCHEDULE" = constant ] || LOWRANK="${LOWRANK}_${RANK_SCHEDULE//,/-}_end${RANK_END}"
COMMON=(--data "$DATA" --depth "$DEPTH" --model-dim "$MODEL_DIM" --head-dim "$HEAD_DIM"
        --max-seq-len "$MAX_SEQ_LEN" --device-batch-size "$DEVICE_BATCH_SIZE"
        --total-batch-size "$TOTAL_BATCH_SIZE" --seed "$SEED" --eval-every "$EVAL_EVERY"
        --eval-tokens "$EVAL_TOKENS" --ppl-thresholds "$PPL_THRESHOLDS" --save-every "$SAVE_EVERY"
        --resume auto)

launch scripts.base_train "${COMMON[@]}" --model-tag "$FULL" --run="$(wandb_name full)" \
  --num-iterations "$NUM_ITERATIONS"
# as many steps as the full-rank run, whose number may have been derived from its size
STEPS=$(python -c '
import sys
from nanochat.metrics import load_run, runs_dir
print(load_run(runs_dir() / sys.argv[1]).config["derived"]["num_iterations"])' "$FULL")
launch scripts.base_train "${COMMON[@]}" --model-tag "$LOWRANK" --run="$(wandb_name lowrank)" \
  --num-iterations "$STEPS" --attn-rank "$ATTN_RANK" --mlp-rank "$MLP_RANK" --matrix-ranks "$MATRIX_RANKS" \
  --factor-act "$FACTOR_ACT" --mlp-ratio "$MLP_RATIO" --rank-schedule "$RANK_SCHEDULE" --rank-end "$RANK_END"

for TAG in "$FULL" "$LOWRANK"; do
  launch scripts.base_eval --model-tag "$TAG" --eval-tokens "$EVAL_TOKENS" \
    --device-batch-size "$DEVICE_BATCH_SIZE"
done
OUT=$(python -c 'from nanochat.common import get_base_dir; print(get_base_dir() / "report")')
[ "$NODE_RANK" -gt 0 ] || run python -m scripts.report "$FULL" "$LOWRANK" --out "$OUT"
exit
}
