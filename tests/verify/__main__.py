"""Right candidates of low precision with many seeds: python -m tests.verify --seeds 50."""

from manual_bp.verify._run import run
from tests.verify.low_precision import LOW_PRECISION
from tests.verify.seeds import main

if __name__ == "__main__":
    main(LOW_PRECISION, lambda case: [run(case, slow=False)], LOW_PRECISION)
