#!/usr/bin/env bash
# llama.cpp's server over the demo base, in the foreground; sixteen at once, of up to 1,024 tokens each. Built once from the sources that
# llama-cpp-python carries, for this processor: a quarter of an hour on two cores.
#   deploy/bench/llama.sh bf16|q4 [folder of a PEFT adapter...]
# LLAMA   where its sources, build and converted files are or go
# PORT    on loopback
# A request names adapters by their places in the list; one that names none is answered by the base, once somebody has posted [] to
# /lora-adapters: until then all of them apply. Wants cmake, ninja, g++ and this project's .venv.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
LLAMA=${LLAMA:-$root/build/bench/llama}
version=0.3.36
source=$LLAMA/llama_cpp_python-$version/vendor/llama.cpp

case $1 in
  bf16 | q4) kind=$1 ;;
  *) echo "usage: llama.sh bf16|q4 [adapter folder...]" >&2; exit 2 ;;
esac
shift
mkdir -p "$LLAMA/adapters"

if [ ! -x "$source/build/bin/llama-quantize" ]; then
  python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$LLAMA" "llama-cpp-python==$version"
  tar -C "$LLAMA" -xf "$LLAMA/llama_cpp_python-$version.tar.gz"
  cmake -S "$source" -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF
  cmake --build "$source/build" --target llama-server
  cmake --build "$source/build" --target llama-quantize
fi

convert() {  # program, arguments
  [ -d "$LLAMA/python" ] || python3 -m pip install --quiet --no-deps --target "$LLAMA/python" sentencepiece
  PYTHONPATH=$LLAMA/python "$root/.venv/bin/python" "$source/$1" "${@:2}"
}

cd "$root"
base=$(.venv/bin/python -c 'from service.model.loading import resolve_folder; print(resolve_folder("demo"))' | tail -1)
[ -f "$LLAMA/bf16.gguf" ] || convert convert_hf_to_gguf.py "$base" --outtype bf16 --outfile "$LLAMA/bf16.gguf"
[ -f "$LLAMA/q4.gguf" ] || "$source/build/bin/llama-quantize" "$LLAMA/bf16.gguf" "$LLAMA/q4.gguf" Q4_0

lora=()
for folder; do
  file=$LLAMA/adapters/$(basename "$folder").gguf
  [ "$file" -nt "$folder/adapter_model.safetensors" ] || convert convert_lora_to_gguf.py "$folder" --base "$base" --outtype bf16 --outfile "$file"
  lora+=(--lora "$file")
done

# Repacked for AMX, its Q4_0 ended at the first batch without a word.
repack=()
if [ "$kind" = q4 ] && grep -qw amx_int8 /proc/cpuinfo; then repack=(--no-repack); fi
exec "$source/build/bin/llama-server" --model "$LLAMA/$kind.gguf" --host 127.0.0.1 --port "${PORT:-8090}" --parallel 16 --ctx-size 16384 \
  --threads "$(nproc)" --no-ui "${repack[@]}" "${lora[@]}"
