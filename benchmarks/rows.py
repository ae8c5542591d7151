"""What the rows of a table cost: the time of a training step, against that of the row's baseline.

    OMP_NUM_THREADS=1 python benchmarks/rows.py configs/tables/digits.yaml --device cpu --classes 10

Each row takes turns with its baseline, round by round, on random images of the row's own size and batch. Evaluation
and what is only measured there (--measure) do not count.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from common import (
    CLASSES,
    ROOT,
    Batches,
    Recipe,
    get_args_parser,
    machine,
    main,
    processor_time,
    ratio,
    spread,
    take_turns,
    timed,
    write,
)

from errors import UserError
from options.flags import shape_of
from tables.reading import read_table
from tables.spec import MAIN, Row, Table
from utils import pick_device


def recipe(table: Table, row: Row, device: torch.device, classes: int) -> Recipe:
    """A row, ready to train.

    Raises:
        UserError: it is no run of main.py.
    """
    if row.program != MAIN:
        raise UserError(f"row {row.name} is a run of {row.program}, not of main.py: name others by --only")
    return Recipe(str(ROOT / row.config), device, [*table.flags, *row.flags], classes)


def run() -> None:
    parser = get_args_parser((__doc__ or "").split("\n")[0])
    parser.add_argument("table", metavar="TABLE.yaml")
    parser.add_argument("--classes", type=int, default=CLASSES, help=f"of the images; {CLASSES}")
    parser.add_argument("--steps", type=int, default=4, help="steps in a round; 4")
    parser.add_argument("--rounds", type=int, default=0, help="rounds of each row, after one to warm up; 12, or 1")
    parser.add_argument("--only", nargs="+", default=[], metavar="ROW", help="rows; all by default")
    help_time = "for a CPU that has other work, with one thread"
    parser.add_argument("--processor-time", action="store_true", help=help_time)
    flags = parser.parse_args()
    device = pick_device(flags.device)
    if flags.processor_time and device.type != "cpu":
        raise UserError("--processor-time is for the CPU: drop it, or give --device cpu")
    table = read_table(flags.table)
    rounds = flags.rounds or (1 if flags.quick else 12)
    clock = processor_time if flags.processor_time else timed
    print(f"{table.title}: {machine(device)}, {torch.get_num_threads()} thread(s)\n")
    print("| row | step time / baseline | ms a step, baseline beside it |\n|---|---|---|")
    ratios: dict[str, Any] = {}
    for row in table.only(flags.only):
        if row.name == row.baseline or not row.baseline:
            continue
        pair = {name: recipe(table, table.row(name), device, flags.classes) for name in (row.baseline, row.name)}
        args = pair[row.name].args
        channels, size, _ = shape_of(args)
        batches = Batches(args.batch_size, flags.steps, size, device, channels, flags.classes)
        turns = {name: clock(each.train, batches, device) for name, each in pair.items()}
        times = take_turns(turns, rounds)
        ratios[f"{row.name}_over_{row.baseline}"] = cost = ratio(times, row.name, row.baseline)
        quartiles = spread(times, row.name, row.baseline).strip()
        middle = [1000 * statistics.median(times[name]) for name in (row.name, row.baseline)]
        print(f"| {row.label} | {cost:.3f} {quartiles} | {middle[0]:.1f}, {middle[1]:.1f} |", flush=True)
    how = {"rounds": rounds, "steps": flags.steps, "processor_time": flags.processor_time}
    write(flags.json, device, {"ratios": ratios, **how})


if __name__ == "__main__":
    main(run)
