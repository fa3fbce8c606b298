#!/usr/bin/env bash
# The single entry point: sets up the environment if needed, then runs a command. `./launch.sh` alone prints the usage.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: ./launch.sh COMMAND ...

  ./launch.sh quickstart                         the whole pipeline at small size (recipes/quickstart.sh)
  ./launch.sh RECIPE.yaml [flags]                train: trainkit fit --config RECIPE.yaml [flags]
  ./launch.sh RECIPE.yaml --resume RUN_DIR       continue that run
  ./launch.sh RECIPE.sh [arguments]              run a recipe script
  ./launch.sh test [pytest arguments]            the tests
  ./launch.sh lint                               ruff, pyright, import floors, shellcheck, documentation
  ./launch.sh distill|features|acceptance ...    make training data with the target; in NPROC processes, like training
  ./launch.sh export|generate|bench|inspect|...  any trainkit command, in one process; add --help for its usage

Environment:
  NPROC        number of processes on this machine; default: number of GPUs, or 1
  NNODES, NODE_RANK, MASTER=host[:port], RUN_DIR   for several machines: run the same line on each; RUN_DIR is shared
  PYTHON       Python interpreter for .venv (3.11 or later)
  TORCH_SPEC   pip requirement for torch on machines without NVIDIA GPU; default torch==2.13.0, a CPU wheel if available
HELP
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
here=$PWD
die() { echo "launch.sh: error: $*" >&2; exit 2; }
is_busy() { # does every second core have work? (on Linux; the load is a number with two decimals)
    local load
    { read -r load _ </proc/loadavg; } 2>/dev/null && (( 10#${load/./} * 2 > $(getconf _NPROCESSORS_ONLN) * 100 ))
}
has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }

# Is THIS checkout installed for interpreter $1, with its test tools? (-P without PYTHONPATH ignores the current folder.)
holds() {
    env -u PYTHONPATH "$1" -P - "$root" 2>/dev/null <<'PY'
import importlib.util as u, pathlib, sys
spec = u.find_spec("trainkit")
here = spec and spec.origin and pathlib.Path(spec.origin).resolve().parents[1] == pathlib.Path(sys.argv[1])
sys.exit(not (here and u.find_spec("pytest") and u.find_spec("torch")))
PY
}

find_python() {
    local p
    for p in ${PYTHON:+"$PYTHON"} python3 python python3.13 python3.12 python3.11; do
        "$p" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo "$p" && return
    done
    die "no Python >= 3.11 with venv found; install one, or set PYTHON: PYTHON=/path/to/python3.12 ./launch.sh ..."
}

# Makes .venv, or completes one that is stale or was interrupted: .venv/trainkit holds a checksum once everything is installed.
make_venv() {
    local venv=$root/.venv want base
    want=$(cksum <"$root/pyproject.toml")
    if command -v flock >/dev/null; then exec 9>"$root/.venv.lock"; flock 9; fi
    if [ "$(cat "$venv/trainkit" 2>/dev/null)" != "$want" ] || ! holds "$venv/bin/python"; then
        echo "launch.sh: installing into $venv; this takes some minutes" >&2
        if [ "$(cat "$venv/trainkit" 2>/dev/null)" = incomplete ] || ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
            base=$(find_python)
            "$base" -m venv --clear "$venv"
        fi
        echo incomplete >"$venv/trainkit"
        if ! has_gpu; then
            "$venv/bin/python" -m pip install --quiet --no-deps --retries 1 \
                --extra-index-url https://download.pytorch.org/whl/cpu "${TORCH_SPEC:-torch==2.13.0}"
        fi
        "$venv/bin/python" -m pip install --quiet --editable "${root}[dev]"
        if has_gpu && ! "$venv/bin/python" -m pip install --quiet --editable "${root}[deepspeed]"; then
            echo "launch.sh: deepspeed did not install; configs/strategy/deepspeed*.yaml will not work here" >&2
        fi
        holds "$venv/bin/python" || die "$venv does not import this checkout; remove the folder and try again"
        echo "$want" >"$venv/trainkit"
    fi
    if command -v flock >/dev/null; then exec 9>&-; fi
    PATH=$venv/bin:$PATH
}

setup() {
    if python=$(command -v python || command -v python3) && holds "$python"; then
        PATH=$("$python" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH
    else
        make_venv
        python=$root/.venv/bin/python
    fi
    export PATH TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}
    # Threads that spin while they wait make a small model twice as fast on an idle machine, and many times slower on a busy one.
    if ! has_gpu; then export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-$(is_busy && echo passive || echo active)}; fi
}

# Number of processes on this machine: NPROC, otherwise the number of GPUs, at least one.
processes() {
    if [ -n "${NPROC:-}" ]; then echo "$NPROC"
    elif has_gpu; then "$python" -c 'import torch; print(max(1, torch.cuda.device_count()))'
    else echo 1; fi
}

absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }

