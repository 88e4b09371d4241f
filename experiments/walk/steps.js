"use strict";

// What the steps are: for each the equation, a sentence, and the matrices in both forms.

const up = (letter, l) => `<msup><mi>${letter}</mi><mn>${l}</mn></msup>`;
const gap = '<mspace width="0.15em"/>';
const op = (sign) => `<mo>${sign}</mo>`;
const per = (letter, l) =>
  `<mfrac><mrow><mo>∂</mo><mi>C</mi></mrow><mrow><mo>∂</mo>${up(letter, l)}</mrow></mfrac>`;
const transposed = (inner) => `<msup>${inner}<mi mathvariant="normal">T</mi></msup>`;
const inBrackets = (inner) => `<mrow><mo>(</mo>${inner}<mo>)</mo></mrow>`;
const slope = (l) =>
  `<mrow><mi>σ</mi><mo lspace="0" rspace="0">′</mo>${inBrackets(up("z", l))}</mrow>`;
const gradient = (letter) => `<mrow><msub><mo>∇</mo><mi>${letter}</mi></msub><mi>C</mi></mrow>`;

// A part of an equation that can be lit; `code` marks the same part of a line of code.
const term = (name, inner) => `<mrow data-term="${name}">${inner}</mrow>`;
const code = (name, inner) => `<span data-term="${name}">${inner}</span>`;

// kind: what the rows and columns are. html and code: the symbol in both forms, for layer l.
const QUANTITIES = {
  a: { kind: "samples", html: (l) => `a<sup>${l}</sup>`, code: (l) => `a[${l}]` },
  z: { kind: "samples", html: (l) => `z<sup>${l}</sup>`, code: (l) => `z[${l}]` },
  y: { kind: "samples", html: () => "y", code: () => "y" },
  losses: { kind: "samples", html: () => "C<sub>x</sub>", code: () => "losses" },
  a_new: { kind: "samples", html: () => "new output", code: () => "output" },
  grad_a: { kind: "samples", html: () => "∇<sub>a</sub>C", code: () => "grad_a" },
  sigma_prime: {
    kind: "samples",
    html: (l) => `σ′(z<sup>${l}</sup>)`,
    code: (l) => `sigma_prime(${l})`,
  },
  back: {
    kind: "samples",
    html: (l) => `(w<sup>${l + 1}</sup>)<sup>T</sup>δ<sup>${l + 1}</sup>`,
    code: (l) => `delta[${l + 1}] @ w[${l + 1}]`,
  },
  delta: { kind: "samples", html: (l) => `δ<sup>${l}</sup>`, code: (l) => `delta[${l}]` },
  w: { kind: "weights", html: (l) => `w<sup>${l}</sup>`, code: (l) => `w[${l}]` },
  b: { kind: "biases", html: (l) => `b<sup>${l}</sup>`, code: (l) => `b[${l}]` },
  grad_w: { kind: "weights", html: (l) => `∂C/∂w<sup>${l}</sup>`, code: (l) => `grad_w[${l}]` },
  grad_b: { kind: "biases", html: (l) => `∂C/∂b<sup>${l}</sup>`, code: (l) => `grad_b[${l}]` },
  w_new: { kind: "weights", html: (l) => `new w<sup>${l}</sup>`, code: (l) => `w[${l}]` },
  b_new: { kind: "biases", html: (l) => `new b<sup>${l}</sup>`, code: (l) => `b[${l}]` },
};

// A matrix in a step. uses: which of its cells make the cell (i, j) of the result: row i ("row"),
// column j ("column"), or the cell (i, j) itself ("cell"). flip: whether it is transposed.
const matrix = (name, uses, flip = false) => ({ name, uses, flip });
const flipped = (name, uses) => matrix(name, uses, true);

// How the cell of a result is worked out, from the numbers that it uses.
const signed = (value) => (value < 0 ? `(${short(value)})` : short(value));
const product = ([p, q, b]) =>
  p.map((value, k) => `${signed(value)} · ${signed(q[k])}`).join(" + ") +
  (b ? ` + ${signed(b[0])}` : "");
const sum = ([p]) => p.map(signed).join(" + ");
const move = (rate) => ([p, q]) => `${short(p[0])} − ${rate} · ${signed(q[0])}`;

