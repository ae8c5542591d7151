# Sourced by the launchers: checks their arguments, leaves the data's folder in DATA, the project's in ROOT and the
# user's own flags in "$@", and defines `launch FLAGS`, which trains with NPROC (default 8) processes here.

if [[ $# -eq 0 || "$1" == -* ]]; then
    cat >&2 <<USAGE
usage: [NPROC=8] $0 DATA [FLAGS]

DATA is a folder with train/ and val/, each with one folder of images per class. FLAGS are main.py's, and win over
the recipe's, for example --epochs 100 --output_dir runs/short. NPROC is the number of processes, one per GPU.
USAGE
    exit 2
fi
DATA="$1"
shift
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
source "$ROOT/script/env.sh" --define

launch() {
    if ! env_active >/dev/null && [[ -d "$ROOT/.venv/bin" ]]; then
        export PATH="$ROOT/.venv/bin:$PATH"
    fi
    if ! command -v torchrun >/dev/null; then
        echo "$0: no torchrun on PATH: activate an environment that holds PyTorch, or make one with" >&2
        echo "    bash $ROOT/script/env.sh requirements.txt" >&2
        exit 2
    fi
    exec torchrun --standalone --nproc_per_node "${NPROC:-8}" "$ROOT/main.py" "$@"
}
