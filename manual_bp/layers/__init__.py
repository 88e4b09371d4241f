"""The layers, one a file: Function, functional call and nn.Module together."""

from manual_bp.layers import leaky_relu, relu, sigmoid, softplus, tanh  # noqa: F401
