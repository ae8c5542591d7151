"""Write docs/regularizers.md from the docstrings of the measures.

python script/make_docs.py          write it
python script/make_docs.py --check  only compare; exit code 1 where it is not what the docstrings say
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from regularizers import catalogue

PAGE = Path(__file__).resolve().parents[1] / catalogue.DOCS


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare and write nothing")
    wanted = catalogue.as_markdown()
    if parser.parse_args(argv).check:
        if PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted:
            return 0
        print(f"{catalogue.DOCS} is not what the docstrings say: run python script/make_docs.py", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
