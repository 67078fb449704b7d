#!/bin/sh
# What a machine with torch for CUDA 13 (Python 3.12, x86-64) and no network lacks, as wheels in .whl/: docs/gpu-check.md.
# Versions are constraints.txt's. bitsandbytes keeps the libraries of CUDA 13 alone, or the wheels would not fit into 64 MiB with the repository.
#     tests/gpu/wheels.sh [PYTHON]      needs pip, setuptools, wheel and network
set -eu
cd "$(dirname "$0")/../.."
python=${1:-python3}
mkdir -p .whl
fetch() {
    "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
        --platform manylinux_2_34_x86_64 --platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 \
        --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform manylinux1_x86_64 -d .whl "$@"
}
pinned() { sed -n "s/^$1==/$1==/p" constraints.txt; }

for name in transformers peft accelerate tokenizers safetensors huggingface_hub bitsandbytes datasets multiprocess dill pydantic pydantic_core \
    annotated-types typing-inspection ruamel.yaml hjson gguf; do
    wanted=$(pinned "$name")
    test -n "$wanted" || { echo "constraints.txt has no $name" >&2; exit 1; }
    fetch "$wanted"
done
fetch liger-kernel==0.8.5

"$python" -m pip --disable-pip-version-check download -q --no-deps --no-binary deepspeed --no-build-isolation -d .whl "$(pinned deepspeed)"
DS_BUILD_OPS=0 "$python" -m pip --disable-pip-version-check wheel -q --no-deps --no-build-isolation -w .whl .whl/deepspeed-*.tar.gz
rm .whl/deepspeed-*.tar.gz

"$python" - <<'PYTHON'
import glob, zipfile
(path,) = glob.glob(".whl/bitsandbytes-*.whl")
with zipfile.ZipFile(path) as whole:
    kept = [(item, whole.read(item)) for item in whole.infolist() if not item.filename.endswith(".so") or "_cuda13" in item.filename or "_cpu" in item.filename]
with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as less:
    for item, data in kept:  # pip checks no hash of RECORD, and files that it lists need not be there
        less.writestr(item, data)
PYTHON
du -sh .whl
