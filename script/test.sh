#!/usr/bin/env bash
# Every check: style, formatting, types, then the tests. Arguments go to pytest: script/test.sh tests/test_main.py
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source script/env.sh requirements-test.txt

ruff check .
ruff format --check .
mypy
python -m pytest "$@"
