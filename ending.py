"""How a program ends: what was raised becomes an exit code, and one line for what a user can mend."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

import torch
import torch.distributed as dist

from errors import Interrupted, LocalError, TrainingDiverged, UserError, is_first_on_machine, shown
from program import FAILED, INTERRUPTED, STOPPED
from utils import lost_process, print_main
from workers import name_dead_workers

LONGEST = 4000  # characters of a message
WRONG = 2  # exit code of a user's mistake


def finish(name: str, action: Callable[[], None]) -> int:
    """Do it, and return the program's exit code; a user's mistake becomes one line and code 2.

    Args:
        name: of the program, for its messages.
    """
    try:
        with name_dead_workers():
            action()
    except (UserError, TrainingDiverged) as error:
        # all processes meet the same mistake, and one of each machine reports it; but a LocalError is its own
        if isinstance(error, LocalError) or is_first_on_machine():
            print(shown(f"{name}: error: {error}", LONGEST), file=sys.stderr, flush=True)
        return WRONG if isinstance(error, UserError) else FAILED
    except Interrupted as stop:
        print_main(f"{name}: {stop}")
        return STOPPED
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        message = f"{name}: error: --torchcompile does not work here, drop it: {' '.join(lines[:2])}"
        print(shown(message, LONGEST), file=sys.stderr)
        return WRONG
    except RuntimeError as error:
        lost = lost_process(error)
        if lost is None:
            raise
        print(shown(f"{name}: error: {lost}", LONGEST), file=sys.stderr, flush=True)
        return FAILED
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted", file=sys.stderr)
        return INTERRUPTED
    finally:
        if dist.is_initialized():
            gc.collect()  # a sharded model holds the group, whose threads must end before Python does
            dist.destroy_process_group()
    return 0
