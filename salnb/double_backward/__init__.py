"""Fast, exact double backward for convolutional networks."""

from salnb.double_backward.fused import use_fused_batch_norm
from salnb.double_backward.mode import fast_double_backward, second_derivatives_of_pytorch

__all__ = ["fast_double_backward", "second_derivatives_of_pytorch", "use_fused_batch_norm"]
