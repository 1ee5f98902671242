"""What a model takes, what is asked of a batch before its forward gets it, and what it then gets.

What does not fit would else come back from an embedding or a kernel, which know neither the batch
nor its key, and on a GPU as an assertion of the device. What a ``forward_fn`` does with a batch is
not known: of those that it gets nothing is asked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from filet.model.batch import (
    IGNORED,
    NUM_ITEMS,
    first_samples,
    labels_of,
    samples_in,
    to_device,
    token_masks,
    without_token_mask,
)
from filet.model.sample import hash_of

__all__ = ["Inputs", "Prepared", "check_batch", "check_dataloader"]

# With these alone a text model makes one row of logits for each token it is given. By any other
# key (shift_labels, logits_to_keep, past_key_values, target_mapping) it may be another number.
_TEXT = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "labels"}
_TEXT |= {NUM_ITEMS}

# Models by the loss they name, with a label for every token.
_CAUSAL, _PER_TOKEN = "ForCausalLM", ("ForMaskedLM", "ForTokenClassification")
_SHIFTING = (_CAUSAL, "ForConditionalGeneration")  # whose heads shift labels
_INDICES = (torch.int64, torch.uint8)  # that torch's cross_entropy takes

# Of the classifiers, those that turn their labels into indices themselves.
_CONVERTING = ("DebertaForSequenceClassification", "DebertaV2ForSequenceClassification")

_LOADER = (
    "torch.utils.data.DataLoader(dataset, batch_size=…, collate_fn=…), with batch_size=None where "
    "its items are batches already"
)


def check_dataloader(dataloader: Any, name: str = "dataloader") -> int | None:
    """How many samples it has, None where that is not known before it is read.

    TypeError for what gives no batches: a data set, one batch, no iterable at all.
    """
    kind = type(dataloader).__name__
    packages = {each.__module__.partition(".")[0] for each in type(dataloader).__mro__}
    is_dataset = isinstance(dataloader, Dataset) or "datasets" in packages
    if is_dataset and not isinstance(dataloader, IterableDataset):
        raise TypeError(f"{name} is a {kind}, a data set of samples; expected batches: {_LOADER}")
    if isinstance(dataloader, (str, bytes, os.PathLike)):
        raise TypeError(
            f"{name} is the {kind} {str(dataloader)!r}; expected batches, of its samples say: "
            f"{_LOADER}"
        )
    if isinstance(dataloader, (Mapping, Tensor)):
        raise TypeError(f"{name} is a {kind}; expected an iterable of batches, a list of one say")
    if not hasattr(dataloader, "__iter__") and not hasattr(dataloader, "__getitem__"):
        raise TypeError(f"{name} is a {kind}; expected an iterable of batches")
    return _samples_of(dataloader)


def _samples_of(dataloader: Any) -> int | None:
    if isinstance(dataloader, (list, tuple)):
        try:
            return sum(map(samples_in, dataloader))
        except TypeError:  # of a batch, which says so when it is read
            return None
    source: Any = getattr(dataloader, "dataset", None)
    whole = 1  # a number of samples of which there are as many as come out even
    if isinstance(dataloader, DataLoader):
        batches: Any = dataloader.batch_sampler  # none where the items are batches
        source = getattr(batches, "sampler", None)
        whole = batches.batch_size if getattr(batches, "drop_last", False) else 1
    try:
        number = len(source)
    except TypeError:
        return None
    return number // whole * whole


def check_batch(batch: Any, forward_fn: Callable[[Any, Any], Any] | None) -> None:
    """TypeError for what gives batches; without a ``forward_fn``, for whatever is no dict."""
    many = isinstance(batch, (DataLoader, Dataset, Iterator))
    if many or (forward_fn is None and not isinstance(batch, Mapping)):
        raise TypeError(
            f"batch is a {type(batch).__name__}; expected one batch, a dict of the model's "
            "arguments: next(iter(dataloader)), say"
        )


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch that was looked at, cut, and freed of the labels that padding predicts."""

    batch: Any
    index: int  # in the dataloader, from 0
    masks: dict[str, Tensor | None]  # (B, T) of the tokens that count, by side; None for all
    samples: int
    tokens: int
    data: int  # the sum of a hash of each sample


