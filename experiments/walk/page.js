// Shows the steps. Every number comes from the JSON in the page.

const walk = JSON.parse(document.getElementById("numbers").textContent);
const steps = makeSteps(walk.net);
const element = (id) => document.getElementById(id);
const state = { step: 0, pass: 0, sample: 1 };

// In a step that has a matrix with more cells than this, matrices are painted, without numbers.
const MOST_CELLS = 400;

const toFixed = (value, places) => value.toFixed(places).replace("-", "−");

function short(value) {
  if (!Number.isFinite(value)) return String(value);
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-3 || size >= 1e4)) return value.toExponential(1).replace("-", "−");
  return toFixed(value, size >= 100 ? 0 : size >= 1 || size === 0 ? 2 : 3);
}

// As many digits as the page has.
const digits = (value) => String(Number(value)).replaceAll("-", "−");

// Numbers of one matrix have the same places, so that they can be compared.
function writer(largest) {
  const power = largest > 0 && Number.isFinite(largest) ? Math.floor(Math.log10(largest)) : 0;
  if (power < -4 || power > 3) return (value) => value.toExponential(0).replace("-", "−");
  const places = Math.max(2 - Math.max(power, 0), 1 - power, 0);
  return (value) => (Number.isFinite(value) ? toFixed(value, places) : String(value));
}

// From blue through white to orange; all are light enough for dark text.
function colour(value, largest) {
  if (Number.isNaN(value)) return [190, 190, 190];
  const share = largest > 0 ? Math.min(Math.abs(value) / largest, 1) : 0;
  const end = value < 0 ? [86, 152, 214] : [236, 138, 52];
  return end.map((channel) => Math.round(255 + (channel - 255) * share));
}

const rgb = (value, largest) => `rgb(${colour(value, largest).join(" ")})`;

// ---- Matrices ----

// A matrix as shown in one form. Its cells are (i, j) as shown and at(i, j) is the number there;
// `own` turns (i, j) into the row and column of the JSON, and back.
function lookUp({ name, uses, flip }, form) {
  const [, quantity, layer] = name.match(/^([a-z_]+?)(\d*)$/);
  const about = QUANTITIES[quantity];
  const rows = (walk.passes[state.pass][name] ?? walk.shared[name]).map((row) => row.map(Number));
  const isTurned = (form === "notes" && about.kind !== "weights") !== flip;
  const own = (i, j) => (isTurned ? [j, i] : [i, j]);
  const [height, width] = own(rows.length, rows[0].length);
  const finite = rows.flat().map(Math.abs).filter(Number.isFinite);
  return {
    name, uses, flip, about, layer: Number(layer), height, width, own,
    at: (i, j) => { const [r, c] = own(i, j); return rows[r][c]; },
    largest: finite.reduce((a, b) => Math.max(a, b), 0),
  };
}

function symbol(shown, form) {
  const text = shown.about[form === "notes" ? "html" : "code"](shown.layer);
  const isNew = shown.name.includes("_new") && form === "code" ? " after" : "";
  if (!shown.flip) return text + isNew;
  return form === "notes" ? `(${text})<sup>T</sup>` : `${text}.mT`;
}

function shape(shown, form) {
  if (form === "notes") return `${shown.height} × ${shown.width}`;
  return shown.about.kind === "biases" ? `(${shown.width},)` : `(${shown.height}, ${shown.width})`;
}

// What the cell of a matrix is about, from its row and column in the JSON.
function place(shown, row, column) {
  const sample = state.pass === 0 ? row + 1 : state.pass;
  const from = shown.layer === 1 ? "input" : "neuron";
  return {
    samples: shown.name === "losses" ? `sample ${sample}`
      : `sample ${sample}, ${shown.name === "a0" ? "input" : "neuron"} ${column + 1}`,
    weights: `to neuron ${row + 1} from ${from} ${column + 1}`,
    biases: `neuron ${column + 1}`,
  }[shown.about.kind];
}

