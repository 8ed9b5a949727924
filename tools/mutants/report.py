"""What the tests noticed and what not, with the answers to known survivors."""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tools.mutants.sample import Change, Mutant, change_of

ANSWERS = Path(__file__).with_name("answers.toml")


@dataclass(frozen=True)
class Found:
    """What came of a mutant; `outcome` is "noticed", "timed out", "survived" or "not run"."""

    mutant: Mutant
    change: Change
    outcome: str
    answer: str = ""


def answers(path: Path = ANSWERS) -> dict[tuple[str, str, str], str]:
    """Why known survivors are no gaps: by module, line and what the line becomes."""
    table = tomllib.loads(path.read_text()) if path.exists() else {}
    return {(a["module"], a["line"], a["becomes"]): a["reason"] for a in table.get("answer", [])}


def report(found: Sequence[Found]) -> str:
    """The figures of each module and of all, then the survivors."""
    counted = ("noticed", "timed out", "survived", "not run")
    lines = [f"| module | {' | '.join(counted)} | share noticed |", "|---|" + "---:|" * 5]
    rows = [(module, [f for f in found if f.mutant.module == module]) for module in
            sorted({f.mutant.module for f in found})]  # fmt: skip
    for name, those in (*rows, ("all", list(found))):
        numbers = [sum(f.outcome == outcome for f in those) for outcome in counted]
        lines.append(f"| {name} | {' | '.join(map(str, numbers))} | {_share(numbers)} |")
    survivors = [f for f in found if f.outcome == "survived"]
    answered = sum(bool(f.answer) for f in survivors)
    lines += ["", f"{len(survivors)} survived, {answered} of them answered."]
    for f in sorted(survivors, key=lambda f: (bool(f.answer), f.mutant.module, f.change.line)):
        lines += ["", f"## {f.mutant.module}:{f.change.line} {f.mutant.kind}", ""]
        lines += [
            f"Answered: {f.answer}" if f.answer else "Open.",
            "",
            "```diff",
            f"-{f.change.before}",
            f"+{f.change.after}",
            "```",
        ]
    return "\n".join(lines) + "\n"


def _share(numbers: Sequence[int]) -> str:
    noticed, timed_out, survived, _ = numbers
    ran = noticed + timed_out + survived
    return f"{(noticed + timed_out) / ran:.0%}" if ran else "–"


def findings(
    mutants: Mapping[str, Mutant],
    sources: Mapping[str, str],
    texts: Mapping[Mutant, str],
    outcomes: Mapping[str, str],
) -> list[Found]:
    """What came of the mutants, with the answers to known survivors."""
    known, found = answers(), []
    for name, mutant in mutants.items():
        change = change_of(sources[mutant.module], texts[mutant])
        answer = known.get((mutant.module, change.before, change.after), "")
        found.append(Found(mutant, change, outcomes.get(name, "not run"), answer))
    return found
