"""The guard: which layers influence the output on a way that no recorded call sees.

The gradient of a layer's parameters is the sum over its recorded calls only where the output
depends on these parameters through the outputs of these calls alone. It does not where a function
reads a weight outside its module, where the output is a derivative of the layers with respect to
their inputs, or where a loop outside the model feeds outputs of earlier forwards in again.
The guard reads that off the autograd graph, without any arithmetic: each way from the output to a
parameter must lead through the node of a recorded call of its layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge

from kfactk.capture.forward import TracedCall
from kfactk.stages import Layer

UNCHANGED = {"SubBackward0", "AddBackward0", "CloneBackward0", "AliasBackward0", "ToCopyBackward0"}
"""Nodes whose first input gets the gradient of the output as it is."""
MOST_NODES = 256
"""Most nodes between the output of a layer's call and its parameters; it makes about ten. A call
that runs again may make more, such as one for each step of a recurrent layer."""


def unseen_layers(
    starts: Sequence[Tensor], calls: Sequence[TracedCall], layers: Iterable[Layer]
) -> list[Layer]:
    """Return the layers whose influence on `starts` the recorded calls do not hold whole.

    Args:
        starts: Tensors that the model made.
        calls: The recorded calls of the forward.
        layers: The followed layers, also those without a call.
    """
    tops = {node for call in calls for node in call.tops}
    owners: dict[Node, Layer] = {}
    unseen: dict[Layer, None] = {}
    ends = {layer: parameter_nodes(layer.tensors().values()) for layer in layers}
    allowed: dict[Layer, set[Node]] = {layer: set() for layer in ends}
    for call in calls:
        layer = call.record.layer
        ends[layer] |= parameter_nodes(p for p in call.parameters if p.grad_fn is None)
        inner = None
        if all(_passes_on(p, ends[layer]) for p in call.parameters):
            inner = inner_nodes(call, ends[layer], tops)
        if inner is None:
            unseen[layer] = None
            continue
        owners.update((node, layer) for node in inner)
        allowed[layer] |= inner | set(call.tops)
    owners.update((node, layer) for layer, nodes in ends.items() for node in nodes)
    for parent, child in graph_edges(starts):
        owner = owners.get(child)
        if owner is not None and child not in tops and parent not in allowed[owner]:
            unseen[owner] = None
    return [layer for layer in allowed if layer in unseen]


def parameter_nodes(parameters: Iterable[Tensor]) -> set[Node]:
    """Return the nodes at which gradients of these tensors arrive."""
    with torch.enable_grad():
        return {get_gradient_edge(each).node for each in parameters if each.requires_grad}


def _passes_on(used: Tensor, ends: set[Node]) -> bool:
    """Return whether a tensor that stood in for a parameter has the parameter's gradient."""
    node = used.grad_fn
    while node is not None and node not in ends:
        node = node.next_functions[0][0] if node.name() in UNCHANGED else None
        if node is None:
            return False
    return True


def inner_nodes(call: TracedCall, ends: set[Node], tops: set[Node]) -> set[Node] | None:
    """Return the nodes between the outputs of a call and its parameters.

    Returns:
        `None` where they lead through other calls, so that the call does not hold them all.
    """
    leads: dict[Node, bool] = {}
    own, most = call.tops, math.inf if call.record.replay is not None else MOST_NODES
    stack: list[tuple[Node, bool]] = [(node, False) for node in own]
    while stack:
        node, done = stack.pop()
        children = [
            child
            for child, _ in node.next_functions
            if child is not None and child not in call.sources
        ]
        if done:
            leads[node] = any(child in ends or leads.get(child, False) for child in children)
        elif node not in leads:
            leads[node] = False
            if len(leads) > most or (node in tops and node not in own):
                return None
            stack.append((node, True))
            stack.extend((child, False) for child in children if child not in leads)
    return {node for node, lead in leads.items() if lead and node not in own}


def graph_edges(starts: Iterable[Tensor]) -> Iterable[tuple[Node, Node]]:
    """Yield the edges of the graph that made `starts`, from the node that ran later."""
    seen: set[Node] = set()
    stack = [start.grad_fn for start in starts if start.grad_fn is not None]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        for child, _ in node.next_functions:
            if child is not None:
                yield node, child
                stack.append(child)