function table(shown) {
  const write = writer(shown.largest);
  const body = document.createElement("table");
  for (let i = 0; i < shown.height; i++) {
    const row = body.insertRow();
    for (let j = 0; j < shown.width; j++) {
      const cell = row.insertCell();
      cell.textContent = write(shown.at(i, j));
      cell.style.background = rgb(shown.at(i, j), shown.largest);
    }
  }
  return body;
}

function painting(shown) {
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height] = [shown.width, shown.height];
  const context = canvas.getContext("2d");
  const image = context.createImageData(shown.width, shown.height);
  for (let i = 0; i < shown.height; i++) {
    for (let j = 0; j < shown.width; j++) {
      image.data.set([...colour(shown.at(i, j), shown.largest), 255], 4 * (i * shown.width + j));
    }
  }
  context.putImageData(image, 0, 0);
  return canvas;
}

function draw(shown, form, isResult, isPainted) {
  const figure = document.createElement("figure");
  figure.tabIndex = 0;
  figure.dataset.name = shown.name;
  figure.className = isResult ? "result" : shown.uses ? "used" : "";
  const caption = document.createElement("figcaption");
  caption.innerHTML = `<b>${symbol(shown, form)}</b> <span>${shape(shown, form)}</span>`;
  const picture = document.createElement("div");
  picture.className = "picture";
  const mark = document.createElement("div");
  mark.className = "mark";
  mark.hidden = true;
  picture.append(isPainted ? painting(shown) : table(shown), mark);
  const texts = [...picture.querySelectorAll("td")].map((cell) => cell.textContent.length);
  const letters = Math.max(...texts, 0);
  figure.append(caption, picture);
  figure.setAttribute("role", "group");
  figure.setAttribute("aria-label", `${caption.textContent}; arrow keys read its numbers`);
  Object.assign(shown, { figure, picture, mark, letters, isResult, isPainted, form, cursor: null });
}

// ---- One cell, and what makes it ----

const RANGES = {
  row: (shown, i) => [i, i + 1, 0, shown.width],
  column: (shown, i, j) => [0, shown.height, j, j + 1],
  cell: (shown, i, j) => [i, i + 1, j, j + 1],
  sample: (shown, i, j) => shown.form === "notes" ? RANGES.column(shown, i, j) : RANGES.row(shown, i),
};

function setMark(shown, range) {
  shown.mark.hidden = range === null;
  if (range === null) return;
  const [top, bottom, left, right] = range;
  const style = shown.mark.style;
  style.top = `${(100 * top) / shown.height}%`;
  style.height = `${(100 * (bottom - top)) / shown.height}%`;
  style.left = `${(100 * left) / shown.width}%`;
  style.width = `${(100 * (right - left)) / shown.width}%`;
}

function numbersIn(shown, [top, bottom, left, right]) {
  const found = [];
  for (let i = top; i < bottom; i++) {
    for (let j = left; j < right; j++) found.push(shown.at(i, j));
  }
  return found;
}

// Marks a cell in both forms, and, if it is the result's, the cells that make it.
function point(shown, i, j) {
  const [row, column] = shown.own(i, j);
  for (const panel of panels) {
    for (const other of panel) {
      const isSame = other.name === shown.name;
      setMark(other, isSame ? RANGES.cell(other, ...other.own(row, column)) : null);
    }
    const result = panel.find((other) => other.isResult && other.name === shown.name);
    for (const other of result ? panel.filter((each) => each.uses) : []) {
      setMark(other, RANGES[other.uses](other, ...result.own(row, column)));
    }
  }
  element("readout").innerHTML = describe(shown, i, j);
}

function describe(shown, i, j) {
  const words = place(shown, ...shown.own(i, j));
  const name = shown.about.html(shown.layer);
  const value = `<span class="what">${name}, ${words}</span> <b>${digits(shown.at(i, j))}</b>`;
  const work = steps[state.step].work;
  if (!(work && shown.isResult)) return value;
  const used = panels[shown.form === "notes" ? 0 : 1].filter((each) => each.uses);
  const numbers = used.map((each) => numbersIn(each, RANGES[each.uses](each, i, j)));
  const count = numbers[0].length;
  return `${value} <span class="work">= ${count > 8 ? `a sum of ${count} terms` : work(numbers)}</span>`;
}

