"""Mistakes that learners make. Importing a module adds its mistakes to MISTAKES."""

from tests.exercises.mistakes import costs, equations, fused, network

__all__ = ["costs", "equations", "fused", "network"]
