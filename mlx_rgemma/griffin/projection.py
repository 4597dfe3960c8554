"""Projections of the same input as one matrix product, for the steps of a decode loop."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_rgemma.griffin.linear import Linear, QuantizedLinear

KEYS = ("weight", "scales", "biases", "bias")


class FusedProjection:
    """Several linear layers over one input, their weights laid out end to end.

    The layers stay what they are: their parameters become views into the joint arrays, so that
    nothing is stored twice. When one of them is replaced (by training, or by an adapter), the
    joint arrays no longer serve and the layers run by themselves.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        widths = [layer["weight"].shape[0] for layer in layers]
        self.cuts = [sum(widths[: i + 1]) for i in range(len(widths) - 1)]
        plain = isinstance(layers[0], nn.Linear)
        joint = Linear(1, 1) if plain else QuantizedLinear(64, 1)
        for key in KEYS:
            joint.pop(key, None)
            if key in layers[0]:
                joint[key] = mx.concatenate([layer[key] for layer in layers])
        if isinstance(joint, nn.QuantizedLinear):
            first = layers[0]
            joint.group_size, joint.bits, joint.mode = first.group_size, first.bits, first.mode
        joint.eval()  # it serves decode steps alone
        self.joint = joint
        mx.eval(joint.parameters())
        for layer, start, width in zip(layers, [0, *self.cuts], widths, strict=True):
            for key in KEYS:
                if key in layer:
                    layer[key] = joint[key][start : start + width]
            mx.eval(layer.parameters())  # what is left to compute belongs to this thread
        self.parts = [layer["weight"] for layer in layers]

    def __call__(self, x: mx.array) -> list[mx.array]:
        return list(mx.split(self.joint(x), self.cuts, axis=-1))

    def expand(self, layers: Sequence[nn.Module]) -> None:
        """Expand the joint quantized weights; those of the layers become views into them."""
        if isinstance(self.joint, QuantizedLinear):
            weights = mx.split(self.joint.expand(), self.cuts)
            for layer, weight in zip(layers, weights, strict=True):
                if isinstance(layer, QuantizedLinear):
                    layer.keep_expanded(weight)

    def serves(self, layers: Sequence[nn.Module]) -> bool:
        """Whether the layers are still the ones that were joined."""
        return all(
            layer.get("weight") is part for layer, part in zip(layers, self.parts, strict=True)
        )

    @staticmethod
    def can_join(layers: Sequence[nn.Module]) -> bool:
        """Whether the layers are plain or alike quantized, with a bias all or none."""
        first = layers[0]
        if type(first) not in (Linear, QuantizedLinear, nn.Linear, nn.QuantizedLinear):
            return False
        if any(type(layer) is not type(first) for layer in layers):
            return False
        if any(set(layer) & set(KEYS) != set(first) & set(KEYS) for layer in layers):
            return False
        if any(layer["weight"].dtype != first["weight"].dtype for layer in layers):
            return False
        settings = ("group_size", "bits", "mode")
        return all(
            getattr(layer, s, None) == getattr(first, s, None) for layer in layers for s in settings
        )


class SharedInputBlock(nn.Module):
    """A block some of whose linear layers read the same input: those named in `shared`."""

    shared: tuple[str, ...] = ()

    def join_projections(self) -> None:
        """Join the layers named in `shared`, if they can be."""
        layers = [self[name] for name in self.shared]
        if FusedProjection.can_join(layers):
            # A plain attribute: joint weights are no parameters of their own.
            object.__setattr__(self, "_fused", FusedProjection(layers))

    def expand_joined(self) -> None:
        """Lay float32 weights beside the joint quantized ones, if there are any."""
        layers = [self[name] for name in self.shared]
        fused = self.__dict__.get("_fused")
        if fused is not None and fused.serves(layers):
            fused.expand(layers)

    def project(self, x: mx.array) -> list[mx.array]:
        """Outputs of the layers named in `shared`; x is (B, L, width).

        One product for one token a row. For longer inputs one product saves nothing, and its
        parts would have to be copied apart.
        """
        layers = [self[name] for name in self.shared]
        fused = self.__dict__.get("_fused")
        one_step = x.shape[1] == 1
        if fused is not None and one_step and fused.serves(layers):
            return fused(x)
        if fused is not None and not one_step and self.training and any(map(_is_trained, layers)):
            # The next update replaces the parts: the joint arrays would only take memory.
            object.__delattr__(self, "_fused")
        return [layer(x) for layer in layers]


def _is_trained(layer: nn.Module) -> bool:
    """Whether a layer's own matrix is, rather than adapters beside it."""
    return "weight" in layer.trainable_parameters()
