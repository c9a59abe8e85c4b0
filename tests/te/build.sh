#!/usr/bin/env bash
# Builds Transformer Engine without a GPU, into the virtual environment $1 (about 6 GB, and 10 to 25 minutes on 2 cores).
# Needs Linux, Python 3.11 or later and nvcc 13 ($CUDA_HOME, by default /usr/local/cuda).
# Then: VENV/bin/pip install -e .[dev], and in the environment that it prints: VENV/bin/python -m pytest -m te
set -eu
venv=$1
python3 -m venv "$venv"
pip="$venv/bin/pip"
"$pip" install -q torch==2.14.1
"$pip" install -q numpy packaging pydantic importlib-metadata onnx onnxscript einops ninja pybind11 setuptools wheel \
  nvdlfw-inspect nvidia-cudnn-frontend
"$pip" install -q --no-deps transformer-engine-cu13==2.20.2 transformer-engine==2.20.2
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
export CUDA_HOME="${CUDA_HOME:-/usr/local/cuda}" NVTE_FRAMEWORK=pytorch NVTE_PYTORCH_FORCE_BUILD=TRUE
export MAX_JOBS="${MAX_JOBS:-2}"
export CPATH="$site/nvidia/cu13/include:$site/nvidia/cudnn/include:$site/nvidia/nccl/include:$site/include"
"$pip" install --no-build-isolation --no-deps --no-binary transformer-engine-torch transformer-engine-torch==2.20.2
echo "LD_LIBRARY_PATH=$(find "$site/nvidia" -maxdepth 2 -name lib -type d | tr '\n' ':')$site/torch/lib"
