// Shows the steps: which one, for which samples, and how large.

const walk = JSON.parse(element("numbers").textContent);
const steps = makeSteps(walk.net);
const state = { step: 0, pass: 0, sample: 1 };

function signElement(sign) {
  const span = document.createElement("span");
  span.className = "sign";
  span.textContent = sign;
  return span;
}

// A matrix with the sign before it.
function newTerm() {
  const term = document.createElement("span");
  term.className = "term";
  return term;
}

function showForm(id, equation, specs) {
  const form = element(id);
  form.querySelector(".equation").innerHTML = equation;
  const line = form.querySelector(".matrices");
  line.replaceChildren();
  const matrices = specs.map((spec) => (typeof spec === "string" ? spec : lookUp(spec, id)));
  const isPainted = matrices.some(({ height, width }) => height * width > MOST_CELLS);
  let term = newTerm();
  for (const shown of matrices) {
    if (typeof shown === "string") {
      term.append(signElement(shown));
      continue;
    }
    draw(shown, id, shown === matrices.at(-1), isPainted);
    listen(shown);
    term.append(shown.figure);
    line.append(term);
    term = newTerm();
  }
  return matrices.filter((shown) => shown.figure);
}

// In pixels. Smaller numbers cannot be read; larger ones do not make a wrapped form clearer.
const [SMALLEST_FONT, WRAPPED_FONTS] = [8.5, [13, 11, 9]];

// The largest cells with which a form fits into its place: in one line, or else wrapped. If its
// numbers fit in neither way, they are hidden.
function fit(drawn) {
  const line = drawn[0].figure.closest(".matrices");
  if (layOut(line, drawn)) return;
  for (const font of WRAPPED_FONTS) {
    if (layOut(line, drawn, font) && isOnScreen(line, drawn)) return;
  }
  layOut(line, drawn);
}

// Lays a form out, wrapped if a font is given, and returns whether its numbers can be read.
function layOut(line, drawn, wrappedFont = 0) {
  line.classList.toggle("wrapped", wrappedFont > 0);
  const letters = Math.max(...drawn.map((each) => each.letters));
  const size = wrappedFont
    ? Math.min(sizeAlone(line, drawn), 4 + 0.67 * letters * wrappedFont) : sizeInLine(line, drawn);
  const height = wrappedFont
    ? Math.min(size, 2 * wrappedFont + 2) : heightInLine(line, drawn, size);
  const font = Math.min((size - 4) / (0.67 * letters), 0.6 * height, 22);
  line.classList.toggle("bare", font < SMALLEST_FONT);
  line.style.setProperty("--font", `${font}px`);
  for (const { picture, width, height: rows } of drawn) {
    picture.style.width = `${lengthOf(width, size)}px`;
    picture.style.height = `${lengthOf(rows, height)}px`;
  }
  return font >= SMALLEST_FONT;
}

// The width of a cell with which all matrices stand in one line.
function sizeInLine(line, drawn) {
  const captions = drawn.map(({ figure }) => figure.firstChild.offsetWidth);
  const signs = [...line.querySelectorAll(".sign")].map((sign) => sign.offsetWidth);
  const between = signs.reduce((sum, width) => sum + width, 14 * (drawn.length + signs.length));
  const taken = (size) => drawn.reduce(
    (sum, { width }, k) => sum + Math.max(lengthOf(width, size), captions[k]), between);
  // A few columns stay large enough for a finger, even if the form must then be scrolled.
  const columns = drawn.reduce((sum, { width }) => sum + width, 0);
  const smallest = columns > 24 ? 0.25 : 16;
  let size = 72;
  while (size > smallest && taken(size) > line.clientWidth) size *= 0.98;
  return size;
}

// The width of a cell with which each matrix, with its sign, has a line of its own.
function sizeAlone(line, drawn) {
  return Math.min(...drawn.map(({ figure, width }) => {
    const sign = figure.previousSibling?.offsetWidth ?? 0;
    return (line.clientWidth - sign - 28) / width;
  }));
}

function heightInLine(line, drawn, size) {
  const tallest = Math.max(...drawn.map((each) => each.height));
  return Math.min(size, 56, roomForNumbers(line) / tallest);
}

// Of a side of a matrix, in pixels. Beside a very long matrix, a short one must still be seen.
const lengthOf = (cells, size) => Math.max(cells * size, Math.min(cells * 6, 60), 14);

// Where both forms are side by side, all of a step should be on the screen at once.
const isStacked = () => element("code").offsetTop > element("notes").offsetTop;

function roomBelow(line) {
  const top = line.getBoundingClientRect().top + window.scrollY;
  return window.innerHeight - top - document.querySelector("footer").offsetHeight;
}

function roomForNumbers(line) {
  return isStacked() ? 0.5 * window.innerHeight : Math.max(roomBelow(line) - 120, 100);
}

function isOnScreen(line, drawn) {
  const boxes = drawn.map(({ figure }) => figure.getBoundingClientRect());
  const [top, bottom] = [Math.min(...boxes.map((box) => box.top)),
    Math.max(...boxes.map((box) => box.bottom))];
  return isStacked() || bottom - top <= roomBelow(line) - 40;
}

function show() {
  const step = steps[state.step];
  const pass = walk.passes[state.pass];
  document.body.classList.toggle("single", pass.y.length === 1);
  element("title").textContent = step.title;
  element("text").textContent = step.text(pass);
  const math = `<math display="block"><mrow>${step.math}</mrow></math>`;
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
  for (const [l, item] of [...element("map").children].entries()) {
    item.classList.toggle("here", l === step.layer);
  }
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
  const number = (name, otherwise) => Number.parseInt(address.get(name), 10) || otherwise;
  go(number("step", 1) - 1, number("sample", 0));
}

const MOVES = {
  first: () => go(0),
  back: () => go(state.step - 1),
  next: () => go(state.step + 1),
  last: () => go(steps.length - 1),
};
const changePass = () => walk.passes.length > 1 && go(state.step, state.pass ? 0 : state.sample);
const KEYS = {
  ArrowRight: MOVES.next, PageDown: MOVES.next, ArrowLeft: MOVES.back, PageUp: MOVES.back,
  Home: MOVES.first, End: MOVES.last, s: changePass, S: changePass,
};

function onKey(event) {
  const isBrowsers = event.ctrlKey || event.altKey || event.metaKey;
  if (isBrowsers || event.target.tagName === "SELECT" || !(event.key in KEYS)) return;
  event.preventDefault();
  KEYS[event.key]();
}

function makeControls() {
  const { sizes, activation, output, cost, source, samples } = walk.net;
  const words = [`${sizes.join("-")} net`, sizes.length > 2 ? activation : "",
    `${output === "none" ? "no activation at the" : output} output`,
    `${cost.replaceAll("-", " ")} cost`, `${samples} sample${samples > 1 ? "s" : ""}`, source];
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
