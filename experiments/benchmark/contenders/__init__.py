"""The contenders for a training step, and those for per-sample results."""
