"""The twelve exercises, each of which needs only those before it."""

from manual_bp.exercises.course.costs import CROSS_ENTROPY, SOFTMAX_CROSS_ENTROPY
from manual_bp.exercises.course.equations import (
    GRAD_B,
    GRAD_W,
    HIDDEN_DELTA,
    OUTPUT_DELTA,
    SIGMOID_PRIME,
)
from manual_bp.exercises.course.fused import LINEAR_SIGMOID_BACKWARD, LINEAR_SIGMOID_SECOND
from manual_bp.exercises.course.gradients import NUMERICAL_GRADIENT, PER_SAMPLE_GRAD_W
from manual_bp.exercises.course.network import BACKPROP

COURSE = (
    SIGMOID_PRIME,
    OUTPUT_DELTA,
    HIDDEN_DELTA,
    GRAD_B,
    GRAD_W,
    BACKPROP,
    NUMERICAL_GRADIENT,
    PER_SAMPLE_GRAD_W,
    CROSS_ENTROPY,
    SOFTMAX_CROSS_ENTROPY,
    LINEAR_SIGMOID_BACKWARD,
    LINEAR_SIGMOID_SECOND,
)
