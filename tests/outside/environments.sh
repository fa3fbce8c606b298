#!/usr/bin/env bash
# Makes one environment of a program that reads our exports: tests/outside/environments.sh NAME FOLDER makes FOLDER/NAME.
# NAME is transformers4, llamacpp, speculators, openvino or compressed; README.md has sizes and times.
#   PYTHON      interpreter, python3 by default (3.11 or later)
#   TORCH_SPEC  pip requirement for torch, torch==2.13.0 by default; a CPU wheel if pip finds one
set -euo pipefail
[ $# = 2 ] || { sed -n '2,5s/^# *//p' "$0" >&2; exit 2; }
requirements=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)/requirements/$1.txt
[ -f "$requirements" ] || { echo "environments.sh: no environment $1; see $(dirname "$requirements")" >&2; exit 2; }
mkdir -p "$2"
folder=$(cd "$2" && pwd)/$1
"${PYTHON:-python3}" -m venv --clear "$folder"
install() { "$folder/bin/python" -m pip install --quiet "$@"; }
if [ "$1" = llamacpp ]; then
    install -r "$requirements"
    exit
fi
# torch comes first and then stays as it is: a later line would otherwise take a CUDA build
install --no-deps --retries 1 --extra-index-url https://download.pytorch.org/whl/cpu "${TORCH_SPEC:-torch==2.13.0}"
"$folder/bin/python" -m pip freeze | grep '^torch==' >"$folder/torch.txt"
install --constraint "$folder/torch.txt" torch -r "$requirements"
if [ "$1" = openvino ]; then install --no-deps optimum-intel==2.2.0; fi # its own requirements exclude these versions
# speculators asks for torchvision and torchaudio, whose PyPI builds do not import beside a CPU build of torch; it needs neither
if [ "$1" = speculators ]; then "$folder/bin/python" -m pip uninstall --quiet --yes torchvision torchaudio; fi
