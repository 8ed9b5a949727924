"""Comparisons in sentences."""

import pytest

from salnb.statistics import Comparison, in_words

BETTER, WORSE, UNCLEAR = (
    Comparison({}, "saliency", 3, 0.5, 0.5 + middle, middle, middle - 0.02, middle + 0.02)
    for middle in (0.04, -0.04, 0.01)
)


@pytest.mark.parametrize(
    ("comparisons", "verdicts", "signs"),
    [
        ([BETTER], "Of 1 comparison, 1 says better, 0 say worse, and 0 cannot tell.", "in 1 of 1;"),
        (
            [BETTER, WORSE, UNCLEAR],
            "Of 3 comparisons, 1 says better, 1 says worse, and 1 cannot tell.",
            "in 2 of 3;",
        ),
    ],
)
def test_verdicts_and_signs_are_counted(comparisons, verdicts, signs):
    words = in_words(comparisons)
    assert words.startswith(verdicts)
    assert signs in words


def test_the_probability_is_that_of_the_sign_test():
    assert "with a probability of 0.0039 (sign test)" in in_words([BETTER] * 9)
    assert "with a probability of 1 (sign test)" in in_words([BETTER, WORSE])


def test_nothing_to_compare_is_said():
    assert in_words([]) == "Nothing can be compared: no seed has both."
