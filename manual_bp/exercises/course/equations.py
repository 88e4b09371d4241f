"""σ' and the four equations, one function each."""

from collections.abc import Callable

import torch
from torch import Tensor

from manual_bp.exercises._exercise import Exercise, Mistake, Part, Values, combined
from manual_bp.layers.sigmoid import sigmoid_prime as slope


def slopes(z: Callable[[Values], Tensor]) -> Part:
    """σ'(z), and what is taken for it."""
    return {
        "": lambda v: slope(z(v).sigmoid()),
        "the factor σ'(z) is missing": lambda v: torch.ones_like(z(v)),
        "σ' of a, not of z: σ is applied twice": lambda v: slope(z(v).sigmoid().sigmoid()),
        "σ(z) where σ'(z) belongs": lambda v: z(v).sigmoid(),
        "z (1 − z) takes z for the activation: a (1 − a) needs a = σ(z)": lambda v: slope(z(v)),
        "1 − a where a (1 − a) belongs (in e^(−z) / (1 + e^(−z))², the square is missing)": (
            lambda v: 1 - z(v).sigmoid()
        ),
        "σ'(z) is squared": lambda v: slope(z(v).sigmoid()).square(),
        "a² where a (1 − a) belongs": lambda v: z(v).sigmoid().square(),
        "a (1 + a) where a (1 − a) belongs": lambda v: z(v).sigmoid() * (1 + z(v).sigmoid()),
        "1 − a² is the derivative of tanh, not of σ": lambda v: 1 - z(v).sigmoid().square(),
        "that is the derivative of tanh, not of σ": lambda v: 1 - z(v).tanh().square(),
        "1 for positive z, else 0, is the derivative of ReLU": lambda v: (z(v) > 0).to(z(v).dtype),
    }


def sums() -> Part:
    """The factor 1 of BP3 and BP4, and what it is mistaken for."""
    return {
        "": lambda _: 1.0,
        "averaged over the {N} samples, but the gradient is their sum (the 1/N of the cost is "
        "already in delta)": lambda v: 1 / v.sizes["N"],
        "the sign is wrong: the minus of gradient descent belongs to the update, not to the "
        "gradient": lambda _: -1.0,
        "N = {N} times too large": lambda v: v.sizes["N"],
        "divided by {out}, the number of neurons": lambda v: 1 / v.sizes["out"],
        "2 times too large": lambda _: 2.0,
    }


def residuals(z: Callable[[Values], Tensor], cost: str = "½‖y − a‖²") -> Part:
    """A − y, and what is taken for it."""
    return {
        "": lambda v: z(v).sigmoid() - v.y,
        f"y − a where a − y belongs: the derivative of {cost} is a − y": (
            lambda v: v.y - z(v).sigmoid()
        ),
        "z − y where a − y belongs": lambda v: z(v) - v.y,
        "the cost itself, ½ (a − y)², where its gradient a − y belongs": (
            lambda v: (z(v).sigmoid() - v.y).square() / 2
        ),
        "|a − y| where a − y belongs: the sign counts": lambda v: (z(v).sigmoid() - v.y).abs(),
        "a − y is summed over the components: each keeps its own": (
            lambda v: (z(v).sigmoid() - v.y).sum(1, keepdim=True)
        ),
        "y is not subtracted": lambda v: z(v).sigmoid(),
        "a − y is summed over everything: each neuron of each sample keeps its own": (
            lambda v: (z(v).sigmoid() - v.y).sum()
        ),
    }


