"""Which GPUs the driver knows: `python -m dijiang_engines.plugin.capabilities` prints them.

Asked in a process of its own: libcuda, once initialised, stays so, and a broken driver may end the process.
"""

from __future__ import annotations

import ctypes

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR (cuda.h)


def main() -> None:
    """Ask libcuda; print one compute capability a line, as 10 * major + minor, until a call fails."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return
    for index in range(count.value):
        numbers = []
        for attribute in (_MAJOR, _MINOR):
            if cuda.cuDeviceGet(ctypes.byref(device), index) != 0:
                return
            if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
                return
            numbers.append(value.value)
        print(10 * numbers[0] + numbers[1])


if __name__ == "__main__":
    main()
