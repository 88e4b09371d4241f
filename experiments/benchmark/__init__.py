"""Compares the cost of handwritten gradients with the alternatives, one question per file.

    python -m experiments.benchmark step
    python -m experiments.benchmark growth
    python -m experiments.benchmark backward
    python -m experiments.benchmark layers
    python -m experiments.benchmark per-sample

The result of every contender is checked before anything is timed. Contenders then take turns, and
every round gives one ratio, so a machine that slows down does so for all of them.
"""
