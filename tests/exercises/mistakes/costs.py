"""The two cross-entropies."""

import numpy as np
import torch

from tests.exercises.answer import mistake


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def stable(z, y):
    return np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))


def softmax(z):
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def log_softmax(z):
    z = z - z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def picked(z, labels):
    return -log_softmax(z)[np.arange(len(z)), labels].mean()


def right_delta(z, labels):
    delta = softmax(z)
    delta[np.arange(len(z)), labels] -= 1
    return delta / len(z)


# 9: the cross-entropy of sigmoid outputs


@mistake(
    "cross_entropy",
    "mnielsen/neural-networks-and-deep-learning pull request 77: σ' multiplied into δ",
    "σ'.*cancel",
)
def slope_left_in(z, y):
    a = sigmoid(z)
    return stable(z, y).sum(1).mean(), (a - y) * a * (1 - a) / len(z)


@mistake("cross_entropy", "δ = y − a", "y − a")
def delta_with_the_wrong_sign(z, y):
    return stable(z, y).sum(1).mean(), (y - sigmoid(z)) / len(z)


@mistake("cross_entropy", "the cost of two classes with one term only", "1 − y")
def one_term_only(z, y):
    a = sigmoid(z)
    cost = -(y * np.log(a)).sum(axis=1).mean()
    return cost, (a - y) / len(z)


@mistake("cross_entropy", "both terms, but log(a) of the textbook", "log|overflow")
def log_of_a(z, y):
    a = sigmoid(z)
    losses = -(y * np.log(a) + (1 - y) * np.log(1 - a))
    return losses.sum(axis=1).mean(), (a - y) / len(z)


@mistake("cross_entropy", "log2, as in information theory", "logarithm")
def in_bits(z, y):
    return stable(z, y).sum(1).mean() / np.log(2), (sigmoid(z) - y) / len(z)


@mistake("cross_entropy", "binary_cross_entropy of PyTorch and Keras", "components")
def mean_over_components(z, y):
    return stable(z, y).mean(), (sigmoid(z) - y) / z.size


@mistake("cross_entropy", "the sum of the batch", "1/N")
def sum_over_samples(z, y):
    return stable(z, y).sum(), sigmoid(z) - y


@mistake("cross_entropy", "cost of the mean, δ of one sample", "1/N")
def delta_of_one_sample(z, y):
    return stable(z, y).sum(1).mean(), sigmoid(z) - y


@mistake("cross_entropy", "the minus of −Σ y ln a forgotten", "sign|minus")
def cost_negative(z, y):
    return -stable(z, y).sum(1).mean(), (sigmoid(z) - y) / len(z)


@mistake("cross_entropy", "∇_a C given as δ", "∂C/∂a")
def gradient_by_a(z, y):
    a = sigmoid(z)
    return stable(z, y).sum(1).mean(), (a - y) / (a * (1 - a)) / len(z)


# 10: softmax with cross-entropy


@mistake("softmax_cross_entropy", "cs231n assignment 1: no shift by the maximum", "overflows")
def no_shift(z, labels):
    a = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    cost = -np.log(a[np.arange(len(z)), labels]).mean()
    a[np.arange(len(z)), labels] -= 1
    return cost, a / len(z)


@mistake(
    "softmax_cross_entropy",
    "linxiaow/EECS498 issue 2: the maximum of the whole batch is subtracted",
    "each sample's own|its own",
)
def shift_of_the_whole_batch(z, labels):
    e = np.exp(z - np.max(z))
    a = e / e.sum(axis=1, keepdims=True)
    cost = -np.log(a[np.arange(len(z)), labels]).mean()
    a[np.arange(len(z)), labels] -= 1
    return cost, a / len(z)


@mistake("softmax_cross_entropy", "axis=0 for axis=1 in the sum", "axis")
def over_samples(z, labels):
    a = torch.softmax(z, dim=0)
    n = torch.arange(len(z))
    cost = -torch.log(a[n, labels]).mean()
    a[n, labels] -= 1
    return cost, a / len(z)


@mistake("softmax_cross_entropy", "a sum without an axis", "whole batch")
def over_everything(z, labels):
    e = np.exp(z - z.max())
    a = e / e.sum()
    cost = -np.log(a[np.arange(len(z)), labels]).mean()
    a[np.arange(len(z)), labels] -= 1
    return cost, a / len(z)


@mistake("softmax_cross_entropy", "cs231n: dscores /= N forgotten", "1/N")
def delta_not_averaged(z, labels):
    return picked(z, labels), right_delta(z, labels) * len(z)


@mistake(
    "softmax_cross_entropy",
    "cs231n: the −1 at the right class forgotten",
    "y is not subtracted|minus y|without − y",
)
def target_not_subtracted(z, labels):
    return picked(z, labels), softmax(z) / len(z)


@mistake(
    "softmax_cross_entropy",
    "a[:, labels] −= 1 instead of a[range(N), labels] −= 1",
    "every row|all samples",
)
def one_from_whole_columns(z, labels):
    a = softmax(z)
    a[:, labels] -= 1
    return picked(z, labels), a / len(z)


@mistake(
    "softmax_cross_entropy",
    "bruceoutdoors/CS231n issue 5: = where −= belongs",
    "set to|assign|replaced",
)
def assigned_not_subtracted(z, labels):
    a = softmax(z)
    a[np.arange(len(z)), labels] = -1
    return picked(z, labels), a / len(z)


@mistake(
    "softmax_cross_entropy",
    "eriklindernoren/ML-From-Scratch issue 71: the softmax differentiated as if it were a sigmoid",
    "diagonal",
)
def diagonal_jacobian(z, labels):
    a = softmax(z)
    y = np.eye(z.shape[1])[labels]
    return picked(z, labels), -y / a * a * (1 - a) / len(z)


@mistake("softmax_cross_entropy", "np.log10", "logarithm")
def in_tens(z, labels):
    return picked(z, labels) / np.log(10), right_delta(z, labels)


@mistake("softmax_cross_entropy", "a − y multiplied by a (1 − a)", "σ'.*cancel|cancel")
def softmax_slope_left_in(z, labels):
    a = softmax(z)
    y = np.eye(z.shape[1])[labels]
    return picked(z, labels), (a - y) * a * (1 - a) / len(z)


@mistake("softmax_cross_entropy", "sigmoids for a softmax", "sigmoid")
def sigmoids(z, labels):
    a = sigmoid(z)
    y = np.eye(z.shape[1])[labels]
    return picked(z, labels), (a - y) / len(z)
