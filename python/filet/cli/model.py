"""The model, the tokenizer and the data that the arguments name."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "check_model_folder",
    "device_of",
    "dtype_of",
    "load_data",
    "load_keep",
    "load_peft_model",
    "lora_config_of",
    "own_code",
    "quantization_config_of",
    "quiet_transformers",
]


def check_model_folder(args: argparse.Namespace) -> None:
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


def load_data(args: argparse.Namespace) -> Any:
    """Read and tokenise the data: its errors come before the model is loaded."""
    from filet.data.samples import read_samples
    from filet.data.tokens import encode
    from filet.model.folder import settings_of

    samples = read_samples(
        args.data,
        text_field=args.text_field,
        prompt_field=args.prompt_field,
        response_field=args.response_field,
        limit=args.samples,
    )
    if args.mask_prompt and all(sample.response is None for sample in samples):
        raise ValueError(f"--mask-prompt: {args.data} has no responses, only whole texts")

    quiet_transformers(args)
    with own_code(args):
        # Before the tokenizer, which reads config.json as well and would be blamed for it.
        settings_of(args.model, trust_remote_code=args.trust_remote_code)
        tokenizer = _tokenizer(args)
    return encode(samples, tokenizer, max_length=args.max_length, mask_prompt=args.mask_prompt)


def load_keep(args: argparse.Namespace) -> Any:
    """The data to keep, read and tokenised; "self" as it is, and None where there are none."""
    if args.keep is None or args.keep == "self":
        return args.keep
    from filet.data.samples import read_samples
    from filet.data.tokens import encode

    samples = read_samples(args.keep, limit=args.samples)
    with own_code(args):
        tokenizer = _tokenizer(args)
    return encode(samples, tokenizer, max_length=args.max_length)


def _tokenizer(args: argparse.Namespace) -> Any:
    transformers = quiet_transformers(args)
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


def load_peft_model(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
    """The model with a default LoRA adapter on its targets."""
    from filet.model.folder import load_adapted

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
    )


def lora_config_of(args: argparse.Namespace, *, rank: int, alpha: int | None) -> Any:
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
