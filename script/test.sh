#!/usr/bin/env bash
# Every check: style, formatting, types, then the tests, in two processes. Arguments go to pytest:
# script/test.sh tests/test_main.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-test.txt

ruff check .
ruff format --check .
mypy
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" # tests are small, and two processes share the cores
# Each file runs in one process; tests/conftest.py puts the longest ones first
python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
