"""The outcome of each check, and the report of a case."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

Status = Literal["passed", "failed", "not applicable", "expected failure", "unexpected pass"]

NOT_JUDGED = "declared, but it cannot be judged"


@dataclass(frozen=True)
class Outcome:
    """What one check found, with the number of comparisons and the seconds it took.

    Attributes:
        message: What was found. For a failure, lines with the diagnosis, with where it fails, and
            with how to run it again may follow.
        notes: What else there is to say.
        follows_from: The check on which this failure builds, and which fails too, expected or not;
            empty if there is none.

    Examples:
        >>> case = function_case(torch.sin, [(torch.randn(5, 3),)])
        >>> (outcome,) = run(case, only=["finite_differences"]).outcomes
        >>> outcome.check, outcome.status
        ('finite_differences', 'passed')
    """

    check: str
    status: Status
    comparisons: int
    seconds: float
    message: str = ""
    notes: tuple[str, ...] = ()
    follows_from: str = ""

    @property
    def is_failure(self) -> bool:
        """Whether it counts against the case. An unexpected pass does."""
        return self.status in ("failed", "unexpected pass")

    @property
    def is_unjudged(self) -> bool:
        """Whether it is a declared capability that cannot be judged."""
        return self.message.startswith(NOT_JUDGED)

    @property
    def diagnosis(self) -> str:
        """The mistake that a failure looks like; empty if nothing is known."""
        return self._line("diagnosis: ")

    @property
    def where(self) -> str:
        """At which samples, in which dtypes or where else it fails; empty if nothing is known."""
        return self._line("where: ")

    @property
    def verdict(self) -> str:
        """A failure in one sentence: what is wrong, why, and where."""
        finding = self.message.partition("\n")[0]
        if finding.startswith("sample ") and self.where:
            finding = finding.partition(": ")[2]
        if not self.diagnosis:
            return ", ".join(filter(None, [f"{self.check}: {finding}", self.where]))
        what = finding.partition(", at index")[0].partition(": expected")[0]
        return ", ".join(filter(None, [f"{what} – {self.diagnosis}", self.where]))

    def _line(self, start: str) -> str:
        lines = self.message.splitlines()
        return next((line.removeprefix(start) for line in lines if line.startswith(start)), "")


@dataclass(frozen=True)
class Report:
    """The outcomes of all checks of a case, the dtypes it was judged in, and how it was called.

    Examples:
        >>> report = check_function(torch.sin, [(torch.randn(5, 3),)], only=["finite_differences"])
        >>> report.raise_if_failed()
        >>> report.verdict
        'ok'
    """

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
    def causes(self) -> tuple[Outcome, ...]:
        """What the failures follow from, that which says most first.

        An expected failure is one if failures follow from it that are not expected.
        """
        names = {outcome.follows_from or outcome.check for outcome in self.failures}
        roots = [outcome for outcome in self.outcomes if outcome.check in names]
        # A declared capability that cannot be judged says nothing about the code.
        return tuple(sorted(roots, key=lambda o: (o.is_unjudged, not o.is_failure)))

    @property
    def ok(self) -> bool:
        """Whether something ran and nothing failed."""
        return self.ran > 0 and not self.failures

    @property
    def verdict(self) -> str:
        """Whether the case is ok; if not, what is wrong with it, in one sentence."""
        if self.ok:
            return "ok"
        if not self.causes:
            return "NOT OK: nothing was compared"
        first = self.causes[0]
        if first.is_failure:
            return f"NOT OK: {first.verdict}"
        return f"NOT OK: {first.check} is expected to fail, but {self._following(first)}"

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
            "verdict": self.verdict,
            "causes": [outcome.check for outcome in self.causes],
            "ran": self.ran,
            "notes": list(self.notes),
            "outcomes": [
                {**asdict(outcome), "diagnosis": outcome.diagnosis, "where": outcome.where}
                for outcome in self.outcomes
            ],
        }

    def __str__(self) -> str:
        lines = [
            self.verdict,
            f"{self.case} on {self.device} in {', '.join(self.dtypes)}, seed {self.seed}",
            *(f"note: {note}" for note in self.notes),
            "",
        ]
        for cause in self.causes:
            lines += [*self._explanation(cause), ""]
        return "\n".join([*lines, *self._table(), self._summary()])

    def _explanation(self, cause: Outcome) -> Iterator[str]:
        """A failure with its whole message, and what follows from it."""
        first, *rest = cause.message.splitlines() or [""]
        yield f"{cause.check}: {'' if cause.is_failure else 'expected to fail: '}{first}"
        yield from (f"    {line}" for line in rest)
        if following := self._following(cause):
            yield f"    {following}"

    def _following(self, cause: Outcome) -> str:
        """The failures that follow from a cause, in one line; empty if there are none."""
        names = [o.check for o in self.failures if o.follows_from == cause.check]
        if len(names) == 1:
            return f"1 check that builds on it fails too: {names[0]}"
        return f"{len(names)} checks that build on it fail too: {', '.join(names)}" if names else ""

    def _table(self) -> Iterator[str]:
        """A line for each check."""
        width = max((len(outcome.check) for outcome in self.outcomes), default=0)
        for outcome in self.outcomes:
            text = outcome.message.partition("\n")[0]
            if outcome.is_failure:
                text = outcome.follows_from and f"follows from {outcome.follows_from}"
            yield (
                f"  {outcome.check:{width}}  {outcome.status:16}  {outcome.comparisons:4}  "
                f"{outcome.seconds:6.2f} s  {text}"
            ).rstrip()

    def _summary(self) -> str:
        counts = {
            status: sum(outcome.status == status for outcome in self.outcomes)
            for status in ("passed", "failed", "expected failure", "unexpected pass")
        }
        summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
        skipped = len(self.outcomes) - self.ran
        return (
            f"{'ok' if self.ok else 'NOT OK'}: {self.ran} checks ran ({summary or 'none'}), "
            f"{skipped} not applicable"
        )
