"""The command line: ``filet init``, ``filet stats`` and ``filet inspect``.

Models come from local folders only, as safetensors unless ``--allow-pickle`` is given, and without
code of their own unless ``--trust-remote-code`` is. Everything is written beside its destination
and renamed into place when it is complete.

Heavy imports happen inside the commands, so that ``filet --help`` and ``filet inspect`` are quick.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from filet.files import PLOT_FILE, inside, staged

__all__ = ["main"]

SCALINGS = ("fisher", "singular", "constant-min", "constant-max")

_DESCRIPTION = """\
Initialise LoRA adapters with FILet: in the directions to which the loss on your data is least
sensitive."""

_EPILOG = """\
examples:
  filet init --model llama --data train.jsonl --output adapter --rank 32
  filet stats --model llama --data train.jsonl --output llama.safetensors
  filet init --model llama --statistics llama.safetensors --output adapter-r64 --rank 64
  filet inspect adapter

exit status: 0 done, 1 an error (said in one line; --debug shows where), 2 wrong usage,
130 interrupted; after 1 and 130 nothing half-written is left."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, without the program's name; ``sys.argv[1:]`` by default.

    Returns:
        0 done, 1 an expected error (one line on stderr), 130 interrupted. Wrong usage raises
        SystemExit with status 2, and ``--help`` with status 0, as argparse does.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    with warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("default", UserWarning)
            for noise in (DeprecationWarning, FutureWarning, PendingDeprecationWarning):
                warnings.simplefilter("ignore", noise)
            warnings.showwarning = _show_warning
        try:
            args.check(args, parser)
            args.run(args)
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
        except _expected_errors() as error:
            if args.debug:
                raise
            print(f"filet: error: {_one_line(error)}", file=sys.stderr)
            return 1


# -- arguments -------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="filet",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    init = commands.add_parser(
        "init",
        help="write a FILet-initialised LoRA adapter for a model",
        description="Run the data through the model, choose the directions and write a plain LoRA "
        "adapter that any PEFT loads, with a report and a picture of the energies beside it.",
    )
    source = init.add_argument_group("model and data")
    _add_model(source, required=True)
    either = source.add_mutually_exclusive_group(required=True)
    _add_data(source, either)
    either.add_argument(
        "--statistics",
        type=Path,
        metavar="FILE",
        help="use statistics that 'filet stats' or --save-statistics wrote: the model is loaded "
        "for its weights and not run",
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
    adapter.add_argument(
        "--rank",
        type=_positive,
        default=32,
        metavar="R",
        help="directions chosen in every layer (default: 32)",
    )
    adapter.add_argument(
        "--alpha",
        type=_positive,
        metavar="N",
        help="LoRA's alpha (default: the rank, so that the scaling alpha/rank is 1)",
    )
    adapter.add_argument("--rslora", action="store_true", help="scale by alpha/sqrt(rank)")
    _add_targets(adapter)
    method = init.add_argument_group("method")
    method.add_argument(
        "--select",
        choices=("min", "max", "random"),
        default="min",
        help="which energies to choose (default: min)",
    )
    method.add_argument(
        "--scaling",
        choices=SCALINGS,
        default="fisher",
        help="how A and B are scaled (default: fisher)",
    )
    method.add_argument(
        "--normalization",
        choices=("mean", "sum"),
        default="mean",
        help="energies of the mean or of the summed loss; scales A and B, does not change the "
        "choice (default: mean)",
    )
    _add_fisher(method)
    running = init.add_argument_group("running")
    _add_run(running, overwrite="replace an adapter that is there")
    _add_engine(running)
    init.set_defaults(run=_init, check=_check_init)

    stats = commands.add_parser(
        "stats",
        help="collect statistics once, for any rank and variant; or merge several",
        description="Run the data through the model and save the statistics that 'filet init "
        "--statistics' takes, or merge files of statistics of the same model.",
    )
    stats.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a .safetensors file to create"
    )
    stats.add_argument(
        "--merge",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="merge these files of statistics instead of running a model: the result is what one "
        "run over all their data gives",
    )
    source = stats.add_argument_group("model and data (not with --merge)")
    _add_model(source, required=False)
    _add_data(source, source)
    method = stats.add_argument_group("method")
    _add_targets(method)
    _add_fisher(method)
    _add_run(stats.add_argument_group("running"), overwrite="replace the file if it is there")
    stats.set_defaults(run=_stats, check=_check_stats)

    inspect = commands.add_parser(
        "inspect",
        help="print the table of an initialisation and draw its energies",
        description="Print the report that 'filet init' wrote and draw the energies, layer by "
        "layer, with the chosen directions marked.",
    )
    inspect.add_argument(
        "folder", type=Path, metavar="FOLDER", help="what 'filet init' wrote, or the report itself"
    )
    inspect.add_argument(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help=f"where to draw (default: FOLDER/{PLOT_FILE})",
    )
    _add_debug(inspect)
    inspect.set_defaults(run=_inspect, check=lambda args, parser: None)
    return parser


