"""Layers that a module calls with the same input, as the q, k and v of an attention, computed as one operation.

Which these are is read from the source of the module's forward: it calls them with one and the same variable, each
once, under no condition. The first of them that is called computes all, and the others hand out what is theirs if they
are called with that very tensor; if not, they compute on their own.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .fast_path import FusedLayer, fused_calls, sharing
from .ops import shared_linear
from .ops.torch_seam import children_of, version_of
from .promote import Transparent, demote

Groups = tuple[tuple[str, ...], ...]


class SharingInput(Transparent):
    """Mixin over a model's module that calls several adapted layers with the same input."""

    training: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # a block that is checkpointed in the reentrant way is computed without gradients first, and is training, too
        if is_compiling() or not (self.training or torch.is_grad_enabled()):  # alone, layers cost the host less there
            return nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]
        children = children_of(self)  # type: ignore[arg-type]
        groups = groups_of(self)  # type: ignore[arg-type]
        if not groups:
            demote(self)  # the adapters are gone
        before, sharing.group = sharing.group, Siblings([[children[name] for name in names] for names in groups])
        try:
            return nn.Module.__call__(self, *args, **kwargs)  # type: ignore[arg-type]
        finally:
            sharing.group = before


class Siblings:
    """Layers of one module that see the same input, during one call of the module.

    Args:
        groups: the layers of each input, in the order in which they are called.
    """

    def __init__(self, groups: list[list[Any]]) -> None:
        self.groups = {id(layer): group for group in groups for layer in group}
        self.ready: dict[int, tuple[Tensor, int, Tensor]] = {}  # layer -> input, its version, output

    def output_of(self, layer: Any, x: Tensor) -> Tensor | None:
        """What a layer gives of x, or None if it is to compute that on its own."""
        ready = self.ready.pop(id(layer), None)
        if ready is not None:
            return ready[2] if ready[0] is x and ready[1] == version_of(x) else None
        group = self.groups.get(id(layer))
        if group is None or x.is_inference():  # which has no version: a change in place would go unseen
            return None
        for other in group:  # once: what follows is for all
            del self.groups[id(other)]
        calls = fused_calls(group, x)
        if calls is None:
            return None
        dtype = calls[0].dtype
        ys = shared_linear(x if x.dtype == dtype else x.to(dtype), [call.operands() for call in calls])
        version = version_of(x)
        for other, y in zip(group, ys, strict=True):
            self.ready[id(other)] = x, version, y
        return self.ready.pop(id(layer))[2]


def groups_of(module: nn.Module) -> Groups:
    """Names of layers with adapters that a module calls with the same input, at least two each."""
    names = tuple(name for name, child in children_of(module).items() if isinstance(child, FusedLayer))
    if len(names) < 2:
        return ()
    forward = inspect.unwrap(module.__dict__.get("forward", type(module).forward))
    code = getattr(forward, "__code__", None)  # a wrapper or a method would keep its module alive in the cache
    return () if code is None else _groups(code, names)


def shares_input(module: nn.Module) -> bool:
    """Whether a module calls several layers, with adapters that can be computed as one operation, on one input."""
    children = children_of(module)
    return any(all(children[name].has_fused() for name in names) for names in groups_of(module))


@functools.lru_cache(1024)
def _groups(code: CodeType, names: tuple[str, ...]) -> Groups:
    """Which of the layers a forward calls with the same variable, each once, whatever its arguments are."""
    try:
        [function] = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    this = function.args.args[0].arg
    calls: dict[str, list[tuple[ast.Call, bool]]] = {}
    stores: list[ast.Name] = []
    mentions: dict[str, int] = {}
    for node, always in _walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            stores.append(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == this:
            mentions[node.attr] = mentions.get(node.attr, 0) + 1
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of, name = node.func.value, node.func.attr
            if isinstance(of, ast.Name) and of.id == this and name in names:
                calls.setdefault(name, []).append((node, always))
    by_variable: dict[str, list[tuple[tuple[int, int], str]]] = {}
    for name, found in calls.items():
        [(call, always), *more] = found
        if more or not always or mentions[name] != 1 or call.keywords or len(call.args) != 1:
            continue
        if isinstance(call.args[0], ast.Name):
            by_variable.setdefault(call.args[0].id, []).append(((call.lineno, call.col_offset), name))
    groups = []
    for variable, own in by_variable.items():
        places, called = zip(*sorted(own), strict=True)
        changed = any(places[0] <= (s.lineno, s.col_offset) <= places[-1] for s in stores if s.id == variable)
        if len(called) > 1 and not changed:
            groups.append(called)
    return tuple(groups)


# below which code may run not at all, several times, or with other settings of torch's
CONDITIONS = (
    *(ast.If, ast.IfExp, ast.BoolOp, ast.Match, ast.For, ast.While, ast.Try, ast.With, ast.Lambda, ast.FunctionDef),
    *(ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.ClassDef),
)


def _walk(function: ast.FunctionDef) -> Iterator[tuple[ast.AST, bool]]:
    """All nodes of a function's body, and whether they are evaluated in every call, once."""
    returned = False
    for statement in function.body:
        for node in ast.walk(statement):
            yield node, not returned and not _is_below_condition(statement, node)
        returned = returned or any(isinstance(node, ast.Return | ast.Raise) for node in ast.walk(statement))


def _is_below_condition(statement: ast.AST, node: ast.AST) -> bool:
    return any(
        any(inner is node for inner in ast.walk(outer))
        for outer in ast.walk(statement)
        if isinstance(outer, CONDITIONS)
    )
