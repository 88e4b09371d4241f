"""Checks whether a hand-written backward is right and, if not, says what is wrong with it."""

from manual_bp.verify._case import Case
from manual_bp.verify._make_case import function_case, module_case
from manual_bp.verify._pytest import parametrize_with_checks
from manual_bp.verify._report import Outcome, Report
from manual_bp.verify._run import check_function, check_module, run
from manual_bp.verify.checks import CAPABILITIES

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
