"""The five steps of the algorithm in place: training at the speed of its matrix products."""

from manual_bp.training_step._captured import CapturedStep
from manual_bp.training_step._compiled import CompiledStep
from manual_bp.training_step._ensemble import EnsembleStep
from manual_bp.training_step._rules import Adam, AdamW
from manual_bp.training_step._training_step import TrainingStep

__all__ = ["Adam", "AdamW", "CapturedStep", "CompiledStep", "EnsembleStep", "TrainingStep"]