fit() {
    local recipe flags=() folder=${RUN_DIR:-} resume="" nodes=${NNODES:-1} nproc
    recipe=$(absolute "$1"); shift
    [ -f "$recipe" ] || die "no recipe $recipe"
    while [ $# -gt 0 ]; do
        case $1 in
            --resume) [ $# -gt 1 ] || die "--resume needs a run folder"; folder=$2; resume=yes; shift 2 ;;
            --resume=*) folder=${1#*=}; resume=yes; shift ;;
            *) flags+=("$1"); shift ;;
        esac
    done
    if [ -n "$folder" ]; then folder=$(absolute "$folder"); fi
    if [ -n "$resume" ]; then
        local last=$folder/checkpoints/last.ckpt
        [ -e "$last" ] || [ -e "${last%.ckpt}.old" ] || die "--resume: no checkpoint $last to continue from; give the folder of the run"
        flags=(--ckpt_path "$last" ${flags[@]+"${flags[@]}"})
    fi
    if [ "$nodes" -gt 1 ]; then
        [ -n "${NODE_RANK:-}" ] && [ -n "${MASTER:-}" ] || die "NNODES=$nodes needs NODE_RANK (0..$((nodes - 1))) and MASTER=host[:port]"
        [ -n "$folder" ] || die "NNODES=$nodes needs RUN_DIR, the same shared folder on every node, or --resume"
    fi
    setup
    nproc=$(processes)
    if [ -z "$folder" ]; then
        folder=$root/runs/$(basename "${recipe%.*}")/$(date +%Y%m%d-%H%M%S)
        mkdir -p "${folder%/*}"
        until mkdir "$folder" 2>/dev/null; do # another run started within this second
            [ -e "$folder" ] || die "cannot make $folder"
            sleep 1
            folder=${folder%/*}/$(date +%Y%m%d-%H%M%S)
        done
    fi
    mkdir -p "$folder"
    echo "launch.sh: $folder" >&2
    if [ "$nproc" -gt 1 ] && ! has_gpu && [ -z "${OMP_NUM_THREADS:-}" ]; then
        local cores; cores=$(getconf _NPROCESSORS_ONLN)
        export OMP_NUM_THREADS=$((cores > nproc ? cores / nproc : 1))
    fi
    local run=("$python")
    if [ "$nodes" -gt 1 ]; then
        local host=${MASTER%:*} port=29500
        case $MASTER in *:*) port=${MASTER##*:} ;; esac
        run+=(-m trainkit.launch --nnodes="$nodes" --node-rank="$NODE_RANK" --nproc-per-node="$nproc"
            --master-addr="$host" --master-port="$port")
    elif [ "$nproc" -gt 1 ]; then
        run+=(-m trainkit.launch --standalone --nproc-per-node="$nproc")
    fi # one process needs no torchrun, and its exit code (130, 143) is returned unchanged
    export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600} # time to write a last checkpoint
    cd "$root"
    exec "${run[@]}" -m trainkit.cli fit --config "${recipe#"$root"/}" --trainer.default_root_dir "$folder" \
        --trainer.devices "$nproc" --trainer.num_nodes "$nodes" ${flags[@]+"${flags[@]}"}
}

case ${1:-} in
    "" | -h | --help | help) usage ;;
    quickstart) shift; setup; cd "$root"; exec bash recipes/quickstart.sh "$@" ;;
    test) # one process per core with one thread each; busy-waiting threads would slow the other processes sixfold
        shift; OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}; setup; cd "$root"
        if has_gpu; then exec "$python" -m pytest "$@"; fi
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY
        workers=$(getconf _NPROCESSORS_ONLN)
        export PYTEST_ADDOPTS="-n $workers --dist loadfile --durations 30 ${PYTEST_ADDOPTS:-}"
        exec "$python" -m pytest "$@"
        ;;
    lint)
        setup; cd "$root"; failed=0
        ruff format --check . || failed=1
        ruff check . || failed=1
        pyright || failed=1
        lint-imports || failed=1
        shellcheck launch.sh .ci/run tests/outside/environments.sh recipes/*.sh recipes/studies/*/*.sh || failed=1
        site=$(mktemp -d) # the built documentation is thrown away: only warnings and errors matter here
        NO_MKDOCS_2_WARNING=1 mkdocs build --strict --quiet --site-dir "$site" || failed=1
        rm -rf "$site"
        exit "$failed"
        ;;
    *.yaml | *.yml) fit "$@" ;;
    distill | features | acceptance) # each process makes its share of the data
        setup; nproc=$(processes)
        if [ "$nproc" -gt 1 ]; then
            exec "$python" -P -m trainkit.launch --standalone --nproc-per-node="$nproc" -m trainkit.cli "$@"
        fi
        exec "$python" -P -m trainkit.cli "$@"
        ;;
    *.sh) script=$(absolute "$1"); shift; [ -f "$script" ] || die "no recipe $script"; setup; cd "$root"; exec bash "$script" "$@" ;;
    *) setup; exec "$python" -P -m trainkit.cli "$@" ;;
esac
