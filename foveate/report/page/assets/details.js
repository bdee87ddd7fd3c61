// One panel at the foot of the window: what a box of the graph holds, before and after.

function detailsPanel(onClose) {
  const title = make("h3", { id: "details-title" });
  const facts = make("p", { class: "facts" });
  const lines = make("div", { class: "lines" });
  const close = make("button", { type: "button", class: "close" }, "Close");
  const element = make(
    "section",
    { id: "details", "aria-labelledby": "details-title", hidden: true },
    make("div", { class: "details-head" }, make("div", null, title, facts), close),
    lines,
  );
  close.addEventListener("click", () => onClose());

  function show(box) {
    const { cell, section } = box;
    title.replaceChildren(make("span", { class: `state ${cell.state}` }, ...sign(cell.state)), cell.role || "(no role)");
    const words = [section.label, `stream ${cell.stream}`, cell.state, cell.what === cell.state ? "" : arrows(cell.what)];
    if (cell.by.length) words.push(`by ${cell.by.join(", ")}`);
    facts.replaceChildren(words.filter((word) => word).join(" \u00b7 "));
    lines.replaceChildren(cell.state === "same" ? one(cell.a) : two(cell.a, cell.b));
    element.hidden = false;
    element.scrollTop = 0;
  }

  return { element, show, hide: () => { element.hidden = true; } };
}

function one(nodes) {
  return make(
    "div",
    { class: "only" },
    make("h4", null, `Before and after, the same (${nodes.length})`),
    make("ol", null, ...nodes.map((line) => make("li", null, make("code", null, line)))),
  );
}

function two(a, b) {
  const head = make(
    "tr",
    null,
    make("th", { scope: "col" }, `Before (${a.length})`),
    make("th", { scope: "col" }, `After (${b.length})`),
  );
  const rows = facing(a, b).map(([before, after]) => {
    const alike = before !== null && after !== null && before === after;
    return make("tr", { class: alike ? "alike" : null }, side(before, after, "removed"), side(after, before, "added"));
  });
  return make("table", null, make("thead", null, head), make("tbody", null, ...rows));
}

function side(line, other, state) {
  if (line === null) return make("td", { class: "void" });
  if (line === other) return make("td", null, make("code", null, line));
  return make("td", { class: state }, ...sign(state), make("code", null, ...marked(line, other)));
}
