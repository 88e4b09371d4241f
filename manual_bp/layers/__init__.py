"""The layers, one a file: Function, functional call and nn.Module together."""