class Inputs:
    """What a model takes, and so what is asked of a batch: nothing where there is a forward_fn.

    Attributes:
        asked: whether anything is.
        shift: whether the model's loss is known to pair a token's logits with the next label.
        names_loss: whether the model says which loss of transformers it has.
        ignored: the label that its loss leaves out; None where its mean is over all labels.
    """

    def __init__(self, model: Any, forward_fn: Callable[[Any, Any], Any] | None = None) -> None:
        self.asked = forward_fn is None
        self.model = type(model).__name__
        # What a model of transformers has to be given. Others may take what they like.
        self.main: str | None = getattr(model, "main_input_name", None)
        config: Any = getattr(model, "config", None)
        self.is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        # Beside pictures or sound, the ids of their places may lie beyond the words.
        self.rows = _rows(model, "get_input_embeddings") if text is config else None
        self.longest, self.positions = _positions(model, text)
        self.labels = _labels(model)
        # What the code of other models does with a batch is not known.
        self.known = type(model).__module__.startswith("transformers.")
        kind = _loss_type_of(model)
        self.loss = _loss(kind, self.is_encoder_decoder) if text is config else None
        self.names_loss = kind is not None
        self.shift = kind in _SHIFTING and not self.is_encoder_decoder
        self.ignored = _ignored(model)
        self.attends = hasattr(text, "num_attention_heads") and not self.is_encoder_decoder
        self.problem: str | None = getattr(config, "problem_type", None)
        self.classes: int = getattr(config, "num_labels", 1)

    def prepared(
        self,
        batch: Any,
        index: int,
        *,
        room: int | None,
        token_mask: str | None,
        shift: bool,
        check: Callable[[Any, int], None] | None = None,
    ) -> Prepared | None:
        """A batch of the dataloader ready to go through, None for one without a sample.

        Args:
            index: its place in the dataloader, for messages.
            room: how many of its samples are wanted, None for all.
            token_mask: see :class:`filet.FiletConfig`.
            shift: whether a label is predicted by the token before its own.
            check: called with the batch and its index, where more is asked than of every batch.
        """
        batch = self.checked(batch, index)
        if check is not None:
            check(batch, index)
        if room is not None:
            batch = first_samples(batch, room)
        size = samples_in(batch)
        if size == 0:
            return None
        masks, tokens = token_masks(batch, size, self.is_encoder_decoder, token_mask)
        data = hash_of(batch, self.is_encoder_decoder)  # with the labels that padding predicts
        batch = self._without_padded_terms(batch, masks["decoder"], shift)
        self._check_labels(batch, index, shift)
        return Prepared(batch, index, masks, size, tokens, data)

    def given(self, batch: Any, device: torch.device, token_mask: str | None) -> tuple[Any, Any]:
        """A batch on ``device``, and what the model's own forward or the forward_fn gets of it."""
        batch = to_device(batch, device)
        return batch, without_token_mask(batch, token_mask) if self.asked else batch

    def _without_padded_terms(self, batch: Any, mask: Tensor | None, shift: bool) -> Any:
        """A copy of the batch less the labels that a padded position predicts: none of them counts.

        ``mask`` (B, T) of the tokens that count, None for all. With padding on the left, the first
        token's label is one of those. Labels stay as they are for a model of which it is not known
        whether it shifts them.
        """
        batch = dict(batch) if isinstance(batch, Mapping) else batch
        labels = labels_of(batch)
        if labels is None or mask is None or self.is_encoder_decoder or not self.names_loss:
            return batch
        if labels.dim() != 2 or labels.shape != mask.shape or labels.is_floating_point():
            return batch
        predicts = mask.to(labels.device)
        if shift:
            predicts = F.pad(predicts[:, :-1], (1, 0), value=True)
        return {**batch, "labels": labels.masked_fill(~predicts, IGNORED)}

    def checked(self, batch: Any, index: int) -> Any:
        """The batch as the model's own forward takes it; an error that names what it does not.

        ``num_items_in_batch``, which transformers' Trainer counts, is left out: by it a model
        divides the sum of its losses instead of taking their mean, and of either the summed loss is
        wanted.
        """
        if not self.asked:
            return batch
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the dataloader gave a {type(batch).__name__}; expected a dict of the model's "
                "arguments, or a forward_fn(model, batch) that knows what to do with it"
            )
        if self.main is not None:
            main = self._check_form(batch, f"of batch {index}")
            if self.known:
                self._check_dtypes(batch, f"of batch {index}")
                self._check_shapes(batch, main, f"of batch {index}")
            self._check_range(batch, f"of batch {index}")
        if NUM_ITEMS not in batch:
            return batch
        return {key: value for key, value in batch.items() if key != NUM_ITEMS}

    def _check_labels(self, batch: Any, index: int, shift: bool) -> None:
        """ValueError for a label that the model has no output for.

        ``shift``: the first of each sample is no label, being predicted by nothing.
        """
        labels = labels_of(batch)
        if not self.asked or self.labels is None or labels is None or labels.is_floating_point():
            return
        if shift and labels.dim() > 1:
            labels = labels[:, 1:]
        wrong = labels[labels.ne(IGNORED) & (labels.lt(0) | labels.ge(self.labels))]
        if wrong.numel():
            raise ValueError(
                f"labels of batch {index} has {int(wrong[0])}; expected {IGNORED}, or what "
                f"{self.model} predicts, 0 … {self.labels - 1}"
            )

    def _check_form(self, batch: Mapping[str, Any], where: str) -> str:
        """Samples stacked in tensors, of what the model takes; the key that says how many."""
        assert self.main is not None
        known = ("input_ids", "inputs_embeds", self.main)
        main = next((key for key in known if batch.get(key) is not None), None)
        if main is None:
            raise ValueError(
                f"no {self.main} in the keys {where}, {', '.join(map(str, batch))}; expected the "
                f"arguments of {self.model}, or a forward_fn(model, batch) that computes the loss "
                "(of pairs for DPO, say)"
            )
        for key in (main, "labels"):
            value = batch.get(key)
            if value is None:
                continue
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"{key} {where} is a {type(value).__name__}; expected a tensor of samples: "
                    f"{_LOADER}"
                )
            if value.dim() < 1 + (key == main):
                raise ValueError(
                    f"{key} {where} has shape {tuple(value.shape)}, as one sample has; expected a "
                    f"batch: {_LOADER}"
                )
            if value.shape[0] != batch[main].shape[0]:
                raise ValueError(
                    f"labels {where} is of {value.shape[0]} samples and {main} of "
                    f"{batch[main].shape[0]}; expected as many"
                )
        shape = batch[main].shape
        if main == "input_ids" and shape[0] and not shape.numel():
            raise ValueError(
                f"input_ids {where} has shape {tuple(shape)}: samples without a token; expected "
                "at least one token in each"
            )
        return main

    def _check_dtypes(self, batch: Mapping[str, Any], where: str) -> None:
        """Ids that an embedding takes, and labels that the model's loss does."""
        ids, labels = batch.get("input_ids"), labels_of(batch)
        if isinstance(ids, Tensor) and self.rows and ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"input_ids {where} is {ids.dtype}; expected torch.int64 or torch.int32"
            )
        if labels is None or self.loss is None or not batch.keys() <= {*_TEXT, self.main}:
            return
        expected, fits = "torch.int64", True
        if self.loss == _CAUSAL:  # its loss is ours as a rule, which takes any integers
            fits = not labels.is_floating_point()
        elif self.loss in _PER_TOKEN or self.problem == "single_label_classification":
            fits = labels.dtype in _INDICES
        elif self.problem == "multi_label_classification":
            expected = "torch.float32 of 0 and 1 (problem_type='multi_label_classification')"
            fits = labels.is_floating_point()
        elif self.problem is None and self.classes > 1 and self.model not in _CONVERTING:
            # Floating ones are of several labels then, one number for each.
            expected = f"torch.int64, or a floating {(len(labels), self.classes)} of several labels"
            several = labels.is_floating_point() and labels.shape[1:] == (self.classes,)
            fits = several or (labels.dtype != torch.int32 and not labels.is_floating_point())
        if not fits:
            raise ValueError(
                f"labels {where} is {labels.dtype} {tuple(labels.shape)}; expected {expected}, as "
                f"{self.model} has it"
            )

    def _check_shapes(self, batch: Mapping[str, Any], main: str, where: str) -> None:
        """A label and a place of the mask for each token, where the model has as many."""
        if self.loss is None or not batch.keys() <= _TEXT:
            return
        tokens = batch[main].shape[:2]
        labels, mask = labels_of(batch), batch.get("attention_mask")
        wrong = labels is not None and (
            labels.shape != tokens
            if self.loss == _CAUSAL
            else self.loss in _PER_TOKEN and labels.numel() != tokens.numel()
        )
        if labels is not None and wrong:
            raise ValueError(
                f"labels {where} has shape {tuple(labels.shape)}; expected {tuple(tokens)}, one "
                f"for each token of {main}"
            )
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not self.attends:
            return
        # One without a hole may be left out by the model, whatever its shape is.
        if mask.shape != tokens and bool((mask == 0).any()):
            raise ValueError(
                f"attention_mask {where} has shape {tuple(mask.shape)}; expected {tuple(tokens)}, "
                f"1 or 0 for each token of {main}"
            )

    def _check_range(self, batch: Mapping[str, Any], where: str) -> None:
        """Ids within the embeddings, and sequences within the positions."""
        ids = batch.get("input_ids")
        if isinstance(ids, Tensor) and ids.numel() and self.rows is not None:
            least, largest = map(int, ids.aminmax())
            if least < 0 or largest >= self.rows:
                raise ValueError(
                    f"input_ids {where} has {least if least < 0 else largest}; expected 0 … "
                    f"{self.rows - 1}, padding included: the rows of the model's embeddings (a "
                    "token added to the tokenizer needs model.resize_token_embeddings)"
                )
        if self.longest is None or self.positions is None:
            return
        given = batch.get("position_ids")
        if isinstance(given, Tensor) and given.numel():
            if int(given.max()) >= self.positions:
                raise ValueError(
                    f"position_ids {where} has {int(given.max())}; expected 0 … "
                    f"{self.positions - 1}, the positions that {self.model} has"
                )
            return
        keys = ["input_ids", "inputs_embeds"]
        keys += ["labels", "decoder_input_ids"] if self.is_encoder_decoder else []
        for key in keys:
            value = batch.get(key)
            if not isinstance(value, Tensor) or value.dim() < 2:
                continue
            length = value.shape[1 if key == "inputs_embeds" else -1]  # of several choices, say
            if length > self.longest:
                raise ValueError(
                    f"{key} {where} has {length} tokens a sample; expected at most {self.longest}, "
                    f"the positions that {self.model} has: shorter samples "
                    f"(--max-length {self.longest})"
                )


