"""Experiments with manual_bp, a file for each question: `python -m experiments.<name>`."""
