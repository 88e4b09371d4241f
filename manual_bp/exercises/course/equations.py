"""σ' and the four equations, one function each."""

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Mistake, Values
from manual_bp.layers.sigmoid import sigmoid_prime as slope


def far_out(values: Values) -> None:
    """Every second z a thousand times as large."""
    flat = values.z.view(-1)
    flat[::2] = torch.where(flat[::2] > 0, 1000.0, -1000.0)
    flat[2::4] *= -1


SIGMOID_PRIME = Exercise(
    "sigmoid_prime",
    "σ', the derivative of the sigmoid",
    """σ'(z) for σ(z) = 1 / (1 + e^(−z)), element by element.

    It must be right for z = 1000 and z = −1000, too.""",
    arguments={"z": ("N", "out")},
    results={"sigma_prime": ("N", "out")},
    right=lambda v: slope(v.z.sigmoid()),
    mistakes=(
        Mistake("that is σ(z) itself, not its derivative", lambda v: v.z.sigmoid()),
        Mistake(
            "the sign is wrong: σ rises everywhere, so σ' is positive",
            lambda v: -slope(v.z.sigmoid()),
        ),
        Mistake(
            "z (1 − z) takes z for the activation: a (1 − a) needs a = σ(z)",
            lambda v: slope(v.z),
        ),
        Mistake(
            "σ is applied twice: that is σ' of a, not of z",
            lambda v: slope(v.z.sigmoid().sigmoid()),
        ),
        Mistake(
            "the square of the denominator in e^(−z) / (1 + e^(−z))² is missing",
            lambda v: 1 - v.z.sigmoid(),
        ),
        Mistake("1 − a² is the derivative of tanh, not of σ", lambda v: 1 - v.z.sigmoid() ** 2),
        Mistake(
            "right for moderate z, but e^(−z) overflows for large ones: a formula in terms of "
            "a = σ(z) does not",
            lambda v: torch.exp(-v.z) / (1 + torch.exp(-v.z)) ** 2,
        ),
    ),
    far=far_out,
    far_says="right for moderate z, but not for z = 1000 or z = −1000: does e^(−z) overflow?",
    where="manual_bp/layers/sigmoid.py",
)

OUTPUT_DELTA = Exercise(
    "output_delta",
    "BP1: the error of the output layer",
    """δ^L = ∂C/∂z^L = ∇_a C ⊙ σ'(z^L) for the quadratic cost.

    C is the mean over the N samples of C_x = ½‖y − a‖², where a = σ(z).""",
    arguments={"z": ("N", "out"), "a": ("N", "out"), "y": ("N", "out")},
    results={"delta": ("N", "out")},
    derived={"a": lambda v: v.z.sigmoid()},
    right=lambda v: (v.a - v.y) * slope(v.a) / len(v.a),
    mistakes=(
        Mistake(
            "y − a where a − y belongs: ½‖y − a‖² differentiated by a gives −(y − a)",
            lambda v: (v.y - v.a) * slope(v.a) / len(v.a),
        ),
        Mistake(
            "σ'(z) is missing: that is ∇_a C, the first factor of BP1",
            lambda v: (v.a - v.y) / len(v.a),
        ),
        Mistake(
            "σ' of a, not of z: a has been through σ already, so that σ is applied twice",
            lambda v: (v.a - v.y) * slope(v.a.sigmoid()) / len(v.a),
        ),
        Mistake(
            "2 times too large: the 2 of the derivative cancels against the ½ of the cost",
            lambda v: 2 * (v.a - v.y) * slope(v.a) / len(v.a),
        ),
        Mistake(
            "the 1/N of the mean is missing: C is the mean over the N = {N} samples, and so each "
            "sample's error has the factor 1/{N}",
            lambda v: (v.a - v.y) * slope(v.a),
        ),
        Mistake(
            "averaged over the {out} components too, as torch.nn.MSELoss does: C_x is their sum",
            lambda v: (v.a - v.y) * slope(v.a) / v.a.numel(),
        ),
        Mistake(
            "⊙ multiplies element by element; this is a matrix product",
            lambda v: (v.a - v.y) @ slope(v.a).mT / len(v.a),
        ),
        Mistake(
            "⊙ multiplies element by element; this is a matrix product",
            lambda v: (v.a - v.y).mT @ slope(v.a) / len(v.a),
        ),
        Mistake(
            "the cost itself times σ'(z): BP1 starts with the gradient of the cost",
            lambda v: (v.a - v.y) ** 2 * slope(v.a) / (2 * len(v.a)),
        ),
        Mistake(
            "σ(z) where σ'(z) belongs",
            lambda v: (v.a - v.y) * v.a / len(v.a),
        ),
    ),
    where="manual_bp/costs/quadratic.py, manual_bp/layers/sigmoid.py",
)


def _hidden(v: Values, w: Tensor, factor: Tensor) -> Tensor:
    return (v.delta_next @ w) * factor


