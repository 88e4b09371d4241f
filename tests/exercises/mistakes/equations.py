"""σ' and BP1 to BP4, each in one function."""

import math

import numpy as np
import torch

from tests.exercises.answer import mistake


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def sigmoid_prime(z):
    return sigmoid(z) * (1 - sigmoid(z))


# 1: σ'


@mistake(
    "sigmoid_prime",
    "Stack Overflow 46395467: a function sigmoid(x, deriv=True) that expects activations",
    "z \\(1 − z\\)",
)
def of_an_activation(z):
    return z * (1 - z)


@mistake("sigmoid_prime", "first attempts: the function itself", "σ\\(z\\) where σ'")
def not_differentiated(z):
    return 1 / (1 + np.exp(-z))


@mistake(
    "sigmoid_prime",
    "mantasu/cs231n issue 10: s (s − 1) and s (1 − s) mixed up",
    "sign",
)
def negative(z):
    s = sigmoid(z)
    return s * (s - 1)


@mistake(
    "sigmoid_prime",
    "forum question: the derivative is called on an output that went through σ already",
    "twice",
)
def sigmoid_twice(z):
    a = sigmoid(z)
    return sigmoid(a) * (1 - sigmoid(a))


@mistake("sigmoid_prime", "quotient rule without its square", "square")
def denominator_not_squared(z):
    return np.exp(-z) / (1 + np.exp(-z))


@mistake("sigmoid_prime", "copied from a net with tanh", "tanh")
def of_tanh(z):
    s = sigmoid(z)
    return 1 - s**2


@mistake(
    "sigmoid_prime",
    "chapter 1 of the notes, taken literally: e^(−z) / (1 + e^(−z))²",
    "overflows",
)
def overflowing(z):
    return np.exp(-z) / (1 + np.exp(-z)) ** 2


@mistake("sigmoid_prime", "scalar code: math.exp on an array", "only .*number|one number")
def of_a_scalar(z):
    s = 1 / (1 + math.exp(-z))
    return s * (1 - s)


@mistake("sigmoid_prime", "the * of mathematics left out", "is a \\* missing before the bracket")
def without_times(z):
    a = sigmoid(z)
    return a(1 - a)


@mistake("sigmoid_prime", "the same in PyTorch", "is a \\* missing before the bracket")
def without_times_in_torch(z):
    a = torch.sigmoid(z)
    return a(1 - a)


@mistake("sigmoid_prime", "σ taken to exist", "write σ yourself: 1 / \\(1 \\+ np.exp\\(-z\\)\\)")
def undefined(z):
    return np.sigmoid(z) * (1 - np.sigmoid(z))


@mistake("sigmoid_prime", "one number in mind: if z > 500", "`if` take one number only")
def of_two_cases(z):
    if z > 500:
        return 0 * z
    return sigmoid(z) * (1 - sigmoid(z))


@mistake("sigmoid_prime", "the same in PyTorch", "`if` take one number only")
def of_two_cases_in_torch(z):
    return torch.zeros_like(z) if z > 500 else torch.sigmoid(z) * (1 - torch.sigmoid(z))


@mistake("sigmoid_prime", "math.exp on a tensor", "math.exp, .* take one number only")
def of_a_scalar_in_torch(z):
    s = torch.as_tensor(1 / (1 + math.exp(-z)))
    return s * (1 - s)


@mistake("sigmoid_prime", "the brackets of a fraction left out", "brackets are missing around 1")
def without_brackets(z):
    a = 1 / 1 + np.exp(-z)
    return a * (1 - a)


@mistake("sigmoid_prime", "^ for a power", "write a \\*\\* 2")
def power(z):
    a = sigmoid(z)
    return a - a ^ 2


@mistake("sigmoid_prime", "^ for a power in PyTorch", "write a \\*\\* 2")
def power_in_torch(z):
    a = torch.sigmoid(z)
    return a - a ^ 2


# 2: BP1


@mistake("output_delta", "Coursera and video courses: error = y − a", "y − a")
def target_minus_output(z, a, y):
    return (y - a) * sigmoid_prime(z) / len(y)


@mistake(
    "output_delta",
    "Bot-Academy/NeuralNetworkFromScratch pull request 3: σ' of the output layer is missing",
    "σ'\\(z\\) is missing",
)
def without_slope(z, a, y):
    return (a - y) / len(y)


@mistake(
    "output_delta",
    "dwhitena/gophernet issue 6: the derivative is taken of the activation",
    "σ' of a, not of z",
)
def slope_of_a(z, a, y):
    return (a - y) * sigmoid_prime(a) / a.shape[0]


@mistake(
    "output_delta",
    "makeyourownneuralnetwork issue 77: the 2 of the derivative of (t − o)²",
    "½",
)
def without_half(z, a, y):
    return 2 * (a - y) * a * (1 - a) / len(a)


@mistake("output_delta", "per-sample formula used for a batch", "1/N")
def not_averaged(z, a, y):
    return (a - y) * sigmoid_prime(z)


@mistake("output_delta", "torch.nn.MSELoss, which averages over components too", "components")
def averaged_over_components(z, a, y):
    return (a - y) * sigmoid_prime(z) / a.size


@mistake("output_delta", "@ for ⊙, the shapes as they are", "a matrix product where ⊙")
def matrix_product_as_it_is(z, a, y):
    return (a - y) @ sigmoid_prime(z)


@mistake("output_delta", "⊙ read as a matrix product", "element by element")
def matrix_product(z, a, y):
    return np.dot(a - y, sigmoid_prime(z).T) / len(a)


@mistake("output_delta", "saving memory with −=", "changes its argument a")
def in_place(z, a, y):
    a -= y
    return a * sigmoid_prime(z) / len(y)


