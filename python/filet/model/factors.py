"""A LoRA factor together with its start: A as [A; A0], B as [B, −B0].

With A0, B0 the factors that FILet chose and s PEFT's scaling, what trains is
    W x + s (B A − B0 A0) x  =  W x + s [B, −B0] [A; A0] x,
which is W x at the start, over a W that nobody changed. The right-hand side is a plain LoRA of rank
2r of which one half is frozen. The adapter is made of just that, under its own name in PEFT's own
dictionaries: whatever PEFT does to a LoRA layer (run, merge, mix, switch, delete, save) it does to
the two halves together.
"""

from __future__ import annotations

import functools
import importlib
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from filet.model.sharded import divided, is_sharded, whole, write

__all__ = ["OF_ADAPTER", "StartedFactor", "StartedLayer", "plain_class", "started_class"]

OF_ADAPTER = "_filet_adapter"
"""Attribute of a config: the name of the adapter whose it is."""


class StartedFactor(nn.Linear):
    """A or B of an initialised layer: a linear layer whose weight is [trained, start].

    Attributes:
        weight: (2r, n) for A, (m, 2r) for B, in the dtype of the part that trains. It is made anew
            whenever it is read; what is written to it in place goes to the two halves.
            ``state_dict`` has it under this name, and ``load_state_dict`` takes it apart again.
        trained: (r, n) or (m, r), the parameter; ``named_parameters`` has it as "weight".
        start: its value at the start, with the sign that it is added with. A buffer that is not
            saved, so no optimiser sees it, nothing that is switched on trains it, and DDP gives all
            ranks that of rank 0, as it does with the parameters.
        dim: along which the two are joined: 0 in A, 1 in B.
        base: fingerprint of the base weight that the layer belongs to.
    """

    dim: int
    base: str
    start: Tensor

    @classmethod
    def begin(cls, linear: nn.Linear, start: Tensor, dim: int, base: str) -> None:
        """Make a factor one with this start; its weight is what trains. Mutates ``linear``.

        The module stays the one that PEFT, hooks and device maps know.
        """
        linear.__class__ = cls
        assert isinstance(linear, cls)
        linear.register_buffer("start", start.detach(), persistent=False)
        linear.dim, linear.base = dim, base
        shape = list(linear.trained.shape)
        shape[dim] += start.shape[dim]
        linear.out_features, linear.in_features = shape

    @staticmethod
    def end(linear: nn.Linear) -> None:
        """Make it a plain linear layer again, of what trains alone. Mutates ``linear``."""
        if isinstance(linear, StartedFactor):
            linear.__class__ = nn.Linear  # type: ignore[assignment]
            del linear.start, linear.dim, linear.base
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
        # These look by its name for the parameter, which FSDP has made flat or sharded.
        caller = sys._getframe(1)
        if caller.f_globals.get("__name__", "").startswith(_FSDP):
            return self.trained
        if caller.f_code is nn.Module.get_parameter.__code__:
            return self.trained
        return _Whole.of(self._whole(), self)

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
            if param is not None and param.shape == (self.out_features, self.in_features):
                trained, start = param.detach().tensor_split([self.rank], self.dim)
                self.start = start.clone()
                param = nn.Parameter(trained.clone(), requires_grad=param.requires_grad)
        super().register_parameter(name, param)

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self._whole(), self.bias)

    def _whole(self) -> Tensor:
        trained = whole(self.trained)  # FSDP 2 has shards, except in a forward
        if trained.shape != self.start.shape:
            # accelerate's dispatch_model puts what it reads as the weight in the parameter's place.
            raise RuntimeError(
                f"the parameter of this FILet factor is {tuple(trained.shape)}; expected the "
                f"trained half alone, {tuple(self.start.shape)}: a model is moved by .to(), or "
                "dispatched before it is initialised"
            )
        return torch.cat([trained, self.start.to(trained)], self.dim)

    def take(self, both: Tensor) -> None:
        """Take both halves from a weight, (2r, n) or (m, 2r). Mutates ``trained`` and ``start``."""
        if both.shape != (self.out_features, self.in_features):
            raise RuntimeError(
                f"the weight of a FILet factor is set to one of shape {tuple(both.shape)}; "
                f"expected {(self.out_features, self.in_features)}, both halves"
            )
        with torch.no_grad():
            trained, start = both.detach().tensor_split([self.rank], self.dim)
            write(self.trained, trained)
            self.start.copy_(start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StartedFactor:
        # Whoever casts parameters one by one passes this by. Their rounding is the start's as well.
        parameter = self._parameters.get("weight")
        if parameter is not None:
            self.start = self.start.to(parameter.dtype)
        super()._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        both = self._whole()
        both = both if keep_vars else both.detach()
        if both.is_meta:  # accelerate asks how it is sharded, to send the weights there
            destination[f"{prefix}weight"] = divided(both, self.trained)
            return
        destination[f"{prefix}weight"] = _Whole.of(both, self)

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
        both = state_dict.get(key)
        if both is not None and both.shape != shape:
            # Also of the shape of what trains: it would run with a start that is not its own.
            error_msgs.append(
                f"size mismatch for {key}: {tuple(both.shape)} in the checkpoint; expected "
                f"{shape}, the trained and the frozen half that FILet's adapters are saved with"
            )
            return
        if both is not None:
            # Of another model's state_dict it is one of these.
            both = whole(both) if is_sharded(both) else both.as_subclass(Tensor)
            trained, start = both.tensor_split([self.rank], self.dim)
            trained = divided(trained, self.trained)
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
_SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]

