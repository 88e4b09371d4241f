"""A whole net, numerical gradients, per-sample gradients."""

import numpy as np
import torch

from tests.exercises.answer import mistake


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def sigmoid_prime(z):
    return sigmoid(z) * (1 - sigmoid(z))


def forward(x, weights, biases):
    zs, activations = [], [x]
    for w, b in zip(weights, biases, strict=True):
        zs.append(activations[-1] @ w.T + b)
        activations.append(sigmoid(zs[-1]))
    return zs, activations


# 6: the whole net


@mistake("backprop", "error = y − a, with the sign of an update", "y − a")
def net_target_minus_output(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (y - a[-1]) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [delta.T @ a[-2]], [delta.sum(0)]
    for l in (2, 3):
        delta = (delta @ weights[-l + 1]) * sigmoid_prime(zs[-l])
        grads_w.insert(0, delta.T @ a[-l - 1])
        grads_b.insert(0, delta.sum(0))
    return grads_w, grads_b


@mistake(
    "backprop",
    "Stack Overflow 46395467: the hidden layer gets the error of the output layer",
    "without the σ' of the layer above",
)
def error_without_slope_goes_down(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    error = (a[-1] - y) / len(x)
    grads_w, grads_b = [None] * 3, [None] * 3
    for l in (2, 1, 0):
        delta = error * sigmoid_prime(zs[l])
        grads_w[l] = delta.T @ a[l]
        grads_b[l] = delta.sum(0)
        error = error @ weights[l]
    return grads_w, grads_b


@mistake("backprop", "derivation.md, mistake 5: σ' of the layer above", "σ' of the wrong layer")
def slope_of_the_wrong_layer(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [delta.T @ a[-2]], [delta.sum(0)]
    for l in (2, 3):
        delta = (delta @ weights[-l + 1]) * sigmoid_prime(zs[-l + 1])
        grads_w.insert(0, delta.T @ a[-l - 1])
        grads_b.insert(0, delta.sum(0))
    return grads_w, grads_b


@mistake("backprop", "an index too high in BP4", "a\\^l where a\\^\\(l−1\\)")
def activation_of_its_own_layer(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [None] * 3, [None] * 3
    for l in (2, 1, 0):
        grads_w[l] = delta.T @ a[l + 1]
        grads_b[l] = delta.sum(0)
        if l:
            delta = (delta @ weights[l]) * sigmoid_prime(zs[l - 1])
    return grads_w, grads_b


@mistake("backprop", "w of its own layer in BP2", "w\\^l where w\\^\\(l\\+1\\)")
def weights_of_its_own_layer(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [delta.T @ a[-2]], [delta.sum(0)]
    for l in (1, 0):
        delta = (delta @ weights[l]) * sigmoid_prime(zs[l])
        grads_w.insert(0, delta.T @ a[l])
        grads_b.insert(0, delta.sum(0))
    return grads_w, grads_b


@mistake("backprop", "delta is never passed down", "delta of the output layer")
def delta_not_passed_down(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    output_delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [output_delta.T @ a[-2]], [output_delta.sum(0)]
    for l in (2, 3):
        delta = (output_delta @ weights[-l + 1]) * sigmoid_prime(zs[-l])
        grads_w.insert(0, delta.T @ a[-l - 1])
        grads_b.insert(0, delta.sum(0))
    return grads_w, grads_b


@mistake("backprop", "σ' forgotten in the hidden layers", "σ'\\(z\\) is missing in (the )?hidden")
def no_slope_in_hidden_layers(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [], []
    for l in (2, 1, 0):
        grads_w.append(delta.T @ a[l])
        grads_b.append(delta.sum(0))
        delta = delta @ weights[l]
    return grads_w[::-1], grads_b[::-1]


@mistake("backprop", "no reversal after append", "order")
def last_layer_first(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [], []
    for l in (2, 1, 0):
        grads_w.append(delta.T @ a[l])
        grads_b.append(delta.sum(0))
        if l:
            delta = delta @ weights[l] * sigmoid_prime(zs[l - 1])
    return grads_w, grads_b


@mistake("backprop", "nabla_b comes first in the notes' program", "swapped")
def biases_first(x, y, weights, biases):
    grads_w, grads_b = last_layer_first(x, y, weights, biases)
    return grads_b[::-1], grads_w[::-1]


@mistake("backprop", "cost of the mean, gradients of the sum", "1/N")
def net_not_averaged(x, y, weights, biases):
    grads_w, grads_b = last_layer_first(x, y, weights, biases)
    n = len(x)
    return [n * g for g in grads_w[::-1]], [n * g for g in grads_b[::-1]]


@mistake("backprop", "divided by m in δ and again in the gradients", "averaged twice")
def net_averaged_twice(x, y, weights, biases):
    grads_w, grads_b = last_layer_first(x, y, weights, biases)
    return [g / len(x) for g in grads_w[::-1]], [g / len(x) for g in grads_b[::-1]]


@mistake(
    "backprop",
    "mnielsen/neural-networks-and-deep-learning pull request 77: which cost takes σ' in BP1",
    "cross-entropy",
)
def output_without_slope(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) / len(x)
    grads_w, grads_b = [None] * 3, [None] * 3
    for l in (2, 1, 0):
        grads_w[l] = delta.T @ a[l]
        grads_b[l] = delta.sum(0)
        if l:
            delta = (delta @ weights[l]) * sigmoid_prime(zs[l - 1])
    return grads_w, grads_b


@mistake("backprop", "weights are updated while the error goes down", "changes its argument")
def updates_on_the_way(x, y, weights, biases):
    zs, a = forward(x, weights, biases)
    delta = (a[-1] - y) * sigmoid_prime(zs[-1]) / len(x)
    grads_w, grads_b = [None] * 3, [None] * 3
    for l in (2, 1, 0):
        grads_w[l] = delta.T @ a[l]
        grads_b[l] = delta.sum(0)
        weights[l] -= 0.1 * grads_w[l]
        if l:
            delta = (delta @ weights[l]) * sigmoid_prime(zs[l - 1])
    return grads_w, grads_b


@mistake("backprop", "a bias forgotten in the forward pass", "without b")
def forward_without_biases(x, y, weights, biases):
    zeros = [0 * b for b in biases]
    grads_w, grads_b = last_layer_first(x, y, weights, zeros)
    return grads_w[::-1], grads_b[::-1]


@mistake("backprop", "loss.backward() of PyTorch", "by hand")
def by_autograd(x, y, weights, biases):
    weights = [w.clone().requires_grad_() for w in weights]
    biases = [b.clone().requires_grad_() for b in biases]
    a = x
    for w, b in zip(weights, biases, strict=True):
        a = torch.sigmoid(a @ w.T + b)
    (0.5 * (a - y) ** 2).sum(1).mean().backward()
    return [w.grad for w in weights], [b.grad for b in biases]


# 7: numerical gradients


@mistake("numerical_gradient", "cs231n notes: the formula with f(x + h) − f(x)", "one side")
def one_sided(f, x):
    grad, h = np.zeros_like(x), 1e-5
    for i in np.ndindex(*x.shape):
        shifted = x.copy()
        shifted[i] += h
        grad[i] = (f(shifted) - f(x)) / h
    return grad


@mistake("numerical_gradient", "a missing 2 in the denominator", "2h")
def divided_by_h(f, x):
    grad, h = np.zeros_like(x), 1e-5
    for i in np.ndindex(*x.shape):
        plus, minus = x.copy(), x.copy()
        plus[i] += h
        minus[i] -= h
        grad[i] = (f(plus) - f(minus)) / h
    return grad


@mistake(
    "numerical_gradient",
    "cs231n assignment 1: the old value is not put back",
    "put it back|puts? .* back",
)
def not_put_back(f, x):
    grad, h = np.zeros_like(x), 1e-5
    for i in np.ndindex(*x.shape):
        x[i] += h
        plus = f(x)
        x[i] -= 2 * h
        grad[i] = (plus - f(x)) / (2 * h)
    return grad


@mistake("numerical_gradient", "plus = x is no copy", "no copy|second name")
def no_copy(f, x):
    grad, h = np.zeros_like(x), 1e-5
    for i in np.ndindex(*x.shape):
        plus = x
        minus = x
        plus[i] += h
        minus[i] -= h
        grad[i] = (f(plus) - f(minus)) / (2 * h)
    return grad


@mistake("numerical_gradient", "all parameters are moved at once", "all elements")
def all_at_once(f, x):
    h = 1e-5
    return (f(x + h) - f(x - h)) / (2 * h) * np.ones_like(x)


@mistake("numerical_gradient", "a step below the precision of the numbers", "too short|rounding")
def step_too_short(f, x):
    grad, h = np.zeros_like(x), 1e-18
    for i in np.ndindex(*x.shape):
        e = np.zeros_like(x)
        e[i] = h
        grad[i] = (f(x + e) - f(x - e)) / (2 * h)
    return grad


@mistake("numerical_gradient", "a loop over rows of a matrix", "row")
def rows_at_once(f, x):
    grad, h = np.zeros_like(x), 1e-5
    for i in range(len(x)):
        e = np.zeros_like(x)
        e[i] = h
        grad[i] = (f(x + e) - f(x - e)) / (2 * h)
    return grad


# 8: per-sample gradients


@mistake("per_sample_grad_w", "BP4 of the batch", "sum over the samples")
def summed(delta, a_prev):
    return delta.T @ a_prev


@mistake("per_sample_grad_w", "einsum with the letters swapped", "transpose")
def each_transposed(delta, a_prev):
    return np.einsum("nj,nk->nkj", delta, a_prev)


@mistake("per_sample_grad_w", "the mean of the batch repeated", "same for every sample")
def mean_repeated(delta, a_prev):
    return np.stack([delta.T @ a_prev / len(delta)] * len(delta))


@mistake("per_sample_grad_w", "1/N where every sample stands alone", "1/N|divided by")
def each_divided(delta, a_prev):
    n = len(delta)
    return np.array([np.outer(delta[i], a_prev[i]) / n for i in range(n)])


@mistake("per_sample_grad_w", "two loops over samples", "every pair|other samples")
def with_the_activations_of_all(delta, a_prev):
    total = a_prev.sum(axis=0)
    return np.array([np.outer(d, total) for d in delta])
