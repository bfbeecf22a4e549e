"""Serves the CPU as a device of ggml's RPC backend: python server.py HOST:PORT, until it is ended.

The wheel of ggml holds the backend but no program that serves it.
"""

from __future__ import annotations

import ctypes
import sys

from sdcpp_py import _native

CPU = 0  # GGML_BACKEND_DEVICE_TYPE_CPU


def serve(endpoint: str) -> None:
    """Runs the server of the very ggml that our extension is linked with."""
    ggml = ctypes.CDLL(_native.__file__)
    pointer, text, size = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_size_t
    registry_by_name = ctypes.CFUNCTYPE(pointer, text)(("ggml_backend_reg_by_name", ggml))
    device_by_type = ctypes.CFUNCTYPE(pointer, ctypes.c_int)(("ggml_backend_dev_by_type", ggml))
    procedure = ctypes.CFUNCTYPE(pointer, pointer, text)(("ggml_backend_reg_get_proc_address", ggml))

    address = procedure(registry_by_name(b"RPC"), b"ggml_backend_rpc_start_server")
    start = ctypes.CFUNCTYPE(None, text, text, size, size, ctypes.POINTER(pointer))(address)
    devices = (pointer * 1)(device_by_type(CPU))
    start(endpoint.encode(), None, 1, len(devices), devices)  # with one thread


if __name__ == "__main__":
    serve(sys.argv[1])
