"""One sample a row."""

import math

import numpy as np
import torch
import torch.nn.functional as F

from tests.exercises.answer import variant


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


@variant("sigmoid_prime", "NumPy")
def in_terms_of_a(z):
    a = sigmoid(z)
    return a * (1 - a)


@variant("sigmoid_prime", "PyTorch")
def in_torch(z):
    a = torch.sigmoid(z)
    return a - a * a


@variant("sigmoid_prime", "loops; nested lists; no library")
def in_plain_python(z):
    result = []
    for row in z:
        result.append([])
        for x in row:
            a = 1 / (1 + math.exp(-x)) if x > -700 else 0.0
            result[-1].append(a * (1 - a))
    return result


@variant("sigmoid_prime", "float32")
def in_float32(z):
    a = sigmoid(z.astype(np.float32))
    return a * (1 - a)


@variant("sigmoid_prime", "hyperbolic cosine")
def by_cosh(z):
    return 1 / (2 + 2 * np.cosh(z))


@variant("sigmoid_prime", "e^(−|z|)")
def without_overflow(z):
    e = np.exp(-np.abs(z))
    return e / (1 + e) ** 2


@variant("output_delta", "σ' from z")
def output_from_z(z, a, y):
    s = sigmoid(z)
    return (a - y) * s * (1 - s) / len(y)


@variant("output_delta", "both signs turned; a keyword argument")
def both_signs(z, a, y):
    n = np.shape(y)[0]
    return np.multiply(y - a, a * (a - 1)) / n


@variant("output_delta", "one sample at a time; a list of arrays")
def output_by_sample(z, a, y):
    return [(a[i] - y[i]) * a[i] * (1 - a[i]) / len(a) for i in range(len(a))]


@variant("output_delta", "float16")
def in_half(z, a, y):
    a, y = a.astype(np.float16), y.astype(np.float16)
    return (a - y) * a * (1 - a) / len(a)


@variant("output_delta", "PyTorch in float32")
def output_in_float32(z, a, y):
    a, y = a.float(), y.float()
    return (a - y).mul(a).mul(1 - a).div(a.shape[0])


@variant("hidden_delta", "@")
def hidden(delta_next, w_next, z):
    a = sigmoid(z)
    return delta_next @ w_next * a * (1 - a)


@variant("hidden_delta", "the formula of the notes, transposed back")
def hidden_as_in_the_notes(delta_next, w_next, z):
    a = sigmoid(z)
    return np.dot(w_next.T, delta_next.T).T * (a * (1 - a))


@variant("hidden_delta", "einsum, PyTorch")
def hidden_by_einsum(delta_next, w_next, z):
    a = torch.sigmoid(z)
    return torch.einsum("nj,jk,nk->nk", delta_next, w_next, a * (1 - a))


@variant("hidden_delta", "three loops")
def hidden_by_loops(delta_next, w_next, z):
    result = np.zeros(z.shape)
    for n in range(z.shape[0]):
        for k in range(z.shape[1]):
            a = sigmoid(z[n, k])
            for j in range(w_next.shape[0]):
                result[n, k] += w_next[j, k] * delta_next[n, j] * a * (1 - a)
    return result


@variant("hidden_delta", "a diagonal matrix for each sample")
def hidden_by_diagonals(delta_next, w_next, z):
    a = sigmoid(z)
    return np.stack([np.diag(s) @ w_next.T @ d for s, d in zip(a * (1 - a), delta_next)])


@variant("grad_b", "keepdims")
def bias_kept(delta):
    return delta.sum(axis=0, keepdims=True)


@variant("grad_b", "a product with ones; a column")
def bias_by_ones(delta):
    return delta.T @ np.ones((len(delta), 1))


@variant("grad_b", "PyTorch, dim=")
def bias_in_torch(delta):
    return torch.sum(delta, dim=0)


@variant("grad_b", "Python's sum; a tuple of numbers")
def bias_as_tuple(delta):
    return tuple(sum(row[j] for row in delta) for j in range(delta.shape[1]))


@variant("grad_b", "np.matrix, which keeps two dimensions")
def bias_as_matrix(delta):
    return np.asmatrix(delta).sum(axis=0)


@variant("grad_w", "@")
def weights(delta, a_prev):
    return delta.T @ a_prev


@variant("grad_w", "the other order, transposed")
def weights_transposed_back(delta, a_prev):
    return (a_prev.T @ delta).T


@variant("grad_w", "a sum of outer products, in PyTorch")
def weights_by_outer(delta, a_prev):
    return sum(torch.outer(d, a) for d, a in zip(delta, a_prev))


