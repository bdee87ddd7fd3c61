// The graph section: tabs, search, boxes, details.

function start(graphs) {
  const section = document.getElementById("graph");
  const views = graphs.map((graph) => ({ graph, boxes: boxesOf(graph), tab: null, panel: null, drawn: false }));
  if (!views.length) return;
  const owner = new Map();
  let current = null;
  let opened = null;

  const search = make("input", { type: "search", id: "search", autocomplete: "off", spellcheck: "false" });
  const onlyChanged = make("input", { type: "checkbox", id: "only-changed" });
  const told = make("p", { role: "status", class: "quiet", id: "told" });
  const details = detailsPanel(close);

  for (const [place, view] of views.entries()) {
    view.count = make("span", { class: "count" });
    view.tab = make(
      "button",
      { type: "button", role: "tab", id: `tab-${place}`, "aria-controls": `panel-${place}`, "aria-selected": "false" },
      view.graph.name, " ", view.count,
    );
    view.panel = make("div", { role: "tabpanel", id: `panel-${place}`, "aria-labelledby": `tab-${place}`, hidden: true });
    view.tab.addEventListener("click", () => select(view));
    view.panel.addEventListener("click", (event) => {
      const box = boxOf(event.target);
      if (box === opened) close();
      else if (box) open(box);
    });
    view.panel.addEventListener("keydown", (event) => move(event, view));
  }
  const tabs = make("div", { role: "tablist", "aria-label": "Graphs" }, ...views.map((view) => view.tab));
  tabs.addEventListener("keydown", turn);

  document.getElementById("undrawn").remove();
  section.append(
    make(
      "div",
      { class: "tools" },
      tabs,
      make("label", { class: "find" }, make("span", null, "Search "), search, make("kbd", { "aria-hidden": "true" }, "/")),
      make("label", { class: "toggle" }, onlyChanged, " only changed"),
    ),
    legend(),
    told,
    ...views.map((view) => view.panel),
    details.element,
  );
  search.addEventListener("input", filter);
  onlyChanged.addEventListener("change", filter);
  document.addEventListener("keydown", shortcut);
  linkChanges();
  const changed = views.filter((view) => view.boxes.some((box) => box.cell.state !== "same"));
  select(changed.find((view) => view.graph.name === "prefill") || changed[0] || views[0]);

  function boxOf(target) {
    const button = target instanceof Element ? target.closest("button.box") : null;
    return button ? owner.get(button) : undefined;
  }

  function draw(view) {
    if (view.drawn) return;
    view.panel.append(drawGraph(view.graph, view.boxes));
    for (const box of view.boxes) owner.set(box.button, box);
    view.drawn = true;
  }

  function select(view) {
    if (view !== current) close(false);
    current = view;
    draw(view);
    for (const other of views) {
      other.panel.hidden = other !== view;
      other.tab.setAttribute("aria-selected", String(other === view));
      other.tab.tabIndex = other === view ? 0 : -1;
    }
    filter();
  }

  function turn(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    select(views[(views.indexOf(current) + step + views.length) % views.length]);
    current.tab.focus();
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter((word) => word);
    const narrowed = words.length > 0 || onlyChanged.checked;
    for (const view of views) {
      let matching = 0;
      for (const box of view.boxes) {
        box.match = words.every((word) => box.text.includes(word))
          && !(onlyChanged.checked && box.cell.state === "same");
        if (box.match) matching++;
        if (box.button) box.button.parentElement.hidden = !box.match;
      }
      view.matching = matching;
      view.count.textContent = narrowed ? `${matching}/${view.boxes.length}` : String(view.boxes.length);
      if (view.drawn) for (const row of view.panel.querySelectorAll("tbody tr")) {
        row.hidden = !row.querySelector("li:not([hidden])");
      }
    }
    const { matching, boxes } = current;
    told.textContent = narrowed
      ? `${matching} of ${boxes.length} boxes match in ${current.graph.name}.`
      : `${boxes.length} boxes in ${current.graph.name}. Choose one to see its nodes before and after.`;
    if (opened && !opened.match) close(false);
    rove();
  }

  // One box of a graph is reached by Tab, the others from it by the arrow keys.
  function rove(wanted) {
    const seen = current.boxes.filter((box) => box.match);
    const chosen = wanted || seen.find((box) => box.button.tabIndex === 0) || seen[0];
    for (const box of current.boxes) box.button.tabIndex = box === chosen ? 0 : -1;
  }

  function move(event, view) {
    const box = boxOf(event.target);
    if (!box || event.ctrlKey || event.metaKey || event.altKey) return;
    if (!["ArrowLeft", "ArrowRight", "ArrowUp", "ArrowDown", "Home", "End"].includes(event.key)) return;
    event.preventDefault();
    const buttons = [...view.panel.querySelectorAll("li:not([hidden]) > button.box")];
    const next = neighbour(buttons, box.button, event.key);
    if (!next) return;
    rove(owner.get(next));
    if (opened) open(owner.get(next));
    next.focus();
  }

  function open(box) {
    if (opened) opened.button.setAttribute("aria-expanded", "false");
    opened = box;
    box.button.setAttribute("aria-expanded", "true");
    rove(box);
    details.show(box);
    box.button.scrollIntoView({ block: "nearest" });
  }

  function close(focus = true) {
    if (!opened) return;
    details.hide();
    opened.button.setAttribute("aria-expanded", "false");
    if (focus) opened.button.focus();
    opened = null;
  }

  function shortcut(event) {
    const typing = event.target instanceof Element && event.target.matches("input, textarea, select");
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      search.focus();
      search.select();
    } else if (event.key === "Escape" && opened) {
      event.preventDefault();
      close(!typing);
    }
  }

  // Each change of the list leads to its box.
  function linkChanges() {
    for (const row of document.querySelectorAll("table.changes tbody tr")) {
      const { graph, layer, stream, role } = row.dataset;
      const view = views.find((entry) => entry.graph.name === graph);
      const box = view && view.boxes.find(({ cell, section: { layers } }) => cell.stream === stream
        && cell.role === role && layers[0] <= Number(layer) && Number(layer) <= layers[1]);
      if (!box) continue;
      const first = row.cells[0];
      const link = make("button", { type: "button", class: "show" }, ...first.childNodes);
      link.append(make("span", { class: "unseen" }, ", show in graph"));
      first.replaceChildren(link);
      link.addEventListener("click", () => {
        search.value = "";
        if (box.cell.state === "same") onlyChanged.checked = false;
        select(view);
        open(box);
        box.button.focus();
        box.button.scrollIntoView({ block: "center" });
      });
    }
  }
}

function legend() {
  const entries = [["same", "same"], ["changed", "changed"], ["removed", "removed"], ["added", "added"]];
  return make("ul", { class: "legend states", "aria-label": "Signs" }, ...entries.map(([state, word]) => make(
    "li", null, make("span", { class: `state ${state}` }, make("span", { "aria-hidden": "true" }, SIGNS.get(state)),
      ` ${word}`),
  )));
}

start(JSON.parse(document.getElementById("data").textContent));
