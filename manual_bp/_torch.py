"""Every private name of PyTorch that the package uses: what it is for, and what happens without it.

Private names are looked up only here, by `getattr` or `_need`. If a name is missing, the package
either falls back to something slower that gives the same numbers, or raises an error with the name
("refuses", below). `tests/test_torch.py` hides each name in turn.
"""

import importlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd import Function, forward_ad
from torch.autograd.function import BackwardCFunction


def _refuse(name: str, purpose: str) -> NoReturn:
    raise RuntimeError(
        f"torch must have the private name {name}, which manual_bp needs to {purpose}; got torch "
        f"{torch.__version__}, which has none: use a version that manual_bp supports"
    )


def _need(owner: object, name: str, purpose: str) -> Any:
    """A private attribute that nothing can replace."""
    value = getattr(owner, name, _MISSING)
    return _refuse(name, purpose) if value is _MISSING else value


_MISSING = object()
_functorch: Any = getattr(torch._C, "_functorch", None)
_pytree: Any = getattr(torch.utils, "_pytree", None)


# --- What is active now. Every call of a layer asks, so this must be cheap.


def functorch_transforms() -> list[str]:
    """The kinds of the active transforms of torch.func, from the outermost to the innermost.

    Without it, always "Functionalize", through which no Function passes: only our forward is used,
    and PyTorch differentiates it.
    """
    interpreters = getattr(_functorch, "get_interpreter_stack", None)
    if interpreters is None:
        return ["Functionalize"]
    return [interpreter.key().name for interpreter in interpreters() or ()]


# Whether a transform of torch.func is active. Without it, the list above is made.
transforms_are_active: Callable[[], bool] = getattr(
    torch._C, "_are_functorch_transforms_active", lambda: bool(functorch_transforms())
)


def _autocast_is_on() -> bool:
    accelerator = torch.accelerator.current_accelerator()
    return any(torch.is_autocast_enabled(kind.type) for kind in (_CPU, accelerator or _CPU))


_CPU = torch.device("cpu")
# Whether autocast is on for any device. Without it, the CPU and the accelerator are asked about.
any_autocast_is_on: Callable[[], bool] = getattr(
    torch._C, "_is_any_autocast_enabled", _autocast_is_on
)
# How many TorchDispatchModes are active. Without it, always one: some results are copied that need
# not be, and only PyTorch checks class indices.
count_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
# Whether torch.jit.trace is running. Without it, a slower public function.
_jit: Any = torch.jit
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", _jit.is_tracing)
# Whether a tensor is batched by is_grads_batched=True. Without it, always: no backward overwrites
# anything.
is_mapped_by_autograd: Callable[[Tensor], bool] = getattr(
    _functorch, "is_legacy_batchedtensor", lambda _: True
)
# Whether hooks are registered for all modules (register_module_forward_hook). Without it, always:
# `convert` fuses no pair.
has_global_hooks: Callable[[], bool] = getattr(
    nn.modules.module, "_has_any_global_hook", lambda: True
)


def forward_ad_level() -> int:
    """How deeply forward-mode AD is nested; below 0 outside of it.

    Without it, always 0: what forward-mode AD might need is saved everywhere.
    """
    level: int = getattr(forward_ad, "_current_level", 0)
    return level


# --- Regions that skip a part of PyTorch.

# Skips autograd, which no_grad only stops from recording: this saves a twentieth of the time of a
# small training step. Without it, no_grad.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", torch.no_grad
)
# Skips __torch_function__ and its modes, such as that of `record`, for which each call takes 2 µs.
# Without it, `record` also sees what its own hooks call.
below_modes: Callable[[], AbstractContextManager[Any]] = getattr(
    torch._C, "DisableTorchFunction", nullcontext
)


# --- Tensors.


def version(t: Tensor) -> int:
    """A number that changes when the tensor is changed in place. Without it, refuses."""
    try:
        number: int | None = getattr(t, "_version", None)
    except RuntimeError:  # inference tensors have none
        return 0
    return _refuse("_version", "notice changes in place") if number is None else number


