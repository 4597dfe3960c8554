"""Convert launches to records that a machine with an NVIDIA GPU can repeat."""

from __future__ import annotations

import numpy as np

from .cuda import ENTRY, translate
from .emulated_kernel import Launch
from .launch_files import RecordedBuffer, RecordedLaunch
from .run import Buffer

# Floats of larger launches are not stored: such a launch is only timed.
MAX_VALUES_BYTES = 8 << 20


def recorded_launch(launch: Launch) -> RecordedLaunch:
    """Return the record of a launch.

    Args:
        launch: a launch that was recorded with `keep_values=True`.

    Raises:
        ValueError: the launch has no values.
    """
    if not launch.buffers:
        raise ValueError(f"[{launch.name}] run without keep_values=True: no values to record")
    types = {info.name: str(info.dtype).split(".")[-1] for info in launch.inputs + launch.outputs}
    buffers = tuple(
        _describe(name, buffer, types.get(name, "")) for name, buffer in launch.buffers.items()
    )
    small = sum(buffer.nbytes for buffer in buffers) <= MAX_VALUES_BYTES
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
