"""The commands: what ``filet init``, ``filet stats`` and ``filet inspect`` do."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from filet.cli.data import load_data, load_keep
from filet.cli.model import (
    check_model,
    device_of,
    dtype_of,
    load_peft_model,
    lora_config_of,
    own_code,
    quantization_config_of,
    quiet_transformers,
)
from filet.cli.output import check_file_output, check_folder_output, one_line, say, say_entry
from filet.cli.processes import agreed, rank_and_size
from filet.model.tasks import CAUSAL, SEEING
from filet.report.names import PLOT_FILE, can_draw
from filet.system.files import inside, replaced

__all__ = ["init", "inspect", "stats"]

_IMAGES_AT_ONCE = 32


def init(args: argparse.Namespace) -> None:
    """Initialise an adapter for a model, and write it with its report."""
    _check_outputs(args)
    if not can_draw():
        warnings.warn(f"matplotlib is not installed: {PLOT_FILE} is left out", stacklevel=1)
    check_model(args)
    config = _config(args)
    encoded = None if args.data is None else load_data(args)
    keep = load_keep(args)
    if _engine(args) == "blockwise":
        report = _init_blockwise(args, encoded, keep, config)
    else:
        report = _init_in_memory(args, encoded, keep, config)
    say(report.table())
    if args.new_head is not None:
        say_entry("head", f"new, drawn by seed {args.new_head}; saved with the adapter")
    say_entry("written", args.output)


def _check_outputs(args: argparse.Namespace) -> None:
    inputs = [args.model, args.data, args.statistics, _kept_file(args)]
    check_folder_output(args.output, args.overwrite, inputs)
    if args.save_statistics is not None:
        check_file_output(args.save_statistics, args.overwrite, inputs, option="--save-statistics")
        if inside(args.save_statistics, args.output):
            raise ValueError("--save-statistics must not lie in the folder that --output creates")


def _kept_file(args: argparse.Namespace) -> Path | None:
    """The file of data to keep, where there is one."""
    return None if args.keep in (None, "self") else Path(args.keep)


def _init_blockwise(args: argparse.Namespace, encoded: Any, keep: Any, config: Any) -> Any:
    """The report of an adapter that the blockwise engine has written."""
    import filet

    size = _micro_size(args, encoded)
    mine = encoded.share(*rank_and_size())
    with own_code(args):
        return filet.initialize_folder(
            args.model,
            list(mine.batches(size, by_length=True)),
            args.output,
            lora_config_of(args, rank=args.rank, alpha=args.alpha),
            config,
            engine="blockwise",
            dtype=dtype_of(args),
            device=device_of(args),
            host_memory=args.host_memory,
            scratch=args.scratch,
            trust_remote_code=args.trust_remote_code,
            overwrite=args.overwrite,
            show_progress_bar=not args.no_progress,
            keep=_kept_batches(encoded, keep, size),
            save_statistics=args.save_statistics,
            quantization_config=quantization_config_of(args),
            task=args.task,
        )


def _init_in_memory(args: argparse.Namespace, encoded: Any, keep: Any, config: Any) -> Any:
    """The report of an adapter that was made of a whole model and is written."""
    import filet
    from filet.adapter.saved import write_folder
    from filet.collect.written import check_shared
    from filet.initialize import check_before_pass, save_whole

    statistics = None if args.statistics is None else filet.Statistics.load(args.statistics)
    peft_model = load_peft_model(args, rank=args.rank, alpha=args.alpha)
    if encoded is not None:
        # Refused before anything runs: a rank too high, say, or options that do not fit.
        check_before_pass(peft_model, config, "default", keep)
    if encoded is None:
        assert statistics is not None  # --data or --statistics, says the parser
        report = filet.apply_statistics(peft_model, statistics, config=config)
    elif args.save_statistics is not None:
        check_shared(args.save_statistics)
        statistics = _run(args, peft_model, encoded, keep, config, filet.collect_statistics)
        # Before they are applied: an error in that does not cost the pass.
        save_whole(statistics, args.save_statistics)
        report = filet.apply_statistics(peft_model, statistics, config=config)
    else:
        report = _run(args, peft_model, encoded, keep, config, filet.initialize_lora_filet_weights)
    if rank_and_size()[0] == 0:
        write_folder(peft_model, report, args.output)
    return report


def stats(args: argparse.Namespace) -> None:
    """Collect the statistics of a model, or merge several files of them, into one file."""
    inputs = args.merge or [args.model, args.data, _kept_file(args)]
    if args.output.suffix != ".safetensors":
        raise ValueError(f"--output must be a .safetensors file, got {args.output}")
    check_file_output(args.output, args.overwrite, inputs, option="--output")
    statistics = _collected(args) if args.merge is None else _merged(args.merge)
    from filet.initialize import save_whole

    save_whole(statistics, args.output)
    say_entry("written", args.output)


def _collected(args: argparse.Namespace) -> Any:
    check_model(args)
    from filet.collect.written import check_shared  # after the checks: it brings torch

    check_shared(args.output)
    encoded, keep = load_data(args), load_keep(args)
    shards = None
    if args.shard is not None:
        encoded, keep, shards = _shard_of(args, encoded, keep)

    import filet

    # The rank does not enter the statistics: 1 costs least.
    peft_model = load_peft_model(args, rank=1, alpha=1)
    statistics = _run(args, peft_model, encoded, keep, _config(args), filet.collect_statistics)
    return dataclasses.replace(statistics, shards=shards)


def _shard_of(args: argparse.Namespace, encoded: Any, keep: Any) -> tuple[Any, Any, Any]:
    """The samples of one shard, of the task and to keep, and which that is of what."""
    from filet.collect.shards import Shards

    number, of = args.shard
    common = {"fisher": args.fisher, "seed": str(args.seed)}
    mine = []
    for option, data in (("--data", encoded), ("--keep", keep)):
        common[option] = "none" if data is None else data.digest()
        if data is not None and len(data) < of:
            raise ValueError(
                f"--shard {number}/{of}: {option} has {len(data)} samples; expected one or more "
                "for each shard"
            )
        mine.append(None if data is None else data.share(number - 1, of))
    return mine[0], mine[1], Shards((number,), of, common)


def _merged(files: Sequence[Path]) -> Any:
    import filet

    first, *others = files
    statistics = filet.Statistics.load(first)
    for path in others:  # one at a time: they can be large
        statistics = statistics.merge(filet.Statistics.load(path))
    if statistics.shards is not None:
        raise ValueError(
            f"--merge: shard {statistics.shards.missing[0]} of {statistics.shards.of} is missing; "
            "expected the files of all shards"
        )
    return statistics


def inspect(args: argparse.Namespace) -> None:
    """Print the table of a report, or how alike two adapters are; the folders are only read."""
    if args.second is not None:
        _compare(args)
        return
    from filet.report.report import FiletReport

    report = FiletReport.load(args.folder)
    say(report.table())
    folder = args.folder if args.folder.is_dir() else args.folder.parent
    if args.plot is not None:
        report.plot(args.plot)
        say_entry("drawn", args.plot)
    if args.html is not None:
        _write(args.html, report.page(f"FILet: {folder.resolve().name}").encode())


def _compare(args: argparse.Namespace) -> None:
    """Two adapters' folders, or two files of statistics."""
    from filet.report.compare import Comparison

    comparison = Comparison.of(args.folder, args.second)
    say(comparison.table())
    if args.plot is not None:
        _write(args.plot, comparison.picture())
    if args.html is not None:
        _write(args.html, comparison.page().encode())