def _add_model(group: argparse._ArgumentGroup, *, required: bool) -> None:
    group.add_argument(
        "--model",
        type=Path,
        required=required,
        metavar="DIR",
        help="local folder of a causal language model and its tokenizer; nothing is downloaded",
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="type of the weights in memory (default: auto, as saved)",
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


def _add_data(
    group: argparse._ArgumentGroup,
    where: argparse._ArgumentGroup | argparse._MutuallyExclusiveGroup,
) -> None:
    where.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".txt (blocks between blank lines, else lines), .jsonl, .jsonl.gz or .parquet",
    )
    group.add_argument(
        "--samples",
        type=_samples,
        default=320,
        metavar="N",
        help="take the first N samples of the file, or 'all' (default: 320)",
    )
    group.add_argument(
        "--max-length",
        type=_positive,
        default=512,
        metavar="N",
        help="tokens kept of a sample (default: 512)",
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
    group.add_argument("--text-field", metavar="NAME", help="field that holds a whole text")
    group.add_argument("--prompt-field", metavar="NAME", help="field that holds the prompt")
    group.add_argument(
        "--response-field", metavar="NAME", help="field that holds what follows the prompt"
    )
    group.add_argument(
        "--mask-prompt", action="store_true", help="count the loss on the response only"
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
        help="blockwise: host memory for what goes between the blocks, 64G say; what does not fit "
        "is put on --scratch or computed again (default: half of what is free)",
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


def _check_init(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.statistics is not None and args.save_statistics is not None:
        parser.error("init: --save-statistics has nothing to save with --statistics")
    if args.statistics is not None or args.save_statistics is not None:
        if args.engine == "blockwise":
            parser.error("init: --engine blockwise keeps no statistics of the whole model")
        args.engine = "memory"
    if args.engine == "memory" and (args.host_memory is not None or args.scratch is not None):
        parser.error("init: --host-memory and --scratch are for --engine blockwise")
    _check_names(args, parser)
    _check_fields(args, parser)


def _check_stats(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    if args.merge is None:
        missing = [f"--{name}" for name in ("model", "data") if getattr(args, name) is None]
        if missing:
            parser.error(f"stats: {' and '.join(missing)} required (or --merge)")
    elif args.model is not None or args.data is not None:
        parser.error("stats: --merge excludes --model and --data")
    elif len(args.merge) < 2:
        parser.error("stats: --merge needs at least two files")
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
    if args.text_field and (args.prompt_field or args.response_field):
        parser.error("--text-field excludes --prompt-field and --response-field")
    if args.response_field and not args.prompt_field:
        parser.error("--response-field needs --prompt-field")
    if args.max_length < 2:
        parser.error("--max-length must be at least 2")


# -- commands --------------------------------------------------------------------------------------


def _init(args: argparse.Namespace) -> None:
    inputs = [args.model, args.data, args.statistics]
    _check_folder_output(args.output, args.overwrite, inputs)
    if args.save_statistics is not None:
        _check_file_output(args.save_statistics, args.overwrite, inputs, option="--save-statistics")
        if inside(args.save_statistics, args.output):
            raise ValueError("--save-statistics must not lie in the folder that --output creates")
    draw = importlib.util.find_spec("matplotlib") is not None
    if not draw:
        warnings.warn(f"matplotlib is not installed: {PLOT_FILE} is left out", stacklevel=1)
    _check_model_folder(args)

    import filet

    config = _config(args)
    encoded = None if args.data is None else _load_data(args)
    if _engine(args) == "blockwise":
        with _own_code(args):
            report = filet.initialize_folder(
                args.model,
                _micro_batches(args, encoded),
                args.output,
                _lora_config(args, rank=args.rank, alpha=args.alpha),
                config,
                engine="blockwise",
                dtype=_dtype(args),
                device=_device(args),
                host_memory=args.host_memory,
                scratch=args.scratch,
                trust_remote_code=args.trust_remote_code,
                overwrite=args.overwrite,
                show_progress_bar=not args.no_progress,
            )
        _print(report.table())
        _print(f"{'written':<14}{args.output}")
        return
    statistics = None if args.statistics is None else filet.Statistics.load(args.statistics)
    peft_model = _load_peft_model(args, rank=args.rank, alpha=args.alpha)
    if encoded is not None:
        from filet.initialize import check_applicable

        # Refused before anything runs: a rank too high, say.
        check_applicable(peft_model, "default")
    if encoded is None:
        assert statistics is not None  # --data or --statistics, says the parser
        report = filet.apply_statistics(peft_model, statistics, config=config)
    elif args.save_statistics is not None:
        statistics = _run(args, peft_model, encoded, config, filet.collect_statistics)
        # Before they are applied: an error in that does not cost the pass.
        with staged(args.save_statistics) as place:
            statistics.save(place)
        report = filet.apply_statistics(peft_model, statistics, config=config)
    else:
        report = _run(args, peft_model, encoded, config, filet.initialize_lora_filet_weights)
    with staged(args.output) as place:
        place.mkdir()
        filet.save_as_lora(peft_model, place)
        report.save(place)
        if draw and report.modules:
            report.plot(place / PLOT_FILE)
    _print(report.table())
    _print(f"{'written':<14}{args.output}")


def _stats(args: argparse.Namespace) -> None:
    inputs = args.merge or [args.model, args.data]
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output must be a .safetensors file, got {args.output}")
    _check_file_output(args.output, args.overwrite, inputs, option="--output")
    if args.merge is not None:
        import filet

        first, *others = args.merge
        statistics = filet.Statistics.load(first)
        for path in others:  # one at a time: they can be large
            statistics = statistics.merge(filet.Statistics.load(path))
    else:
        _check_model_folder(args)
        encoded = _load_data(args)

        import filet

        # The rank does not enter the statistics: 1 costs least.
        peft_model = _load_peft_model(args, rank=1, alpha=1)
        statistics = _run(args, peft_model, encoded, _config(args), filet.collect_statistics)
    with staged(args.output) as place:
        statistics.save(place)
    _print(f"{'written':<14}{args.output}")


def _inspect(args: argparse.Namespace) -> None:
    from filet.report import FiletReport

    report = FiletReport.load(args.folder)
    _print(report.table())
    folder = args.folder if args.folder.is_dir() else args.folder.parent
    path = args.plot or folder / PLOT_FILE
    if report.modules:
        report.plot(path)
        _print(f"{'drawn':<14}{path}")


def _run(
    args: argparse.Namespace,
    peft_model: Any,
    encoded: Any,
    config: Any,
    function: Callable[..., Any],
) -> Any:
    """Print the plan and run ``function`` on the data; in smaller batches where memory runs out."""
    import torch

    import filet

    plan = filet.estimate(
        peft_model,
        encoded.batches(2, by_length=True)[0],  # of the longest samples
        dataclasses.replace(config, samples=len(encoded)),
        batch_size=args.batch_size,
        tokens=encoded.tokens,
    )
    _print(str(plan))
    config = dataclasses.replace(config, passes=plan.passes)
    size = plan.batch_size
    while True:
        loader = encoded.batches(size, by_length=True)
        padding = 1 - encoded.tokens / sum(batch["input_ids"].numel() for batch in loader)
        _print(f"{'padding':<14}{padding:.1%} of {len(loader)} batches")
        try:
            return function(
                peft_model, loader, config=config, show_progress_bar=not args.no_progress
            )
        except filet.OutOfMemoryError as error:
            if args.batch_size != "auto" or size == 1 or error.phase != "pass":
                raise
            message = _one_line(error)
        # Outside of the handler: what failed is held until it has ended.
        size //= 2
        warnings.warn(f"{message}. Starting again with --batch-size {size}", stacklevel=1)
        gc.collect()
        torch.cuda.empty_cache()


def _micro_batches(args: argparse.Namespace, encoded: Any) -> list[dict[str, Any]]:
    """What goes through a block at a time: 4096 tokens, where the size is left to us."""
    from filet.plan import CPU_TOKENS

    size = args.batch_size
    if size == "auto":
        size = max(1, CPU_TOKENS // max(len(ids) for ids, _ in encoded.rows))
    return list(encoded.batches(size, by_length=True))


# -- model and data --------------------------------------------------------------------------------


def _config(args: argparse.Namespace) -> Any:
    from filet import FiletConfig

    chosen: dict[str, Any] = {
        key: getattr(args, key) for key in ("fisher", "seed", "samples", "passes")
    }
    if args.command == "init":
        chosen["select"] = args.select
        chosen["scaling"] = args.scaling.replace("-", "_")
        chosen["normalization"] = args.normalization
    return FiletConfig(**chosen)


def _check_model_folder(args: argparse.Namespace) -> None:
    """Refuse what is not a local model, before anything heavy is imported."""
    folder: Path = args.model
    if not folder.is_dir():
        raise ValueError(
            f"--model: no folder {str(folder)!r}; models come from a local folder, nothing is "
            "downloaded"
        )
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"--model: {folder} holds an adapter; give the folder of its base model")
    if not (folder / "config.json").is_file():
        raise ValueError(f"--model: no config.json in {folder}")
    if not args.allow_pickle and not any(folder.glob("*.safetensors")):
        pickled = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
        )
        found = f", only {', '.join(pickled[:3])}" if pickled else ""
        raise ValueError(
            f"--model: no safetensors weights in {folder}{found}"
            + ("; --allow-pickle loads them, if you trust their source" if pickled else "")
        )


def _load_data(args: argparse.Namespace) -> Any:
    """Read and tokenise the data: its errors come before the model is loaded."""
    from filet.data import encode, read_samples
    from filet.folder import settings_of

    samples = read_samples(
        args.data,
        text_field=args.text_field,
        prompt_field=args.prompt_field,
        response_field=args.response_field,
        limit=args.samples,
    )
    if args.mask_prompt and all(sample.response is None for sample in samples):
        raise ValueError(f"--mask-prompt: {args.data} has no responses, only whole texts")

    _transformers(args)
    with _own_code(args):
        # Before the tokenizer, which reads config.json as well and would be blamed for it.
        settings_of(args.model, trust_remote_code=args.trust_remote_code)
        tokenizer = _tokenizer(args)
    return encode(samples, tokenizer, max_length=args.max_length, mask_prompt=args.mask_prompt)


def _tokenizer(args: argparse.Namespace) -> Any:
    transformers = _transformers(args)
    expected = "expected its files, tokenizer.json say, beside the weights"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(args.model), local_files_only=True, trust_remote_code=args.trust_remote_code
        )
    except Exception as error:  # of as many kinds as there are files
        if "trust_remote_code" in str(error):
            raise
        raise ValueError(
            f"--model: no tokenizer can be loaded from {args.model}; {expected} "
            f"({type(error).__name__}: {error})"
        ) from error
    # Without files some kinds are made all the same, and know no word.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(f"--model: the tokenizer in {args.model} has no words; {expected}")
    return tokenizer


def _load_peft_model(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
    """The model with a default LoRA adapter on its targets."""
    from filet.folder import load_model
    from filet.targets import adapted

    device = _device(args)
    _transformers(args)
    with _own_code(args):
        model = load_model(
            args.model,
            device=device,
            dtype=_dtype(args),
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
        )
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.train()  # it checkpoints in this mode only; dropout is off in the pass
    return adapted(model, _lora_config(args, rank=rank, alpha=alpha), args.seed)


def _engine(args: argparse.Namespace) -> str:
    """The engine, chosen by what the device holds where it is left to us."""
    if args.engine != "auto" or (args.allow_pickle and not any(args.model.glob("*.safetensors"))):
        return "blockwise" if args.engine == "blockwise" else "memory"
    import torch

    from filet.blockwise import choose_engine

    _transformers(args)
    with _own_code(args):
        return choose_engine(
            args.model,
            _lora_config(args, rank=1, alpha=1),
            torch.device(_device(args)),
            dtype=_dtype(args),
            trust_remote_code=args.trust_remote_code,
        )


def _device(args: argparse.Namespace) -> str:
    import torch

    device: str = args.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return device


def _dtype(args: argparse.Namespace) -> Any:
    import torch

    return args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def _lora_config(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
    from peft import LoraConfig

    targets = args.target_modules
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_rslora=getattr(args, "rslora", False),
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


@contextlib.contextmanager
def _own_code(args: argparse.Namespace) -> Iterator[None]:
    """transformers' refusal to run a model's own code, in the words of this command line."""
    try:
        yield
    except ValueError as error:
        if args.trust_remote_code or "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"--model: {args.model} needs Python code that lies beside its weights; "
            "--trust-remote-code runs it, if you trust its source"
        ) from error


def _transformers(args: argparse.Namespace) -> Any:
    """transformers, as quiet as was asked for."""
    import transformers

    if not args.debug:
        transformers.logging.set_verbosity_error()
    if args.no_progress:
        transformers.logging.disable_progress_bar()
    return transformers


# -- output ----------------------------------------------------------------------------------------


def _check_folder_output(output: Path, overwrite: bool, inputs: Sequence[Path | None]) -> None:
    """Refuse, before any work, an output folder that would destroy something."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output: {output} is a file, not a folder")
    if not output.is_dir() or not any(output.iterdir()):
        return
    if not overwrite:
        raise ValueError(f"--output: {output} is not empty; --overwrite replaces it")
    if not (output / "adapter_config.json").is_file():
        raise ValueError(f"--output: {output} holds no adapter; --overwrite replaces only adapters")
    for path in inputs:
        if path is not None and inside(path, output):
            raise ValueError(f"--output: {output} holds {path}, which is read")


def _check_file_output(
    output: Path, overwrite: bool, inputs: Sequence[Path | None], *, option: str
) -> None:
    """Refuse, before any work, an output file that would destroy something."""
    if output.is_dir():
        raise ValueError(f"{option}: {output} is a folder, not a file")
    if not output.exists():
        return
    if not overwrite:
        raise ValueError(f"{option}: {output} exists; --overwrite replaces it")
    if any(path is not None and output.resolve() == path.resolve() for path in inputs):
        raise ValueError(f"{option}: {output} is also read")


# -- messages --------------------------------------------------------------------------------------


def _print(text: str) -> None:
    """Print where the terminal may know ASCII only: names of files can hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, errors="replace").decode(encoding))


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    print(f"filet: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _expected_errors() -> tuple[type[Exception], ...]:
    """What a user can cause; anything else is a bug and keeps its traceback."""
    errors: tuple[type[Exception], ...] = (
        ValueError,
        OSError,
        FloatingPointError,
        ImportError,
        MemoryError,
    )
    # Of packages that no error can be of before they are imported.
    for package, name in (("torch", "OutOfMemoryError"), ("safetensors", "SafetensorError")):
        if package in sys.modules:
            errors += (getattr(sys.modules[package], name),)
    return errors


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        text = error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    else:
        text = str(error) or type(error).__name__
    return " ".join(text.split())


if __name__ == "__main__":
    raise SystemExit(main())
