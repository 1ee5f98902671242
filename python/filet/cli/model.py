"""The model that the arguments name, a folder or a name on the Hub, and how it is loaded."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filet.model.tasks import CAUSAL, IMAGES, SEEING, TASKS, task_of

__all__ = [
    "check_model",
    "device_of",
    "dtype_of",
    "load_peft_model",
    "lora_config_of",
    "own_code",
    "quantization_config_of",
    "quiet_transformers",
]


def check_model(args: argparse.Namespace) -> None:
    """Refuse what is no model, before anything heavy is imported; a name's files are fetched.

    ``args.model`` is the folder afterwards, and ``args.task`` what the model is for.
    """
    if not args.model.is_dir():
        args.model = _fetched(args)
    folder: Path = args.model
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
    args.task = args.task or task_of(folder)
    _check_task(args)


def _check_task(args: argparse.Namespace) -> None:
    """Refuse what is not for the model's task."""
    if args.new_head is not None and not TASKS[args.task].classifies:
        raise ValueError(f"--new-head: --task {args.task} has no head of classes")
    if args.task == CAUSAL:
        return
    # What is for causal models, and how other data are read than this task's (--response-field
    # needs --prompt-field).
    given: dict[str, Any] = {"--keep self": args.keep == "self"}
    if args.task != SEEING:
        given["--count-prompt"] = args.count_prompt
        given["--chat-template"] = args.chat_template
    if TASKS[args.task].classifies:
        given["--prompt-field"] = args.prompt_field
        given["--side"] = args.side != "chosen"  # the default
    if args.task == IMAGES:
        given["--text-field"] = args.text_field
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} is not for --task {args.task}; expected it left out")


def _fetched(args: argparse.Namespace) -> Path:
    """The folder, in the user's cache, of a model on the Hub: what is needed of it, no more."""
    from filet.data.sources import HUB_NAME

    name = str(args.model)
    if args.model.exists() or not HUB_NAME.fullmatch(name):
        raise ValueError(
            f"--model: no folder {name!r}; expected a folder, or owner/name of a model on the Hub"
        )
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]
    wanted += ["*.bin", "*.pt", "*.pth"] if args.allow_pickle else []
    wanted += ["*.py"] if args.trust_remote_code else []
    try:
        found = snapshot_download(
            name,
            revision=args.revision,
            allow_patterns=wanted,
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # of as many kinds as there are places to fail at
        raise ValueError(
            f"--model: {name!r} is no folder here, nor found on the Hub or in its cache "
            f"({type(error).__name__}: {error})"
        ) from error
    return Path(found)


def load_peft_model(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
    """The model with a default LoRA adapter on its targets."""
    from filet.model.folder import NewHead, load_adapted

    device = device_of(args)
    quiet_transformers(args)
    with own_code(args):
        return load_adapted(
            args.model,
            lora_config_of(args, rank=rank, alpha=alpha),
            args.seed,
            device=device,
            dtype=dtype_of(args),
            trust_remote_code=args.trust_remote_code,
            allow_pickle=args.allow_pickle,
            gradient_checkpointing=args.gradient_checkpointing,
            quantization_config=quantization_config_of(args),
            task=args.task,
            head=None if args.new_head is None else NewHead(args.new_head, args.num_labels),
        )


def device_of(args: argparse.Namespace) -> str:
    import torch

    device: str = args.device
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device")
    return device


def dtype_of(args: argparse.Namespace) -> Any:
    import torch

    return args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)


def quantization_config_of(args: argparse.Namespace) -> Any:
    """transformers' config for --quantize, None without it."""
    if args.quantize is None:
        return None
    from filet.model.folder import quantization_of

    return quantization_of(
        args.model,
        args.quantize,
        double=args.double_quant,
        dtype=dtype_of(args),
        trust_remote_code=args.trust_remote_code,
        task=args.task,
    )


def lora_config_of(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
    from peft import LoraConfig

    targets = args.target_modules
    return LoraConfig(
        task_type=TASKS[args.task].peft,
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        use_rslora=getattr(args, "rslora", False),
        target_modules="all-linear" if targets == ["all-linear"] else targets,
    )


@contextlib.contextmanager
def own_code(args: argparse.Namespace) -> Iterator[None]:
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


def quiet_transformers(args: argparse.Namespace) -> Any:
    """transformers, as quiet as was asked for."""
    import transformers

    if not args.debug:
        transformers.logging.set_verbosity_error()
    if args.no_progress:
        transformers.logging.disable_progress_bar()
    return transformers
