import json
import re
from pathlib import Path

import pytest
import torch

from experiments.walk.__main__ import Config, invent, write
from experiments.walk.page import page
from tests.experiments.walk.browser import needs_chromium, watch


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


def framed(width: int, height: int) -> str:
    """A page with the walk in a frame: a window of Chromium is never narrower than 500 pixels."""
    frame = f'<iframe src="walk.html" width="{width}" height="{height}"></iframe>'
    return f"<title>A frame</title><body>{frame}</body>"


@needs_chromium
@pytest.mark.parametrize(
    ("width", "height", "scrolls_down"), [(390, 844, True), (1280, 800, False)]
)
def test_a_telephone_and_a_laptop_show_every_number_without_scrolling_sideways(
    width: int, height: int, scrolls_down: bool, text: str, tmp_path: Path
) -> None:
    (tmp_path / "walk.html").write_text(text, encoding="utf-8")
    found = watch(
        framed(width, height),
        """
        const inside = at("iframe").contentWindow;
        const root = inside.document.documentElement;
        return [...Array(19).keys()].map((k) => {
          inside.go(k);
          const cut = all("figure, .equation", inside.document).filter((each) =>
            each.getBoundingClientRect().right > root.clientWidth);
          const cells = all("td", inside.document);
          const fonts = cells.map((cell) => parseFloat(getComputedStyle(cell).fontSize));
          const full = cells.filter((cell) => cell.scrollWidth > cell.clientWidth);
          return {
            room: root.clientWidth, width: root.scrollWidth, cut: cut.length, full: full.length,
            font: Math.min(...fonts), down: root.scrollHeight > root.clientHeight,
          };
        });
        """,
        tmp_path,
    )
    assert all(width - 40 < step["room"] == step["width"] <= width for step in found)
    assert not any(step["cut"] or step["full"] for step in found)
    assert min(step["font"] for step in found) >= 8.5
    assert any(step["down"] for step in found) is scrolls_down


@needs_chromium
def test_numbers_that_have_no_room_on_a_telephone_are_hidden(tmp_path: Path) -> None:
    """Not shown in a size that nobody can read, or beyond the edge."""
    text, _ = write(wide := Config(batch_size=20), invent(wide))
    (tmp_path / "walk.html").write_text(text, encoding="utf-8")
    found = watch(
        framed(390, 844),
        """
        const inside = at("iframe").contentWindow;
        inside.go(1);
        const root = inside.document.documentElement;
        return [all(".bare", inside.document).length, root.scrollWidth <= root.clientWidth];
        """,
        tmp_path,
    )
    assert found == [1, True]  # in the notes; in the code, samples are rows
