#!/usr/bin/env python3
"""Versions of Python's packages and of NVIDIA's libraries as the loader finds them."""

import ctypes
import importlib.metadata
import platform

print("python", platform.python_version())
for package in ("torch", "transformers"):
    try:
        print(package, importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        print(package, "is not installed")


def first(*names):
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            pass
    print(names[0], "was not found")


number = ctypes.c_int()
if lib := first("libcuda.so.1"):
    lib.cuDriverGetVersion(ctypes.byref(number))
    print("driver for CUDA", f"{number.value // 1000}.{number.value % 1000 // 10}")
if lib := first("libnvrtc.so.13", "libnvrtc.so.12"):
    minor = ctypes.c_int()
    lib.nvrtcVersion(ctypes.byref(number), ctypes.byref(minor))
    print("NVRTC", f"{number.value}.{minor.value}")
if lib := first("libcublas.so.13", "libcublas.so.12"):
    parts = []
    for which in range(3):  # major, minor, patch
        lib.cublasGetProperty(which, ctypes.byref(number))
        parts.append(str(number.value))
    print("cuBLAS", ".".join(parts))
if lib := first("libnccl.so.2"):
    lib.ncclGetVersion(ctypes.byref(number))
    print("NCCL", f"{number.value // 10000}.{number.value // 100 % 100}.{number.value % 100}")
