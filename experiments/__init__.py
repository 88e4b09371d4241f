"""Experiments with manual_bp, one file per question: `python -m experiments.<name>`."""
