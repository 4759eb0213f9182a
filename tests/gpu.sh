#!/usr/bin/env bash
# Checks on an NVIDIA GPU, in under five minutes on a bare machine with Python 3.11 and a CUDA driver:
#
#   tests/gpu.sh                # leaves gpu.json in the folder of the repository
#   tests/gpu.sh --small        # without the 7B, for GPUs with less than 40 GB
#
# It creates a virtual environment, and needs no checkpoint: the weights are random. It has not been run yet.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=${GPU_ENVIRONMENT:-.venv-gpu}
if [ ! -d "$environment" ]; then
    python3 -m venv "$environment"
    "$environment/bin/pip" install --quiet -r requirements.txt "transformers>=5.23,<6" tokenizers
fi
export PYTHONPATH="$PWD:$PWD/tiny"
exec "$environment/bin/python" tests/gpu.py "$@"