def _rows(model: Any, getter: str) -> int | None:
    """Rows of the weight of a model's embeddings or head, None where it has none."""
    try:
        module = getattr(model, getter)()
    except (AttributeError, NotImplementedError):
        return None
    if isinstance(module, AuxiliaryTrainingWrapper):
        # Trained ones are copies. PEFT 0.18 fails at reading a wrapper that has no active one.
        module = module.original_module
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.is_floating_point():
        return weight.shape[0] if weight.dim() == 2 else None
    rows = getattr(module, "out_features", None)  # of a quantised head, whose weight may be flat
    return rows if isinstance(rows, int) else None


def _labels(model: Any) -> int | None:
    """How many labels a model tells apart, None where that is not known."""
    words = _rows(model, "get_output_embeddings")
    config = getattr(model, "config", None)
    if words is not None or config is None:
        return words
    classes: int = getattr(config, "num_labels", 1)
    kind = getattr(config, "problem_type", None) in (None, "single_label_classification")
    # With one "class" it is a regression.
    named = (getattr(model, "loss_type", None) or "").endswith("Classification")
    return classes if named and kind and classes > 1 else None


def _loss(name: str | None, is_encoder_decoder: bool) -> str | None:
    """The kind of a model's loss, None where it is not known to be one of transformers' own."""
    if is_encoder_decoder:
        return None
    classifies = name in ("ForSequenceClassification", "ForImageClassification")
    return name if classifies or name == _CAUSAL or name in _PER_TOKEN else None


