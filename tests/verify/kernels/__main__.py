"""All kernels, and 1 % planted in each gradient: python -m tests.verify.kernels [--seeds N]."""

from manual_bp.verify.checks import bias
from tests.verify.kernels.cases import ACCURACY, ACCURATE, CASES, judge
from tests.verify.seeds import main

if __name__ == "__main__":
    bias._SECONDS = 60  # on a slow machine, too, `unbiased` draws as often as it must
    main(CASES, lambda case: judge(case, (*ACCURACY, "unbiased")), ACCURATE)