def has_tensor_hooks(t: Tensor) -> bool:
    """Whether hooks are registered for the gradient of a tensor. Without it, refuses."""
    purpose = "find hooks"
    return bool(
        _need(t, "_backward_hooks", purpose) or _need(t, "_post_accumulate_grad_hooks", purpose)
    )


# Makes a tensor that is no view for autograd, but shares memory with t. Without it, a copy.
_unsafe_view: Callable[..., Tensor] | None = getattr(torch.ops.aten, "_unsafe_view", None)


def as_no_view(t: Tensor) -> Tensor:
    """The same values as a tensor that may be changed in place outside of a Function."""
    return t.clone() if _unsafe_view is None else _unsafe_view(t, t.shape)


# --- What modules hold. PyTorch's public methods are slower, and skip what occurs twice.


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's own dict of its parameters by name. Without it, refuses."""
    own: dict[str, Any] = _need(module, "_parameters", "read the parameters of a module")
    return own


def parameters_for_reading(module: nn.Module) -> dict[str, Any]:
    """The same, for calls of layers. Without it, empty: ask the module itself."""
    own: dict[str, Any] = getattr(module, "_parameters", {})
    return own


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """A module's own dict of its buffers by name. Without it, refuses."""
    own: dict[str, Any] = _need(module, "_buffers", "read the buffers of a module")
    return own


def own_modules(module: nn.Module) -> dict[str, Any]:
    """A module's own dict of its submodules by name. Without it, refuses."""
    own: dict[str, Any] = _need(module, "_modules", "read the submodules of a module")
    return own


def forward_hooks(module: nn.Module) -> dict[int, Any]:
    """A module's forward hooks by number. Without it, refuses."""
    hooks: dict[int, Any] = _need(module, "_forward_hooks", "find hooks")
    return hooks


def without_forward_hooks(
    attributes: dict[str, Any], is_left_out: Callable[[object], bool]
) -> dict[str, Any]:
    """The attributes of a module, without some of its forward hooks.

    Without the names, with them.
    """
    kept = dict(attributes)
    # A list, since other threads may add and remove hooks meanwhile.
    hooks = list(kept.get("_forward_hooks", {}).items())
    left_out = {key for key, hook in hooks if is_left_out(hook)}
    for name in kept.keys() & {"_forward_hooks", "_forward_hooks_with_kwargs"}:
        kept[name] = OrderedDict((k, v) for k, v in list(kept[name].items()) if k not in left_out)
    return kept


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after its forward. Without it, refuses."""
    return bool(forward_hooks(module) or _need(module, "_forward_pre_hooks", "find hooks"))


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after its backward. Without it, refuses."""
    purpose = "find hooks"
    return bool(
        _need(module, "_backward_hooks", purpose) or _need(module, "_backward_pre_hooks", purpose)
    )


# --- Nodes of autograd's graph.


def is_user_function(node: object) -> bool:
    """Whether a node belongs to a Function written in Python outside of this package.

    Its backward may do anything, such as run a part of the model again and call backward() there.
    Without the private name, our own Functions count too.
    """
    function = getattr(type(node), "_forward_cls", Function)
    return isinstance(node, BackwardCFunction) and not function.__module__.startswith(
        f"{__package__}."
    )


# --- Nested containers of tensors. Without these names, refuses.


def tree_leaves(tree: Any) -> list[Any]:
    """All leaves of nested tuples, lists, dicts and registered classes."""
    leaves: list[Any] = _need(_pytree, "tree_leaves", "look into nested containers")(tree)
    return leaves