function unpoint() {
  for (const shown of panels.flat()) {
    setMark(shown, null);
    shown.cursor = null;
  }
  element("readout").textContent = "Point at a cell, or touch it, to see its number and what makes it.";
}

function listen(shown) {
  const { figure, picture } = shown;
  const onPointer = (event) => {
    const box = picture.getBoundingClientRect();
    const inside = (share, count) => Math.min(Math.max(Math.floor(share * count), 0), count - 1);
    point(shown, inside((event.clientY - box.top) / box.height, shown.height),
      inside((event.clientX - box.left) / box.width, shown.width));
  };
  picture.addEventListener("pointermove", onPointer);
  picture.addEventListener("pointerdown", onPointer);
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") unpoint();
  });
  figure.addEventListener("focus", () => moveCursor(shown, 0, 0));
  figure.addEventListener("blur", unpoint);
  figure.addEventListener("keydown", (event) => {
    const by = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Escape") figure.blur();
    if (!by) return;
    moveCursor(shown, ...by);
    event.preventDefault();
    event.stopPropagation();
  });
}

function moveCursor(shown, down, right) {
  const [i, j] = shown.cursor ?? [0, 0];
  shown.cursor = [Math.min(Math.max(i + down, 0), shown.height - 1),
    Math.min(Math.max(j + right, 0), shown.width - 1)];
  point(shown, ...shown.cursor);
}

// ---- One step ----

let panels = [[], []];

function signElement(sign) {
  const span = document.createElement("span");
  span.className = "sign";
  span.textContent = sign;
  return span;
}

function showForm(id, equation, specs) {
  const form = element(id);
  form.querySelector(".equation").innerHTML = equation;
  const line = form.querySelector(".matrices");
  line.replaceChildren();
  const matrices = specs.map((spec) => (typeof spec === "string" ? spec : lookUp(spec, id)));
  const isPainted = matrices.some(({ height, width }) => height * width > MOST_CELLS);
  for (const shown of matrices) {
    if (typeof shown !== "string") {
      draw(shown, id, shown === matrices.at(-1), isPainted);
      listen(shown);
    }
    line.append(shown.figure ?? signElement(shown));
  }
  return matrices.filter((shown) => shown.figure);
}

// The largest cells with which a form fits into its place; if its numbers do not, they are hidden.
function fit(drawn) {
  const line = drawn[0].figure.parentElement;
  const captions = drawn.map(({ figure }) => figure.firstChild.offsetWidth);
  const between = [...line.querySelectorAll(".sign")].reduce((sum, sign) => sum + sign.offsetWidth, 0) +
    14 * line.children.length;
  const taken = (size) => drawn.reduce(
    (sum, { width }, k) => sum + Math.max(lengthOf(width, size), captions[k]), between);
  let size = 72;
  const smallest = drawn.some((each) => each.isPainted) ? 0.25 : 16;
  while (size > smallest && taken(size) > line.clientWidth) size *= 0.98;
  const height = Math.min(size, 56, roomBelow(line) / Math.max(...drawn.map((each) => each.height)));
  const letters = Math.max(...drawn.map((each) => each.letters));
  const font = Math.min((size - 4) / (0.65 * letters), 0.6 * height, 22);
  line.classList.toggle("bare", font < 9.5);
  line.style.setProperty("--font", `${font}px`);
  for (const { picture, width, height: rows } of drawn) {
    picture.style.width = `${lengthOf(width, size)}px`;
    picture.style.height = `${lengthOf(rows, height)}px`;
  }
}

// Of a side of a matrix, in pixels. Beside a very long matrix, a short one must still be seen.
const lengthOf = (cells, size) => Math.max(cells * size, Math.min(cells * 6, 60), 14);

// Where both forms are side by side, all of a step should be on the screen at once.
function roomBelow(line) {
  const isStacked = element("code").offsetTop > element("notes").offsetTop;
  if (isStacked) return 0.5 * window.innerHeight;
  const top = line.getBoundingClientRect().top + window.scrollY;
  const rest = element("readout").offsetHeight + document.querySelector("footer").offsetHeight;
  return Math.max(window.innerHeight - top - rest - 130, 100);
}

