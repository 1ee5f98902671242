"""The arguments of the commands: names, types and helps."""

from __future__ import annotations

import argparse
import math
import re
from functools import partial
from pathlib import Path

from filet.cli.checks import check_init, check_stats, defaults_of
from filet.model.tasks import TASKS
from filet.report.names import PLOT_FILE

__all__ = ["make_parser"]

_SCALINGS = ("fisher", "singular", "constant-min", "constant-max")

_DESCRIPTION = """\
Initialise LoRA adapters with FILet: in the directions to which the loss on your data is least
sensitive."""

_EPILOG = """\
examples:
  filet init --model llama --data train.jsonl --output adapter --rank 32
  filet stats --model llama --data train.jsonl --output llama.safetensors
  filet init --model llama --statistics llama.safetensors --output adapter-r64 --rank 64
  filet inspect adapter --html adapter.html
  filet inspect adapter adapter-r64
  torchrun --nproc-per-node 4 -m filet.cli init --model llama ...   on four GPUs at once

exit status: 0 done, 1 an error (said in one line; --debug shows where), 2 wrong usage,
130 interrupted; after 1 and 130 nothing half-written is left."""


def make_parser() -> argparse.ArgumentParser:
    """The parser of the program; ``args.check`` refuses arguments that do not fit each other."""
    parser = argparse.ArgumentParser(
        prog="filet",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_init(
        commands.add_parser(
            "init",
            help="write a FILet-initialised LoRA adapter for a model",
            description="Run the data through the model, choose the directions and write a plain "
            "LoRA adapter that any PEFT loads, with a report and a picture of the energies beside "
            "it.",
        )
    )
    _add_stats(
        commands.add_parser(
            "stats",
            help="collect statistics once, for any rank and variant; or merge several",
            description="Run the data through the model and save the statistics that 'filet init "
            "--statistics' takes, or merge files of statistics of the same model.",
        )
    )
    _add_inspect(
        commands.add_parser(
            "inspect",
            help="print the table of an initialisation, or compare two",
            description="Print the report that 'filet init' wrote; with --plot also draw the "
            "energies, layer by layer, the chosen directions marked. Or say how alike two adapters "
            "are, by the overlap of their directions, or two files of statistics, by their "
            "moments' cosine. Nothing is written but what --plot and --html name.",
        )
    )
    return parser


def _add_init(init: argparse.ArgumentParser) -> None:
    source = init.add_argument_group("model and data")
    _add_model(source, required=True)
    _add_task(source)
    either = source.add_mutually_exclusive_group(required=True)
    _add_data(source, either)
    either.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="use statistics that 'filet stats' or --save-statistics wrote, by the name given "
        "there: the model is loaded for its weights and not run",
    )
    adapter = init.add_argument_group("adapter")
    adapter.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder to create"
    )
    adapter.add_argument(
        "--save-statistics",
        type=Path,
        metavar="FILE",
        help="also keep the statistics, to be used again with --statistics",
    )
    _add_lora(adapter)
    method = init.add_argument_group("method")
    _add_choice(method)
    _add_fisher(method)
    running = init.add_argument_group("running")
    _add_run(running, overwrite="replace an adapter that is there")
    _add_engine(running)
    init.set_defaults(check=partial(check_init, defaults_of(init)))


def _add_stats(stats: argparse.ArgumentParser) -> None:
    stats.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .safetensors file to create; of several processes, a file of each, and an index",
    )
    stats.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="merge these files of statistics instead of running a model: the result is what one "
        "run over all their data gives",
    )
    stats.add_argument(
        "--shard",
        type=_shard,
        metavar="I/N",
        help="take only the I-th of N parts of the samples, on a machine of its own, say; --merge "
        "takes the N files",
    )
    source = stats.add_argument_group("model and data (not with --merge)")
    _add_model(source, required=False)
    _add_task(source)
    _add_data(source, source)
    method = stats.add_argument_group("method")
    _add_targets(method)
    _add_fisher(method)
    _add_run(stats.add_argument_group("running"), overwrite="replace the file if it is there")
    stats.set_defaults(check=partial(check_stats, defaults_of(stats)))


def _add_inspect(inspect: argparse.ArgumentParser) -> None:
    inspect.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="what 'filet init' wrote, or the report itself; with SECOND any adapter's folder, or "
        "a file of statistics",
    )
    inspect.add_argument(
        "second",
        type=Path,
        nargs="?",
        metavar="SECOND",
        help="another adapter's folder, or another file of statistics: say how alike the two are",
    )
    inspect.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help=f"also draw it (of one adapter, what 'filet init' wrote beside it as {PLOT_FILE})",
    )
    inspect.add_argument(
        "--html",
        type=Path,
        metavar="FILE.html",
        help="also write table and picture as a page that opens offline",
    )
    _add_debug(inspect)
    inspect.set_defaults(check=lambda args, parser: None)


