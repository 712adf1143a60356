"""K-FAC for GPT-2, whose layers are `Conv1D` of transformers: weights are `[d_in, d_out]`."""

import attrs
from torch import nn
from transformers.pytorch_utils import Conv1D

from kfactk import Layer, LayerCall, Tensors
from kfactk_stages.curvature.kfac import Kfac


@attrs.frozen(kw_only=True)
class Gpt2Kfac(Kfac):
    covered = (nn.Linear, Conv1D)

    def matrix(self, layer: Layer, tensors: Tensors):
        if isinstance(layer.module, Conv1D):
            tensors = {**tensors, "weight": tensors["weight"].T}
        return super().matrix(layer, tensors)

    def tensors(self, layer: Layer, matrix):
        if not isinstance(layer.module, Conv1D):
            return super().tensors(layer, matrix)
        weight = {"weight": matrix[:, : layer.module.nx].T}
        return {**weight, "bias": matrix[:, -1]} if layer.bias else weight

    def blank(self, layer: Layer) -> LayerCall:
        call = super().blank(layer)
        return LayerCall(call.gradient, call.inputs) if isinstance(layer.module, Conv1D) else call
