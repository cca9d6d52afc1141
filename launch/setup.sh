# shellcheck shell=bash
# The scripts beside this one source it, and then call `set_up` or `set_up test`. That installs the project, once, into
# the active virtual environment or, if none is active, into .venv. It puts that environment's programs first on PATH.
# The working folder is the project's root afterwards, from wherever the script was called.

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." > /dev/null || exit
root=$(pwd -P)

say() { printf '%s\n' "$*"; }

fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# The number of NVIDIA GPUs in this machine.
count_gpus() { nvidia-smi -L 2> /dev/null | grep -c '^GPU ' || true; }

# Whether a Python runs and is new enough.
recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2> /dev/null; }

find_python() {
    local name
    for name in python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
        if recent "$name"; then
            say "$name"
            return
        fi
    done
    fail "Python 3.10 or newer is needed, but python3 is $(python3 -V 2>&1 || true). Install one and run this again."
}

# The environment to install into: the active one or, if there is none, .venv.
choose_environment() {
    local active=${VIRTUAL_ENV:-}
    # conda's "base" holds conda itself. A project's packages must not go there.
    if [ -z "$active" ] && [ "${CONDA_DEFAULT_ENV:-base}" != base ]; then
        active=${CONDA_PREFIX:-}
    fi
    if [ -n "$active" ] && ! [ -x "$active/bin/python" ]; then
        fail "The active environment $active has no bin/python. Deactivate it (or unset VIRTUAL_ENV) and run this again."
    fi
    say "${active:-$root/.venv}"
}

# Makes .venv if it is missing or unusable (an interrupted installation, or its Python has been removed).
make_venv() {
    local base
    "$1/bin/python" -c '' 2> /dev/null && return
    base=$(find_python)
    "$base" -c 'import ensurepip, venv' 2> /dev/null || fail "$("$base" -V) cannot make a virtual environment: its \
modules venv and ensurepip are missing. On Debian and Ubuntu: sudo apt install python3-venv"
    "$base" -m venv --clear "$1" || fail "The virtual environment $1 could not be made, for the reason above."
}

# The pip index of the torch build for this machine's driver and first GPU. Empty if the build on PyPI fits, or if no
# build does.
torch_index() {
    local gpu
    gpu=$(nvidia-smi --query-gpu=driver_version,compute_cap --format=csv,noheader 2> /dev/null | head -n 1) || true
    case $gpu in [0-9]*,*[0-9]) "$1" -m trainer.engine.gpus "$gpu" ;; esac
}

# install_project ENVIRONMENT EXTRA
install_project() {
    local python=$1/bin/python present tested index torch=() problem
    recent "$python" || fail "The environment $1 has $("$python" -V 2>&1), and 3.10 or newer is needed. Deactivate or \
delete it and run this again."
    # Environments made by uv come without pip.
    "$python" -m pip --version > /dev/null 2>&1 || "$python" -m ensurepip > /dev/null 2>&1 ||
        fail "The environment $1 has no pip. Install it there and run this again."

    present=$("$python" -c 'from importlib.metadata import version; print(version("torch"))' 2> /dev/null || true)
    tested=$(sed -n 's/^torch==//p' launch/constraints.txt)
    case $present in
        "" | "$tested" | "$tested"+*) ;;
        *) say "torch $present in $1 is replaced by $tested, with which this project is tested." ;;
    esac
    index=$(torch_index "$python")
    if [ -n "$index" ]; then
        torch=("torch==$tested+${index##*/}" --extra-index-url "$index")
        say "PyPI's torch does not fit this machine's GPU or its driver, so torch comes from $index."
    fi
    say "Installing the project into $1 (the first time with PyTorch and DeepSpeed: minutes, some gigabytes) ..."
    "$python" -m pip install -qq --no-input --disable-pip-version-check \
        --constraint launch/constraints.txt "${torch[@]}" --editable ".${2:+[$2]}" ||
        fail "The installation failed, for the reason above. Run this again to continue."
    problem=$("$python" -m trainer.engine.gpus)
    if [ -n "$problem" ]; then say "WARNING: $problem"; fi
    # pip writes the path of Python into the first line of DeepSpeed's programs. With a space in it they cannot be run.
    case $1 in *" "*) sed -i '1s|^#!/.* .*/bin/python.*|#!/usr/bin/env python|' "$1"/bin/deepspeed "$1"/bin/ds* ;; esac
}

# set_up [test]: afterwards `python`, `deepspeed` and other programs are those of the environment.
set_up() {
    local extra=${1:-} environment files stamp stamped=()
    [ "$(uname -s)" = Linux ] || fail "This project runs only on Linux, but this is $(uname -s)."
    environment=$(choose_environment)
    stamp=$environment/strong-scaling-trainer.stamp
    files=$(cat pyproject.toml launch/constraints.txt | sha256sum)
    # The stamp says what is installed there: from which folder, by which files, with which extra.
    if [ -f "$stamp" ]; then mapfile -t stamped < "$stamp"; fi

    if [ "${stamped[0]:-}" != "$root" ] || [ "${stamped[1]:-}" != "$files" ] ||
        ! [[ "${stamped[2]:-}" == "$extra" || -z "$extra" ]] || ! [ -x "$environment/bin/deepspeed" ]; then
        rm -f "$stamp"
        if [ "$environment" = "$root/.venv" ]; then
            # Programs in an environment contain its path. So it is made again if the project was moved or copied.
            if [ -n "${stamped[0]:-}" ] && [ "${stamped[0]}" != "$root" ]; then rm -rf "$environment"; fi
            make_venv "$environment"
        fi
        install_project "$environment" "$extra"
        # Written last, so that an interrupted installation is continued.
        printf '%s\n' "$root" "$files" "$extra" > "$stamp"
    fi

    export PATH=$environment/bin:$PATH
    # Without it DeepSpeed warns that it finds no accelerator.
    if [ "$(count_gpus)" = 0 ]; then export DS_ACCELERATOR=${DS_ACCELERATOR:-cpu}; fi
}