@variant("grad_w", "broadcasting and a sum; float32 tensors")
def weights_by_broadcasting(delta, a_prev):
    return (delta.float()[:, :, None] * a_prev.float()[:, None, :]).sum(dim=0)


@variant("grad_w", "three loops and lists")
def weights_by_loops(delta, a_prev):
    n, j, k = len(delta), len(delta[0]), len(a_prev[0])
    return [[sum(delta[x][o] * a_prev[x][i] for x in range(n)) for i in range(k)] for o in range(j)]


def forward(x, weights, biases):
    a = [x]
    for w, b in zip(weights, biases):
        a.append(sigmoid(a[-1] @ w.T + b))
    return a


@variant("backprop", "any number of layers")
def net(x, y, weights, biases):
    a = forward(x, weights, biases)
    delta = (a[-1] - y) * a[-1] * (1 - a[-1]) / len(x)
    grads_w, grads_b = [], []
    for i in reversed(range(len(weights))):
        grads_w.insert(0, delta.T @ a[i])
        grads_b.insert(0, delta.sum(0))
        delta = delta @ weights[i] * a[i] * (1 - a[i])
    return grads_w, grads_b


@variant("backprop", "one sample after another, as update_mini_batch in the notes; 1/N at the end")
def net_by_samples(x, y, weights, biases):
    nabla_w = [np.zeros(w.shape) for w in weights]
    nabla_b = [np.zeros(b.shape) for b in biases]
    for one, target in zip(x, y):
        a = forward(one, weights, biases)
        delta = (a[-1] - target) * a[-1] * (1 - a[-1])
        for i in (2, 1, 0):
            nabla_w[i] += np.outer(delta, a[i])
            nabla_b[i] += delta
            delta = weights[i].T @ delta * a[i] * (1 - a[i])
    return tuple(w / len(x) for w in nabla_w), tuple(b / len(x) for b in nabla_b)


@variant("backprop", "PyTorch; three named layers; biases kept as rows; a list of two lists")
def net_in_torch(x, y, weights, biases):
    w1, w2, w3 = weights
    b1, b2, b3 = biases
    a1 = torch.sigmoid(x @ w1.mT + b1)
    a2 = torch.sigmoid(a1 @ w2.mT + b2)
    a3 = torch.sigmoid(a2 @ w3.mT + b3)
    d3 = (a3 - y) * a3 * (1 - a3) / x.shape[0]
    d2 = d3 @ w3 * a2 * (1 - a2)
    d1 = d2 @ w2 * a1 * (1 - a1)
    return [
        [d1.mT @ x, d2.mT @ a1, d3.mT @ a2],
        [d.sum(0, keepdim=True) for d in (d1, d2, d3)],
    ]


@variant("backprop", "a dictionary")
def net_as_dictionary(x, y, weights, biases):
    grads_w, grads_b = net(x, y, weights, biases)
    return {"grads_b": grads_b, "grads_w": grads_w}


@variant("numerical_gradient", "x is moved and put back, as in cs231n")
def in_place_and_back(f, x):
    grad, h = np.zeros_like(x), 1e-5
    it = np.nditer(x, flags=["multi_index"], op_flags=["readwrite"])
    while not it.finished:
        i = it.multi_index
        old = x[i]
        x[i] = old + h
        plus = f(x)
        x[i] = old - h
        minus = f(x)
        x[i] = old
        grad[i] = (plus - minus) / (2 * h)
        it.iternext()
    return grad


@variant("numerical_gradient", "a long step; f(x) is evaluated in vain")
def with_a_long_step(f, x):
    f(x)
    steps = 1e-3 * np.eye(x.size).reshape(-1, *x.shape)
    return np.reshape([(f(x + e) - f(x - e)) / 2e-3 for e in steps], x.shape)


@variant(
    "numerical_gradient", "PyTorch; += and −= without an old value, so that x comes back rounded"
)
def put_back_by_adding(f, x):
    grad = torch.zeros_like(x)
    for i in range(x.shape[0]):
        for k in range(x.shape[1]):
            x[i, k] += 1e-4
            plus = f(x)
            x[i, k] -= 2e-4
            grad[i, k] = (plus.item() - f(x).item()) / 2e-4
            x[i, k] += 1e-4
    return grad


@variant("numerical_gradient", "four points")
def of_fourth_order(f, x):
    h, grad = 1e-4, np.empty(x.shape)
    for i in np.ndindex(x.shape):
        e = np.zeros(x.shape)
        e[i] = h
        grad[i] = (f(x - 2 * e) - 8 * f(x - e) + 8 * f(x + e) - f(x + 2 * e)) / (12 * h)
    return grad


