"""Programs without complex numbers: ONNX has none.

What is complex and depends on weights only is computed now and becomes a constant. What is left, the complex states of
S4D and S5 and what enters them, is computed in pairs of real numbers, `view_as_real` of the complex tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from ._portable import times

_aten = torch.ops.aten


class Pair(NamedTuple):
    """A complex tensor: (..., 2)."""

    parts: Tensor


def has_complex(graph: fx.Graph) -> bool:
    """Whether any node has a complex value."""
    return any(isinstance(v := n.meta.get("val"), Tensor) and v.is_complex() for n in graph.nodes)


def without_complex(module: fx.GraphModule) -> nn.Module:
    """The same function in real numbers. Programs are traced from it once more."""
    _fold(module)
    return _Lowered(module)


# ---- constants -------------------------------------------------------------------------------------------------------


def _fold(module: fx.GraphModule) -> None:
    """Compute what is complex and depends on weights only, and store what others make of it as buffers."""
    for node in list(module.graph.nodes):
        if node.target is _aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)  # it would keep its complex argument alive
    values: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        value = _value(module, node, values)
        if value is not None:
            values[node] = value
    for count, node in enumerate([n for n in values if _is_border(n, values)]):
        name, value = f"constant_{count}", values[node]
        pairs = _is_complex(value)
        module.register_buffer(name, (torch.view_as_real(value) if pairs else value).contiguous())
        with module.graph.inserting_before(node):
            constant = module.graph.get_attr(name)
            if pairs:
                constant = module.graph.call_function(_aten.view_as_complex.default, (constant,))
        node.replace_all_uses_with(constant)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()


def _value(module: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    """The value of a node that depends on weights only, else None."""
    if node.op == "get_attr":
        value = _attribute(module, str(node.target))
        return value.detach() if isinstance(value, Tensor) else None
    if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
    call: Any = node.target
    return call(*args, **kwargs)


def _is_complex(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_complex()


def _is_border(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Where complex constants end: a real value made of them, or one that meets something that is not constant."""
    if _is_complex(values[node]):
        return any(user not in values for user in node.users)
    return any(_is_complex(values[n]) for n in node.all_input_nodes)


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


# ---- pairs -----------------------------------------------------------------------------------------------------------


class _Lowered(nn.Module):
    """The module's graph, run node by node with pairs in the place of complex tensors."""

    def __init__(self, module: fx.GraphModule):
        super().__init__()
        # Under the names that they had: a wrapper would give them longer ones.
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.graph = module.graph

    def forward(self, tokens: Tensor, state: Any = None) -> Any:
        return _Interpreter(self, graph=self.graph).run(tokens, *([] if state is None else [state]))


class _Interpreter(fx.Interpreter):
    def call_function(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        form = _FORMS.get(getattr(target, "overloadpacket", target))
        if form is not None and (target is _aten.view_as_complex.default or any(isinstance(a, Pair) for a in args)):
            return form(*args, **kwargs)
        if any(isinstance(a, Pair) for a in args):
            raise NotImplementedError(f"export: a complex {target} has no form in real numbers yet")
        return super().call_function(target, args, kwargs)


def _of_parts(function: Callable) -> Callable:
    """Applied to the parts as they are: every axis that it names is counted from the front."""
    return lambda x, *args, **kwargs: Pair(function(x.parts, *args, **kwargs))


def _axis(axis: int) -> int:
    return axis if axis >= 0 else axis - 1


_FORMS: dict[Any, Callable] = {
    _aten.view_as_complex: lambda x: Pair(x),
    _aten.view_as_real: lambda x: x.parts,
    _aten.view: lambda x, shape: Pair(x.parts.reshape(*shape, 2)),
    _aten.reshape: lambda x, shape: Pair(x.parts.reshape(*shape, 2)),
    _aten.unflatten: lambda x, axis, sizes: Pair(x.parts.unflatten(_axis(axis), sizes)),
    _aten.flatten: lambda x, start, end=-1: Pair(x.parts.flatten(start, _axis(end))),
    _aten.unsqueeze: lambda x, axis: Pair(x.parts.unsqueeze(_axis(axis))),
    _aten.squeeze: lambda x, axis: Pair(x.parts.squeeze(_axis(axis))),
    _aten.select: lambda x, axis, index: Pair(x.parts.select(_axis(axis), index)),
    _aten.to: lambda x, *_, **__: x,  # between complex dtypes: programs are made in float32
    _aten.clone: _of_parts(lambda x, **_: x.clone()),
    _aten.contiguous: _of_parts(lambda x, **_: x.contiguous()),
    _aten.detach: _of_parts(lambda x: x),
    _aten.alias: _of_parts(lambda x: x),
    _aten.add: lambda x, y: Pair(x.parts + y.parts),
    _aten.mul: lambda x, y: Pair(times(x.parts, y.parts)),
    _aten.addcmul: lambda x, y, z: Pair(x.parts + times(y.parts, z.parts)),
}
