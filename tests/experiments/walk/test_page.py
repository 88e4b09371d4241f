import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments.walk.__main__ import Config, Subject, invent, write
from experiments.walk.page import page
from manual_bp import backprop
from tests.experiments.walk.browser import needs_chromium, watch

CONFIG = Config()


@pytest.fixture(scope="module")
def text() -> str:
    return write(CONFIG, invent(CONFIG))[0]


def test_the_page_asks_for_nothing_else(text: str) -> None:
    assert "http" not in text.replace("http-equiv", "")
    assert not re.search(
        r"@import|url\(|fetch\(|XMLHttp|import\(|<script src|<link rel=.style", text
    )
    policy = re.search(r'content="(default-src[^"]*)"', text)
    assert policy is not None
    assert policy[1] == (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )


def test_no_text_can_end_the_script_that_holds_the_numbers() -> None:
    source = "</script><script>alert(1)</script>"
    made = page({"source": source}, {}, [])
    assert source not in made
    numbers = re.search(r'id="numbers">(.*?)</script>', made)
    assert numbers is not None
    assert json.loads(numbers[1])["net"]["source"] == source


def test_infinite_numbers_and_nan_are_kept() -> None:
    made = page({}, {"w1": torch.tensor([[torch.inf, -torch.inf, torch.nan, 1 / 3]])}, [])
    assert '"w1":[["Infinity","-Infinity","NaN",0.333333]]' in made


@needs_chromium
def test_keys_and_buttons_reach_every_step(text: str, tmp_path: Path) -> None:
    found = watch(
        text,
        """
        const seen = [], back = [], buttons = [];
        const here = () =>
          [text("#title"), text("#parts [aria-current]"), text("#count"), location.hash];
        seen.push(here());
        while (!at("#next").disabled) {
          press(seen.length % 2 ? "ArrowRight" : "PageDown");
          seen.push(here());
        }
        press("ArrowRight");
        const afterLast = here();
        while (!at("#back").disabled) {
          press(back.length % 2 ? "ArrowLeft" : "PageUp");
          back.push(here());
        }
        press("End"); const end = here();
        press("Home"); const home = here();
        buttons.push(here());
        while (!at("#next").disabled) { at("#next").click(); buttons.push(here()); }
        at("#back").click(); const oneBack = here();
        at("#first").click(); const first = here();
        at("#last").click(); const last = here();
        const parts = all("#parts button").map((button) => { button.click(); return here(); });
        return { seen, afterLast, back, end, home, buttons, oneBack, first, last, parts };
        """,
        tmp_path,
    )
    seen = found["seen"]
    parts = ["Input", *["Forward"] * 4, "Cost", *["BP1"] * 2, *["BP2"] * 2, *["BP3"] * 2]
    assert [part for _, part, *_ in seen] == [*parts, *["BP4"] * 2, *["Step"] * 5]
    assert len({title for title, *_ in seen}) == len(seen) == 19
    assert [count for *_, count, _ in seen] == [f"{k} of 19" for k in range(1, 20)]
    assert [address for *_, address in seen] == [f"#step={k}&sample=0" for k in range(1, 20)]
    assert found["back"] == seen[-2::-1]
    assert found["buttons"] == seen
    assert found["afterLast"] == found["end"] == found["last"] == seen[-1]
    assert found["home"] == found["first"] == seen[0]
    assert found["oneBack"] == seen[-2]
    assert found["parts"] == [seen[k] for k in (0, 1, 5, 6, 8, 10, 12, 14)]


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
    subject = invent(CONFIG)
    rows = [(subject.x[i, None], subject.y[i, None]) for i in range(len(subject.x))]
    passes = [subject, *(subject._replace(x=x, y=y) for x, y in rows)]
    right = [expected(each, CONFIG.learning_rate) for each in passes]
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
def test_the_factors_in_use_are_lit(text: str, tmp_path: Path) -> None:
    lit = watch(
        text,
        """
        const inForm = (form, kind) =>
          all(`#${form} .equation [data-term=${kind}]`).map((term) => term.textContent);
        const captions = (form, kind) =>
          all(`#${form} figure.${kind} b`).map((caption) => caption.textContent);
        return [...Array(19).keys()].map((k) => {
          go(k);
          const background = getComputedStyle(at(".equation [data-term=used]")).backgroundColor;
          return {
            used: [inForm("notes", "used"), inForm("code", "used")],
            result: [inForm("notes", "result"), inForm("code", "result")],
            later: [inForm("notes", "later"), inForm("code", "later")],
            captions: [captions("notes", "used"), captions("code", "used")],
            background, isMath: Boolean(at("#notes .equation math")),
          };
        });
        """,
        tmp_path,
    )
    assert all(step["isMath"] and step["background"] == "rgb(255, 233, 138)" for step in lit)
    assert all(step["used"][1] or step["result"][1] for step in lit)
    forward, first_half, second_half = lit[1], lit[8], lit[9]
    assert forward["used"] == [["w1", "a0", "b1"], ["a[0]", "w[1].mT", "b[1]"]]
    assert forward["captions"] == forward["used"]
    assert first_half["used"] == [["((w2)Tδ2)"], ["(delta[2] @ w[2])"]]
    assert first_half["later"] == [["δ1", "σ′(z1)"], ["delta[1]", "sigma_prime(1)"]]
    assert second_half["used"][1] == ["(delta[2] @ w[2])", "sigma_prime(1)"]
    assert second_half["result"] == [["δ1"], ["delta[1]"]]
    assert second_half["later"] == [[], []]


