"""Torch's global defaults, set for the length of a block."""

import contextlib

import torch

DTYPES = [torch.float64, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