def means(components: str, called: str, of_square: str = "") -> Part:
    """The factor 1/N of a mean over samples, and what it is mistaken for.

    Args:
        components: The name of their number.
        called: What they are called.
        of_square: Why there is no 2, if the cost is a square.
    """
    return {
        "": lambda v: 1 / v.sizes["N"],
        "the 1/N of the mean is missing: C is the mean over the N = {N} samples, and so each "
        "sample's error has the factor 1/{N}": lambda _: 1.0,
        f"2 times too large{of_square}": lambda v: 2 / v.sizes["N"],
        "half as large as it should be": lambda v: 0.5 / v.sizes["N"],
        f"averaged over the {{{components}}} {called} too: C_x is their sum": (
            lambda v: 1 / (v.sizes["N"] * v.sizes[components])
        ),
        f"divided by {{{components}}}, the number of {called}, and not by N = {{N}}": (
            lambda v: 1 / v.sizes[components]
        ),
        "divided by N = {N} twice": lambda v: 1 / v.sizes["N"] ** 2,
    }


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
        Mistake(
            "the sign is wrong: σ rises everywhere, so σ' is positive",
            lambda v: -slope(v.z.sigmoid()),
        ),
        *combined(lambda slope: slope, slopes(lambda v: v.z)),
        *(
            Mistake(
                "1 / 1 + e^(−z) divides only 1 by 1: brackets are missing around 1 + e^(−z)", gives
            )
            for gives in (
                lambda v: 1 + torch.exp(-v.z),
                lambda v: slope(1 + torch.exp(-v.z)),
            )
        ),
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
        *combined(
            lambda residual, slope, mean: residual * slope * mean,
            residuals(lambda v: v.z),
            slopes(lambda v: v.z) | {"σ' of y, not of z": lambda v: slope(v.y.sigmoid())},
            means(
                "out",
                "components",
                ": the 2 of the derivative cancels against the ½ of the cost",
            ),
        ),
        *(
            Mistake("a matrix product where ⊙, element by element, belongs", product)
            for product in (
                lambda v: (v.a - v.y) @ slope(v.a) / len(v.a),
                lambda v: (v.a - v.y) @ slope(v.a),
                lambda v: (v.a - v.y) @ slope(v.a).mT / len(v.a),
                lambda v: (v.a - v.y).mT @ slope(v.a) / len(v.a),
                lambda v: (v.a - v.y) @ slope(v.a).mT,
                lambda v: (v.a - v.y).mT @ slope(v.a),
            )
        ),
        Mistake(
            "the mean over the samples is taken: each sample keeps its own error, with the factor "
            "1/N",
            lambda v: ((v.a - v.y) * slope(v.a)).mean(0),
        ),
    ),
    where="manual_bp/costs/quadratic.py, manual_bp/layers/sigmoid.py",
)


def _shared_out(dim: int) -> Callable[[Values], Tensor]:
    return lambda v: v.delta_next @ (v.w_next / v.w_next.sum(dim, keepdim=True))


