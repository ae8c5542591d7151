"""Which coefficient makes each regularizer equally strong: its gradient is a given share of the cross-entropy's.

    python script/match_coefficients.py -- --config configs/digits.yaml
    python script/match_coefficients.py --share 0.1 --measures attn.mhs weight.so -- \\
        --config configs/deit_small.yaml --data-path IMAGENET --finetune CHECKPOINT

Regularizers are of scales that differ by many powers of ten, so a comparison at equal coefficients compares scales.
Here c = share |grad CE| / |grad R|, of all weights, as a mean over batches, at the weights that the flags behind --
start from, rounded to one digit. Each stands at its default layers. Terms that take labels (patch.mixing,
patch.region_mixing) are cross-entropies themselves and have no entry.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import program
from errors import UserError, shown
from options.parser import Parser

PROGRAM = "match_coefficients.py"


def get_args_parser() -> argparse.ArgumentParser:
    """The command line, without main.py's flags."""
    parser = Parser(
        prog=PROGRAM,
        usage=f"{PROGRAM} [FLAGS] -- FLAGS of main.py",
        description=(__doc__ or "").partition("\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--share", type=float, default=0.1, metavar="X", help="of the cross-entropy's gradient (0.1)"
    )
    parser.add_argument("--batches", type=int, default=4, metavar="N", help="that the norms are means over (4)")
    parser.add_argument(
        "--measures", nargs="+", default=[], metavar="SPEC", help="terms of --reg without =COEF (all)"
    )
    return parser


def strengths(names: Sequence[str], flags: Sequence[str], batches: int) -> Iterator[tuple[str, float, float]]:
    """Each term with the norms of its gradient and of the cross-entropy's, as means over batches.

    Raises:
        UserError: the flags or a term cannot be.
    """
    from itertools import islice

    import torch
    from torch import nn

    import build
    from datasets import build_dataset
    from loaders import build_train_loader
    from models.sharding import weights_of
    from options import config
    from state.preprocessing import follow_weights
    from utils import pick_device, seed_everything

    def norm(value: torch.Tensor, model: nn.Module) -> float:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        gradients = torch.autograd.grad(value, weights, retain_graph=True, allow_unused=True)
        return math.sqrt(sum(float(g.double().square().sum()) for g in gradients if g is not None))

    for name in names:
        args = follow_weights(config.resolve([*flags, "--reg", f"{name}=1"]))
        device = pick_device(args.device, 0)
        seed_everything(args.seed)
        images, classes = build_dataset(True, args)
        backbone = build.build_backbone(args, len(classes))
        diversity, measure = build.build_diversity(args, backbone)
        model = build.build_student(args, backbone, diversity, measure, len(classes), device)
        objective = build.build_objective(args, diversity, len(classes), device)
        mixing = build.build_mixing(args, backbone, diversity)
        own, label = 0.0, 0.0
        seen = 0
        for batch in islice(build_train_loader(args, images, 1, 0, device), batches):
            mixed, labels = mixing(*(part.to(device) for part in batch))
            terms = objective(model.train()(mixed, labels=labels), labels)
            terms |= objective.of_weights(weights_of(model))
            label_name = next(iter(terms))
            own += norm(next(terms[key].value for key in terms if key.startswith(name)), model)
            label += norm(terms[label_name].value, model)
            seen += 1
        yield name, own / seen, label / seen


def rounded(value: float) -> float:
    """To one digit that counts."""
    return float(f"{value:.0e}")


def default_names() -> list[str]:
    """All regularizers that take no labels, at their levels."""
    from regularizers import MEASURES
    from regularizers.catalogue import read

    entries = [entry for entry in read().entries if MEASURES[entry.name].takes != "labels"]
    return [f"{level}.{entry.name}" for entry in entries for level in entry.levels]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; a user's mistake becomes one line and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    end = words.index("--") if "--" in words else len(words)
    try:
        args = get_args_parser().parse_args(words[:end])
        flags = words[end + 1 :]
        if not flags:
            raise UserError("main.py's flags are missing, e.g. -- --config configs/digits.yaml")
        if args.batches < 1 or not args.share > 0:
            raise UserError("--batches must be at least 1, and --share above 0")
        print(f"{'term':40} {'|grad R|':>10} {'|grad CE|':>10}  coefficient for a share of {args.share:g}")
        for name in args.measures or default_names():
            with contextlib.redirect_stdout(io.StringIO()):
                ((_, own, label),) = strengths([name], flags, args.batches)
            coefficient = f"{rounded(args.share * label / own):g}" if own else "none: its gradient is 0"
            print(f"{name:40} {own:10.3g} {label:10.3g}  {coefficient}", flush=True)
    except UserError as error:
        print(shown(f"{PROGRAM}: error: {error}", 4000), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    program.begin(PROGRAM)
    program.leave(main())