@variant("per_sample_grad_w", "broadcasting")
def by_broadcasting(delta, a_prev):
    return delta[:, :, None] * a_prev[:, None, :]


@variant("per_sample_grad_w", "a list of outer products")
def list_of_outer_products(delta, a_prev):
    return [np.outer(d, a) for d, a in zip(delta, a_prev)]


@variant("per_sample_grad_w", "a batched product of PyTorch")
def by_bmm(delta, a_prev):
    return torch.bmm(delta.unsqueeze(2), a_prev.unsqueeze(1))


@variant("cross_entropy", "log(1 + e^(−|z|))")
def cost_from_z(z, y):
    losses = np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))
    return losses.sum() / len(z), (sigmoid(z) - y) / len(z)


@variant("cross_entropy", "np.logaddexp; the cost as an array of one number")
def cost_by_logaddexp(z, y):
    losses = y * np.logaddexp(0, -z) + (1 - y) * np.logaddexp(0, z)
    return losses.sum(axis=1, keepdims=True).mean(axis=0, keepdims=True), (sigmoid(z) - y) / len(z)


@variant("cross_entropy", "softplus of PyTorch; a Python number; float32")
def cost_by_softplus(z, y):
    z, y = z.float(), y.float()
    losses = F.softplus(z) - y * z
    return losses.sum(1).mean().item(), (torch.sigmoid(z) - y) / z.shape[0]


@variant("softmax_cross_entropy", "the shift by the maximum")
def shifted(z, labels):
    z = z - z.max(axis=1, keepdims=True)
    log_a = z - np.log(np.exp(z).sum(axis=1, keepdims=True))
    delta = np.exp(log_a)
    delta[np.arange(len(z)), labels] -= 1
    return -log_a[np.arange(len(z)), labels].mean(), delta / len(z)


@variant("softmax_cross_entropy", "logsumexp and one-hot rows, in PyTorch")
def by_logsumexp(z, labels):
    y = F.one_hot(labels, z.shape[1])
    log_a = z - torch.logsumexp(z, dim=1, keepdim=True)
    return -(y * log_a).sum(1).mean(), (log_a.exp() - y) / len(z)


@variant("softmax_cross_entropy", "one sample at a time")
def softmax_by_sample(z, labels):
    cost, delta = 0.0, []
    for row, label in zip(z, labels):
        e = np.exp(row - max(row))
        a = e / sum(e)
        cost += -math.log(a[label]) / len(z)
        delta.append([(a[k] - (k == label)) / len(z) for k in range(len(row))])
    return cost, delta


@variant("softmax_cross_entropy", "the whole Jacobian")
def by_the_jacobian(z, labels):
    e = np.exp(z - z.max(1)[:, None])
    a = e / e.sum(1)[:, None]
    y = np.eye(z.shape[1])[labels]
    jacobian = a[:, :, None] * (np.eye(z.shape[1]) - a[:, None, :])
    grad_a = -y / np.where(y > 0, a, 1)
    delta = np.einsum("nk,nkj->nj", grad_a, jacobian) / len(z)
    return -np.log((a * y).sum(1)).mean(), delta


@variant("linear_sigmoid_backward", "δ first")
def fused(grad_a, a_prev, w, a):
    delta = grad_a * a * (1 - a)
    return delta @ w, delta.T @ a_prev, delta.sum(axis=0)


@variant("linear_sigmoid_backward", "PyTorch, a list, the bias as a column")
def fused_in_torch(grad_a, a_prev, w, a):
    delta = grad_a * (a - a * a)
    return [delta.matmul(w), delta.mT.matmul(a_prev), delta.sum(0).reshape(-1, 1)]


@variant("linear_sigmoid_second", "u = v wᵀ and ε")
def second(v, grad_a, a_prev, w, a):
    s = a * (1 - a)
    u = v @ w.T
    e = grad_a * u * s * (1 - 2 * a)
    return u * s, e @ w, (grad_a * s).T @ v + e.T @ a_prev, e.sum(0)


@variant("linear_sigmoid_second", "σ'' = σ' − 2aσ', einsum, PyTorch in float32")
def second_by_einsum(v, grad_a, a_prev, w, a):
    v, grad_a, a_prev, w, a = (t.float() for t in (v, grad_a, a_prev, w, a))
    slope = a - a**2
    up = torch.einsum("nk,jk->nj", v, w)
    bend = grad_a * up * (slope - 2 * a * slope)
    by_w = torch.einsum("nj,nk->jk", grad_a * slope, v) + torch.einsum("nj,nk->jk", bend, a_prev)
    return up * slope, torch.einsum("nj,jk->nk", bend, w), by_w, torch.einsum("nj->j", bend)
