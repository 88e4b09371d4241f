"""Is a hand-written backward right? And if not, what is wrong with it?"""

from manual_bp.verify._case import CAPABILITIES, Case, function_case, module_case
from manual_bp.verify._pytest import parametrize_with_checks
from manual_bp.verify._report import Outcome, Report
from manual_bp.verify._run import check_function, check_module, run

__all__ = [
    "CAPABILITIES",
    "Case",
    "Outcome",
    "Report",
    "check_function",
    "check_module",
    "function_case",
    "module_case",
    "parametrize_with_checks",
    "run",
]
