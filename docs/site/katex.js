// Reads formulas, [[tex, isDisplay], ...], and writes the HTML of each. The argument is KaTeX.
const katex = require(process.argv[2]);
const formulas = JSON.parse(require("fs").readFileSync(0, "utf8"));
try {
  const html = formulas.map(([tex, displayMode]) => katex.renderToString(tex, { displayMode }));
  process.stdout.write(JSON.stringify(html));
} catch (error) {
  console.error(error.message);
  process.exitCode = 1;
}