def flatten_tree(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers, and the structure from which `unflatten_tree` makes more."""
    flat: tuple[list[Any], Any] = _need(_pytree, "tree_flatten", "look into nested containers")(
        tree
    )
    return flat


def unflatten_tree(leaves: Iterable[Any], structure: Any) -> Any:
    """Nested containers of this structure that hold these leaves."""
    return _need(_pytree, "tree_unflatten", "nest arguments")(leaves, structure)


def tree_paths(arguments: tuple[Any, ...]) -> list[tuple[int, str]]:
    """For every leaf, the position of its argument, and the path from there, such as `['h'][0]`."""
    pairs = _need(_pytree, "tree_flatten_with_path", "name nested arguments")(arguments)[0]
    text = _need(_pytree, "keystr", "name nested arguments")
    return [(path[0].idx, text(path[1:])) for path, _ in pairs]


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """The same tuples, lists and dicts with other tensors. Without it, refuses."""
    return _need(_pytree, "tree_map_only", "look into nested containers")(Tensor, change, tree)


# --- Only for `TrainingStep.compile`. PyTorch's compiler is imported when it is first asked for.


def compile_ahead(program: Any, path: str, options: dict[str, Any]) -> None:
    """Compile an exported program with AOTInductor, into a package. Without it, refuses."""
    inductor = importlib.import_module("torch._inductor")
    build = _need(inductor, "aoti_compile_and_package", "compile a step")
    try:
        build(program, package_path=path, inductor_configs=options)
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise RuntimeError(f"PyTorch must be able to compile the step; got {reason}") from error


def load_compiled(path: str) -> tuple[Callable[[list[Tensor]], list[Tensor]], dict[str, str]]:
    """The function in a package, from flat tensors to flat tensors, and its metadata.

    Not through nested containers, which would take as long as a small step. Without it, refuses.
    """
    inductor = importlib.import_module("torch._inductor")
    purpose = "load a compiled step"
    package = _need(inductor, "aoti_load_package", purpose)(path, run_single_threaded=True)
    loader = _need(package, "loader", purpose)
    return loader.run, loader.get_metadata()


def writes_call(operator: Any, function: str, count: int) -> bool:
    """Have AOTInductor write a call of a C function for an operator, and say whether it will.

    The function gets the first arguments of the operator, as many as count says.

    Without it, False: a compiled step writes new weights to a buffer, and then copies them.
    """
    try:
        module: Any = importlib.import_module(
            "torch._inductor.codegen.custom_extern_kernel_codegen"
        )
    except ModuleNotFoundError:
        return False
    table = getattr(module, "CUSTOM_EXTERN_KERNEL_CODEGEN", None)
    entry = getattr(module, "CustomCodegen", None)
    if table is None or entry is None:
        return False

    def write(node: Any, write_line: Callable[[str], None]) -> None:
        arguments = ", ".join(node.codegen_args()[:count])
        write_line(f"AOTI_TORCH_ERROR_CODE_CHECK({function}({arguments}));")

    table[f"torch.ops.{operator}"] = entry(python=write)
    return True


def adding_cpp(operator: Any, source: str) -> dict[str, Any]:
    """The options with which AOTInductor compiles C++ that an operator calls, too."""
    # It writes these declarations into a block of extern "C", each after the word extern.
    text = f"""int manual_bp_begins;
}}
{source}
extern "C" {{
extern int manual_bp_ends"""
    return {"aot_inductor.custom_ops_to_c_shims": {operator: [text]}}


# --- Only for `record`.


def leaf_of(node: object) -> Tensor | None:
    """The leaf whose `.grad` a node of autograd's graph adds to; None for all other nodes.

    Without the name, None for all, and `record` refuses the graph.
    """
    # A Function's context may have any attributes.
    return None if isinstance(node, BackwardCFunction) else getattr(node, "variable", None)


def node_that_made(t: Tensor) -> Any:
    """The node of autograd's graph that made a tensor, even if it was changed in place since.

    Changing a view in place gives it another node, but leaves that of its base. Without the name,
    refuses.
    """
    base = _need(t, "_base", "find the base of a view")
    return (t if base is None else base).grad_fn


def reduced_dims(node: object) -> Any:
    """The dimension or dimensions over which a node sums or averages. Without it, none is known."""
    return getattr(node, "_saved_dim", ())


def shape_before(node: object) -> Any:
    """The shape of what a node reduces. Without it, None: not known."""
    return getattr(node, "_saved_self_sym_sizes", None)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether torch.compile or module.compile() made a module, which hides the modules in it.

    Without the names, no: hooks in such a model are not called, and `record` says so.
    """
    is_wrapper = type(module).__name__ == "OptimizedModule"
    return is_wrapper or getattr(module, "_compiled_call_impl", None) is not None


# The number of the backward pass that runs in this thread; -1 if none does. On accelerators, and if
# many passes are nested, autograd runs them in threads of its own. Without it, all passes have one
# number: `record` takes what other threads bring for its own, and may refuse results.
running_pass: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: 0)


# --- Only for the verification kit.

_python_dispatch: Any = getattr(torch.utils, "_python_dispatch", None)


def seeing_operators(see: Callable[[str], object]) -> AbstractContextManager[Any]:
    """A region in which `see` gets the name of every operator that runs. Without it, refuses."""
    mode: Any = _need(_python_dispatch, "TorchDispatchMode", "count operators")

    class Seeing(mode):  # type: ignore[misc]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            see(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    return Seeing()


def is_pytorchs_function(node: object) -> bool:
    """Whether a node belongs to a Function that is part of PyTorch, such as that of checkpointing.

    The backward of an operator made with torch.library is its author's. Without the private name,
    none does.
    """
    return module_of(node).split(".")[0] == "torch" and not is_of_operator(node)


def module_of(node: object) -> str:
    """The name of the module with the Function of a node; empty without the private name."""
    return str(getattr(getattr(type(node), "_forward_cls", None), "__module__", ""))


def is_of_operator(node: object) -> bool:
    """Whether a node belongs to an operator made with torch.library.

    Without the private name, none does: the kit blames operators for what PyTorch drops.
    """
    function = getattr(type(node), "_forward_cls", None)
    return function is not None and function.__module__.startswith("torch._library.")


def operator_of(fn: object) -> Any:
    """The operator of torch.library that this is, as its default overload; None if it is none.

    Without the names, None: the kit judges it as any other call.
    """
    overload = getattr(fn, "_opoverload", fn)
    overload = getattr(overload, "default", overload)
    kind = getattr(getattr(torch, "_ops", None), "OpOverload", None)
    return overload if kind is not None and isinstance(overload, kind) else None


def operator_arguments(operator: Any) -> list[str]:
    """The names of an operator's arguments. Without the name, none is known."""
    schema = getattr(operator, "_schema", None)
    return [] if schema is None else [argument.name for argument in schema.arguments]


def expected_gradient(node: object, slot: int) -> Any:
    """The shape, dtype and device that a node of autograd's graph wants its gradient to have.

    Without it, None: the kit does not look at gradients as a backward returned them.
    """
    metadata: Any = getattr(node, "_input_metadata", None)
    return None if metadata is None else metadata[slot]


def version_of(value: Tensor) -> int:
    """How often a tensor was changed in place, as autograd knows. Without it, always 0."""
    return int(getattr(value, "_version", 0))


def own_test_samples() -> tuple[list[Any], list[Any]]:
    """PyTorch's samples for its own tests: of operators (OpInfo) and of modules (ModuleInfo).

    Without the names, refuses. They need packages that PyTorch does not install.

    Raises:
        ModuleNotFoundError: Such a package is missing.
    """
    return (
        _need(_testing("common_methods_invocations"), "op_db", "judge PyTorch's functions"),
        _need(_testing("common_modules"), "module_db", "judge PyTorch's modules"),
    )


def _testing(name: str) -> Any:
    """A module of PyTorch's own tests; None if this version has none of the name."""
    path = f"torch.testing._internal.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if path.startswith(missing):
            return None
        raise ModuleNotFoundError(
            f"{missing} must be installed, since PyTorch's own test samples need it: install "
            f"manual-bp[test]",
            name=missing,
        ) from None
