// A graph as a table: a row for each range of layers, a column for each stream, a box for each role.

const ORDER = ["visual", "text", "joint", "none"];

// Streams in columns; what belongs to both or to neither shares the last one.
function columnsOf(graph) {
  const found = new Set(graph.sections.flatMap((section) => section.cells.map((cell) => cell.stream)));
  const known = ORDER.filter((stream) => found.has(stream));
  const rest = [...found].filter((stream) => !ORDER.includes(stream));
  const shared = [...known.filter((stream) => stream === "joint" || stream === "none"), ...rest];
  const columns = known.filter((stream) => stream === "visual" || stream === "text").map((stream) => [stream]);
  return shared.length ? [...columns, shared] : columns;
}

const columnTitle = (streams) => streams.map((stream) => (stream === "none" ? "no stream" : stream)).join(" / ");

// One entry for each cell; `button` comes when the graph is drawn.
function boxesOf(graph) {
  return graph.sections.flatMap((section) => section.cells.map((cell) => ({
    cell,
    section,
    button: null,
    text: [cell.role, cell.stream, cell.state, cell.what, section.label, ...cell.by, ...cell.a, ...cell.b]
      .join("\n").toLowerCase(),
  })));
}

function drawGraph(graph, boxes) {
  const columns = columnsOf(graph);
  const bySection = new Map(graph.sections.map((section) => [section, []]));
  for (const box of boxes) bySection.get(box.section).push(box);
  const head = make(
    "tr",
    { role: "row" },
    make("th", { scope: "col", role: "columnheader" }, "layers"),
    ...columns.map((streams) => make("th", { scope: "col", role: "columnheader" }, columnTitle(streams))),
  );
  const rows = graph.sections.map((section) => make(
    "tr",
    { role: "row" },
    make("th", { scope: "row", role: "rowheader" }, section.label, times(section.layers)),
    ...columns.map((streams) => drawCell(streams, bySection.get(section))),
  ));
  return make(
    "table",
    { class: `graph columns-${columns.length}`, role: "table", "aria-label": `Graph ${graph.name}` },
    make("thead", { role: "rowgroup" }, head),
    make("tbody", { role: "rowgroup" }, ...rows),
  );
}

function times([first, last]) {
  return last > first ? make("span", { class: "times" }, ` \u00d7 ${last - first + 1}`) : null;
}

function drawCell(streams, boxes) {
  const mine = boxes.filter((box) => streams.includes(box.cell.stream));
  for (const box of mine) box.button = drawBox(box);
  const list = mine.length
    ? make("ul", null, ...mine.map((box) => make("li", null, box.button)))
    : null;
  return make("td", { role: "cell", "data-stream": columnTitle(streams), class: mine.length ? null : "empty" }, list);
}

function drawBox({ cell }) {
  return make(
    "button",
    { type: "button", class: `box ${SIGNS.has(cell.state) ? cell.state : ""}`, tabindex: -1, "aria-expanded": "false" },
    ...sign(cell.state),
    make("span", { class: "role" }, cell.role || "(no role)"),
    cell.what && cell.what !== cell.state ? make("span", { class: "what" }, arrows(cell.what)) : null,
  );
}

// The box that an arrow key leads to, among those that can be seen; null at the edge.
function neighbour(buttons, from, key) {
  const place = buttons.indexOf(from);
  if (key === "ArrowRight") return buttons[place + 1] || null;
  if (key === "ArrowLeft") return buttons[place - 1] || null;
  if (key === "Home") return buttons[0];
  if (key === "End") return buttons[buttons.length - 1];
  const here = from.getBoundingClientRect();
  const down = key === "ArrowDown" ? 1 : -1;
  let best = null;
  let least = Infinity;
  for (const button of buttons) {
    const there = button.getBoundingClientRect();
    const fall = down * (there.top - here.top);
    if (fall < here.height / 2) continue;
    // The next line of boxes first, then the one straight below or above.
    const far = fall * 10000 + Math.abs(there.left - here.left);
    if (far < least) [best, least] = [button, far];
  }
  return best;
}
