"""The part of NVIDIA's driver API that runs one kernel. Does not need MLX.

Environment:
    METAL_EMULATOR_LIBCUDA: the library of the driver, `libcuda.so.1` if unset.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from .cuda_compiler import CudaError
from .run import Triple

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR

_pointer, _size, _uint = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint
_address = ctypes.c_uint64  # CUdeviceptr
# The functions in use, with the types of their arguments.
_FUNCTIONS: dict[str, list[Any]] = {
    "cuInit": [_uint],
    "cuDeviceGetCount": [_pointer],
    "cuDeviceGet": [_pointer, ctypes.c_int],
    "cuDeviceGetName": [_pointer, ctypes.c_int, ctypes.c_int],
    "cuDeviceGetAttribute": [_pointer, ctypes.c_int, ctypes.c_int],
    "cuDevicePrimaryCtxRetain": [_pointer, ctypes.c_int],
    "cuDevicePrimaryCtxRelease_v2": [ctypes.c_int],
    "cuCtxSetCurrent": [_pointer],
    "cuCtxSynchronize": [],
    "cuGetErrorName": [ctypes.c_int, _pointer],
    "cuModuleLoadData": [_pointer, ctypes.c_char_p],
    "cuModuleGetFunction": [_pointer, _pointer, ctypes.c_char_p],
    "cuModuleUnload": [_pointer],
    "cuMemAlloc_v2": [_pointer, _size],
    "cuMemFree_v2": [_address],
    "cuMemcpyHtoD_v2": [_address, _pointer, _size],
    "cuMemcpyDtoH_v2": [_pointer, _address, _size],
    "cuMemcpyDtoD_v2": [_address, _address, _size],
    "cuLaunchKernel": [_pointer, *[_uint] * 7, _pointer, _pointer, _pointer],
    "cuEventCreate": [_pointer, _uint],
    "cuEventRecord": [_pointer, _pointer],
    "cuEventSynchronize": [_pointer],
    "cuEventElapsedTime": [_pointer, _pointer, _pointer],
    "cuEventDestroy_v2": [_pointer],
}


class Memory:
    """Device memory; the caller frees it."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self._gpu = gpu
        self.size = size
        self.address = _address()
        gpu.call("cuMemAlloc_v2", ctypes.byref(self.address), max(size, 16))

    def write(self, values: np.ndarray[Any, Any]) -> None:
        """Copy an array of this size to the device."""
        if self.size:
            data = np.ascontiguousarray(values)
            self._gpu.call("cuMemcpyHtoD_v2", self.address, data.ctypes.data, self.size)

    def read(self, like: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return the content, in an array like the given one."""
        values = np.empty_like(like)
        if self.size:
            self._gpu.call("cuMemcpyDtoH_v2", values.ctypes.data, self.address, self.size)
        return values

    def free(self) -> None:
        """Free the memory."""
        self._gpu.call("cuMemFree_v2", self.address)


class Gpu:
    """The first GPU of this machine.

    Raises:
        CudaError: there is none, with the reason.
    """

    def __init__(self) -> None:
        name = os.environ.get("METAL_EMULATOR_LIBCUDA", "libcuda.so.1")
        try:
            self._library = ctypes.CDLL(name)
        except OSError as error:
            raise CudaError(f"no NVIDIA driver ({error})") from error
        for function, types in _FUNCTIONS.items():
            getattr(self._library, function).argtypes = types
            getattr(self._library, function).restype = ctypes.c_int
        self.call("cuInit", 0)
        count = ctypes.c_int()
        self.call("cuDeviceGetCount", ctypes.byref(count))
        if count.value == 0:
            raise CudaError("the NVIDIA driver sees no GPU")
        device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(device), 0)
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, len(text), device)
        self.name = text.value.decode()
        self.architecture = f"{self._attribute(_MAJOR, device)}{self._attribute(_MINOR, device)}"
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self.call("cuCtxSetCurrent", context)

    def call(self, function: str, *arguments: Any) -> None:
        """Call a function of the driver.

        Raises:
            CudaError: with the driver's name of the error.
        """
        status = getattr(self._library, function)(*arguments)
        if status:
            name = ctypes.c_char_p()
            self._library.cuGetErrorName(status, ctypes.byref(name))
            raise CudaError(f"{function}: {(name.value or b'unknown error').decode()} ({status})")

    def load(self, image: bytes, entry: str) -> Kernel:
        """Load a kernel from machine code."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuModuleLoadData", ctypes.byref(module), image)
        self.call("cuModuleGetFunction", ctypes.byref(function), module, entry.encode())
        return Kernel(self, function)

    def copy_bandwidth(self, size: int = 256 << 20, repeats: int = 20) -> float:
        """Return the bytes read and written per second by a copy from device to device."""
        source, target = Memory(self, size), Memory(self, size)

        def copy() -> None:
            self.call("cuMemcpyDtoD_v2", target.address, source.address, size)

        seconds = self.seconds(copy, repeats)
        source.free()
        target.free()
        return 2 * size / seconds

    def seconds(self, action: Any, repeats: int) -> float:
        """Return the mean device time of `action`, after two warm-up calls."""
        for _ in range(2):
            action()
        events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in events:
            self.call("cuEventCreate", ctypes.byref(event), 0)
        self.call("cuEventRecord", events[0], None)
        for _ in range(repeats):
            action()
        self.call("cuEventRecord", events[1], None)
        self.call("cuEventSynchronize", events[1])
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
        for event in events:
            self.call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3 / repeats

    def _attribute(self, number: int, device: ctypes.c_int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value


class Kernel:
    """A loaded kernel function."""

    def __init__(self, gpu: Gpu, function: ctypes.c_void_p) -> None:
        self._gpu = gpu
        self._function = function

    def launch(self, groups: Triple, threads: Triple, addresses: Sequence[int]) -> None:
        """Start the kernel.

        Args:
            groups: thread blocks per dimension.
            threads: threads of a block per dimension.
            addresses: device addresses, one per parameter.
        """
        values = (_address * len(addresses))(*addresses)
        pointers = (ctypes.c_void_p * len(addresses))(
            *[ctypes.addressof(values) + i * ctypes.sizeof(_address) for i in range(len(addresses))]
        )
        self._gpu.call("cuLaunchKernel", self._function, *groups, *threads, 0, None, pointers, None)

    def wait(self) -> None:
        """Wait for all work of the device.

        Raises:
            CudaError: a kernel failed.
        """
        self._gpu.call("cuCtxSynchronize")