HIDDEN_DELTA = Exercise(
    "hidden_delta",
    "BP2: the error one layer down",
    """δ^l = ((w^(l+1))ᵀ δ^(l+1)) ⊙ σ'(z^l).

    The equation is for one sample, a column. delta_next and w_next are δ and w of layer l+1.""",
    arguments={"delta_next": ("N", "out"), "w_next": ("out", "in"), "z": ("N", "in")},
    results={"delta": ("N", "in")},
    right=lambda v: _hidden(v, v.w_next, slope(v.z.sigmoid())),
    mistakes=(
        Mistake("the factor σ'(z) is missing", lambda v: v.delta_next @ v.w_next),
        Mistake(
            "{wt} where {w} belongs: the sum runs over the neurons of layer l+1",
            lambda v: _hidden(v, v.w_next.mT, slope(v.z.sigmoid())),
        ),
        Mistake(
            "σ' of a, not of z: σ is applied twice",
            lambda v: _hidden(v, v.w_next, slope(v.z.sigmoid().sigmoid())),
        ),
        Mistake(
            "σ(z) where σ'(z) belongs",
            lambda v: _hidden(v, v.w_next, v.z.sigmoid()),
        ),
        Mistake(
            "z (1 − z) takes z for the activation: a (1 − a) needs a = σ(z)",
            lambda v: _hidden(v, v.w_next, slope(v.z)),
        ),
        Mistake(
            "σ'(z^l) is multiplied before the weights: it belongs to layer l, so it comes after "
            "them",
            lambda v: (v.delta_next * slope(v.z.sigmoid())) @ v.w_next,
        ),
        Mistake(
            "both mistakes at once: {wt} where {w} belongs, and the factor σ'(z) is missing",
            lambda v: v.delta_next @ v.w_next.mT,
        ),
        *(
            Mistake(
                f"only the {which} neuron of layer l+1 counts: is there an = where += belongs?",
                lambda v, i=i: v.delta_next[:, [i]] * v.w_next[i] * slope(v.z.sigmoid()),
            )
            for which, i in (("last", -1), ("first", 0))
        ),
        *(
            Mistake(
                "the error is shared out by each weight's share of their sum: BP2 multiplies by "
                "the weight itself",
                lambda v, dim=dim: _hidden(
                    v, v.w_next / v.w_next.sum(dim, keepdim=True), slope(v.z.sigmoid())
                ),
            )
            for dim in (1, 0)
        ),
    ),
    where="manual_bp/layers/linear.py, manual_bp/layers/sigmoid.py",
)


GRAD_B = Exercise(
    "grad_b",
    "BP3: the gradient of the biases",
    """∂C/∂b^l, from the errors of a batch. For one sample it is δ^l.

    delta is ∂C/∂z^l. If C is a mean over samples, its 1/N is already in delta.""",
    arguments={"delta": ("N", "out")},
    results={"grad_b": ("out",)},
    right=lambda v: v.delta.sum(0),
    mistakes=(
        Mistake(
            "averaged over the {N} samples: BP3 is their sum (the 1/N of the cost is already in "
            "delta)",
            lambda v: v.delta.mean(0),
        ),
        Mistake(
            "summed over the wrong axis: over the neurons, axis {over_neurons}, where the "
            "samples, axis {over_samples}, belong",
            lambda v: v.delta.sum(1),
        ),
        Mistake(
            "averaged over the wrong axis, {over_neurons}: the neurons stay, and the samples, "
            "axis {over_samples}, are summed",
            lambda v: v.delta.mean(1),
        ),
        Mistake(
            "the sum over the samples is missing: all {N} of them use the same b",
            lambda v: v.delta,
        ),
        Mistake(
            "summed over all neurons as well: each neuron has a ∂C/∂b of its own",
            lambda v: v.delta.sum(),
        ),
        Mistake(
            "one number, the mean of everything: BP3 sums over samples", lambda v: v.delta.mean()
        ),
        Mistake(
            "only the last sample counts: is there an = where += belongs?", lambda v: v.delta[-1]
        ),
        Mistake(
            "only the first sample counts: is the return inside the loop?", lambda v: v.delta[0]
        ),
    ),
    where="manual_bp/layers/linear.py",
)

GRAD_W = Exercise(
    "grad_w",
    "BP4: the gradient of the weights",
    """∂C/∂w^l, from the errors of a batch. For one sample it is δ^l (a^(l−1))ᵀ.

    delta is ∂C/∂z^l, with the 1/N of the cost already in it; a_prev is a^(l−1).""",
    arguments={"delta": ("N", "out"), "a_prev": ("N", "in")},
    results={"grad_w": ("out", "in")},
    right=lambda v: v.delta.mT @ v.a_prev,
    mistakes=(
        Mistake(
            "averaged over the {N} samples: BP4 is their sum (the 1/N of the cost is already in "
            "delta)",
            lambda v: v.delta.mT @ v.a_prev / len(v.delta),
        ),
        Mistake(
            "the transpose of what is asked for: grad_w has the shape of w, (out, in)",
            lambda v: v.a_prev.mT @ v.delta,
        ),
        Mistake(
            "the sign is wrong: the minus of gradient descent belongs to the update, not to the "
            "gradient",
            lambda v: -v.delta.mT @ v.a_prev,
        ),
        Mistake(
            "only the last sample counts: is there an = where += belongs?",
            lambda v: torch.outer(v.delta[-1], v.a_prev[-1]),
        ),
        Mistake(
            "only the first sample counts: is the return inside the loop?",
            lambda v: torch.outer(v.delta[0], v.a_prev[0]),
        ),
        Mistake(
            "a product of sums over the samples, where the sum of each sample's own product "
            "belongs",
            lambda v: torch.outer(v.delta.sum(0), v.a_prev.sum(0)),
        ),
        Mistake(
            "a product of means over the samples, where the sum of each sample's own product "
            "belongs",
            lambda v: torch.outer(v.delta.mean(0), v.a_prev.mean(0)),
        ),
        Mistake(
            "the sum over the samples is missing: these are the {N} gradients of single samples",
            lambda v: v.delta[:, :, None] * v.a_prev[:, None],
        ),
        Mistake(
            "element by element, where a matrix product belongs: every neuron j meets every "
            "neuron k",
            lambda v: v.delta * v.a_prev,
        ),
    ),
    where="manual_bp/layers/linear.py",
)
