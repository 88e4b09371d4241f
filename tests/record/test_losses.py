"""The reduction of a cost, if its last step shows it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import manual_bp
from manual_bp import (
    QuadraticCost,
    SigmoidCrossEntropyCost,
    SoftmaxCrossEntropyCost,
    record,
)
from tests.record.recording import (
    recorded,
)
from tests.record.test_samples import Towers


class TestReduction:
    @pytest.mark.parametrize("told", ["mean", "sum"])
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda r: lambda z: F.mse_loss(z, torch.zeros_like(z), reduction=r),
            lambda r: lambda z: F.binary_cross_entropy_with_logits(z, z.detach() * 0, reduction=r),
            lambda r: lambda z: F.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction=r),
            lambda r: lambda z: QuadraticCost(r)(z, torch.zeros_like(z)),
            lambda r: lambda z: SigmoidCrossEntropyCost(r)(z, torch.zeros_like(z)),
            lambda r: lambda z: SoftmaxCrossEntropyCost(r)(z, torch.zeros(4, dtype=torch.long)),
            lambda r: lambda z: getattr(z.square().sum(-1), r)(),
            lambda r: lambda z: getattr(z.square(), r)(),
            lambda r: lambda z: F.l1_loss(z, z.detach() + 1, reduction=r).mean(),
        ],
    )  # fmt: skip
    def test_a_reduction_that_the_cost_shows_to_be_wrong_is_refused(
        self, cost_of: Any, told: Any
    ) -> None:
        net = nn.Sequential(nn.Linear(3, 2))
        x = torch.randn(4, 3)
        recorded(net, x, cost_of(told), reduction=told)
        other = {"mean": "sum", "sum": "mean"}[told]
        net.zero_grad()
        message = (
            f"reduction must be that of the cost; got '{told}', and a cost that is the {other}"
        )
        with pytest.raises(ValueError, match=message):
            recorded(net, x, cost_of(other), reduction=told)
        assert net[0].weight.grad is None

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: z.square().sum() / 4,
            lambda z: 4 * z.square().sum(-1).mean(),
            lambda z: torch.stack([c.mean() for c in z.square()]).sum(),
            lambda z: z.square().sum(-1).mean() + z.sum(),
            lambda z: torch.einsum("ij,ij->", z, z),
        ],
    )
    def test_the_argument_is_trusted_if_the_cost_does_not_show_its_reduction(
        self, cost_of: Any
    ) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 2), torch.randn(4, 3), cost_of, reduction=told)

    def test_both_are_accepted_for_one_sample(self) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 2), torch.randn(1, 3), lambda z: z.sum(), reduction=told)


class TestMoreOnReductions:
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: (torch.tensor([0.3, 0.7]) * torch.stack([z.mean(), z.square().mean()])).sum(),
            lambda z: (z.square() / 2).sum(),
            lambda z: z.square().mean(0).sum(),
            lambda z: (z.mT @ z - torch.eye(2)).square().sum(),
            lambda z: (z.square().sum(1) * torch.tensor([0.2, 0.8])).sum(),
        ],
    )  # fmt: skip
    def test_sums_of_something_other_than_losses_are_accepted(self, cost_of: Any) -> None:
        """Each with as many terms as there are samples."""
        recorded(nn.Linear(3, 2), torch.randn(2, 3), cost_of)

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: z.square().sum().double(),
            lambda z: z.sigmoid().sub(1).abs().sum(),
            lambda z: manual_bp.leaky_relu(manual_bp.relu(z)).sum(),
            lambda z: F.cross_entropy(z, torch.zeros(4, dtype=torch.long), reduction="none").sum(),
            lambda z: QuadraticCost("none")(z, torch.zeros_like(z)).sum(),
            lambda z: z.square().sum(1).sum().sum(),
        ],
    )
    def test_sums_of_losses_are_recognised(self, cost_of: Any) -> None:
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        recorded(model, x, cost_of, reduction="sum")
        with pytest.raises(ValueError, match="got 'mean', and a cost that is the sum"):
            recorded(model, x, cost_of)


@pytest.mark.parametrize(
    "cost_of",
    [
        lambda z: z.square().sum(0).mean(),
        lambda z: z.abs().sum(-2).mean(),
        lambda z: z.log_softmax(0).square().sum(1).mean(),
    ],
)
def test_costs_that_mix_samples_are_accepted(cost_of: Any) -> None:
    for told in ("mean", "sum"):
        recorded(nn.Linear(3, 2), torch.randn(4, 3), cost_of, reduction=told)


LOG_PROBABILITIES = torch.randn(4, 3).log_softmax(1)


SIGNS = torch.tensor([1.0, -1.0, 1.0, -1.0])


CLASSES = torch.tensor([0, 2, 1, 0])


# Each loss of torch.nn that has a reduction, of z (4, 3), with the arguments that it takes.
LOSSES: dict[str, Callable[[Any], Callable[[Tensor], Tensor]]] = {
    "BCELoss": lambda loss: lambda z: loss(z.sigmoid(), z.detach().sigmoid()),
    "BCEWithLogitsLoss": lambda loss: lambda z: loss(z, z.detach().sigmoid()),
    "CTCLoss": lambda loss: (
        lambda z: loss(
            z.log_softmax(-1).unsqueeze(1).expand(4, 2, 3), torch.ones(2, 2).long(), (4, 4), (1, 2)
        )
    ),
    "CosineEmbeddingLoss": lambda loss: lambda z: loss(z, z.detach() + 1, SIGNS),
    "CrossEntropyLoss": lambda loss: lambda z: loss(z, CLASSES),
    "GaussianNLLLoss": lambda loss: lambda z: loss(z, z.detach() + 1, z.square() + 1),
    "HingeEmbeddingLoss": lambda loss: lambda z: loss(z, SIGNS[:, None].expand(4, 3)),
    "HuberLoss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "KLDivLoss": lambda loss: lambda z: loss(z.log_softmax(1), LOG_PROBABILITIES.exp()),
    "L1Loss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "MSELoss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "MarginRankingLoss": lambda loss: lambda z: loss(z[:, 0], z[:, 1], SIGNS),
    "MultiLabelMarginLoss": lambda loss: lambda z: loss(z, torch.tensor([[0, 1, -1]] * 4)),
    "MultiLabelSoftMarginLoss": lambda loss: lambda z: loss(z, z.detach().sigmoid().round()),
    "MultiMarginLoss": lambda loss: lambda z: loss(z, CLASSES),
    "NLLLoss": lambda loss: lambda z: loss(z.log_softmax(1), CLASSES),
    "PoissonNLLLoss": lambda loss: lambda z: loss(z, z.detach().exp()),
    "SmoothL1Loss": lambda loss: lambda z: loss(z, z.detach() + 1),
    "SoftMarginLoss": lambda loss: lambda z: loss(z, SIGNS[:, None].expand(4, 3)),
    "TripletMarginLoss": lambda loss: lambda z: loss(z, z.detach() + 1, z.detach() - 1),
    "TripletMarginWithDistanceLoss": lambda loss: lambda z: loss(z, z + 1, z.detach() - 1),
}


class TestLossesOfTorch:
    def refuse_the_other(self, cost_of: Any, reduction: Any) -> None:
        model, x = nn.Linear(3, 3), torch.randn(4, 3)
        recorded(model, x, cost_of, reduction=reduction)
        other = {"mean": "sum", "sum": "mean"}[reduction]
        with pytest.raises(ValueError, match=f"got '{other}', and a cost that is the {reduction}"):
            recorded(model, x, cost_of, reduction=other)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize("name", LOSSES)
    # PyTorch warns that KLDivLoss("mean") is the mean over components as well.
    @pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss")
    def test_each_loss_shows_its_reduction(self, name: str, reduction: Any) -> None:
        loss = getattr(nn, name)
        self.refuse_the_other(LOSSES[name](loss(reduction=reduction)), reduction)
        of_none = LOSSES[name](loss(reduction="none"))
        self.refuse_the_other(lambda z: getattr(of_none(z), reduction)(), reduction)
        # With weights of the user's, it may be either.
        for told in ("mean", "sum"):
            model, x = nn.Linear(3, 3), torch.randn(4, 3)
            recorded(model, x, lambda z: (of_none(z) / 4).sum(), reduction=told)

    def test_every_loss_of_pytorch_is_tested(self) -> None:
        others = {"AdaptiveLogSoftmaxWithLoss", "LinearCrossEntropyLoss", "NLLLoss2d"}
        assert {name for name in dir(nn) if name.endswith("Loss")} - others == set(LOSSES)

    @pytest.mark.parametrize("reduction", ["mean", "sum"])
    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda r: lambda z: F.cross_entropy(z, CLASSES, reduction=r, label_smoothing=0.1),
            lambda r: lambda z: F.cross_entropy(z, LOG_PROBABILITIES.exp(), reduction=r),
            lambda r: lambda z: F.poisson_nll_loss(z, z.detach().exp(), reduction=r, full=True),
            lambda r: (
                lambda z: F.kl_div(
                    z.log_softmax(1),
                    LOG_PROBABILITIES,
                    reduction="batchmean" if r == "mean" else r,
                    log_target=True,
                )
            ),
            lambda r: lambda z: F.l1_loss(z, z.detach() + 1, None, None, r),
            lambda r: lambda z: F.huber_loss(z, z.detach() + 1, reduction=r).double(),
        ],
    )
    def test_losses_in_other_forms_show_their_reduction(self, cost_of: Any, reduction: Any) -> None:
        self.refuse_the_other(cost_of(reduction), reduction)

    @pytest.mark.parametrize(
        "cost_of",
        [
            lambda z: F.binary_cross_entropy_with_logits(
                z, z.detach().sigmoid(), weight=torch.tensor(0.25), reduction="sum"
            ),
            lambda z: F.kl_div(z.log_softmax(1), LOG_PROBABILITIES, reduction="sum") / 4,
            lambda z: (
                F.cross_entropy(z, CLASSES, reduction="none").unflatten(0, (4, 1)).sum(0).mean()
            ),
            lambda z: F.mse_loss(z, z.detach() + 1, reduction="sum").mul_(0.25),
        ],
    )
    def test_losses_that_may_be_either_are_accepted(self, cost_of: Any) -> None:
        for told in ("mean", "sum"):
            recorded(nn.Linear(3, 3), torch.randn(4, 3), cost_of, reduction=told)


def test_both_are_accepted_for_one_sample_whatever_runs_first() -> None:
    model, x = Towers(5, "buffer"), torch.randn(1, 4, dtype=torch.float64)
    y = torch.zeros(1, dtype=torch.long)
    with record(model, "mean"):
        model.txt(model.classes())
        F.cross_entropy(model(x), y, reduction="sum").backward()