def _add_lora(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rank",
        type=_positive,
        default=32,
        metavar="R",
        help="directions chosen in every layer (default: 32)",
    )
    group.add_argument(
        "--alpha",
        type=_positive,
        metavar="N",
        help="LoRA's alpha (default: the rank, so that the scaling alpha/rank is 1)",
    )
    group.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank)")
    _add_targets(group)


def _add_choice(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--start",
        choices=("zero", "untouched"),
        default="zero",
        help="zero: directions in A and B = 0, plain LoRA; untouched: A0 and B0, subtracted by a "
        "frozen half of the adapter (default: zero)",
    )
    group.add_argument(
        "--select",
        choices=("auto", "min", "max", "random", "contrast"),
        default="auto",
        help="which energies to choose; or contrast: directions of largest task over data to keep "
        "(default: auto, contrast with data to keep, else min)",
    )
    group.add_argument(
        "--damping",
        type=_positive_float,
        default=1e-2,
        metavar="X",
        help="of contrast, over the mean eigenvalue of what is kept (default: 0.01)",
    )
    group.add_argument(
        "--scaling",
        choices=_SCALINGS,
        default="fisher",
        help="how A and B are scaled (default: fisher)",
    )
    group.add_argument(
        "--normalization",
        choices=("relative", "mean", "sum"),
        default="relative",
        help="what A and B are scaled by: energies over their mean, times --gamma; or energies of "
        "the mean or of the summed loss. Does not change the choice (default: relative)",
    )
    group.add_argument(
        "--gamma",
        type=_positive_float,
        default=4 / 3,
        metavar="X",
        help="of relative and of contrast: 1/3 makes A as large as LoRA's default, 4/3 (the "
        "default) twice as large",
    )
    group.add_argument(
        "--no-orthogonal",
        action="store_false",
        dest="orthogonal",
        help="take the chosen directions as they are, not orthonormal (not with contrast)",
    )


def _add_model(group: argparse._ArgumentGroup, *, required: bool) -> None:
    group.add_argument(
        "--model",
        type=Path,
        required=required,
        metavar="DIR",
        help="folder of a model and its tokenizer; or owner/name on the Hub, from the user's cache "
        "or downloaded into it",
    )
    group.add_argument(
        "--revision", metavar="NAME", help="of a --model on the Hub: a branch, tag or commit"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights in memory (default: auto, as saved)",
    )
    group.add_argument(
        "--quantize",
        choices=("nf4", "fp4", "int8"),
        help="quantise the model as it is loaded, by bitsandbytes: the adapter is for that base "
        "(QLoRA). A folder that is quantised already is loaded as it is, without this",
    )
    group.add_argument(
        "--double-quant",
        action="store_true",
        help="of --quantize nf4 and fp4: quantise their scales once more",
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="where to run (default: auto, a GPU if there is one)",
    )
    group.add_argument(
        "--allow-pickle",
        action="store_true",
        help="also load weights that are not safetensors; such files can run code: only if you "
        "trust their source",
    )
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that lies in the model's folder",
    )
    group.add_argument(
        "--gradient-checkpointing",
        action="store_true",
        help="keep one activation a block and run the forward again in the backward: less memory, "
        "more time",
    )


def _add_task(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--task",
        choices=TASKS,
        help="what the model is for; vlm: chats with images (default: what its config.json says, "
        "else causal-lm)",
    )
    group.add_argument(
        "--new-head",
        type=_seed,
        metavar="SEED",
        help="of classifiers: draw the head of classes that the model has not; it is "
        "trained, and saved with the adapter",
    )
    group.add_argument(
        "--num-labels",
        type=_positive,
        metavar="N",
        help="classes of a new head (default: what config.json says)",
    )


