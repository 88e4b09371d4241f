"""The costs, one a file: C and its gradient with respect to the network's output."""
