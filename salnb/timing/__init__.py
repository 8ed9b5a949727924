"""What a training step with the saliency loss costs: the paper's Table 4, on the device at hand."""

from typing import TYPE_CHECKING

from salnb._common.lazy import lazy_names

if TYPE_CHECKING:
    from salnb.timing import tables
    from salnb.timing.cases import PAPER, TABLE_4, Case, Settings, plan
    from salnb.timing.measurement import measure
    from salnb.timing.profiles import profile_table, read_profile
    from salnb.timing.records import case_of, check_record, read_timing
    from salnb.timing.runner import default_path, study
    from salnb.timing.tables import compare, describe

__all__ = [
    "PAPER",
    "TABLE_4",
    "Case",
    "Settings",
    "case_of",
    "check_record",
    "compare",
    "default_path",
    "describe",
    "measure",
    "plan",
    "profile_table",
    "read_profile",
    "read_timing",
    "study",
    "tables",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "cases": ("PAPER", "TABLE_4", "Case", "Settings", "plan"),
        "measurement": ("measure",),
        "profiles": ("profile_table", "read_profile"),
        "records": ("case_of", "check_record", "read_timing"),
        "runner": ("default_path", "study"),
        "tables": ("compare", "describe", "tables"),
    },
)
