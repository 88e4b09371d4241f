from pathlib import Path

import torch
from torch import Tensor

from experiments.walk.__main__ import Config, Subject, invent
from manual_bp import backprop
from tests.experiments.walk.browser import needs_chromium, watch


def expected(subject: Subject, rate: float) -> dict[str, Tensor]:
    """The matrices by the page's names, in rows, from `backprop` of a net of two layers."""
    net, x, y, cost, _ = subject
    trace = backprop(net, x, y, cost)
    one, two = trace.layers
    found = {"a0": x, "y": y, "losses": ((trace.output - y) ** 2).sum(1, keepdim=True) / 2}
    found |= {"grad_a": (trace.output - y) / len(x), "back1": two.delta @ two.w}
    for k, layer in ((1, one), (2, two)):
        assert layer.b is not None
        assert layer.grad_w is not None
        assert layer.grad_b is not None
        found |= {f"w{k}": layer.w, f"b{k}": layer.b[None], f"z{k}": layer.z, f"a{k}": layer.a}
        found |= {f"sigma_prime{k}": layer.a * (1 - layer.a), f"delta{k}": layer.delta}
        found |= {f"grad_w{k}": layer.grad_w, f"grad_b{k}": layer.grad_b[None]}
        found[f"w_new{k}"] = layer.w - rate * layer.grad_w
        found[f"b_new{k}"] = layer.b[None] - rate * layer.grad_b[None]
    hidden = torch.sigmoid(x @ found["w_new1"].mT + found["b_new1"])
    found["a_new"] = torch.sigmoid(hidden @ found["w_new2"].mT + found["b_new2"])
    return {name: matrix.detach() for name, matrix in found.items()}


ALL_NUMBERS = """
const shown = [];
for (const option of all("#pass option").filter((each) => "05".includes(each.value))) {
  at("#pass").value = option.value;
  at("#pass").dispatchEvent(new Event("change"));
  press("Home");
  for (;;) {
    for (const figure of all("figure")) {
      const [rows, columns] = shapeOf(figure);
      const pointed = [...Array(rows).keys()].map((i) => [...Array(columns).keys()].map((j) => {
        pointAt(figure, i, j, rows, columns);
        return text("#readout b");
      }));
      shown.push({
        pass: Number(option.value), form: figure.closest("section").id, name: figure.dataset.name,
        symbol: figure.querySelector("b").textContent, pointed,
        cells: all("tr", figure).map((row) => all("td", row).map((cell) => cell.textContent)),
      });
    }
    if (at("#next").disabled) break;
    press("ArrowRight");
  }
}
return shown;
"""


def numbers(rows: list[list[str]]) -> Tensor:
    return torch.tensor([[float(number.replace("−", "-")) for number in row] for row in rows])


@needs_chromium
def test_every_number_in_both_forms_is_that_of_backprop(text: str, tmp_path: Path) -> None:
    subject = invent(Config())
    rows = [(subject.x[i, None], subject.y[i, None]) for i in range(len(subject.x))]
    passes = [subject, *(subject._replace(x=x, y=y) for x, y in rows)]
    right = [expected(each, Config().learning_rate) for each in passes]
    shown = watch(text, ALL_NUMBERS, tmp_path)
    names = {each["name"] for each in shown}
    assert names == set(right[0])
    assert {each["pass"] for each in shown} == {0, 5}
    for each in shown:
        name, is_notes = each["name"], each["form"] == "notes"
        matrix = right[each["pass"]][name]
        is_weights = name.rstrip("12") in ("w", "grad_w", "w_new")
        is_flipped = each["symbol"].endswith((".mT", ")T"))
        if (is_notes and not is_weights) != is_flipped:
            matrix = matrix.mT
        torch.testing.assert_close(numbers(each["pointed"]), matrix, rtol=1e-5, atol=2e-7)
        places = len(each["cells"][0][0].partition(".")[2])
        cells = numbers(each["cells"])
        torch.testing.assert_close(cells, matrix, rtol=0, atol=0.5001 * 10**-places)


@needs_chromium
def test_a_number_that_is_rounded_to_0_has_no_sign(text: str, tmp_path: Path) -> None:
    found = watch(
        text,
        """
        const written = (largest, ...values) => values.map(writer(largest));
        return [
          written(1, -0.001, -0.0049, -0, 0, 0.004), written(1, -0.0051, 0.0051),
          written(100, -0.4, -0.6), written(0.01, -0.0004, -0.0006), written(1e5, -1e-9, -0),
        ];
        """,
        tmp_path,
    )
    assert found == [
        ["0.00"] * 5,
        ["−0.01", "0.01"],
        ["0", "−1"],
        ["0.000", "−0.001"],
        ["−1e−9", "0e+0"],
    ]


