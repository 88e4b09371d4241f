// Draws matrices, and shows what makes each of their numbers. Only numbers of the page are shown.

const element = (id) => document.getElementById(id);

// In a step that has a matrix with more cells than this, matrices are painted, without numbers.
const MOST_CELLS = 400;

// The matrices on the screen: those of the notes, then those of the code.
let panels = [[], []];

const withSigns = (text) => text.replaceAll("-", "−").replace("Infinity", "∞");

// As many digits as the page has.
const digits = (value) => withSigns(String(Number(value)));

// To three digits.
function short(value) {
  const size = Math.abs(value);
  if (!Number.isFinite(value)) return digits(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e4)) return withSigns(value.toExponential(2));
  const power = size === 0 ? 0 : Math.floor(Math.log10(size));
  return withSigns(value.toFixed(Math.min(Math.max(2 - power, 0), 6)));
}

// Numbers of one matrix have the same places, so that they can be compared.
function writer(largest) {
  const power = largest > 0 ? Math.floor(Math.log10(largest)) : 0;
  const isExtreme = power < -4 || power > 3;
  const places = Math.max(2 - Math.max(power, 0), 1 - power, 0);
  return (value) => {
    if (!Number.isFinite(value)) return digits(value);
    const text = isExtreme ? value.toExponential(0) : value.toFixed(places);
    return withSigns(Number(text) === 0 ? text.replace("-", "") : text);  // 0.00, not -0.00
  };
}

// From blue through white to orange; all are light enough for dark text.
function colour(value, largest) {
  if (Number.isNaN(value)) return [190, 190, 190];
  const share = value === 0 ? 0 : Math.min(Math.abs(value) / largest, 1);
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
  sample: (shown, i, j) => RANGES[shown.form === "notes" ? "column" : "row"](shown, i, j),
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
  const made = count > 8 ? `a sum of ${count} terms` : work(numbers);
  return `${value} <span class="work">= ${made}</span>`;
}

function unpoint() {
  for (const shown of panels.flat()) {
    setMark(shown, null);
    shown.cursor = null;
  }
  element("readout").textContent =
    "Point at a cell, or touch it, to see its number and what makes it.";
}

const ARROWS = {
  ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
};

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
  // A click does not focus, so that the arrow keys still step.
  picture.addEventListener("mousedown", (event) => event.preventDefault());
  picture.addEventListener("pointerleave", (event) => {
    if (event.pointerType === "mouse") unpoint();
  });
  figure.addEventListener("focus", () => moveCursor(shown, 0, 0));
  figure.addEventListener("blur", unpoint);
  figure.addEventListener("keydown", (event) => {
    const by = ARROWS[event.key];
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
