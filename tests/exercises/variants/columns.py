"""One sample a column, as in the notes."""

import numpy as np
import torch

from tests.exercises.answer import variant


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def sigmoid_prime(z):
    return sigmoid(z) * (1 - sigmoid(z))


@variant("output_delta", "N is the second size", form="columns")
def output(z, a, y):
    return (a - y) * sigmoid_prime(z) / a.shape[1]


@variant("hidden_delta", "the formula of the notes", form="columns")
def hidden(delta_next, w_next, z):
    return np.dot(w_next.T, delta_next) * sigmoid_prime(z)


@variant("grad_b", "keepdims", form="columns")
def bias(delta):
    return np.sum(delta, axis=1, keepdims=True)


@variant("grad_b", "without keepdims", form="columns")
def flat_bias(delta):
    return delta.sum(1)


@variant("grad_w", "the formula of the notes", form="columns")
def weights(delta, a_prev):
    return delta @ a_prev.T


@variant("backprop", "deeplearning.ai: caches, A0 = X", form="columns")
def net(x, y, weights, biases):
    cache = {"A0": x}
    for l, (w, b) in enumerate(zip(weights, biases), start=1):
        cache[f"Z{l}"] = np.dot(w, cache[f"A{l - 1}"]) + b
        cache[f"A{l}"] = sigmoid(cache[f"Z{l}"])
    dz = (cache["A3"] - y) * sigmoid_prime(cache["Z3"])
    grads = {}
    for l in (3, 2, 1):
        grads[f"dW{l}"] = np.dot(dz, cache[f"A{l - 1}"].T) / x.shape[1]
        grads[f"db{l}"] = np.sum(dz, axis=1, keepdims=True) / x.shape[1]
        if l > 1:
            dz = np.dot(weights[l - 1].T, dz) * sigmoid_prime(cache[f"Z{l - 1}"])
    return [grads[f"dW{l}"] for l in (1, 2, 3)], [grads[f"db{l}"] for l in (1, 2, 3)]


@variant("per_sample_grad_w", "the sample first in the result", form="columns")
def per_sample(delta, a_prev):
    return np.einsum("jn,kn->njk", delta, a_prev)


@variant("softmax_cross_entropy", "classes along axis 0", form="columns")
def softmax(z, labels):
    z = z - z.max(axis=0)
    log_a = z - np.log(np.exp(z).sum(axis=0))
    y = np.eye(len(z))[:, labels]
    return -(y * log_a).sum() / z.shape[1], (np.exp(log_a) - y) / z.shape[1]


@variant("cross_entropy", "components along axis 0", form="columns")
def cross_entropy(z, y):
    losses = torch.logaddexp(z, torch.zeros_like(z)) - y * z
    return losses.sum(dim=0).mean(), (z.sigmoid() - y) / z.shape[1]


@variant("linear_sigmoid_backward", "the four equations of the notes", form="columns")
def fused(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return w.T @ delta, delta @ a_prev.T, delta.sum(axis=1, keepdims=True)


@variant("linear_sigmoid_second", "as in the notes", form="columns")
def second(v, grad_a, a_prev, w, a):
    s = a * (1 - a)
    u = w @ v
    e = grad_a * u * s * (1 - 2 * a)
    return u * s, w.T @ e, (grad_a * s) @ v.T + e @ a_prev.T, e.sum(1)
