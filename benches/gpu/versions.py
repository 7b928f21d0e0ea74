#!/usr/bin/env python3
"""Versions of Python's packages and of NVIDIA's libraries as the loader finds them; attributes of the GPU; the rates of copies from and
to pinned host memory."""

import ctypes
import importlib.metadata
import platform
import time

print("python", platform.python_version())
for package in ("torch", "transformers", "nvidia-cudnn-cu13", "nvidia-cublas", "nvidia-cuda-nvrtc", "nvidia-nccl-cu13"):
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
driver = first("libcuda.so.1")
if driver:
    driver.cuDriverGetVersion(ctypes.byref(number))
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

# CUdevice_attribute of cuda.h.
ATTRIBUTES = {
    "multiprocessors": 16, "clock in kHz": 13, "memory clock in kHz": 36, "bytes of L2 cache": 38, "ECC": 32,
    "shared memory of a block, with opt-in": 97, "reads pageable host memory (HMM or Grace)": 88,
    "by the host's page tables": 100,
}
BYTES, COPIES = 256 << 20, 8


def check(code, call):
    if code != 0:
        raise OSError(f"{call}: error {code}")


def bus(driver):
    """Prints attributes of the first GPU, and the rates of copies."""
    check(driver.cuInit(0), "cuInit")
    device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
    check(driver.cuDeviceGet(ctypes.byref(device), 0), "cuDeviceGet")
    for name, attribute in ATTRIBUTES.items():
        check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device), "cuDeviceGetAttribute")
        print(f"{name}: {number.value}")
    check(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
    check(driver.cuStreamCreate(ctypes.byref(stream), 1), "cuStreamCreate")
    at, host = ctypes.c_uint64(), ctypes.c_void_p()
    check(driver.cuMemAlloc_v2(ctypes.byref(at), ctypes.c_size_t(BYTES)), "cuMemAlloc")
    check(driver.cuMemHostAlloc(ctypes.byref(host), ctypes.c_size_t(BYTES), 0), "cuMemHostAlloc")
    ctypes.memset(host, 1, BYTES)
    copies = {
        "to the GPU": lambda: driver.cuMemcpyHtoDAsync_v2(at, host, ctypes.c_size_t(BYTES), stream),
        "from the GPU": lambda: driver.cuMemcpyDtoHAsync_v2(host, at, ctypes.c_size_t(BYTES), stream),
    }
    for name, copy in copies.items():
        check(copy(), name)  # warm-up
        check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
        begin = time.perf_counter()
        for _ in range(COPIES):
            check(copy(), name)
        check(driver.cuStreamSynchronize(stream), "cuStreamSynchronize")
        print(f"pinned copies {name}: {COPIES * BYTES / (time.perf_counter() - begin) / 1e9:.1f} GB/s")


if driver:
    try:
        bus(driver)
    except OSError as error:
        print(error)
