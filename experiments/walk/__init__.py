"""One step of learning as a page to click through, from the input to the new weights.

    python -m experiments.walk

writes a single HTML file: the forward pass, BP1 to BP4 and gradient descent on your net and batch.
"""