function inputStep() {
  return {
    part: "Input", layer: 0, title: "The input",
    text: () => "The inputs x are the activations of layer 0. The output should become y.",
    math: term("result", up("a", 0)) + op("=") + term("used", "<mi>x</mi>"),
    code: `${code("result", "a[0]")} = ${code("used", "x")}`,
    notes: [matrix("y"), "", matrix("a0")],
    rows: [matrix("y"), "", matrix("a0")],
  };
}

function forwardSteps(l, net) {
  const sigma = l === net.sizes.length - 1 ? net.output : net.activation;
  const weighted = {
    part: "Forward", layer: l, title: `Layer ${l}: the weighted input`,
    text: () => `Each neuron adds up the activations below, each times its weight, and its bias.`,
    math: term("result", up("z", l)) + op("=") + term("used", up("w", l)) + gap +
      term("used", up("a", l - 1)) + op("+") + term("used", up("b", l)),
    code: `${code("result", `z[${l}]`)} = ${code("used", `a[${l - 1}]`)} @ ` +
      `${code("used", `w[${l}].mT`)} + ${code("used", `b[${l}]`)}`,
    notes: [matrix(`w${l}`, "row"), "", matrix(`a${l - 1}`, "column"), "+", matrix(`b${l}`, "row"),
      "=", matrix(`z${l}`)],
    rows: [matrix(`a${l - 1}`, "row"), "@", flipped(`w${l}`, "column"), "+",
      matrix(`b${l}`, "column"), "=", matrix(`z${l}`)],
    work: product,
  };
  const activation = {
    part: "Forward", layer: l, title: `Layer ${l}: the activation`,
    text: () => `The ${sigma} function, element by element.`,
    math: term("result", up("a", l)) + op("=") + "<mi>σ</mi>" +
      inBrackets(term("used", up("z", l))),
    code: `${code("result", `a[${l}]`)} = sigma(${code("used", `z[${l}]`)})`,
    notes: [matrix(`z${l}`, "cell"), "→", matrix(`a${l}`)],
    rows: [matrix(`z${l}`, "cell"), "→", matrix(`a${l}`)],
  };
  return sigma === "none" ? [weighted] : [weighted, activation];
}

const y = term("used", "<mi>y</mi>");
const output = term("used", "<mi>a</mi>");
const oneMinus = (inner) => inBrackets(`<mn>1</mn><mo>−</mo>${inner}`);
const ln = (inner) => `${gap}<mi>ln</mi>${gap}${inner}`;
const sumOver = (index) => `<munder><mo>∑</mo><mi>${index}</mi></munder>`;
const meanOverSamples =
  `<mrow class="batch"><mfrac><mn>1</mn><mi>n</mi></mfrac>${sumOver("x")}</mrow>`;
const sumOverSamples = `<mrow class="batch">${sumOver("x")}</mrow>`;

// uses: which outputs make a cell of the cost's gradient.
const COSTS = {
  quadratic: {
    words: "half the squared distance between output and target",
    math: meanOverSamples + "<mfrac><mn>1</mn><mn>2</mn></mfrac>" +
      `<msup><mrow><mo>‖</mo>${y}<mo>−</mo>${output}<mo>‖</mo></mrow><mn>2</mn></msup>`,
    gradient: "a − y for this cost",
    uses: "cell",
  },
  "sigmoid-cross-entropy": {
    words: "the cross-entropy of y and a = σ(z)",
    math: op("−") + meanOverSamples + sumOver("j") + op("[") + y + ln(output) + op("+") +
      oneMinus(y) + ln(oneMinus(output)) + op("]"),
    gradient: "a − y with a = σ(z): the σ′ of BP1 has cancelled",
    uses: "cell",
  },
  "softmax-cross-entropy": {
    words: "the cross-entropy of y and a = softmax(z)",
    math: op("−") + meanOverSamples + sumOver("j") + y + ln(output),
    gradient: "a − y with a = softmax(z): the σ′ of BP1 has cancelled",
    uses: "sample",
  },
};

