"""The pairs (a, δ) of every layer in one pass, and everything that is computed from them."""

from manual_bp.trace._call import Call as Call
from manual_bp.trace._diagnostics import Diagnostics as Diagnostics
from manual_bp.trace._diagnostics import LayerDiagnostics as LayerDiagnostics
from manual_bp.trace._layer import LayerTrace as LayerTrace
from manual_bp.trace._trace import Trace as Trace
