"""Texts to be told apart, as a file holds them and as a model takes them; and that model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from effect.tasks import Row, length_multiple, padded, token_mask

__all__ = ["BertMeanForSequenceClassification", "Texts", "write_texts"]


class BertMeanForSequenceClassification(BertPreTrainedModel):
    """BERT whose classes are told by the mean of its last states over a text's tokens.

    MiniLM's sentence embeddings are that mean; transformers' own classifier has the first token
    through one more layer, which MiniLM never trained.
    """

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        # Of two dimensions, transformers would look at its values, to leave out one of ones alone:
        # a graph that is captured on a GPU cannot wait for them.
        unseen = (1 - attention_mask)[:, None, None].to(self.dtype) * torch.finfo(self.dtype).min
        unseen = unseen.expand(-1, 1, input_ids.shape[1], -1)
        hidden = self.bert(input_ids, attention_mask=unseen).last_hidden_state
        mask = attention_mask.unsqueeze(2)
        mean = (hidden.float() * mask).sum(1) / mask.sum(1)
        logits = self.classifier(mean.to(hidden.dtype))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Texts:
    """Samples are token ids (L,) int64. A file is what :func:`write_texts` makes."""

    loads: Any = BertMeanForSequenceClassification

    def __init__(self, config: Any, device: torch.device) -> None:
        self.pad, self.multiple = config.pad_token_id, length_multiple(device)

    def read(self, path: Path, limit: int | None) -> list[Row]:
        with np.load(path) as file:
            ids, lengths, labels = (
                torch.from_numpy(file[name].astype(np.int64))
                for name in ("ids", "lengths", "labels")
            )
        if ids.dim() != 1 or len(ids) != lengths.sum():
            raise ValueError(
                f"ids of {path} are {tuple(ids.shape)}; expected ({int(lengths.sum())},), the sum "
                "of its lengths"
            )
        return list(zip(ids.split(lengths.tolist()), labels, strict=True))[:limit]

    def batch(self, samples: Sequence[Tensor]) -> dict[str, Tensor]:
        ids = padded(samples, self.multiple, self.pad)
        return {"input_ids": ids, "attention_mask": token_mask(samples, ids.shape[1])}

    def arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return inputs


def write_texts(path: Path, rows: Sequence[tuple[Sequence[int], int]]) -> None:
    """Token ids and class of every text: ``ids``, one after the other, ``lengths``, ``labels``.

    ValueError for an id that is not uint16.
    """
    texts, labels = zip(*rows, strict=True)
    ids = np.concatenate([np.asarray(text) for text in texts])
    if ids.min() < 0 or ids.max() >= 1 << 16:
        raise ValueError(f"ids are {ids.min()} to {ids.max()}; expected 0 to 65535")
    np.savez_compressed(
        path,
        ids=ids.astype(np.uint16),
        lengths=np.array([len(text) for text in texts], np.uint16),
        labels=np.array(labels, np.uint8),
    )