def _add_data(
    group: argparse._ArgumentGroup,
    where: argparse._ArgumentGroup | argparse._MutuallyExclusiveGroup,
) -> None:
    where.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="a file (.jsonl, .json, .csv, .parquet, .txt, and .gz), a folder of such files or of "
        "datasets' save_to_disk, or owner/name on the Hub: text, conversations, prompts and "
        "completions, token ids (docs/data.md)",
    )
    _add_source(group)
    group.add_argument(
        "--keep",
        metavar="FILE",
        help="data of what is not to be forgotten, as for --data (columns found by themselves); or "
        "'self', text drawn from the model",
    )
    group.add_argument(
        "--samples",
        type=_samples,
        default=320,
        metavar="N",
        help="draw N samples from all the data by --seed, or take 'all' (default: 320)",
    )
    group.add_argument(
        "--max-length",
        type=_positive,
        default=1024,
        metavar="N",
        help="tokens kept of a sample (default: 1024)",
    )
    group.add_argument(
        "--batch-size",
        type=_positive_or_auto,
        default="auto",
        metavar="N",
        help="samples as long as the longest that go through the model at once, shorter ones share "
        "their room; the result does not depend on it (default: auto, what fits in the GPU's free "
        "memory, or 4096 tokens on a CPU)",
    )
    group.add_argument(
        "--passes",
        type=_positive_or_auto,
        default="auto",
        metavar="N",
        help="take the moments in N passes over the data, each of some blocks, and keep finished "
        "ones in host memory (default: auto, as few as fit; one on a CPU)",
    )


def _add_source(group: argparse._ArgumentGroup) -> None:
    """Which part of the data is read, by which columns, and what of a sample is predicted."""
    group.add_argument(
        "--split", default="train", metavar="NAME", help="split of --data (default: train)"
    )
    group.add_argument("--subset", metavar="NAME", help="subset of a --data on the Hub")
    group.add_argument(
        "--data-revision", metavar="NAME", help="of a --data on the Hub: a branch, tag or commit"
    )
    group.add_argument(
        "--streaming",
        action="store_true",
        default=None,
        help="read rows without a copy in the cache of datasets; of a data set on the Hub, the "
        "samples then come from a shuffled buffer (default: for files larger than free memory)",
    )
    group.add_argument("--text-field", metavar="NAME", help="column that holds a whole text")
    group.add_argument("--prompt-field", metavar="NAME", help="column that holds the prompt")
    group.add_argument(
        "--response-field", metavar="NAME", help="column that holds what follows the prompt"
    )
    group.add_argument(
        "--side",
        choices=("chosen", "rejected"),
        default="chosen",
        help="which side of pairs is read (default: chosen)",
    )
    group.add_argument(
        "--chat-template",
        type=Path,
        metavar="FILE",
        help="Jinja template of conversations (default: the tokenizer's)",
    )
    group.add_argument(
        "--count-prompt",
        action="store_true",
        help="count the loss on prompts too, and on all turns of a conversation (default: on "
        "responses, and on the assistant's turns)",
    )


def _add_targets(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--target-modules",
        nargs="+",
        default=["all-linear"],
        metavar="NAME",
        help="names of the linear layers (default: all-linear, all but the output layer)",
    )


def _add_fisher(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fisher",
        choices=("empirical", "sampled"),
        default="empirical",
        help="labels of the data, or drawn from the model (default: empirical)",
    )
    group.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="of everything random (default: 0)"
    )


def _add_run(group: argparse._ArgumentGroup, *, overwrite: str) -> None:
    group.add_argument("--overwrite", action="store_true", help=overwrite)
    group.add_argument("--no-progress", action="store_true", help="no progress bars")
    _add_debug(group)


def _add_engine(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--engine",
        choices=("auto", "memory", "blockwise"),
        default="auto",
        help="memory: the whole model at once; blockwise: a block at a time from its safetensors "
        "shards, for models larger than the GPU, and resumed by the same command when killed "
        "(default: auto, memory where the model fits)",
    )
    group.add_argument(
        "--host-memory",
        type=_bytes,
        metavar="SIZE",
        help="blockwise: host memory for what goes between the blocks, 64G say, of all processes "
        "of a machine; what does not fit is put on --scratch or computed again (default: half of "
        "what is free)",
    )
    group.add_argument(
        "--scratch",
        type=Path,
        metavar="DIR",
        help="blockwise: folder on a fast disk for what host memory does not hold",
    )


def _add_debug(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    group.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return value


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _shard(text: str) -> tuple[int, int]:
    """``2/4``: the second of four."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= number <= of:
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text!r}")
    return number, of


def _seed(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"must be a whole number in [0, 2**63), got {text!r}")
    return value


def _bytes(text: str) -> int:
    """``64G``, ``1.5T``, ``500M``, or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    size = 0
    if match:
        size = int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"must be a size like 64G or 500M, got {text!r}")
    return size


def _samples(text: str) -> int | None:
    """A positive number, or None for ``all``."""
    return None if text == "all" else _positive(text)


def _positive_or_auto(text: str) -> int | str:
    return text if text == "auto" else _positive(text)
