"""Run by `tests.double_backward.test_fused` with TRITON_INTERPRET=1: the kernels against float64.

python -m tests.helpers.interpreted_kernels vectors "images channels_last"
"""

import itertools
import sys
import traceback

import torch
from triton.runtime import interpreter

from salnb.double_backward import batch_norm, kernels

# of the largest value; the interpreter cuts bfloat16 off where a device rounds
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 1e-2}


patch_tensors = interpreter._patch_lang_tensor


def patch_tensors_and_bounds(tensor, *scope):
    """Bounds of `range` are arrays of one number: older versions call `int` on them, which NumPy 2.4 refuses."""
    patch_tensors(tensor, *scope)
    tensor.__index__ = lambda self: self.handle.data.item()


interpreter._patch_lang_tensor = patch_tensors_and_bounds


def close(actual, expected, dtype):
    gap = (actual.double() - expected).abs().max() / expected.abs().max()
    assert gap < TOLERANCE[dtype], f"{gap:.1e} in {dtype}"


def compare(shape, memory_format, dtype, training, weighted):
    # more channels than a block has, an odd number of pixels, and a mean that is not small
    x, gy, vx, more = (torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(4))
    x = x + 3
    if memory_format is torch.contiguous_format and not weighted:
        x = torch.stack([x, x], -1)[..., 0]  # with gaps: in neither of the two layouts, and brought into this
    wide = torch.promote_types(dtype, torch.float32)
    w = torch.randn(shape[1], dtype=wide) if weighted else None
    over = [0, *range(2, len(shape))]
    mean, var = x.to(wide).mean(over), x.to(wide).var(over, unbiased=False)
    spread = (var + 1e-5).rsqrt() if training else var
    at = batch_norm.Forward(x, w, mean, spread, training, 1e-5)
    exact = batch_norm.Forward(*(t if t is None else t.double() for t in at[:4]), training, 1e-5)

    expected = batch_norm.first_gradients(gy.double(), exact, [True] * 3, more.double())
    _, gw, gb = expected
    actual = kernels.first_gradients(gy, *at, more)
    with_both = kernels.first_gradients(gy, *at, more, gw.to(wide))
    close(with_both[1], 2 * gw, wide)
    second = batch_norm.second_gradients((vx.double(), None, None), gy.double(), exact, gw, gb, True)
    found = kernels.second_gradients(vx, gy, *at[:4], *actual[1:], training, 1e-5)
    for a, e in zip((*actual, *found), (*expected, *second), strict=True):
        if e is not None:
            close(a, e, dtype if a.shape == x.shape else wide)
    for image in (actual[0], found[0], found[1] if training else found[0]):
        assert image.dtype == dtype
        assert image.is_contiguous(memory_format=memory_format)


def main(kind, layout="contiguous_format"):
    """Compare all cases of a kind; gives how many there are."""
    torch.manual_seed(0)
    # the smallest with more than one part, and more than one block of channels
    shape = {
        "images": (2, 34, 7, 5) if layout == "channels_last" else (3, 2, 21, 17),
        "vectors": (45, 34),
        "sequences": (5, 2, 300),
        "volumes": (2, 2, 5, 11, 13),
    }[kind]
    cases = [(dtype, both, both) for dtype, both in itertools.product(TOLERANCE, (True, False))]
    for case in cases:
        compare(shape, getattr(torch, layout), *case)
    return len(cases)


if __name__ == "__main__":
    for words in sys.argv[1:]:
        try:
            print(f"{words}: {main(*words.split())} cases")
        except Exception:  # the other kinds have their turn
            traceback.print_exc()
