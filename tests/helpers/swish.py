"""A Function of a user's whose second derivative is right; subclasses have other backward passes."""

import torch
from torch.autograd import Function


class Swish(Function):
    @staticmethod
    def forward(ctx, z):
        ctx.save_for_backward(z)
        return z * torch.sigmoid(z)

    @staticmethod
    def backward(ctx, grad):
        (z,) = ctx.saved_tensors
        return Swish.slope(z) * grad

    @staticmethod
    def slope(z):
        s = torch.sigmoid(z)
        return s * (1 + z * (1 - s))
