"""`python -m manual_bp.verify package.module:Name`, or `--self-test`.

The exit code is 0 if everything is right, 1 if something failed, and 2 for unusable input.
"""

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NoReturn

from manual_bp.verify._case import Case
from manual_bp.verify._run import run
from manual_bp.verify.checks import CHECKS

PROGRAM = "python -m manual_bp.verify"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        refuse(message)


def refuse(reason: str) -> NoReturn:
    """Print one line that says what is wrong, and exit with code 2."""
    print(f"{PROGRAM}: {' '.join(reason.split())}", file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    parser = _Parser(PROGRAM, description="Judge hand-written backwards.")
    parser.add_argument("case", nargs="?", help="package.module:Name of a Case, or a list of them")
    parser.add_argument("--seed", type=int, help="seed of the random numbers")
    parser.add_argument("--check", action="append", help="run only this check; may be repeated")
    parser.add_argument("--no-compiler", action="store_true", help="leave out the slow checks")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--self-test", action="store_true", help="judge the kit itself")
    parser.add_argument(
        "--sweep", action="store_true", help="in the self-test: judge PyTorch's functions instead"
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds in the self-test (3)")
    options = parser.parse_args(arguments)
    if options.self_test == (options.case is not None):
        refuse("give either package.module:Name of a Case or --self-test")
    if options.sweep and not options.self_test:
        refuse("--sweep is a part of --self-test; give both")
    if options.seeds < 1:
        refuse(f"--seeds must be at least 1; got {options.seeds}")
    if options.self_test:
        return 0 if _judge_the_kit(options.seeds, is_sweep=options.sweep) else 1
    names = {check.name for check in CHECKS}
    unknown = sorted(set(options.check or ()) - names)
    if unknown:
        refuse(f"--check must be one of {', '.join(sorted(names))}; got {', '.join(unknown)}")
    cases = find(options.case)
    if options.seed is not None:
        cases = [replace(case, seed=options.seed) for case in cases]
    reports = []
    for case in cases:
        try:
            reports.append(run(case, options.check, slow=not options.no_compiler))
        except (TypeError, ValueError) as error:
            refuse(f"{case.name}: {error}")
    if options.json:
        print(json.dumps([report.to_dict() for report in reports], indent=2))
    else:
        print("\n\n".join(map(str, reports)))
    return 0 if all(report.ok for report in reports) else 1


def _judge_the_kit(seeds: int, *, is_sweep: bool) -> bool:
    """Whether the kit catches every planted mistake, or raises no alarm in the sweep."""
    if not is_sweep:
        from manual_bp.verify.self_test import self_test

        return self_test(seeds)
    from manual_bp.verify.sweep import sweep

    try:
        return sweep(seeds)
    except ImportError as error:
        refuse(str(error))


def find(location: str) -> list[Case]:
    """The case or cases at package.module:Name."""
    module_name, _, name = location.partition(":")
    if not module_name or not name:
        refuse(f"the case must be package.module:Name; got {location!r}")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        refuse(f"{module_name} cannot be imported: {type(error).__name__}: {error}")
    for part in name.split("."):
        if not hasattr(found, part):
            refuse(f"{module_name} has no {name}")
        found = getattr(found, part)
    cases = list(found) if isinstance(found, list | tuple) else [found]
    if not cases or not all(isinstance(case, Case) for case in cases):
        kind = type(found).__name__
        refuse(
            f"{location} must be a Case (function_case, module_case) or a list of them; got {kind}"
        )
    return [replace(case, location=location) for case in cases]


if __name__ == "__main__":
    sys.exit(main())
