# Sourced, with a requirements file of this project as argument:  source script/env.sh requirements.txt
#
# Leaves `python` an interpreter (3.10 or newer) with those requirements installed: the virtual or conda
# environment that is active, else .venv in the project's root, which is made if need be. A stamp inside the
# environment, written only after a successful installation, makes the next call return at once.
# With --define as argument it only defines its functions.

env_fail() {
    echo "script/env.sh: $*" >&2
    exit 2
}

# The folder of the virtual or conda environment that is active; conda's base counts as none.
env_active() {
    if [[ -n "${VIRTUAL_ENV:-}" ]]; then
        echo "$VIRTUAL_ENV"
    elif [[ -n "${CONDA_PREFIX:-}" && "${CONDA_DEFAULT_ENV:-}" != base ]]; then
        echo "$CONDA_PREFIX"
    else
        return 1
    fi
}

env_is_recent() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

env_find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if env_is_recent "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

# One checksum of a requirements file and of the files it includes with -r.
env_checksum() {
    local files=("$1") index=0 included
    while ((index < ${#files[@]})); do
        while read -r included; do
            files+=("$(dirname "$1")/$included")
        done < <(sed -n 's/^-r *//p' "${files[index]}")
        index=$((index + 1))
    done
    cat "${files[@]}" | cksum | tr ' ' '-'
}

# Make .venv, unless it is there; one that an interrupted call left behind is made anew.
env_make() {
    local base
    [[ -e "$1/bin/python" && ! -e "$1/.unfinished" ]] && return
    base="$(env_find_python)" || env_fail "Python 3.10 or newer is needed, but none was found"
    echo "making $1 with $base"
    rm -rf "$1"
    mkdir "$1"
    touch "$1/.unfinished"
    "$base" -m venv "$1" || env_fail "'$base -m venv' failed; on Debian and Ubuntu: apt install python3-venv"
}

env_use() {
    local root environment stamp
    root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
    [[ -f "$root/$1" ]] || env_fail "no file $root/$1"
    if ! environment="$(env_active)"; then
        environment="$root/.venv"
        env_make "$environment"
    fi
    export PATH="$environment/bin:$PATH"
    stamp="$environment/.installed-$(env_checksum "$root/$1")"
    [[ -e "$stamp" ]] && return
    env_is_recent "$environment/bin/python" || env_fail "Python 3.10 or newer is needed in $environment"
    echo "installing $1 into $environment"
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --requirement "$root/$1" ||
        env_fail "the installation failed; run this again"
    touch "$stamp"
    rm -f "$environment/.unfinished"
}

if [[ "${1:?usage: source script/env.sh REQUIREMENTS}" != --define ]]; then
    env_use "$1"
fi