@mistake("output_delta", "the cost itself is propagated instead of its gradient", "cost itself")
def propagates_the_cost(z, a, y):
    return 0.5 * (a - y) ** 2 * sigmoid_prime(z) / len(y)


# 3: BP2


@mistake("hidden_delta", "@ for ⊙, the shapes as they are", "a matrix product where ⊙")
def product_of_both(delta_next, w_next, z):
    return delta_next @ w_next @ sigmoid_prime(z)


@mistake(
    "hidden_delta",
    "the formula of the notes, whose samples are columns, with the transpose kept",
    "wᵀ where w belongs",
)
def transpose_kept(delta_next, w_next, z):
    return np.dot(delta_next, w_next.T) * sigmoid_prime(z)


@mistake(
    "hidden_delta",
    "derivation.md, mistake 4: w δ for wᵀ δ, with samples in columns",
    "w where wᵀ belongs",
    form="columns",
)
def transpose_missing(delta_next, w_next, z):
    return np.dot(w_next, delta_next) * sigmoid_prime(z)


@mistake("hidden_delta", "the formula of the notes in a file with rows", "columns")
def as_in_the_notes(delta_next, w_next, z):
    return np.dot(w_next.transpose(), delta_next) * sigmoid_prime(z)


@mistake("hidden_delta", "Coursera week 5: g'(z) forgotten in the hidden layer", "σ'\\(z\\)")
def hidden_without_slope(delta_next, w_next, z):
    return delta_next @ w_next


@mistake("hidden_delta", "gophernet issue 6, in the hidden layer", "σ' of a, not of z")
def hidden_slope_of_a(delta_next, w_next, z):
    a = sigmoid(z)
    return (delta_next @ w_next) * sigmoid_prime(a)


@mistake("hidden_delta", "σ for σ'", "σ\\(z\\) where σ'\\(z\\)")
def multiplied_by_the_activation(delta_next, w_next, z):
    return (delta_next @ w_next) * sigmoid(z)


@mistake(
    "hidden_delta",
    "Make Your Own Neural Network: errors shared out by the fraction of each weight",
    "share",
)
def split_by_weight(delta_next, w_next, z):
    fraction = w_next / w_next.sum(axis=1, keepdims=True)
    return (delta_next @ fraction) * sigmoid_prime(z)


@mistake("hidden_delta", "σ' multiplied before wᵀ, with the shapes of a square layer", "before")
def slope_inside(delta_next, w_next, z):
    return (delta_next * sigmoid_prime(z)) @ w_next


@mistake("hidden_delta", "a loop that assigns where it should add", "only the last")
def loop_overwrites(delta_next, w_next, z):
    result = np.zeros_like(z)
    for n in range(z.shape[0]):
        for k in range(z.shape[1]):
            for j in range(w_next.shape[0]):
                result[n, k] = w_next[j, k] * delta_next[n, j] * sigmoid_prime(z[n, k])
    return result


# 4: BP3


@mistake("grad_b", "deeplearning.ai: np.mean where delta has its 1/m already", "averaged over the")
def bias_averaged(delta):
    return np.mean(delta, axis=0)


@mistake("grad_b", "axis=1 copied from code whose samples are columns", "wrong axis")
def wrong_axis(delta):
    return np.sum(delta, axis=1)


@mistake("grad_b", "BP3 of one sample used for a batch", "sum over the samples is missing")
def bias_not_summed(delta):
    return delta


@mistake("grad_b", "np.sum without an axis", "all neurons")
def one_number(delta):
    return delta.sum()


@mistake("grad_b", "a loop that assigns where it should add", "only the last sample")
def last_sample(delta):
    for row in delta:
        result = row
    return result


@mistake("grad_b", "axis=1, keepdims=True from deeplearning.ai, in rows", "wrong axis")
def wrong_axis_kept(delta):
    return np.sum(delta, axis=1, keepdims=True)


# 5: BP4


@mistake("grad_w", "cs231n and deeplearning.ai: / m again", "averaged over the")
def weight_averaged(delta, a_prev):
    return delta.T @ a_prev / delta.shape[0]


@mistake(
    "grad_w",
    "iamtrask/Grokking-Deep-Learning pull request 22: the weight deltas are transposed",
    "transpose",
)
def swapped(delta, a_prev):
    return a_prev.T @ delta


@mistake("grad_w", "the formula of the notes, in a file with rows", "columns")
def weight_as_in_the_notes(delta, a_prev):
    return delta @ a_prev.T


@mistake("grad_w", "np.outer of the sums over the batch", "product of (two )?sums")
def outer_of_sums(delta, a_prev):
    return np.outer(delta.sum(axis=0), a_prev.sum(axis=0))


@mistake("grad_w", "np.outer of the means over the batch", "product of (two )?means")
def outer_of_means(delta, a_prev):
    return np.outer(delta.mean(axis=0), a_prev.mean(axis=0))


@mistake("grad_w", "a loop over samples with = for +=", "only the last sample")
def weight_of_last_sample(delta, a_prev):
    for d, a in zip(delta, a_prev, strict=True):
        grad = np.outer(d, a)
    return grad


@mistake("grad_w", "gradient descent's minus put into the gradient", "sign")
def descending(delta, a_prev):
    return -(delta.T @ a_prev)


@mistake("grad_w", "* for @", "matrix product")
def times_element_by_element(delta, a_prev):
    return delta * a_prev


@mistake("grad_w", "einsum with the sum left out", "sum over the samples is missing")
def einsum_unsummed(delta, a_prev):
    return torch.einsum("nj,nk->njk", delta, a_prev)