function costStep(net) {
  const L = net.sizes.length - 1;
  const { words, math } = COSTS[net.cost];
  const letter = net.output === "none" ? "z" : "a";
  const matrices = [matrix(`${letter}${L}`, "sample"), "", matrix("y", "sample"), "→",
    matrix("losses")];
  return {
    part: "Cost", layer: L + 1, title: "The cost",
    text: (pass) => `The loss of a sample is ${words}. ` +
      (pass.y.length > 1 ? `The cost is their mean: C = ${digits(pass.cost[0][0])}.`
        : `Here C = ${digits(pass.cost[0][0])}.`),
    math: term("result", "<mi>C</mi>") + op("=") + math,
    code: `${code("result", "cost")} = ${net.cost.replaceAll("-", "_")}_cost(` +
      `${code("used", `${letter}[${L}]`)}, ${code("used", "y")})`,
    notes: matrices,
    rows: matrices,
  };
}

const weightOfSamples = (pass) =>
  pass.y.length > 1 ? " C is the mean, so each sample has the weight 1/n." : "";

// BP1. If the cost takes z, its gradient is the error already.
function outputErrorSteps(net) {
  const L = net.sizes.length - 1;
  const { gradient: words, uses } = COSTS[net.cost];
  const takesZ = net.output === "none";
  const letter = takesZ ? "z" : "a";
  const result = takesZ ? `delta${L}` : "grad_a";
  const ofOutput = [matrix(`${letter}${L}`, uses), "", matrix("y", uses), "→", matrix(result)];
  const first = {
    part: "BP1", layer: L,
    title: takesZ ? "BP1: the error of the output" : "BP1: what the cost asks of the output",
    text: (pass) => `${takesZ ? "δ" : "∇C"} is ${words}.${weightOfSamples(pass)}`,
    math: takesZ
      ? term("result", up("δ", L)) + op("=") + term("used", gradient("z"))
      : term("later", up("δ", L)) + op("=") + term("result", gradient("a")) + op("⊙") +
        term("later", slope(L)),
    code: takesZ
      ? `${code("result", `delta[${L}]`)} = ${code("used", `cost.gradient(z[${L}], y)`)}`
      : `${code("result", "grad_a")} = cost.gradient(${code("used", `a[${L}]`)}, ` +
        `${code("used", "y")})`,
    notes: ofOutput,
    rows: ofOutput,
  };
  return takesZ ? [first] : [first, timesSlope("BP1", L, "grad_a",
    term("used", gradient("a")), code("used", "grad_a"))];
}

// The second half of BP1 and of BP2: ⊙ σ′(z).
function timesSlope(part, l, from, math, line) {
  const matrices = (times) => [matrix(from, "cell"), times, matrix(`sigma_prime${l}`, "cell"), "=",
    matrix(`delta${l}`)];
  return {
    part, layer: l, title: `${part}: the error of layer ${l}`,
    text: () => "Times the slope of σ at z. A saturated neuron has σ′ near 0, so its error is near 0.",
    math: term("result", up("δ", l)) + op("=") + math + op("⊙") + term("used", slope(l)),
    code: `${code("result", `delta[${l}]`)} = ${line} * ${code("used", `sigma_prime(${l})`)}`,
    notes: matrices("⊙"),
    rows: matrices("*"),
    work: product,
  };
}

// BP2.
function errorSteps(l) {
  const back = inBrackets(transposed(inBrackets(up("w", l + 1))) + up("δ", l + 1));
  const line = `(delta[${l + 1}] @ w[${l + 1}])`;
  const first = {
    part: "BP2", layer: l, title: `BP2: layer ${l + 1} sends its error back`,
    text: () => `Through the same weights, transposed: how the cost changes with each activation of
      layer ${l}.`,
    math: term("later", up("δ", l)) + op("=") + term("used", back) + op("⊙") +
      term("later", slope(l)),
    code: `${code("later", `delta[${l}]`)} = ${code("used", line)} * ` +
      code("later", `sigma_prime(${l})`),
    notes: [flipped(`w${l + 1}`, "row"), "", matrix(`delta${l + 1}`, "column"), "=",
      matrix(`back${l}`)],
    rows: [matrix(`delta${l + 1}`, "row"), "@", matrix(`w${l + 1}`, "column"), "=",
      matrix(`back${l}`)],
    work: product,
  };
  return [first, timesSlope("BP2", l, `back${l}`, term("used", back), code("used", line))];
}

