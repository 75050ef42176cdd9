# What demo and test share: a virtual environment in .venv, installed once for each state of the requirements.
# Sourced with the working directory at the project's root.

find_python() {
    local candidate
    for candidate in "${PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null &&
            "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11, 3.12 or 3.13 found; install one, or name it: PYTHON=/path/to/python $0" >&2
    return 1
}

# make_environment EXTRAS: .venv with this project and its extras, at the versions of scripts/constraints.txt.
make_environment() {
    local extras=$1 python state
    python=$(find_python)
    state=$(cat pyproject.toml scripts/constraints.txt <("$python" --version) | sha256sum | cut -c1-16)
    if [ -x .venv/bin/python ] && [ "$(cat .venv/installed-"$extras" 2>/dev/null)" = "$state" ]; then
        return
    fi
    echo "── installing .venv ($extras)" >&2
    if ! "$python" -m venv .venv; then
        echo "error: $python has no venv module; on Debian and Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    # torch first and by its exact version: nothing else may choose one.
    .venv/bin/python -m pip install --quiet --disable-pip-version-check "$(grep '^torch==' scripts/constraints.txt)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        --constraint scripts/constraints.txt --editable ".[$extras]"
    if [[ ",$extras," == *,test,* ]]; then
        # Liger's patch is tested without a GPU, and our own kernels in Triton's interpreter. Its version is no constraint:
        # elsewhere each torch brings the one that it was built with.
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
            "$(grep '^liger-kernel==' scripts/constraints.txt)" triton==3.6.0
    fi
    echo "$state" >.venv/installed-"$extras"
}
