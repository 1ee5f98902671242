"""The batches of a pass: read once or kept for the next pass, and prepared one by one."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from filet.config import FiletConfig
from filet.model.batch import on_host, samples_in
from filet.model.inputs import Inputs, Prepared, check_dataloader

__all__ = ["Batches", "PreparedBatches"]


class Batches:
    """The batches of a dataloader, which is read once. With ``keep`` they can be read again.

    Kept are copies in host memory of the batches that were read.

    Attributes:
        samples: how many there are; None where that is not known before they are read.
        keep: whether what is read is kept.
    """

    def __init__(self, dataloader: Iterable[Any]) -> None:
        self.samples = check_dataloader(dataloader)
        self.keep = False
        self._source = iter(dataloader)
        self._kept: list[Any] = []

    def first(self) -> Any:
        """The first batch with a sample in it, None without any; iterating starts over with it."""
        while not any(map(samples_in, self._kept)):
            read = [on_host(batch) for batch in itertools.islice(self._source, 1)]
            if not read:
                return None
            self._kept += read
        return next(batch for batch in self._kept if samples_in(batch))

    def __iter__(self) -> Iterator[Any]:
        yield from self._kept
        for batch in self._source:
            if self.keep:
                self._kept.append(on_host(batch))
            yield batch


class PreparedBatches:
    """Batches ready to go through a model, up to ``config.samples``; read no further than that.

    Attributes:
        index: in the dataloader, of the batch that was read last; -1 before the first.
        samples: of the batches that went through.
    """

    def __init__(
        self,
        dataloader: Iterable[Any],
        config: FiletConfig,
        inputs: Inputs,
        shift: Callable[[], bool],
        check: Callable[[Any, int], None] | None = None,
    ) -> None:
        """``shift()``, ``check``: of each batch, see :meth:`Inputs.prepared`."""
        self.index = -1
        self.samples = 0
        self._dataloader = dataloader
        self._config = config
        self._inputs = inputs
        self._shift = shift
        self._check = check

    def __iter__(self) -> Iterator[Prepared]:
        most = self._config.samples
        for index, batch in enumerate(self._dataloader):
            self.index = index
            batch = self._inputs.prepared(
                batch,
                index,
                room=None if most is None else most - self.samples,
                token_mask=self._config.token_mask,
                shift=self._shift(),
                check=self._check,
            )
            if batch is None:
                continue
            if self.samples == 0 and not self._inputs.asked:
                _warn_of_other_masks(batch.batch, self._config.token_mask)
            yield batch
            self.samples += batch.samples
            if most is not None and self.samples >= most:
                return


def _warn_of_other_masks(batch: Any, token_mask: str | None) -> None:
    """A forward_fn may know of a mask that this library does not."""
    if token_mask != "attention_mask" or not isinstance(batch, Mapping) or token_mask in batch:
        return
    others = [
        key
        for key, value in batch.items()
        if "mask" in str(key) and isinstance(value, Tensor) and value.dim() > 1
    ]
    if others:
        warnings.warn(
            f"the batch has {others[0]!r} and no attention_mask, so padding counts like any token; "
            f"expected FiletConfig(token_mask={others[0]!r}), or token_mask=None if all count",
            stacklevel=5,
        )
