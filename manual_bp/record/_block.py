"""A block of `record`: hooks and a mode see what happens in it, and pass it on to its parts."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.overrides import TorchFunctionMode

from manual_bp._torch import below_modes
from manual_bp.record._activations import functions_of_activations
from manual_bp.record._calls import PRODUCTS, SeenCalls
from manual_bp.record._choose import Layers, choose, linear_layers
from manual_bp.record._fill import Filling
from manual_bp.record._hooks import Hook
from manual_bp.record._losses import LOSSES, Losses, Reduction
from manual_bp.record._passes import BACKWARDS, Backward, Passes
from manual_bp.record._samples import InputAndOutput, OwnTensors
from manual_bp.trace import Trace


class Block(TorchFunctionMode):
    """What `record` returns: see there for the arguments, and for the errors raised."""

    def __init__(
        self,
        model: nn.Module,
        reduction: Reduction,
        layers: Layers | None,
        no_samples: Layers | None,
    ) -> None:
        super().__init__()
        modules = dict(model.named_modules())
        linear = linear_layers(modules)
        names = linear if layers is None else choose("layers", layers, linear)
        if not names:
            raise ValueError("layers must choose at least one linear layer, or be None; got none")
        without = None if no_samples is None else choose("no_samples", no_samples, linear)
        self._model = model
        self._own = OwnTensors(modules.values())
        self._in_and_out = InputAndOutput()
        self._calls = SeenCalls(names, self._own)
        self._losses = Losses(reduction)
        self._filling = Filling(
            self._calls, self._in_and_out, reduction, layers is not None, without
        )
        self._activations = functions_of_activations()
        self._passes = Passes(model, self._calls, self._losses, self._filling)
        self._removers: list[Any] = []

    def __enter__(self) -> Trace:
        if self._passes.thread is not None:
            raise RuntimeError(
                "what record returns must be entered once, since it records one backward pass; "
                "it was entered before: call record again for another block"
            )
        self._passes.thread = threading.get_ident()
        hook = Hook(self._see_layer)
        try:
            for layer in self._calls.names:
                self._removers.append(hook.add(layer, prepend=True))
            self._removers.append(Hook(self._see_model).add(self._model, prepend=False))
        except BaseException:
            self._release()
            raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self._filling.trace

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        super().__exit__(kind, error, traceback)  # type: ignore[no-untyped-call]
        try:
            if kind is None:
                self._filling.require_filled()
        finally:
            self._release()

    def _release(self) -> None:
        for remove in self._removers:
            remove()
        self._removers.clear()
        self._calls.release()
        self._losses.release()

    def _enter(self, _: object) -> None:
        super().__enter__()  # type: ignore[no-untyped-call]

    def _leave(self, *_: object) -> None:
        super().__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _see_layer(self, layer: nn.Module, *call: Any) -> None:
        # A replica of a module has the same hooks.
        if layer in self._calls.names and self._passes.is_of_block():
            with below_modes():
                self._calls.see_layer(layer, *call)

    def _see_model(self, model: nn.Module, *call: Any) -> None:
        if model is self._model and torch.is_grad_enabled() and self._passes.is_of_block():
            with below_modes():
                self._in_and_out.see(self._own, *call)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if is_compiling():
            return func(*args, **kwargs)
        if func in BACKWARDS:
            return self._passes.run(Backward(func, args, kwargs, self._enter, self._leave))
        may_be_own = self._own.may_lead_to_more(args)
        if func in self._activations:
            result = self._calls.see_activation(self._activations[func], func, args, kwargs)
        else:
            result = func(*args, **kwargs)
            if func in PRODUCTS:
                self._calls.see_product(func, args, kwargs, result)
            elif func in LOSSES:
                self._losses.see(func, args, kwargs, result)
        if may_be_own and isinstance(result, Tensor | tuple | list):
            self._own.see(func, args, kwargs, result)
        return result
