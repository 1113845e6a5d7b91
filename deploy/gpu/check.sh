#!/bin/sh
# Checks the GPU path on a machine with a GPU, torch, Triton, transformers and PEFT, and times it, in under six minutes:
#     deploy/gpu/check.sh OUT [arguments of deploy/gpu/check.py]
# Wheels of what else is needed (bitsandbytes, llguidance, pydantic and what these need) lie in .whl/: nothing is fetched.
set -eu
cd "$(dirname "$0")/../.."
out=$1
shift
if ls .whl/*.whl >/dev/null 2>&1; then
	site=$(mktemp -d)
	trap 'rm -rf "$site"' EXIT
	python3 -m pip install --quiet --no-index --no-deps --no-warn-conflicts --target "$site" .whl/*.whl
	export PYTHONPATH="$site:$PWD${PYTHONPATH:+:$PYTHONPATH}"
fi
export HF_HUB_OFFLINE=1
python3 -m deploy.gpu.check --out "$out" "$@"
