"""A fused layer, and its second derivative."""

import numpy as np

from tests.exercises.answer import mistake


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


# 11: the fused layer


@mistake("linear_sigmoid_backward", "gophernet issue 6: σ' called on the activation", "σ' of a")
def fused_slope_of_a(grad_a, a_prev, w, a):
    delta = grad_a * sigmoid(a) * (1 - sigmoid(a))
    return delta @ w, delta.T @ a_prev, delta.sum(0)


@mistake("linear_sigmoid_backward", "the backward of a linear layer alone", "σ'.* missing")
def fused_without_slope(grad_a, a_prev, w, a):
    return grad_a @ w, grad_a.T @ a_prev, grad_a.sum(0)


@mistake("linear_sigmoid_backward", "grad_a for δ in BP3", "∂C/∂a where δ")
def bias_from_grad_a(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return delta @ w, delta.T @ a_prev, grad_a.sum(0)


@mistake("linear_sigmoid_backward", "grad_a for δ in BP4", "∂C/∂a where δ")
def weights_from_grad_a(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return delta @ w, grad_a.T @ a_prev, delta.sum(0)


@mistake(
    "linear_sigmoid_backward",
    "the σ' of the layer below, which belongs to its own backward",
    "layer below",
)
def slope_of_the_layer_below(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return (delta @ w) * a_prev * (1 - a_prev), delta.T @ a_prev, delta.sum(0)


@mistake("linear_sigmoid_backward", "/ m in dW and db, as in deeplearning.ai", "averaged over the")
def fused_averaged(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    n = len(a)
    return delta @ w, delta.T @ a_prev / n, delta.sum(0) / n


@mistake("linear_sigmoid_backward", "the order dW, db, dA", "order")
def another_order(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return delta.T @ a_prev, delta.sum(0), delta @ w


@mistake("linear_sigmoid_backward", "w of shape (in, out), as in cs231n", "wᵀ where w belongs")
def weights_transposed(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return delta @ w.T, delta.T @ a_prev, delta.sum(0)


@mistake(
    "linear_sigmoid_backward",
    "the backward overwrites the gradient it is given",
    "changes its argument grad_a",
)
def overwrites_grad_a(grad_a, a_prev, w, a):
    grad_a *= a * (1 - a)
    return grad_a @ w, grad_a.T @ a_prev, grad_a.sum(0)


# 12: its second derivative


@mistake("linear_sigmoid_second", "a saved tensor taken for a constant", "a as a constant|constant")
def a_is_constant(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    delta = grad_a * s1
    return u * s1, np.zeros_like(a_prev), delta.T @ v, np.zeros(len(w))


@mistake("linear_sigmoid_second", "σ'' = 1 − 2a", "σ''")
def second_slope_without_first(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * (1 - 2 * a)
    return u * s1, e @ w, (grad_a * s1).T @ v + e.T @ a_prev, e.sum(0)


@mistake("linear_sigmoid_second", "σ'' = a (1 − a) (2a − 1)", "sign of σ''")
def second_slope_negative(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * s1 * (2 * a - 1)
    return u * s1, e @ w, (grad_a * s1).T @ v + e.T @ a_prev, e.sum(0)


@mistake("linear_sigmoid_second", "product rule: w only through σ", "direct|product rule")
def only_through_a(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * s1 * (1 - 2 * a)
    return u * s1, e @ w, e.T @ a_prev, e.sum(0)


@mistake(
    "linear_sigmoid_second", "product rule: w only where it is written", "through a|product rule"
)
def only_directly(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * s1 * (1 - 2 * a)
    return u * s1, e @ w, (grad_a * s1).T @ v, e.sum(0)


@mistake("linear_sigmoid_second", "σ' for σ'' : differentiated once", "σ' where σ''")
def first_slope_again(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * s1
    return u * s1, e @ w, (grad_a * s1).T @ v + e.T @ a_prev, e.sum(0)


@mistake("linear_sigmoid_second", "v multiplied by w, not wᵀ", "v")
def v_times_w(v, grad_a, a_prev, w, a):
    s1 = a * (1 - a)
    u = v @ w
    e = grad_a * u * s1 * (1 - 2 * a)
    return u * s1, e @ w, (grad_a * s1).T @ v + e.T @ a_prev, e.sum(0)