# What would change the tensor that was read, and nothing else.
_LOST = {"__set__", "requires_grad_", "resize_", "resize_as_"}


class _Whole(Tensor):
    """What is read as a weight: a tensor like any other. What is written to it goes to its factor.

    The same holds for its views. PEFT's hot swap, for one, writes adapters into weights, and an
    average of ``state_dict`` values is taken in place.
    """

    _factor: StartedFactor
    _root: Tensor  # the joined halves, whose views all these are

    @classmethod
    def of(cls, whole: Tensor, factor: StartedFactor) -> Tensor:
        return cls._alias(whole, whole, factor)

    @classmethod
    def _alias(cls, tensor: Tensor, root: Tensor, factor: StartedFactor) -> Tensor:
        alias = tensor.as_subclass(cls)
        alias._root, alias._factor = root, factor
        alias._reference = weakref.ref(alias)  # type: ignore[attr-defined]  # no swap_tensors
        return alias

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
        # torch.nn.init hands its tensor on by name.
        written = (args[:1] or tuple(kwargs.values())) if in_place else (kwargs.get("out"),)
        mine = [each for each in _flat(written) if isinstance(each, cls)]
        if mine and func != _SET_DATA and name in _LOST:
            raise RuntimeError(
                f"{name} on the weight of a FILet factor, which is made when it is read, would be "
                "lost; expected it on the parameter, which named_parameters has, or on a clone"
            )
        with torch._C.DisableTorchFunctionSubclass():
            for each in mine:  # it may have been read long ago
                each._root.detach().copy_(each._factor._whole().detach())
            found = func(*args, **kwargs)
            for each in mine:
                if func == _SET_DATA:
                    each._root = each.as_subclass(Tensor)
                each._factor.take(each._root)
            for each in _flat((args, *kwargs.values())) if func != Tensor.as_subclass else ():
                if isinstance(each, cls):
                    found = each._kept(found)
            return found

    def _kept(self, found: Any) -> Any:
        """What was found, and where it is a view of this tensor, one that is written to as well."""
        if isinstance(found, (tuple, list)):
            return type(found)(map(self._kept, found))
        if type(found) is Tensor and torch._C._is_alias_of(found, self):  # type: ignore[attr-defined]
            return self._alias(found, self._root, self._factor)
        return found

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().as_subclass(Tensor).clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)


def _flat(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


class StartedLayer:
    """Of a LoRA layer of PEFT's with such factors: an adapter made by their config has them too.

    TRL's trainers make their reference so, ``add_adapter("ref", model.peft_config["default"])``,
    and then copy the parameters over by name. It begins where the other began. (PEFT's "all-linear"
    knows its own layers by a "Linear" in the name of their class.)
    """

    def _get_name(self) -> str:
        return plain_class(type(self)).__name__  # in what is printed

    def update_layer(self: Any, adapter_name: str, r: int, *args: Any, **kwargs: Any) -> None:
        super().update_layer(adapter_name, r, *args, **kwargs)  # type: ignore[misc]
        # PEFT 0.18 hands on what is in the config, not the config itself.
        config = kwargs.get("config") or sys._getframe(1).f_locals.get("lora_config")
        name = vars(config).get(OF_ADAPTER) if config is not None else None
        A = self.lora_A[name] if name in self.lora_A else None
        if not isinstance(A, StartedFactor) or 2 * A.rank != r:
            return
        for factors in (self.lora_A, self.lora_B):
            like, new = factors[name], factors[adapter_name]
            begun = -like.start if like.dim == 1 else like.start.clone()
            new._parameters["weight"] = nn.Parameter(
                begun.to(new.weight.dtype), requires_grad=new.weight.requires_grad
            )
            StartedFactor.begin(new, like.start.clone(), like.dim, like.base)


def started_class(kind: type[LoraLayer]) -> type[LoraLayer]:
    """PEFT's class of a LoRA layer, over a plain or a quantised base, with a frozen half."""
    kind = plain_class(kind)
    return _made(kind.__module__, kind.__name__)


def plain_class(kind: type) -> type[LoraLayer]:
    """The class of PEFT's that a layer's class is, or was made from."""
    return kind.__bases__[1] if issubclass(kind, StartedLayer) else kind


@functools.cache
def _made(module: str, name: str) -> type[LoraLayer]:
    kind = getattr(importlib.import_module(module), name)
    where = {"__module__": __name__, "__qualname__": f"Started_{module.rpartition('.')[2]}_{name}"}
    return type(where["__qualname__"], (StartedLayer, kind), where)


def __getattr__(name: str) -> Any:
    """A pickled layer's class is found by its name here, in a process that has not made it yet."""
    if name.startswith("Started_"):
        _, module, kind = name.split("_", 2)
        return _made(f"peft.tuners.lora.{module}", kind)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
