"""A LoRA factor together with its start: A as [A; A0], B as [B, −B0].

With A0, B0 the factors that FILet chose and s PEFT's scaling, what trains is
    W x + s (B A − B0 A0) x  =  W x + s [B, −B0] [A; A0] x,
which is W x at the start, over a W that nobody changed. The right-hand side is a plain LoRA of rank
2r of which one half is frozen. The adapter is made of just that, under its own name in PEFT's own
dictionaries: whatever PEFT does to a LoRA layer (run, merge, mix, switch, delete, save) it does to
the two halves together.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["StartedFactor"]


class StartedFactor(nn.Linear):
    """A or B of an initialised layer: a linear layer whose weight is [trained, start].

    Attributes:
        weight: (2r, n) for A, (m, 2r) for B, in the dtype of the part that trains. It is made anew
            whenever it is read, so writing to it is an error. ``state_dict`` has it under this
            name, and ``load_state_dict`` takes it apart again.
        trained: (r, n) or (m, r), the parameter; ``named_parameters`` has it as "weight".
        start: its value at the start, with the sign that it is added with. Neither a parameter nor
            a buffer: no optimiser sees it, nothing that is switched on trains it, and DDP does not
            broadcast it in every step.
        dim: along which the two are joined: 0 in A, 1 in B.
    """

    dim: int
    start: Tensor

    @classmethod
    def begin(cls, linear: nn.Linear, start: Tensor, dim: int) -> None:
        """Make a factor one with this start; its weight is what trains. Mutates ``linear``.

        The module stays the one that PEFT, hooks and device maps know.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.start, linear.dim = start.detach(), dim
        shape = list(linear.trained.shape)
        shape[dim] += start.shape[dim]
        linear.out_features, linear.in_features = shape

    @staticmethod
    def end(linear: nn.Linear) -> None:
        """Make it a plain linear layer again, of what trains alone. Mutates ``linear``."""
        if isinstance(linear, StartedFactor):
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            del linear.start, linear.dim
            linear.out_features, linear.in_features = linear.weight.shape

    @property
    def trained(self) -> Tensor:
        parameter = self._parameters.get("weight")
        if parameter is not None:
            return parameter
        if "_view" in self.__dict__:
            view: Tensor = self.__dict__["_view"]
            return view
        raise AttributeError("weight")  # which FSDP 1 is about to set

    @property
    def rank(self) -> int:
        """r, of the part that trains."""
        return self.trained.shape[self.dim]

    @property
    def weight(self) -> Tensor:
        if torch.compiler.is_compiling():
            return self._whole()
        # FSDP looks by its name for the parameter that it has made flat or sharded.
        caller: str = sys._getframe(1).f_globals.get("__name__", "")
        return self.trained if caller.startswith(_FSDP) else _ReadOnly.of(self._whole())

    # These two only past nn.Module's own __setattr__ and __delattr__: FSDP 1 takes the parameter
    # away for a flat one of its own, and puts views of that in its place.
    @weight.setter
    def weight(self, view: Tensor) -> None:
        self.__dict__["_view"] = view

    @weight.deleter
    def weight(self) -> None:
        self.__dict__.pop("_view", None)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            self.__dict__.pop("_view", None)  # FSDP's, which it takes back
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._whole(), self.bias)

    def _whole(self) -> Tensor:
        trained = self.trained
        if hasattr(trained, "full_tensor"):  # FSDP 2 has shards, except in a forward
            trained = trained.full_tensor()
        if trained.shape != self.start.shape:
            # accelerate's dispatch_model puts what it reads as the weight in the parameter's place.
            raise RuntimeError(
                f"the parameter of this FILet factor is {tuple(trained.shape)}; expected the "
                f"trained half alone, {tuple(self.start.shape)}: a model is moved by .to(), or "
                "dispatched before it is initialised"
            )
        return torch.cat([trained, self.start.to(trained)], self.dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StartedFactor:
        super()._apply(fn, recurse)
        self.start = fn(self.start)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        whole = self._whole()
        destination[f"{prefix}weight"] = whole if keep_vars else whole.detach()

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key, shape = f"{prefix}weight", (self.out_features, self.in_features)
        whole = state_dict.get(key)
        if whole is not None and whole.shape != shape:
            # Also of the shape of what trains: it would run with a start that is not its own.
            error_msgs.append(
                f"size mismatch for {key}: {tuple(whole.shape)} in the checkpoint; expected "
                f"{shape}, the trained and the frozen half that FILet's adapters are saved with"
            )
            return
        if whole is not None:
            trained, start = whole.tensor_split([self.rank], self.dim)
            if local_metadata.get("assign_to_params_buffers", False):
                trained, self.start = trained.contiguous(), start.detach().contiguous()
            else:
                self.start.copy_(start)
            state_dict = {**state_dict, key: trained}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_FSDP = "torch.distributed.fsdp"
_WRITES = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")}
_WRITES |= {"__set__", "__setitem__", "__imatmul__", "__iand__", "__ior__", "__ixor__"}
_DATA = Tensor.data.__get__  # type: ignore[attr-defined]
_LOST = (
    "this is the weight of a FILet factor, its trained and its frozen half joined when it is read, "
    "so what is written to it would be lost; expected load_state_dict, or the saved adapter loaded "
    "by PeftModel.from_pretrained, where it is a plain weight"
)


class _ReadOnly(Tensor):
    """What is read as a weight: a tensor like any other, but whoever writes to it is told.

    PEFT's hot swap, for one, writes adapters into the weights that it finds.
    """

    @classmethod
    def of(cls, whole: Tensor) -> Tensor:
        weight = whole.as_subclass(cls)
        weight._reference = weakref.ref(weight)  # type: ignore[attr-defined]  # no swap_tensors
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        # torch.nn.init hands its tensor on by name.
        written = (args[:1] or tuple(kwargs.values())) if in_place else (kwargs.get("out"),)
        if any(isinstance(each, cls) for each in written):
            raise RuntimeError(_LOST)
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            # What is read as data can be written to as well, past autograd.
            return found.as_subclass(cls) if func == _DATA else found
