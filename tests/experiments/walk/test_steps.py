from pathlib import Path
from typing import Any

import pytest

from experiments.walk.__main__ import Config, invent, write
from manual_bp import backprop
from tests.experiments.walk.browser import needs_chromium, watch


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
