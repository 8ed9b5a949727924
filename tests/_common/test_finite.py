"""Values that are not finite are found wherever they are, and large ones are not taken for such."""

import math

import pytest
import torch

from salnb._common.checks import check_finite


@pytest.mark.parametrize(
    "values",
    [torch.full((8,), 3e38), torch.full((3,), -6e4, dtype=torch.float16), torch.zeros(0), torch.arange(3)],
    ids=["sum too large", "half", "none", "integers"],
)
def test_what_is_finite_passes(values):
    check_finite(values, name="values")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("others", [0.0, math.inf, -math.inf, 3e38], ids=str)
def test_one_that_is_not_is_found(others, bad):
    with pytest.raises(ValueError, match=r"values must be finite, got \d NaN or infinite values"):
        check_finite(torch.tensor([others, others, bad]), name="values")