HIDDEN_DELTA = Exercise(
    "hidden_delta",
    "BP2: the error one layer down",
    """δ^l = ((w^(l+1))ᵀ δ^(l+1)) ⊙ σ'(z^l).

    The equation is for one sample, a column. delta_next and w_next are δ and w of layer l+1.""",
    arguments={"delta_next": ("N", "out"), "w_next": ("out", "in"), "z": ("N", "in")},
    results={"delta": ("N", "in")},
    right=lambda v: (v.delta_next @ v.w_next) * slope(v.z.sigmoid()),
    mistakes=(
        *combined(
            lambda product, slope, factor: product * slope * factor,
            {
                "": lambda v: v.delta_next @ v.w_next,
                "{wt} where {w} belongs: the sum runs over the neurons of layer l+1": (
                    lambda v: v.delta_next @ v.w_next.mT
                ),
                "only the last neuron of layer l+1 counts (is there an = where += belongs?)": (
                    lambda v: v.delta_next[:, [-1]] * v.w_next[-1]
                ),
                "only the first neuron of layer l+1 counts": (
                    lambda v: v.delta_next[:, [0]] * v.w_next[0]
                ),
                "the error is shared out by each weight's share of their sum, and BP2 multiplies "
                "by the weight itself": _shared_out(1),
                "the error is shared out by each weight's share of the sum into layer l+1, and BP2 "
                "multiplies by the weight itself": _shared_out(0),
                "|w| where w belongs: the sign counts": lambda v: v.delta_next @ v.w_next.abs(),
                "delta_next is missing: that is a sum of weights alone": (
                    lambda v: v.w_next.sum(0)
                ),
                "summed over the samples: each keeps its own error": (
                    lambda v: (v.delta_next @ v.w_next).sum(0)
                ),
                "w_next and delta_next are multiplied element by element, where a matrix product "
                "belongs": lambda v: v.delta_next * v.w_next,
            },
            slopes(lambda v: v.z),
            {
                "": lambda _: 1.0,
                "divided by N = {N}: the 1/N of the cost is already in delta_next": (
                    lambda v: 1 / v.sizes["N"]
                ),
                "divided by {out}, the number of neurons of layer l+1: BP2 sums over them": (
                    lambda v: 1 / v.sizes["out"]
                ),
                "the sign is wrong": lambda _: -1.0,
            },
        ),
        Mistake(
            "σ'(z^l) is multiplied before the weights: it belongs to layer l, so it comes after "
            "them",
            lambda v: (v.delta_next * slope(v.z.sigmoid())) @ v.w_next,
        ),
        Mistake(
            "a matrix product where ⊙, element by element, belongs",
            lambda v: v.delta_next @ v.w_next @ slope(v.z.sigmoid()),
        ),
        Mistake(
            "σ'(z) is added, where ⊙ multiplies",
            lambda v: v.delta_next @ v.w_next + slope(v.z.sigmoid()),
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
    mistakes=combined(
        lambda total, factor: total * factor,
        {
            "": lambda v: v.delta.sum(0),
            "summed over the wrong axis: over the neurons (axis {over_neurons}), not the samples "
            "(axis {over_samples})": lambda v: v.delta.sum(1),
            "averaged over the neurons (axis {over_neurons}): BP3 is a sum over the samples (axis "
            "{over_samples})": lambda v: v.delta.mean(1),
            "the sum over the samples is missing: all {N} of them use the same b": (
                lambda v: v.delta
            ),
            "summed over all neurons as well: each neuron has a ∂C/∂b of its own": (
                lambda v: v.delta.sum()
            ),
            "only the last sample counts (is there an = where += belongs?)": lambda v: v.delta[-1],
            "only the first sample counts (is the return inside the loop?)": lambda v: v.delta[0],
            "the squares are summed": lambda v: v.delta.square().sum(0),
            "the absolute values are summed: the sign counts": lambda v: v.delta.abs().sum(0),
            "the largest is taken, where the sum belongs": lambda v: v.delta.amax(0),
            "delta is not used: for a batch, BP3 sums it over the samples": (
                lambda v: torch.ones_like(v.delta[0])
            ),
        },
        sums(),
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
    mistakes=combined(
        lambda product, factor: product * factor,
        {
            "": lambda v: v.delta.mT @ v.a_prev,
            "the transpose of what is asked for: grad_w has the shape of w, (out, in)": (
                lambda v: v.a_prev.mT @ v.delta
            ),
            "only the last sample counts (is there an = where += belongs?)": (
                lambda v: torch.outer(v.delta[-1], v.a_prev[-1])
            ),
            "only the first sample counts (is the return inside the loop?)": (
                lambda v: torch.outer(v.delta[0], v.a_prev[0])
            ),
            "a product of sums over the samples, where the sum of each sample's own product "
            "belongs": lambda v: torch.outer(v.delta.sum(0), v.a_prev.sum(0)),
            "a product of means over the samples, where the sum of each sample's own product "
            "belongs": lambda v: torch.outer(v.delta.mean(0), v.a_prev.mean(0)),
            "the sum over the samples is missing: these are the {N} gradients of single samples": (
                lambda v: v.delta[:, :, None] * v.a_prev[:, None]
            ),
            "element by element, where a matrix product belongs: every neuron j meets every "
            "neuron k": lambda v: v.delta * v.a_prev,
            "a (1 − a) where a belongs: BP4 takes the activations themselves": (
                lambda v: v.delta.mT @ slope(v.a_prev)
            ),
            "σ(a) where a belongs: a_prev is an activation already": (
                lambda v: v.delta.mT @ v.a_prev.sigmoid()
            ),
            "a_prev is missing: that is BP3 in every column": (
                lambda v: v.delta.sum(0)[:, None].expand(-1, v.a_prev.shape[1])
            ),
            "one number: every neuron j and every neuron k have a weight of their own": (
                lambda v: (v.delta * v.a_prev).sum()
            ),
        },
        sums(),
    ),
    where="manual_bp/layers/linear.py",
)