const overSamples = (pass) => pass.y.length > 1 ? " The samples add up." : "";

// BP3.
function biasGradientStep(l) {
  return {
    part: "BP3", layer: l, title: `BP3: the biases of layer ${l}`,
    text: (pass) => `The gradient of a bias is the error of its neuron.${overSamples(pass)}`,
    math: term("result", per("b", l)) + op("=") + sumOverSamples + term("used", up("δ", l)),
    code: `${code("result", `grad_b[${l}]`)} = ${code("used", `delta[${l}]`)}.sum(0)`,
    notes: [matrix(`delta${l}`, "row"), "→", matrix(`grad_b${l}`)],
    rows: [matrix(`delta${l}`, "column"), "→", matrix(`grad_b${l}`)],
    work: sum,
  };
}

// BP4.
function weightGradientStep(l) {
  return {
    part: "BP4", layer: l, title: `BP4: the weights of layer ${l}`,
    text: (pass) => `The error of the neuron that a weight leads to, times the activation that it
      comes from.${overSamples(pass)}`,
    math: term("result", per("w", l)) + op("=") + sumOverSamples + term("used", up("δ", l)) +
      gap + term("used", transposed(inBrackets(up("a", l - 1)))),
    code: `${code("result", `grad_w[${l}]`)} = ${code("used", `delta[${l}].mT`)} @ ` +
      code("used", `a[${l - 1}]`),
    notes: [matrix(`delta${l}`, "row"), "", flipped(`a${l - 1}`, "column"), "=",
      matrix(`grad_w${l}`)],
    rows: [flipped(`delta${l}`, "row"), "@", matrix(`a${l - 1}`, "column"), "=",
      matrix(`grad_w${l}`)],
    work: product,
  };
}

function descentStep(letter, words, l, net) {
  const rate = net.learning_rate;
  const matrices = (minus) => [matrix(`${letter}${l}`, "cell"), minus,
    matrix(`grad_${letter}${l}`, "cell"), "=", matrix(`${letter}_new${l}`)];
  return {
    part: "Step", layer: l, title: `Gradient descent: the ${words} of layer ${l}`,
    text: () => `A step against the gradient, with the learning rate η = ${rate}.`,
    math: term("result", up(letter, l)) + op("→") + term("used", up(letter, l)) + op("−") +
      `<mi>η</mi>${gap}` + term("used", per(letter, l)),
    code: `${code("result", `${letter}[${l}]`)} -= lr * ` + code("used", `grad_${letter}[${l}]`),
    notes: matrices("− η"),
    rows: matrices("- lr *"),
    work: move(rate),
  };
}

function endStep(net) {
  const L = net.sizes.length - 1;
  const letter = net.output === "none" ? "z" : "a";
  const matrices = [matrix("y"), "", matrix(`${letter}${L}`), "→", matrix("a_new")];
  return {
    part: "Step", layer: L + 1, title: "After the step",
    text: (pass) => {
      const [before, after] = [Number(pass.cost[0][0]), Number(pass.cost_new[0][0])];
      const verb = after < before ? "fell" : after > before ? "rose" : "went";
      return `With the new weights, the cost ${verb} from ${digits(before)} to ${digits(after)}.`;
    },
    math: term("used", "<mi>C</mi>") + op("→") + term("result", "<mi>C</mi>"),
    code: `${code("result", "cost")} = ${net.cost.replaceAll("-", "_")}_cost(net(x), y)`,
    notes: matrices,
    rows: matrices,
  };
}

function makeSteps(net) {
  const layers = net.sizes.slice(1).map((_, k) => k + 1);
  const down = layers.toReversed();
  return [
    inputStep(),
    ...layers.flatMap((l) => forwardSteps(l, net)),
    costStep(net),
    ...outputErrorSteps(net),
    ...down.slice(1).flatMap(errorSteps),
    ...down.map(biasGradientStep),
    ...down.map(weightGradientStep),
    ...layers.flatMap((l) => [descentStep("w", "weights", l, net),
      descentStep("b", "biases", l, net)]),
    endStep(net),
  ];
}
