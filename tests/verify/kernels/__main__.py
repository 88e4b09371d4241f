"""All kernels, and 1 % planted in each gradient: python -m tests.verify.kernels [--seeds N].

Each promise that a case says is broken must be broken.
"""

from collections.abc import Iterable

from manual_bp.verify import Report
from manual_bp.verify._case import Case
from manual_bp.verify.checks import bias
from tests.verify.kernels.cases import ACCURACY, ACCURATE, CASES, PROMISES, judge
from tests.verify.seeds import main


def _judge(case: Case) -> Iterable[Report]:
    accuracy = (*ACCURACY, "unbiased")
    broken = [name for name in case.expected_failures if name not in accuracy]
    return judge(case, accuracy, [*PROMISES, *broken])


if __name__ == "__main__":
    bias._SECONDS = 60  # on a slow machine, too, `unbiased` draws as often as it must
    main(CASES, _judge, ACCURATE)
