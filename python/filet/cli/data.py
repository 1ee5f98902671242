"""The data that the arguments name, as token ids by the model's tokenizer, and one sample shown."""

from __future__ import annotations

import argparse
from typing import Any

from filet.cli.model import own_code, quiet_transformers
from filet.cli.output import one_line, say_entry
from filet.cli.processes import check_same
from filet.model.tasks import CAUSAL, IMAGES, SEEING

__all__ = ["load_data", "load_keep"]


def load_data(args: argparse.Namespace) -> Any:
    """Read and encode the data, and show a sample: errors come before the model is loaded."""
    from filet.data.sources import Source

    _quiet_datasets(args)
    source = Source(args.data, args.split, args.subset, args.data_revision, args.streaming)
    if args.task == SEEING:
        encoded, tokenizer = _seen(args, source, _fields(args))
        _show(encoded, tokenizer)
    else:
        encoded = _images(args, source) if args.task == IMAGES else _texts(args, source)
    _say_cut(args, encoded, "--data")
    check_same("the hash of what was drawn of --data", encoded.digest())
    return encoded


def _say_cut(args: argparse.Namespace, encoded: Any, option: str) -> None:
    """How many of the samples that are used lost their end, where some did."""
    if cut := getattr(encoded, "cut", 0):  # no image does
        of = f"{len(encoded)} samples of {option} {'was' if cut == 1 else 'were'}"
        say_entry("cut", f"{cut} of {of} cut to {args.max_length} tokens (--max-length)")


def _texts(args: argparse.Namespace, source: Any) -> Any:
    from filet.data.samples import read_samples
    from filet.data.tasks import encoded_for
    from filet.data.tokens import encode

    drawn: dict[str, Any] = {"fields": _fields(args), "samples": args.samples, "seed": args.seed}
    # Read before anything else is: it is refused the soonest.
    samples = read_samples(source, **drawn) if args.task == CAUSAL else []
    settings = _settings(args)
    with own_code(args):
        tokenizer = _tokenizer(args)
    length = args.max_length
    if args.task == CAUSAL:
        encoded = encode(samples, tokenizer, max_length=length, count_prompt=args.count_prompt)
    else:
        encoded = encoded_for(args.task, source, tokenizer, settings, max_length=length, **drawn)
    _show(encoded, tokenizer)
    return encoded


def _fields(args: argparse.Namespace) -> Any:
    from filet.data.samples import Fields

    return Fields(args.text_field, args.prompt_field, args.response_field, args.side)


def _show(encoded: Any, tokenizer: Any) -> None:
    """How much is predicted, and one sample."""
    from filet.data.shown import MARKS, shown, shown_other

    marks = " and ".join(MARKS)
    apart = encoded.form in ("one", "other")
    counts = f"{encoded.terms} {'labels for' if apart else 'of'} {encoded.tokens} tokens"
    say_entry("predicted", f"{counts}; of one sample, in {marks}:")
    first = encoded.rows[0]
    say_entry("", shown_other(tokenizer, *first) if apart else shown(tokenizer, *first))


def _seen(
    args: argparse.Namespace, source: Any, fields: Any, labelled: bool = True
) -> tuple[Any, Any]:
    """Texts with images, through the model's processor; and its tokenizer."""
    from filet.data.seen import seen_of

    settings, processor = _settings(args), _processor_of_both(args)
    encoded = seen_of(
        source,
        processor,
        settings,
        fields=fields,
        samples=args.samples,
        seed=args.seed,
        max_length=args.max_length,
        count_prompt=args.count_prompt,
        labelled=labelled,
    )
    return encoded, processor.tokenizer


def _processor_of_both(args: argparse.Namespace) -> Any:
    from filet.data.chat import use_template

    transformers = quiet_transformers(args)
    try:
        with own_code(args):
            processor = transformers.AutoProcessor.from_pretrained(
                str(args.model), local_files_only=True, trust_remote_code=args.trust_remote_code
            )
    except Exception as error:  # of as many kinds as there are files
        if "trust_remote_code" in str(error) or "--trust-remote-code" in str(error):
            raise
        raise ValueError(
            f"--model: no processor of images and text can be loaded from {args.model}; expected "
            f"its files, preprocessor_config.json say, beside the weights, and what they need "
            f"({one_line(error)})"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise ValueError(
            f"--model: {args.model} has a {type(processor).__name__} and no processor of images "
            "and text; expected preprocessor_config.json beside the weights"
        )
    if args.chat_template is not None:
        use_template(processor, args.chat_template)
    return processor


def _images(args: argparse.Namespace, source: Any) -> Any:
    from filet.data.images import images_of

    settings, processor = _settings(args), _processor(args)
    encoded = images_of(source, processor, settings, samples=args.samples, seed=args.seed)
    shape = " x ".join(map(str, encoded.rows[0][0].shape))
    say_entry("predicted", f"classes of {len(encoded)} images of {shape}")
    return encoded


def _processor(args: argparse.Namespace) -> Any:
    transformers = quiet_transformers(args)
    try:
        return transformers.AutoImageProcessor.from_pretrained(
            str(args.model), local_files_only=True, trust_remote_code=args.trust_remote_code
        )
    except Exception as error:  # of as many kinds as there are files
        raise ValueError(
            f"--model: no image processor can be loaded from {args.model}; expected "
            f"preprocessor_config.json beside the weights ({type(error).__name__}: {error})"
        ) from error


def _settings(args: argparse.Namespace) -> Any:
    """The model's config, read before its tokenizer, which would be blamed for what is wrong."""
    from filet.model.folder import settings_of

    quiet_transformers(args)
    with own_code(args):
        found = settings_of(args.model, trust_remote_code=args.trust_remote_code, task=args.task)
    if args.num_labels is not None:
        found.num_labels = args.num_labels
    return found


def load_keep(args: argparse.Namespace) -> Any:
    """The data to keep, read for the model; "self" as it is, and None where there are none."""
    if args.keep is None or args.keep == "self":
        return args.keep
    from filet.collect.keep import said_of_keep
    from filet.data.samples import Fields
    from filet.data.sources import Source

    _quiet_datasets(args)
    source = Source(args.keep)
    with said_of_keep():
        if args.task == SEEING:
            encoded = _seen(args, source, Fields(), labelled=False)[0]
        elif args.task == CAUSAL:
            encoded = _causal_keep(args, source)
        else:
            encoded = _keep_of_task(args, source)
    _say_cut(args, encoded, "--keep")
    check_same("the hash of what was drawn of --keep", encoded.digest())
    return encoded


def _causal_keep(args: argparse.Namespace, source: Any) -> Any:
    from filet.data.samples import read_samples
    from filet.data.tokens import encode

    samples = read_samples(source, samples=args.samples, seed=args.seed)
    with own_code(args):
        tokenizer = _tokenizer(args)
    return encode(samples, tokenizer, max_length=args.max_length, labelled=False)


def _keep_of_task(args: argparse.Namespace, source: Any) -> Any:
    """What is read as the data of the task, without their classes."""
    from filet.data.images import images_of
    from filet.data.samples import Fields
    from filet.data.tasks import encoded_for

    settings = _settings(args)
    drawn: dict[str, Any] = {"samples": args.samples, "seed": args.seed, "labelled": False}
    if args.task == IMAGES:
        return images_of(source, _processor(args), settings, **drawn)
    with own_code(args):
        tokenizer = _tokenizer(args)
    drawn |= {"fields": Fields(), "max_length": args.max_length}
    return encoded_for(args.task, source, tokenizer, settings, **drawn)


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