@needs_chromium
def test_a_switch_shows_one_sample_or_the_batch(text: str, tmp_path: Path) -> None:
    found = watch(
        text,
        """
        const here = () => ({
          address: location.hash, choice: at("#pass").selectedOptions[0].textContent,
          shapes: all("figure").map((figure) => shapeOf(figure)),
          sum: getComputedStyle(at("math .batch")).display,
        });
        const seen = [here()];
        press("s"); seen.push(here());
        press("s"); seen.push(here());
        at("#pass").value = "3"; at("#pass").dispatchEvent(new Event("change")); seen.push(here());
        press("s"); press("s"); seen.push(here());
        at("#pass").focus(); press("ArrowRight"); seen.push(here());  // the select's own key
        at("#pass").blur();
        press("Home");
        return seen.concat({ options: all("#pass option").map((option) => option.textContent) });
        """,
        tmp_path,
        "#step=12&sample=0",
    )
    batch, first, again, third, toggled, in_select, last = found
    assert batch["choice"] == "the batch of 5"
    assert batch["shapes"] == [[3, 5], [3, 1], [5, 3], [1, 3]]
    assert batch["sum"] != "none"
    assert first["choice"] == "sample 1"
    assert first["shapes"] == [[3, 1], [3, 1], [1, 3], [1, 3]]
    assert first["sum"] == "none"
    assert again == batch
    assert third["choice"] == "sample 3"
    assert third["address"] == "#step=12&sample=3"
    assert toggled == in_select == third
    assert last["options"] == ["the batch of 5", *(f"sample {k}" for k in range(1, 6))]


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


@needs_chromium
def test_everything_has_a_name_for_a_screen_reader(text: str, tmp_path: Path) -> None:
    found = watch(
        text,
        """
        return {
          buttons: all("button").filter((button) => !button.textContent.trim()).length,
          figures: all("figure").map((each) => [each.tabIndex, each.getAttribute("aria-label")]),
          labelled: at("#pass").labels.length,
          live: all("[aria-live=polite]").map((each) => each.id),
          sections: all("section").map((each) =>
            document.getElementById(each.getAttribute("aria-labelledby")).textContent),
          language: document.documentElement.lang, headings: all("h1").length,
          resources: performance.getEntriesByType("resource").map((each) => each.name),
        };
        """,
        tmp_path,
        "#step=2",
    )
    assert found["buttons"] == 0
    assert found["figures"][0] == [0, "w1 3 × 4; arrow keys read its numbers"]
    assert all(stop == 0 and label for stop, label in found["figures"])
    assert found["labelled"] == 1
    assert found["live"] == ["step", "readout"]
    assert [title.split()[:3] for title in found["sections"]] == [
        ["In", "the", "notes"],
        ["In", "the", "code"],
    ]
    assert (found["language"], found["headings"]) == ("en", 1)
    assert found["resources"] == []


@needs_chromium
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"sizes": (64, 30, 10), "cost": "softmax-cross-entropy", "activation": "relu"}, 17),
        ({"sizes": (2, 1), "cost": "sigmoid-cross-entropy", "batch_size": 1}, 9),
    ],
)
def test_other_nets_and_costs_have_all_their_steps(
    options: dict[str, Any], steps: int, tmp_path: Path
) -> None:
    config = Config(**options)
    subject = invent(config)
    found = watch(
        write(config, subject)[0],
        """
        const seen = [];
        for (;;) {
          seen.push([text("#title"), text("#text"), all("canvas").length, all("td").length]);
          if (at("#next").disabled) break;
          press("ArrowRight");
        }
        const cut = seen.map((_, k) => {
          go(k);
          return all(".matrices").filter((line) => line.scrollWidth > line.clientWidth).length;
        });
        go(1);
        const figure = at("#code figure");  // a[0]
        pointAt(figure, 0, 1, ...shapeOf(figure));
        return { seen, cut, a: text("#readout b"), isChoice: !at("#choice").hidden };
        """,
        tmp_path,
    )
    assert len(found["seen"]) == steps
    assert found["cut"] == [0] * steps  # all matrices are on the screen
    assert all(canvases * cells == 0 < canvases + cells for *_, canvases, cells in found["seen"])
    assert (found["seen"][1][2] > 0) == (config.sizes[0] == 64)
    assert float(found["a"].replace("−", "-")) == pytest.approx(subject.x[0, 1].item(), rel=1e-5)
    assert found["isChoice"] == (config.batch_size > 1)
    cost = backprop(*subject[:4]).cost.item()
    assert f"C = {cost:.6g}." in next(
        text for title, text, *_ in found["seen"] if title == "The cost"
    )


@needs_chromium
def test_a_telephone_needs_no_scrolling_sideways(text: str, tmp_path: Path) -> None:
    (tmp_path / "walk.html").write_text(text, encoding="utf-8")
    # A window of Chromium is never narrower than 500 pixels, but a frame is.
    frame = '<iframe src="walk.html" width="390" height="844"></iframe>'
    found = watch(
        f"<title>A telephone</title><body>{frame}</body>",
        """
        const inside = at("iframe").contentWindow;
        const root = inside.document.documentElement;
        return [...Array(19).keys()].map((k) => {
          inside.go(k);
          const cut = all("figure, .equation", inside.document).filter((each) =>
            each.getBoundingClientRect().right > root.clientWidth);
          return [root.clientWidth, root.scrollWidth, cut.length];
        });
        """,
        tmp_path,
    )
    assert all(350 < room == width <= 390 for room, width, _ in found)
    assert sum(cut for *_, cut in found) == 0
