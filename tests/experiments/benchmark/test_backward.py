from experiments.benchmark.backward import autograd_passes, bare_passes
from experiments.benchmark.problem import problem


def test_forward_and_backward_are_separate_contenders() -> None:
    task = problem((8, 8, 8, 8), 3, "cpu")
    found = bare_passes(task) + autograd_passes(task)
    assert [contender.name for contender in found] == [
        f"{who}, {which}" for who in ("products", "autograd") for which in ("forward", "backward")
    ]
    for contender in found:
        contender.call()
        contender.call()  # backward can be repeated
