"""Which arguments of the commands fit each other."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping

__all__ = ["check_init", "check_stats", "defaults_of"]

# What is read and taken; where nothing is they say nothing.
_OF_DATA = (
    "split", "subset", "data_revision", "streaming", "text_field", "prompt_field", "response_field",
    "side", "chat_template", "count_prompt", "samples", "max_length", "fisher",
)  # fmt: skip


def defaults_of(command: argparse.ArgumentParser) -> dict[str, object]:
    """Of the arguments that say how data are read and go through the model."""
    return {name: command.get_default(name) for name in _OF_DATA}


def _check_no_data(
    args: argparse.Namespace,
    parser: argparse.ArgumentParser,
    defaults: Mapping[str, object],
    instead: str,
) -> None:
    """Refuse what says how data are read and go through the model, where there are none."""
    for name, default in defaults.items():
        if getattr(args, name) != default:
            option = f"--{name.replace('_', '-')}"
            parser.error(f"{option} is for data that are read now; {instead} has what was taken")


def check_init(
    defaults: Mapping[str, object], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    if args.statistics is not None and args.save_statistics is not None:
        parser.error("init: --save-statistics has nothing to save with --statistics")
    if args.statistics is not None and args.keep is not None:
        parser.error("init: --keep is for 'filet stats'; the statistics have it or have it not")
    if args.statistics is not None:
        if args.engine == "blockwise":
            parser.error("init: --engine blockwise takes data; --statistics need the whole model")
        args.engine = "memory"
        _check_no_data(args, parser, defaults, "--statistics")
    if args.engine == "memory" and (args.host_memory is not None or args.scratch is not None):
        parser.error("init: --host-memory and --scratch are for --engine blockwise")
    _check_names(args, parser)
    _check_fields(args, parser)


def check_stats(
    defaults: Mapping[str, object], args: argparse.Namespace, parser: argparse.ArgumentParser
) -> None:
    if args.merge is None:
        missing = [f"--{name}" for name in ("model", "data") if getattr(args, name) is None]
        if missing:
            parser.error(f"stats: {' and '.join(missing)} required (or --merge)")
    elif any(given is not None for given in (args.model, args.data, args.keep, args.shard)):
        parser.error("stats: --merge excludes --model, --data, --keep and --shard")
    elif len(args.merge) < 2:
        parser.error("stats: --merge needs at least two files")
    else:
        _check_no_data(args, parser, defaults, "--merge")
    if args.shard is not None and args.keep == "self":
        parser.error("stats: --shard takes data to keep from a file, which all shards have")
    _check_names(args, parser)
    _check_fields(args, parser)


def _check_names(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    for name in args.target_modules:
        if re.search(r"[][(){}*+?^$|\\,]", name):
            parser.error(
                f"--target-modules {name!r}: expected names of layers with spaces between them "
                "(q_proj mlp.up_proj), no pattern and no list"
            )


def _check_fields(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.double_quant and args.quantize not in ("nf4", "fp4"):
        parser.error("--double-quant is for --quantize nf4 or fp4")
    if args.num_labels is not None and args.new_head is None:
        parser.error("--num-labels is for --new-head")
    if args.text_field and (args.prompt_field or args.response_field):
        parser.error("--text-field excludes --prompt-field and --response-field")
    if args.response_field and not args.prompt_field:
        parser.error("--response-field needs --prompt-field")
    if args.max_length < 2:
        parser.error("--max-length must be at least 2")
