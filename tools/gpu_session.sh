#!/usr/bin/env bash
# One visit to a machine with a GPU: its tests, then times. It needs a Python with torch, torchvision and pytest,
# no network, and installs nothing.
#
#     tools/gpu_session.sh OUT [SECONDS [ITERATIONS]]    # PYTHON=python3 by default
#
# gives `salnb time` 240 seconds by default, and each row 40 iterations: with the paper's 200, few rows would have
# their turn. It leaves in OUT:  machine.txt  test-gpu.log  test-gpu.xml  timing.json  timing.log
# What `salnb train` needs besides is taken from _build/gpu, if it was put there before (see CONTRIBUTING.md).
set -uo pipefail
cd "$(dirname "$0")/.." || exit

OUT=$(realpath -m "${1:?which folder? tools/gpu_session.sh OUT [SECONDS [ITERATIONS]]}")
SECONDS_TO_TIME=${2:-240}
ITERATIONS=${3:-40}
PYTHON=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/_build/gpu${PYTHONPATH:+:$PYTHONPATH}
mkdir -p "$OUT"

{
	date -u
	nvidia-smi
	"$PYTHON" -c 'import sys, torch, torchvision; print(sys.version, torch.__version__, torchvision.__version__)'
} >"$OUT/machine.txt" 2>&1

PYTEST_ADDOPTS="--junitxml=$OUT/test-gpu.xml" timeout 400 make test-gpu "PYTHON=$PYTHON" 2>&1 | tee "$OUT/test-gpu.log"
TESTS=${PIPESTATUS[0]}

"$PYTHON" -m salnb time --device cuda --budget "$SECONDS_TO_TIME" --iterations "$ITERATIONS" --out "$OUT/timing.json" 2>&1 |
	tee "$OUT/timing.log"
TIMES=${PIPESTATUS[0]}

echo "tests ended with $TESTS, times with $TIMES: see $OUT"
exit $((TESTS || TIMES))
