"""Names and roles of all parameters, once: for schemas, sharding, quantization and training.

The parameters of a module share a role. Names on disk are Hugging Face's; Google's checkpoints have
names of their own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

A_PARAM = "recurrent_param"
"""Hugging Face's name of the RG-LRU's Lambda, which Google calls `a_param`."""


class Role(Enum):
    """Purpose of a module."""

    EMBEDDING = auto()  # also the LM head
    IN_PROJ = auto()  # reads the residual stream
    OUT_PROJ = auto()  # writes to the residual stream
    CONV = auto()
    RG_LRU = auto()  # gates, and Lambda
    NORM = auto()


MATRICES = (Role.EMBEDDING, Role.IN_PROJ, Role.OUT_PROJ)
"""Roles whose weights are matrices: they are quantized, and weight decay applies to them."""


@dataclass(frozen=True)
class Module:
    """A module that has parameters.

    Attributes:
        role: Its purpose.
        google: Google's name, within a layer.
        google_index: Index along the first axis, where Google stacks two modules in one tensor.
        shard_axis: Axis of the weight that tensor parallelism splits; None if every rank has all
            of it.
        high_precision: Whether the recipe `rgemma` gives it more bits; docs/quantization.md has
            the reasons.
    """

    role: Role
    google: str
    google_index: int | None = None
    shard_axis: int | None = None
    high_precision: bool = False


def _projection(role: Role, google: str, **options: object) -> Module:
    axis = 0 if role is Role.IN_PROJ else 1
    return Module(role, google, **{"shard_axis": axis, **options})  # type: ignore[arg-type]


MODULES: dict[str, Module] = {
    "embed_tokens": Module(Role.EMBEDDING, "embedder.input_embedding", high_precision=True),
    "temporal_pre_norm": Module(Role.NORM, "temporal_pre_norm"),
    "linear_y": _projection(Role.IN_PROJ, "recurrent_block.linear_y", high_precision=True),
    "linear_x": _projection(Role.IN_PROJ, "recurrent_block.linear_x", high_precision=True),
    "linear_out": _projection(Role.OUT_PROJ, "recurrent_block.linear_out", high_precision=True),
    "conv_1d": Module(Role.CONV, "recurrent_block.conv_1d", shard_axis=0),
    "rg_lru": Module(Role.RG_LRU, "recurrent_block.rg_lru", shard_axis=0),
    # The queries could do with fewer bits, but with the same bits the three are one product.
    "q_proj": _projection(Role.IN_PROJ, "attention_block.proj_q", high_precision=True),
    # All heads share one key/value head, which every rank has.
    "k_proj": Module(Role.IN_PROJ, "attention_block.proj_k", high_precision=True),
    "v_proj": Module(Role.IN_PROJ, "attention_block.proj_v", high_precision=True),
    "o_proj": _projection(Role.OUT_PROJ, "attention_block.proj_final"),
    "channel_pre_norm": Module(Role.NORM, "channel_pre_norm"),
    "gate_proj": _projection(Role.IN_PROJ, "mlp_block.ffw_up", google_index=0),
    "up_proj": _projection(Role.IN_PROJ, "mlp_block.ffw_up", google_index=1),
    "down_proj": _projection(Role.OUT_PROJ, "mlp_block.ffw_down"),
    "final_norm": Module(Role.NORM, "final_norm"),
}
"""All modules with parameters, in the order of the model."""


def find_module(name: str) -> Module:
    """Return the module that a parameter belongs to, also as an adapter or quantized.

    Raises:
        KeyError: If it belongs to none.
    """
    for part in name.split("."):
        if part in MODULES:
            return MODULES[part]
    raise KeyError(name)


def is_bias(name: str) -> bool:
    """Return whether a parameter is a bias (not the `biases` of a quantized matrix)."""
    return name.endswith(("bias", "_bias"))


def is_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix, which can be quantized."""
    return find_module(name).role in MATRICES and name.endswith(".weight")


def shard_axis(name: str) -> int | None:
    """Return the axis along which ranks split a parameter; None if every rank has all of it."""
    module = MODULES.get(name.split(".")[-2]) if "." in name else None
    if module is None or (module.role is Role.OUT_PROJ and is_bias(name)):
        return None
    return module.shard_axis


def uses_weight_decay(name: str, ndim: int) -> bool:
    """Return whether weight decay applies to a parameter: to matrices and their adapters.

    It does not apply to the RG-LRU (Griffin, arXiv:2402.19427, section 3.2: no weight decay on the
    recurrence), norms, convolution and biases. It applies to matrices of other modules.

    Args:
        name: Full name in the model.
        ndim: Number of its dimensions.
    """
    known = any(part in MODULES for part in name.split("."))
    matrix = not known or find_module(name).role in MATRICES
    return ndim >= 2 and matrix and not is_bias(name)


def modules_of(role: Role) -> tuple[str, ...]:
    """Return the names of the modules of a role."""
    return tuple(name for name, module in MODULES.items() if module.role is role)
