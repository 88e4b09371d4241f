"""What `import manual_bp` costs besides `import torch`."""

import subprocess
import sys
from importlib.metadata import requires

# The compiler of PyTorch takes more than a second to import.
COMPILER = {"torch._dynamo", "torch._inductor", "torch.onnx._internal", "sympy"}


def test_the_import_loads_nothing_but_required_packages_and_no_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        "import manual_bp; print(*set(sys.modules) - before)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = run.stdout.split()
    assert "manual_bp.verify" not in loaded
    assert not COMPILER & set(loaded)
    packages = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names
    assert packages <= {"manual_bp", "numpy", "tabulate", "torch"}
    needed = [need for need in requires("manual-bp") or [] if "extra ==" not in need]
    assert {need.partition(">=")[0] for need in needed} == {"numpy", "tabulate", "torch"}
