"""The data that the arguments name, as token ids by the model's tokenizer, and one sample shown."""

from __future__ import annotations

import argparse
from typing import Any

from filet.cli.model import own_code, quiet_transformers
from filet.cli.output import say_entry
from filet.cli.processes import check_same

__all__ = ["load_data", "load_keep"]


def load_data(args: argparse.Namespace) -> Any:
    """Read and tokenise the data, and show a sample: errors come before the model is loaded."""
    from filet.data.samples import Fields, read_samples
    from filet.data.shown import MARKS, shown
    from filet.data.sources import Source
    from filet.data.tokens import encode
    from filet.model.folder import settings_of

    _quiet_datasets(args)
    source = Source(args.data, args.split, args.subset, args.data_revision, args.streaming)
    fields = Fields(args.text_field, args.prompt_field, args.response_field, args.side)
    samples = read_samples(source, fields=fields, samples=args.samples, seed=args.seed)
    quiet_transformers(args)
    with own_code(args):
        # Before the tokenizer, which reads config.json as well and would be blamed for it.
        settings_of(args.model, trust_remote_code=args.trust_remote_code)
        tokenizer = _tokenizer(args)
    encoded = encode(samples, tokenizer, max_length=args.max_length, count_prompt=args.count_prompt)
    check_same("the hash of what was drawn of --data", encoded.digest())
    marks = " and ".join(MARKS)
    say_entry(
        "predicted", f"{encoded.terms} of {encoded.tokens} tokens; of one sample, in {marks}:"
    )
    say_entry("", shown(tokenizer, *encoded.rows[0]))
    return encoded


def load_keep(args: argparse.Namespace) -> Any:
    """The data to keep, read and tokenised; "self" as it is, and None where there are none."""
    if args.keep is None or args.keep == "self":
        return args.keep
    from filet.data.samples import read_samples
    from filet.data.sources import Source
    from filet.data.tokens import encode

    _quiet_datasets(args)
    samples = read_samples(Source(args.keep), samples=args.samples, seed=args.seed)
    with own_code(args):
        tokenizer = _tokenizer(args)
    encoded = encode(samples, tokenizer, max_length=args.max_length)
    check_same("the hash of what was drawn of --keep", encoded.digest())
    return encoded


def _tokenizer(args: argparse.Namespace) -> Any:
    from filet.data.chat import use_template

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
    if args.chat_template is not None:
        use_template(tokenizer, args.chat_template)
    return tokenizer


def _quiet_datasets(args: argparse.Namespace) -> None:
    """``datasets`` as quiet as was asked for; it has bars for every step, of small files too."""
    import datasets

    if not args.debug:
        datasets.logging.set_verbosity_error()
    if args.no_progress:
        datasets.disable_progress_bars()
