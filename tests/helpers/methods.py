"""What the tests ask of saliency methods, told from the catalogue: a new method joins them by its entry."""

from salnb._common.catalog import METHODS

ONE_PASS = [name for name, spec in METHODS.items() if not spec.repeats]
WITH_RULE = [name for name, spec in METHODS.items() if spec.rule]


def cheap(method, passes=2, *, still=False):
    """Options with which a method that repeats a pass does so a few times, without noise if `still`."""
    spec = METHODS[method]
    options = {spec.repeats: passes} if spec.repeats else {}
    return options | ({"noise_level": 0.0} if still and "noise_level" in spec.options else {})
