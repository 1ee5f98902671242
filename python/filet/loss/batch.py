"""The summed loss of a batch, by the shortest way that its model allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftModel

from filet.config import FiletConfig
from filet.loss.chunked import ChunkedLoss, HeadLoss
from filet.loss.summed import ModelLoss, SummedLoss
from filet.model.inputs import Inputs

__all__ = ["BatchLoss", "ForwardFn"]

ForwardFn = Callable[[Any, Any], Any]


class BatchLoss:
    """Takes batches forward: up to the last hidden states where that will do, or all the way."""

    def __init__(
        self,
        config: FiletConfig,
        peft_model: PeftModel,
        inputs: Inputs,
        forward_fn: ForwardFn | None,
        most: Callable[[Any], Any] | None,
    ) -> None:
        """``most``: as of :class:`HeadLoss`."""
        self.peft_model = peft_model
        self.forward = forward_fn or _own_forward
        self.summed = SummedLoss(config, inputs)
        self.head = HeadLoss(config, peft_model, inputs.shift, forward_fn, most)

    def __call__(
        self, given: Any, host: Any, batch: Any, once_more: Callable[[], None]
    ) -> ChunkedLoss | ModelLoss:
        """
        Args:
            given: what the model gets of the batch, on its device.
            host: the batch before it went to the device.
            batch: the whole batch, on the device.
            once_more: called before the batch goes through the model a second time, where the model
                turned out to do something else with its logits.
        """
        if self.head.takes(given):
            loss = self.head(given, host)
            if loss is not None:
                return loss
            once_more()
        return self.summed(self.forward(self.peft_model, given), batch)

    def alone(self, given: Any) -> None:
        """A batch forward for what happens on the way; no loss is made where there need be none."""
        if self.head.why_not is None and "labels" not in given:
            self.head.hidden_alone(given)
        else:
            self.forward(self.peft_model, given)


def _own_forward(model: Any, batch: Any) -> Any:
    return model(**batch)