@needs_chromium
def test_a_number_of_a_result_marks_what_makes_it_in_both_forms(text: str, tmp_path: Path) -> None:
    marks = watch(
        text,
        """
        const marks = {};
        for (const [step, name, i, j] of [
          [2, "z1", 2, 3], [8, "delta2", 1, 4], [9, "back1", 2, 3], [11, "grad_b2", 1, 0],
          [14, "grad_w1", 2, 3], [15, "w_new1", 2, 1], [7, "grad_a", 1, 2], [6, "losses", 0, 4],
        ]) {
          go(step - 1);
          const figure = at(`#notes [data-name=${name}]`);
          pointAt(figure, i, j, ...shapeOf(figure));
          marks[name] = ["notes", "code"].map((form) => Object.fromEntries(
            all(`#${form} figure`).map((each) => [each.dataset.name, marked(each)])));
          marks[name].push(text("#readout"));
        }
        return marks;
        """,
        tmp_path,
    )
    # [rows from, rows to, columns from, columns to]
    notes, code, said = marks["z1"]
    assert notes == {"w1": [2, 3, 0, 4], "a0": [0, 4, 3, 4], "b1": [2, 3, 0, 1], "z1": [2, 3, 3, 4]}
    assert code == {"w1": [0, 4, 2, 3], "a0": [3, 4, 0, 4], "b1": [0, 1, 2, 3], "z1": [3, 4, 2, 3]}
    assert said.startswith("z1, sample 4, neuron 3 ")
    assert len(said.partition("= ")[2].split(" · ")) == 5
    notes, code, said = marks["delta2"]
    assert set(map(tuple, notes.values())) == {(1, 2, 4, 5)}
    assert set(map(tuple, code.values())) == {(4, 5, 1, 2)}
    notes, code, _ = marks["back1"]
    assert notes == {"w2": [2, 3, 0, 2], "delta2": [0, 2, 3, 4], "back1": [2, 3, 3, 4]}
    assert code == {"delta2": [3, 4, 0, 2], "w2": [0, 2, 2, 3], "back1": [3, 4, 2, 3]}
    notes, code, said = marks["grad_b2"]
    assert notes == {"delta2": [1, 2, 0, 5], "grad_b2": [1, 2, 0, 1]}
    assert code == {"delta2": [0, 5, 1, 2], "grad_b2": [0, 1, 1, 2]}
    assert said.count(" + ") == 4
    notes, code, said = marks["grad_w1"]
    assert notes == code == {"delta1": [2, 3, 0, 5], "a0": [0, 5, 3, 4], "grad_w1": [2, 3, 3, 4]}
    assert said.startswith("∂C/∂w1, to neuron 3 from input 4 ")
    assert " − 3 · " in marks["w_new1"][2]
    assert set(map(tuple, marks["grad_a"][1].values())) == {(2, 3, 1, 2)}
    assert marks["losses"][1] == {"a2": [4, 5, 0, 2], "y": [4, 5, 0, 2], "losses": [4, 5, 0, 1]}


@needs_chromium
def test_in_a_matrix_arrow_keys_move_from_cell_to_cell(text: str, tmp_path: Path) -> None:
    found = watch(
        text,
        """
        const figure = at("#notes figure.result");
        const here = () => [location.hash, marked(figure), text("#readout .what")];
        figure.focus();
        const seen = [here()];
        for (const key of ["Right", "Down", "Left", "Left", "Up", "Up"]) {
          press(`Arrow${key}`);
          seen.push(here());
        }
        press("Escape");
        seen.push([document.activeElement === document.body, marked(figure)]);
        figure.focus();
        press("PageDown");
        seen.push(location.hash);
        press("ArrowRight", { altKey: true });  // which is the browser's own
        seen.push(location.hash);
        return seen;
        """,
        tmp_path,
        "#step=2&sample=0",
    )
    assert {address for address, *_ in found[:7]} == {"#step=2&sample=0"}
    places = [(mark[0], mark[2]) for _, mark, _ in found[:7]]
    assert places == [(0, 0), (0, 1), (1, 1), (1, 0), (1, 0), (0, 0), (0, 0)]
    assert found[2][2] == "z1, sample 2, neuron 2"
    assert found[7:] == [[True, None], "#step=3&sample=0", "#step=3&sample=0"]