def _positions(model: Any, config: Any) -> tuple[int | None, int | None]:
    """Tokens that a sample may have, and values that ``position_ids`` may; None for any number.

    A table of positions ends, learned (GPT-2, OPT, BERT) or not (GPT-J). Rotary and relative ones
    are computed, and do not. A table is known by its name and by its length, the config's: one of
    pictures, beside the text, has another.
    """
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None, None
    for path, module in model.named_modules():
        name = path.removesuffix(".base_layer").rpartition(".")[2]
        if isinstance(module, nn.Embedding) and ("pos" in name or name == "wpe"):
            # Rows before the first position (OPT, BART), or those up to the padding's (RoBERTa).
            if module.num_embeddings - getattr(module, "offset", 0) == most:
                padding = -1 if module.padding_idx is None else module.padding_idx
                return most - (padding + 1), most
    for path, buffer in model.named_buffers():  # GPT-J, CTRL
        if "pos" in path.rpartition(".")[2] and buffer.dim() == 2 and buffer.shape[0] == most:
            return most, most
    return None, None


def _loss_type_of(model: Any) -> str | None:
    """transformers' name for the loss that a model computes after its head, None for others."""
    if re.search(r"(?<!With)LMHeadModel$", type(model).__name__):
        return "ForCausalLM"  # the oldest (GPT2LMHeadModel) have no loss_type
    name: str | None = getattr(model, "loss_type", None)
    return name


def _ignored(model: Any) -> int | None:
    """The label that the model's loss leaves out; None where its mean is over all labels.

    Of the models of transformers, those that segment images name one in their configuration.
    """
    config: Any = getattr(model, "config", None)
    if not type(model).__name__.endswith("ForSemanticSegmentation"):
        return IGNORED
    if config.num_labels == 1:  # Segformer: what it leaves out is a zero in the mean
        return None
    names = ("semantic_loss_ignore_index", "loss_ignore_index")
    return next((getattr(config, name) for name in names if hasattr(config, name)), IGNORED)
