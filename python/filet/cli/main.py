"""The program ``filet``: its commands, and how their errors are said.

Models come from a folder, or by their name from the Hub or its cache; as safetensors unless
``--allow-pickle`` is given, and without code of their own unless ``--trust-remote-code`` is. A path
that is there wins over a name, and asks nothing of the network. Everything is written beside its
destination and renamed into place when it is complete.

Heavy imports happen inside the commands, so that ``filet --help`` and ``filet inspect`` are quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Sequence

from filet.cli.arguments import make_parser
from filet.cli.commands import init, inspect, stats
from filet.cli.output import Said, expected_errors, one_line, say_error, show_warning
from filet.cli.processes import launched

__all__ = ["main"]

_COMMANDS = {"init": init, "stats": stats, "inspect": inspect}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done, 1 an expected error (one line on stderr), 130 interrupted. Wrong usage raises
        SystemExit with status 2, and ``--help`` with status 0, as argparse does.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("default", UserWarning)
            for noise in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", noise)
            warnings.showwarning = show_warning
        try:
            args.check(args, parser)
            with launched(args) if args.command != "inspect" else contextlib.nullcontext():
                _COMMANDS[args.command](args)
            sys.stdout.flush()
            return 0
        except KeyboardInterrupt:
            if args.debug:
                raise
            print("filet: interrupted", file=sys.stderr)
            return 130
        except BrokenPipeError:
            # The reader of our output is gone (filet inspect | head): nothing more to say to it.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        except Said:
            return 1
        except expected_errors() as error:
            if args.debug:
                raise
            say_error(one_line(error))
            return 1