function show() {
  const step = steps[state.step];
  const pass = walk.passes[state.pass];
  document.body.classList.toggle("single", pass.y.length === 1);
  element("title").textContent = step.title;
  element("text").textContent = step.text(pass);
  const math = `<math display="block" data-part="${step.part}"><mrow>${step.math}</mrow></math>`;
  panels = [
    showForm("notes", math, step.notes),
    showForm("code", `<code>${step.code}</code>`, step.rows),
  ];
  panels.forEach(fit);
  element("count").textContent = `${state.step + 1} of ${steps.length}`;
  for (const [id, isEnd] of [["first", 0], ["back", 0], ["next", 1], ["last", 1]]) {
    element(id).disabled = state.step === (isEnd ? steps.length - 1 : 0);
  }
  for (const item of document.querySelectorAll("#parts button")) {
    const isHere = item.textContent === step.part;
    if (isHere) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  }
  element("map").classList.toggle("backward", step.part === "BP1" || step.part === "BP2");
  [...element("map").children].forEach((item, l) => item.classList.toggle("here", l === step.layer));
  element("pass").value = state.pass;
  unpoint();
}

// ---- Where we are: #step=3&sample=2; sample 0 is the whole batch ----

function go(step, pass = state.pass) {
  state.step = Math.min(Math.max(step, 0), steps.length - 1);
  state.pass = Math.min(Math.max(pass, 0), walk.passes.length - 1);
  if (state.pass > 0) state.sample = state.pass;
  history.replaceState(null, "", `#step=${state.step + 1}&sample=${state.pass}`);
  show();
}

function goToAddress() {
  const address = new URLSearchParams(location.hash.slice(1));
  go((Number.parseInt(address.get("step"), 10) || 1) - 1, Number.parseInt(address.get("sample"), 10) || 0);
}

const MOVES = {
  first: () => go(0),
  back: () => go(state.step - 1),
  next: () => go(state.step + 1),
  last: () => go(steps.length - 1),
};
const KEYS = {
  ArrowRight: MOVES.next, PageDown: MOVES.next, ArrowLeft: MOVES.back, PageUp: MOVES.back,
  Home: MOVES.first, End: MOVES.last,
  s: () => walk.passes.length > 1 && go(state.step, state.pass ? 0 : state.sample),
};

function onKey(event) {
  const isOurs = !(event.ctrlKey || event.altKey || event.metaKey || event.target.tagName === "SELECT");
  if (!isOurs || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function makeControls() {
  const { sizes, activation, output, cost, source, samples } = walk.net;
  const words = [`${sizes.join("-")} net`, sizes.length > 2 ? activation : "",
    `${output === "none" ? "no activation at the" : output} output`, `${cost.replaceAll("-", " ")} cost`,
    `${samples} sample${samples > 1 ? "s" : ""}`, source];
  element("net").textContent = words.filter(Boolean).join(", ");
  for (const part of new Set(steps.map((step) => step.part))) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = part;
    button.addEventListener("click", () => go(steps.findIndex((step) => step.part === part)));
    const item = document.createElement("li");
    item.append(button);
    element("parts").append(item);
  }
  sizes.concat(0).forEach((size, l) => {
    const item = document.createElement("li");
    item.textContent = l === 0 ? `input (${size})` : size ? `layer ${l} (${size})` : "C";
    element("map").append(item);
  });
  walk.passes.forEach((pass, k) => {
    const name = k ? `sample ${k}` : samples > 1 ? `the batch of ${samples}` : "the sample";
    element("pass").append(new Option(name, k));
  });
  element("pass").addEventListener("change", (event) => go(state.step, Number(event.target.value)));
  element("choice").hidden = walk.passes.length === 1;
  for (const id in MOVES) element(id).addEventListener("click", MOVES[id]);
}

makeControls();
goToAddress();
window.addEventListener("hashchange", goToAddress);
window.addEventListener("keydown", onKey);
window.addEventListener("resize", () => panels.forEach(fit));
