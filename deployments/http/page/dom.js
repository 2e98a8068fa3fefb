// What touches the document. Whatever comes from the server goes in as text, never as markup.

const byId = (id) => document.getElementById(id);

/** `node` says `text`; where it does already nothing changes, so that nothing is announced or unselected. */
function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** An SVG element. `inside`: text, or elements. */
function svg(name, attributes, ...inside) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...inside);
  return node;
}

/** A small picture in a table cell; the cells beside it say the same in words. */
const sketch = (...inside) => svg("svg", { "aria-hidden": "true" }, ...inside);

/** `body` has these rows, each a list of texts and sketches; the first cell of each is its header. */
function fill(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  rows.forEach((cells, index) => {
    const row = body.rows[index] ?? body.insertRow();
    cells.forEach((content, column) => {
      const cell = row.cells[column] ?? row.appendChild(document.createElement(column ? "td" : "th"));
      if (!column) cell.scope = "row";
      if (typeof content === "string") say(cell, content);
      else cell.replaceChildren(content);
    });
  });
}