def _write(path: Path, content: bytes) -> None:
    with replaced(path) as beside:
        beside.write_bytes(content)
    say_entry("written", path)


def _run(
    args: argparse.Namespace,
    peft_model: Any,
    encoded: Any,
    keep: Any,
    config: Any,
    function: Callable[..., Any],
) -> Any:
    """Print the plan and run ``function`` on the data; in smaller batches where memory runs out."""
    import torch

    import filet

    rank, processes = rank_and_size()
    tokens = getattr(encoded, "tokens", None)  # images have none
    plan = filet.estimate(
        peft_model,
        encoded.batches(2, by_length=True)[0],  # of the longest samples
        dataclasses.replace(config, samples=-(-len(encoded) // processes)),
        batch_size=args.batch_size,
        tokens=None if tokens is None else -(-tokens // processes),
        keep=keep is not None,
    )
    if processes > 1:
        say(f"rank {rank} of {processes}, of its share of the samples:")
    say(str(plan))
    passes, size = agreed(plan.passes, plan.batch_size)
    if tokens is None and args.batch_size == "auto":
        size = min(size, _IMAGES_AT_ONCE)  # the plan knows no patches: an image is long
    config = dataclasses.replace(config, passes=passes)
    mine = encoded.share(rank, processes)
    while True:
        loader = mine.batches(size, by_length=True)
        if tokens is not None:
            padding = 1 - mine.tokens / max(1, sum(batch["input_ids"].numel() for batch in loader))
            say_entry("padding", f"{padding:.1%} of {len(loader)} batches")
        try:
            return function(
                peft_model,
                loader,
                config=config,
                show_progress_bar=not args.no_progress,
                keep=_kept_batches(encoded, keep, size),
            )
        except filet.OutOfMemoryError as error:
            if args.batch_size != "auto" or size == 1 or error.phase != "pass":
                raise
            message = one_line(error)
        # Outside of the handler: what failed is held until it has ended.
        size //= 2
        warnings.warn(f"{message}. Starting again with --batch-size {size}", stacklevel=1)
        gc.collect()
        torch.cuda.empty_cache()


def _kept_batches(encoded: Any, keep: Any, size: int) -> Any:
    """The data to keep, in batches of no more tokens than those of the task; "self" as it is."""
    if keep in (None, "self"):
        return keep
    longest, its_longest = (max(len(ids) for ids, _ in each.rows) for each in (encoded, keep))
    mine = keep.share(*rank_and_size())
    return list(mine.batches(max(1, size * longest // its_longest), by_length=True))


def _micro_size(args: argparse.Namespace, encoded: Any) -> int:
    """Samples of what goes through a block at a time: 4096 tokens, where the size is left to us."""
    from filet.collect.estimate import CPU_TOKENS

    if args.batch_size != "auto":
        return int(args.batch_size)
    return max(1, CPU_TOKENS // max(len(ids) for ids, _ in encoded.rows))


def _config(args: argparse.Namespace) -> Any:
    from filet import FiletConfig

    chosen: dict[str, Any] = {
        key: getattr(args, key) for key in ("fisher", "seed", "samples", "passes")
    }
    if args.command == "init":
        names = ("start", "select", "damping", "normalization", "gamma", "orthogonal")
        chosen |= {key: getattr(args, key) for key in names}
        chosen["scaling"] = args.scaling.replace("-", "_")
    return FiletConfig(**chosen)


def _engine(args: argparse.Namespace) -> str:
    """The engine, chosen by what the device holds where it is left to us."""
    if args.task not in (CAUSAL, SEEING):
        if args.engine == "blockwise":
            raise ValueError(
                f"--engine blockwise is for --task {CAUSAL} and {SEEING}, and this is {args.task}"
            )
        return "memory"
    if args.engine != "auto" or (args.allow_pickle and not any(args.model.glob("*.safetensors"))):
        return "blockwise" if args.engine == "blockwise" else "memory"
    import torch

    from filet.blockwise.folder import choose_engine

    quiet_transformers(args)
    with own_code(args):
        return choose_engine(
            args.model,
            lora_config_of(args, rank=1, alpha=1),
            torch.device(device_of(args)),
            dtype=dtype_of(args),
            trust_remote_code=args.trust_remote_code,
            quantization_config=quantization_config_of(args),
            keep=args.keep is not None,
            task=args.task,
        )
