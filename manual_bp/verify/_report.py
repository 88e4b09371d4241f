"""The outcome of each check, and the report of a case."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable", "expected failure", "unexpected pass"]


@dataclass(frozen=True)
class Outcome:
    """What one check found, with the number of comparisons and the seconds it took."""

    check: str
    status: Status
    comparisons: int
    seconds: float
    message: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether it counts against the case. An unexpected pass does."""
        return self.status in ("failed", "unexpected pass")


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of a case, the dtypes it was judged in, and how it was called."""

    case: str
    seed: int
    device: str
    outcomes: tuple[Outcome, ...]
    dtypes: tuple[str, ...] = ("float64",)
    notes: tuple[str, ...] = ()

    @property
    def ran(self) -> int:
        """The number of checks that compared something."""
        return sum(outcome.status != "not applicable" for outcome in self.outcomes)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The outcomes that count against the case."""
        return tuple(outcome for outcome in self.outcomes if outcome.is_failure)

    @property
    def ok(self) -> bool:
        """Whether something ran and nothing failed."""
        return self.ran > 0 and not self.failures

    def raise_if_failed(self) -> None:
        """Raise an AssertionError with the whole report, unless it is ok."""
        if not self.ok:
            raise AssertionError(str(self))

    def to_dict(self) -> dict[str, Any]:
        """The whole report as plain values, ready for JSON."""
        return {
            "case": self.case,
            "seed": self.seed,
            "device": self.device,
            "dtypes": list(self.dtypes),
            "ok": self.ok,
            "ran": self.ran,
            "notes": list(self.notes),
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
        }

    def __str__(self) -> str:
        width = max((len(outcome.check) for outcome in self.outcomes), default=0)
        lines = [f"{self.case} on {self.device} in {', '.join(self.dtypes)}, seed {self.seed}"]
        lines += [f"  note: {note}" for note in self.notes]
        for outcome in self.outcomes:
            first, *rest = outcome.message.splitlines() or [""]
            lines.append(
                f"  {outcome.check:{width}}  {outcome.status:16}  {outcome.comparisons:4}  "
                f"{outcome.seconds:6.2f} s  {first}".rstrip()
            )
            lines += [f"      {line}" for line in rest]
        counts = {
            status: sum(outcome.status == status for outcome in self.outcomes)
            for status in ("passed", "failed", "expected failure", "unexpected pass")
        }
        summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        skipped = len(self.outcomes) - self.ran
        lines.append(
            f"{'ok' if self.ok else 'NOT OK'}: {self.ran} checks ran ({summary or 'none'}), "
            f"{skipped} not applicable"
        )
        return "\n".join(lines)
