"""Turn executed launches into files that a machine with an NVIDIA GPU can repeat."""

from __future__ import annotations

import numpy as np

from .cuda import ENTRY, translate
from .recorded import RecordedBuffer, RecordedLaunch
from .run import Buffer
from .standin import Launch

# Floats beyond this are not stored: a launch of that size is there to be timed.
MOST_VALUES_BYTES = 8 << 20


def recorded_launch(launch: Launch) -> RecordedLaunch:
    """A launch that was executed with `keep_values`, as it is stored.

    Raises:
        ValueError: when the launch kept no values.
    """
    if not launch.buffers:
        raise ValueError(f"[{launch.name}] executed without keep_values: nothing to record")
    types = {info.name: str(info.dtype).split(".")[-1] for info in launch.inputs + launch.outputs}
    buffers = tuple(
        _describe(name, buffer, types.get(name, "")) for name, buffer in launch.buffers.items()
    )
    small = sum(buffer.nbytes for buffer in buffers) <= MOST_VALUES_BYTES
    values = {}
    for described, buffer in zip(buffers, launch.buffers.values(), strict=True):
        is_input_number = described.role == "input" and described.stored_type.kind in "iub"
        if small or (is_input_number and described.type != "bfloat16"):
            values[described.name] = buffer.array
    captured = launch.capture
    return RecordedLaunch(
        launch.name,
        translate(captured.source, captured.function, captured.instance),
        ENTRY,
        launch.grid,
        launch.threadgroup,
        float(launch.init_value or 0),
        buffers,
        values,
    )


def _describe(name: str, buffer: Buffer, mlx_type: str) -> RecordedBuffer:
    array: np.ndarray = buffer.array
    kind = "bfloat16" if mlx_type == "bfloat16" else array.dtype.name
    return RecordedBuffer(name, buffer.role, kind, array.shape, buffer.origin)
