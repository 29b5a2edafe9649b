"use strict";

// The page's data is what launch.page.write_page was given. Text from it only ever becomes text nodes and attributes.
const data = JSON.parse(document.getElementById("data").textContent);

const find = (id) => document.getElementById(id);
const methods = data.methods.map((method) => method.name);
const MINUS = "\u2212";
const NONE = "\u2013";

const state = {
  dataset: null,
  image: null,
  left: null,
  right: null,
  split: 50, // where the divider is, in percent of the stage
  view: { u: 0.5, v: 0.5, zoom: 1 }, // centre in parts of the picture; 1 fits it in
  sorting: new Map(), // table -> {label, ascending}
};

// ---------------------------------------------------------------------------------------------------------- helpers

/** Make an element; attributes that are null or false are left out, `on...` are listeners. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  return fill(element, attributes, children);
}

/** The same for SVG. */
function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS(find("scatter").namespaceURI, tag);
  return fill(element, attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null));
  return element;
}

/** A number of the data, null where it is not known; infinities come as strings. */
function number(value) {
  return value === null || value === undefined ? null : Number(value);
}

function fixed(value, digits, sign = false) {
  const found = number(value);
  if (found === null) return NONE;
  if (!Number.isFinite(found)) return found > 0 ? "\u221e" : `${MINUS}\u221e`;
  const text = Math.abs(found).toFixed(digits);
  const zero = Number(text) === 0;
  return (found < 0 && !zero ? MINUS : sign && !zero ? "+" : "") + text;
}

function interval(part, digits, sign = false) {
  if (number(part.low) === null || number(part.high) === null) return null;
  return `[${fixed(part.low, digits, sign)}, ${fixed(part.high, digits, sign)}]`;
}

/** 1234567 -> 1.23 M. */
function short(value, units) {
  const found = number(value);
  if (found === null) return NONE;
  const step = [1e12, 1e9, 1e6, 1e3].findIndex((size) => Math.abs(found) >= size);
  if (step < 0) return String(found);
  return `${(found / [1e12, 1e9, 1e6, 1e3][step]).toPrecision(3)} ${units[step]}`;
}

function count(n, noun) {
  return `${n} ${noun}${n === 1 ? "" : "s"}`;
}

function listed(names, most = 5) {
  return names.slice(0, most).join(", ") + (names.length > most ? ` and ${names.length - most} more` : "");
}

const clamp = (value, low, high) => Math.min(Math.max(value, low), high);
const of = (part, ...keys) =>
  keys.reduce((found, key) => (found && Object.hasOwn(found, key) ? found[key] : null), part);
const arrow = (metric) => (metric.lower_better ? "\u2193" : "\u2191");
const better = (metric) => (metric.lower_better ? "lower is better" : "higher is better");
const dataset = () => data.datasets.find((one) => one.name === state.dataset);
const pen = make("canvas").getContext("2d");
const kind = (name) =>
  of(
    data.methods.find((method) => method.name === name),
    "kind",
  );

/** How wide a plot draws a text. */
function wide(text) {
  pen.font = `13px ${getComputedStyle(document.body).fontFamily}`;
  return pen.measureText(text).width;
}

/** A text that a plot has this much room for. */
function cut(text, room) {
  let found = text;
  while (wide(found) > room && found.length > 1) found = `${found.replace(/\u2026$/, "").slice(0, -1)}\u2026`;
  return found;
}

/** Metrics that some row has in a part of the data, on the chosen data set. */
function measured(part) {
  const found = of(data, part, state.dataset) || {};
  return data.metrics.filter((metric) => Object.values(found).some((row) => of(row, metric.id) !== null));
}

function options(select, entries, chosen) {
  select.replaceChildren(
    ...entries.map(({ key, label, disabled }) => make("option", { value: key, disabled: disabled ? "" : null }, label)),
  );
  const usable = entries.filter((entry) => !entry.disabled);
  const wanted = usable.some((entry) => entry.key === chosen) ? chosen : of(usable[0], "key");
  if (wanted !== null) select.value = wanted;
  return wanted;
}

// ----------------------------------------------------------------------------------------------------------- tables

/**
 * Put a sortable table into an element.
 *
 * columns: [{label, note, arrow, low: whether low comes first, text: whether it holds words}], the first heads the rows
 * rows: [{name, tags: [str], cells: [{key, lines: [str], strong}]}], a cell for each column but the first
 */
function table(element, caption, columns, rows) {
  const body = make("tbody");
  const sorting = state.sorting;
  const heads = columns.map((column, index) =>
    make(
      "th",
      { scope: "col", class: index === 0 || column.text ? null : "number" },
      make(
        "button",
        {
          type: "button",
          title: column.note,
          onclick: () => {
            const before = sorting.get(element.id);
            const first = index === 0 || column.text || Boolean(column.low);
            const ascending = before && before.label === column.label ? !before.ascending : first;
            sorting.set(element.id, { label: column.label, ascending });
            order();
          },
        },
        index === 0 || column.text ? null : make("span", { class: "sort", "aria-hidden": "true" }),
        column.label,
        column.arrow ? make("b", { class: "arrow", "aria-hidden": "true" }, ` ${column.arrow}`) : null,
        column.note && column.arrow ? make("span", { class: "hidden" }, `, ${column.note.split("\n")[0]}`) : null,
        index === 0 || column.text ? make("span", { class: "sort", "aria-hidden": "true" }) : null,
      ),
    ),
  );

  function order() {
    const chosen = sorting.get(element.id);
    const index = chosen ? columns.findIndex((column) => column.label === chosen.label) : -1;
    heads.forEach((head, i) => {
      if (i === index) head.setAttribute("aria-sort", chosen.ascending ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
      head.querySelector(".sort").textContent = i !== index ? "" : chosen.ascending ? "\u25b4" : "\u25be";
    });
    const key = (row) => (index === 0 ? row.name : row.cells[index - 1].key);
    const sorted = [...rows];
    if (index >= 0) {
      sorted.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        const sign = x < y ? -1 : x > y ? 1 : 0;
        return chosen.ascending ? sign : -sign;
      });
    }
    body.replaceChildren(...sorted.map((row) => row.element));
  }

  for (const row of rows) {
    row.element = make(
      "tr",
      {},
      make(
        "th",
        { scope: "row", class: wide(row.name) > 320 ? "long" : null },
        make("span", {}, row.name),
        ...(row.tags || []).map((tag) => make("span", { class: "tag" }, tag)),
      ),
      row.cells.map((cell, i) =>
        make(
          "td",
          { class: columns[i + 1].text ? null : "number" },
          make(cell.strong ? "strong" : "span", {}, cell.lines[0]),
          ...cell.lines.slice(1).map((line) => make("small", {}, line)),
        ),
      ),
    );
  }
  element.replaceChildren(
    make(
      "div",
      { class: "scroll", tabindex: "0", role: "region", "aria-label": caption },
      make("table", {}, make("caption", { class: "hidden" }, caption), make("thead", {}, make("tr", {}, heads)), body),
    ),
  );
  order();
}

function tags(name) {
  const found = [];
  if (kind(name) !== null && kind(name) !== "run") found.push(kind(name));
  if (name === data.reference) found.push("reference");
  return found;
}

/** A table with a row for each method, or pair of them, and a column for each metric; `cell(entry, metric, most)` makes the cells. */
function methodTable(id, part, caption, cell, withImages) {
  const found = of(data, part, state.dataset) || {};
  const metrics = measured(part);
  const section = find(id).closest("section");
  section.hidden = metrics.length === 0;
  if (section.hidden) return;
  const total = dataset().images.length;
  const columns = [{ label: "Method" }];
  if (withImages) columns.push({ label: "Images", note: "how many images the numbers run over" });
  columns.push(
    ...metrics.map((metric) => ({
      label: metric.label,
      note: `${metric.id}, ${better(metric)}\n${metric.protocol}`,
      arrow: part === "ranks" ? null : arrow(metric),
      low: part === "ranks" || metric.lower_better,
    })),
  );
  const rows = (part === "pairs" ? Object.keys(found) : methods)
    .filter((name) => metrics.some((metric) => of(found, name, metric.id) !== null))
    .map((name) => {
      const entries = metrics.map((metric) => of(found, name, metric.id));
      const most = Math.max(0, ...entries.map((entry) => number(of(entry, "n")) || 0));
      const cells = entries.map((entry, i) =>
        number(withImages ? of(entry, "mean") : entry) === null
          ? { key: null, lines: [NONE] }
          : cell(entry, metrics[i], most),
      );
      if (withImages) cells.unshift({ key: most, lines: [most === total ? `${most}` : `${most} of ${total}`] });
      return { name, tags: tags(name), cells };
    });
  table(find(id), `${caption}, ${state.dataset}`, columns, rows);
}

function gainCell(gain, metric, most) {
  const [low, high] = [number(gain.low), number(gain.high)];
  const known = low !== null && high !== null;
  return {
    key: number(gain.mean),
    strong: known && (metric.lower_better ? high < 0 : low > 0),
    lines: [
      fixed(gain.mean, metric.digits, true),
      interval(gain, metric.digits, true) || "",
      number(gain.wins) === null ? "" : `wins ${fixed(100 * gain.wins, 0)} %`,
      ...(gain.n === most ? [] : [`over ${gain.n}`]),
    ],
  };
}

function showTables() {
  methodTable(
    "means-table",
    "means",
    "Means",
    (mean, metric, most) => ({
      key: number(mean.mean),
      lines: [
        fixed(mean.mean, metric.digits),
        interval(mean, metric.digits) || "",
        ...(mean.n === most ? [] : [`over ${mean.n}`]),
      ],
    }),
    true,
  );
  methodTable("gains-table", "gains", `Gains over ${data.reference}`, gainCell, true);
  methodTable("pairs-table", "pairs", "Gains over other methods", gainCell, true);
  methodTable("ranks-table", "ranks", "Mean ranks", (rank) => ({ key: number(rank), lines: [fixed(rank, 2)] }), false);
}

function showEfficiency() {
  find("efficiency").hidden = data.efficiency.length === 0;
  const columns = [
    { label: "Method" },
    { label: "Trainable", note: "trainable parameters", low: true },
    { label: "Total", note: "all parameters", low: true },
    { label: "MACs", note: "multiply-accumulate operations for an image", low: true },
    { label: "Seconds", note: "seconds for an image", low: true },
    { label: "Peak memory", note: "in megabytes", low: true },
    { label: "Denoiser calls", note: "for an image", low: true },
  ];
  const parameters = ["T", "G", "M", "k"];
  const rows = data.efficiency.map((row) => {
    const spread = number(row.spread) === null ? [] : [`\u00b1 ${Number(number(row.spread).toPrecision(2))}`];
    const cell = (value, text, more = []) => ({
      key: number(value),
      lines: [number(value) === null ? NONE : text, ...more],
    });
    return {
      name: row.method,
      tags: tags(row.method),
      cells: [
        cell(row.trainable, short(row.trainable, parameters)),
        cell(row.total, short(row.total, parameters)),
        cell(row.macs, short(row.macs, parameters)),
        cell(row.seconds, `${Number((number(row.seconds) || 0).toPrecision(3))}`, spread),
        cell(row.memory_mb, `${fixed(row.memory_mb, 0)} MB`),
        cell(row.denoiser_calls, `${number(row.denoiser_calls)}`),
      ],
    };
  });
  table(find("efficiency-table"), "Efficiency", columns, rows);
}

function showPublished() {
  find("published").hidden = data.published.length === 0;
  const papers = [...new Set(data.published.map((published) => published.paper))];
  const article = (published) =>
    make(
      "article",
      {},
      make("h4", {}, published.table),
      make("p", { class: "muted" }, `Protocol: ${published.protocol}`),
      make("div", { id: `published-${data.published.indexOf(published)}` }),
    );
  find("published-tables").replaceChildren(
    ...papers.map((paper) => {
      const found = data.published.filter((published) => published.paper === paper);
      return make(
        "details",
        { open: data.published.length < 4 ? "" : null },
        make(
          "summary",
          {},
          make("h3", {}, paper),
          make("small", { class: "muted" }, ` ${count(found.length, "table")}`),
        ),
        found.map(article),
      );
    }),
  );
  data.published.forEach((published, i) => {
    const columns = [{ label: "Method" }, { label: "Data set", text: true }];
    columns.push(...published.columns.map((label) => ({ label })));
    const rows = Object.entries(published.rows).flatMap(([name, found]) =>
      Object.entries(found).map(([method, values]) => ({
        name: method,
        cells: [
          { key: name, lines: [name] },
          ...published.columns.map((_, j) => {
            const value = number(of(values, j));
            return { key: value, lines: [value === null ? NONE : String(value).replace("-", MINUS)] };
          }),
        ],
      })),
    );
    table(find(`published-${i}`), `${published.paper}: ${published.table}`, columns, rows);
  });
}

// --------------------------------------------------------------------------------------------- what failed, protocols

/** An item that unfolds to its details. */
function unfold(summary, details) {
  if (details.length === 0) return make("li", {}, summary);
  return make(
    "li",
    {},
    make(
      "details",
      {},
      make("summary", {}, summary),
      make(
        "ul",
        {},
        details.map((line) => make("li", {}, line)),
      ),
    ),
  );
}

function gaps() {
  const items = [];
  for (const method of data.methods) {
    const failed = method.failures || [];
    for (const { name, images } of data.datasets) {
      const here = failed.filter((failure) => failure.dataset === name);
      if (here.length) {
        items.push(
          unfold(
            `${method.name} failed on ${here.length} of ${count(images.length, "image")} of ${name}`,
            here.map((failure) => `${failure.image}: ${failure.reason}`),
          ),
        );
      }
      const known = of(data.values, name, method.name) || {};
      const scored = new Set(Object.values(known).flatMap((values) => Object.keys(values)));
      const told = new Set(here.map((failure) => failure.image));
      const lacks = images.filter((image) => !scored.has(image) && !told.has(image));
      if (lacks.length) {
        const share = `${lacks.length} of ${count(images.length, "image")}`;
        items.push(unfold(`${method.name} has no numbers of ${share} of ${name}`, lacks));
      }
    }
    const elsewhere = failed.filter((failure) => !data.datasets.some(({ name }) => name === failure.dataset));
    for (const failure of elsewhere) {
      items.push(unfold(`${method.name}: ${failure.image || failure.dataset || ""} ${failure.reason}`, []));
    }
  }
  for (const [metric, reason] of Object.entries(data.missing)) {
    items.push(unfold(`${metric} was not computed: ${reason}`, []));
  }
  if (data.lost.length) items.push(unfold(`${count(data.lost.length, "picture")} not there`, data.lost));
  return items;
}

function showGaps() {
  const items = gaps();
  find("gaps-list").replaceChildren(
    items.length ? make("ul", {}, items) : make("p", {}, "Nothing: every method has every image and metric."),
  );
}

function showProtocols() {
  find("protocols-list").replaceChildren(
    ...data.metrics.flatMap((metric) => [
      make("dt", {}, metric.label),
      make("dd", {}, `${metric.id}: ${metric.protocol} (${better(metric)})`),
    ]),
  );
}

function showSources() {
  find("sources").hidden = data.sources.length === 0;
  find("sources-list").replaceChildren(...data.sources.map((source) => make("li", {}, source)));
}

// ------------------------------------------------------------------------------------------------------------ viewer

const stage = find("stage");
let tiles = []; // {box, img, note, source}
let drag = null;

/** Address of a picture; that of an embedded one is a block further down the page, null until that has come in. */
function address(path) {
  if (!path.startsWith("#")) return path;
  const block = find(path.slice(1));
  const whole = block !== null && (block.nextElementSibling !== null || document.readyState !== "loading");
  return whole ? block.textContent : null;
}

/** All that can be looked at of the chosen image: [{key, label, path}]. */
function sources() {
  const found = of(data.images, state.dataset, state.image);
  if (found === null) return [];
  const others = Object.values(data.images[state.dataset]);
  return [
    { key: "lq", label: "LQ", path: found.lq },
    ...methods
      .filter((name) => others.some((other) => of(other.methods, name) !== null)) // one that failed here keeps its place
      .map((name) => ({ key: `method ${name}`, label: name, path: of(found.methods, name) })),
    { key: "hq", label: "HQ", path: found.hq },
  ];
}

function panes() {
  const sides = ["left", "right"].map((side) => {
    const box = find(`pane-${side}`);
    return { box, img: box.querySelector("img") };
  });
  return [...sides, ...tiles];
}

/** Width and height of the largest picture that has come in. */
function world() {
  let size = [1, 1];
  for (const { img } of panes()) {
    if (!img.hidden && img.naturalWidth > size[0]) size = [img.naturalWidth, img.naturalHeight];
  }
  return size;
}

/** Screen pixels for a picture pixel when the picture fits the box. */
function fitted(box) {
  const [width, height] = world();
  const edge = box.getBoundingClientRect();
  return Math.min(edge.width / width, edge.height / height);
}

/** Put every picture where the view says. */
function place() {
  const [width, height] = world();
  stage.parentElement.style.setProperty("--aspect", clamp(width / height, 0.75, 2.4));
  const { u, v, zoom } = state.view;
  const all = panes().map((pane) => ({ ...pane, edge: pane.box.getBoundingClientRect() }));
  for (const { img, note, edge } of all) {
    const [w, h] = [edge.width, edge.height];
    const scale = Math.min(w / width, h / height) * zoom;
    img.style.width = `${width * scale}px`;
    img.style.height = `${height * scale}px`;
    img.style.transform = `translate(${w / 2 - u * width * scale}px, ${h / 2 - v * height * scale}px)`;
    img.classList.toggle("pixels", width * scale >= img.naturalWidth);
    if (note && img.naturalWidth) note.textContent = `${img.naturalWidth} \u00d7 ${img.naturalHeight}`;
  }
  const scale = fitted(stage) * zoom;
  find("zoom").textContent = `\u00d7${scale >= 10 ? scale.toFixed(0) : scale.toPrecision(2)}`;
  find("pane-right").style.clipPath = `inset(0 0 0 ${state.split}%)`;
  const divider = find("divider");
  divider.style.left = `${state.split}%`;
  divider.setAttribute("aria-valuenow", Math.round(state.split));
}

/** Load a picture into an <img>; what cannot be loaded leaves its box empty and says so. */
function load(img, source) {
  const path = of(source, "path");
  img.alt = source ? `${state.image}, ${source.label}` : "";
  if (img.dataset.path === String(path)) return;
  img.dataset.path = String(path);
  img.hidden = true;
  img.parentElement.dataset.empty = path === null ? "no picture" : "";
  img.onload = () => {
    img.hidden = false;
    place();
  };
  img.onerror = () => {
    img.parentElement.dataset.empty = "picture not there";
  };
  const show = () => {
    if (img.dataset.path !== String(path)) return; // another picture is wanted by now
    const found = address(path);
    if (found === null) setTimeout(show, 50);
    else img.src = found;
  };
  if (path === null) img.removeAttribute("src");
  else show();
}

/** Zoom by a factor about a point so far from a box's middle; at a limit nothing happens and false comes back. */
function zoomBy(factor, box = stage, dx = 0, dy = 0) {
  const fit = fitted(box);
  const low = Math.min(1, 1 / fitted(stage));
  const zoom = clamp(state.view.zoom * factor, low, Math.max(64 / fitted(stage), 1));
  if (zoom === state.view.zoom) return false;
  const before = fit * state.view.zoom;
  const after = fit * zoom;
  state.view.zoom = zoom;
  panBy(dx / before - dx / after, dy / before - dy / after);
  return true;
}

/** Move the view by picture pixels. */
function panBy(x, y) {
  const [width, height] = world();
  state.view.u = clamp(state.view.u + x / width, 0, 1);
  state.view.v = clamp(state.view.v + y / height, 0, 1);
  place();
}

function fitView() {
  state.view = { u: 0.5, v: 0.5, zoom: 1 };
  place();
}

function showCrop(crop) {
  const [width, height] = world();
  const fit = fitted(stage);
  state.view = {
    u: (crop.x + crop.size / 2) / width,
    v: (crop.y + crop.size / 2) / height,
    zoom: Math.min(stage.clientWidth, stage.clientHeight) / crop.size / fit,
  };
  place();
}

function setSplit(split) {
  state.split = clamp(split, 0, 100);
  place();
}

/** Wheel and drag on a box move the common view. */
function movable(box) {
  box.addEventListener(
    "wheel",
    (event) => {
      const edge = box.getBoundingClientRect();
      const pixels = event.deltaY * (event.deltaMode === 1 ? 20 : 1);
      const x = event.clientX - edge.left - edge.width / 2;
      const y = event.clientY - edge.top - edge.height / 2;
      const moved = zoomBy(2 ** (-clamp(pixels, -200, 200) / 250), box, x, y);
      if (moved) event.preventDefault(); // at the limits the page scrolls on
    },
    { passive: false },
  );
  box.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || event.target === find("divider")) return;
    drag = { x: event.clientX, y: event.clientY };
    box.setPointerCapture(event.pointerId);
  });
  box.addEventListener("pointermove", (event) => {
    if (drag === null || !box.hasPointerCapture(event.pointerId)) return;
    const scale = fitted(box) * state.view.zoom;
    panBy((drag.x - event.clientX) / scale, (drag.y - event.clientY) / scale);
    drag = { x: event.clientX, y: event.clientY };
  });
  box.addEventListener("pointerup", () => (drag = null));
  box.addEventListener("pointercancel", () => (drag = null));
}

function stageKeys(event) {
  if (event.target !== stage) return;
  const step = stage.clientWidth / 10 / (fitted(stage) * state.view.zoom);
  const actions = {
    ArrowLeft: () => panBy(-step, 0),
    ArrowRight: () => panBy(step, 0),
    ArrowUp: () => panBy(0, -step),
    ArrowDown: () => panBy(0, step),
    "+": () => zoomBy(1.5),
    "=": () => zoomBy(1.5),
    "-": () => zoomBy(1 / 1.5),
    0: fitView,
  };
  if (event.ctrlKey || event.metaKey || event.altKey || !Object.hasOwn(actions, event.key)) return;
  event.preventDefault();
  actions[event.key]();
}

function dividerKeys(event) {
  const steps = {
    ArrowLeft: -2,
    ArrowDown: -2,
    ArrowRight: 2,
    ArrowUp: 2,
    PageDown: -10,
    PageUp: 10,
    Home: -100,
    End: 100,
  };
  if (!Object.hasOwn(steps, event.key)) return;
  event.preventDefault();
  setSplit(state.split + steps[event.key]);
}

function bindViewer() {
  const divider = find("divider");
  movable(stage);
  stage.addEventListener("keydown", stageKeys);
  divider.addEventListener("keydown", dividerKeys);
  divider.addEventListener("pointerdown", (event) => divider.setPointerCapture(event.pointerId));
  divider.addEventListener("pointermove", (event) => {
    if (!divider.hasPointerCapture(event.pointerId)) return;
    const edge = stage.getBoundingClientRect();
    setSplit((100 * (event.clientX - edge.left)) / edge.width);
  });
  for (const side of ["left", "right"]) {
    find(side).addEventListener("change", () => {
      state[side] = find(side).value;
      showSides();
    });
  }
  find("image").addEventListener("change", () => showImage(find("image").value));
  find("previous").addEventListener("click", () => stepImage(-1));
  find("next").addEventListener("click", () => stepImage(1));
  find("zoom-in").addEventListener("click", () => zoomBy(1.5));
  find("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  find("zoom-fit").addEventListener("click", fitView);
  find("zoom-one").addEventListener("click", () => zoomBy(1 / (fitted(stage) * state.view.zoom)));
  new ResizeObserver(place).observe(stage);
}

/** Names of the images of the chosen data set that have pictures, in order. */
function pictured() {
  const found = of(data.images, state.dataset) || {};
  return dataset().images.filter((name) => Object.hasOwn(found, name));
}

function stepImage(step) {
  const names = pictured();
  showImage(names[(names.indexOf(state.image) + step + names.length) % names.length]);
}

/** The two sides of the stage. */
function showSides() {
  const all = sources();
  for (const side of ["left", "right"]) {
    const entries = all.map(({ key, label, path }) => ({ key, label, disabled: path === null }));
    state[side] = options(find(side), entries, state[side]);
    const source = all.find(({ key }) => key === state[side]) || null;
    load(find(`pane-${side}`).querySelector("img"), source);
    find(`chip-${side}`).textContent = of(source, "label") || "";
  }
  for (const tile of tiles) {
    for (const side of ["left", "right"]) {
      tile[side].setAttribute("aria-pressed", String(tile.key === state[side]));
    }
  }
  place();
}

/** The strip: one tile for each picture of the image. */
function showTiles() {
  tiles = sources().map((source) => {
    const img = make("img", { alt: "" });
    const box = make("div", { class: "tile" }, img);
    const note = make("small", { class: "muted" });
    const side = (name) =>
      make(
        "button",
        {
          type: "button",
          "aria-label": `${source.label} to the ${name}`,
          disabled: source.path === null ? "" : null,
          onclick: () => {
            state[name] = source.key;
            showSides();
          },
        },
        name,
      );
    const [left, right] = [side("left"), side("right")];
    const caption = make(
      "figcaption",
      {},
      make("span", { class: "name", title: source.label }, source.label),
      note,
      make("span", { class: "joined" }, left, right),
    );
    movable(box);
    return { box, img, note, left, right, key: source.key, source, figure: make("figure", {}, box, caption) };
  });
  find("tiles").replaceChildren(...tiles.map((tile) => tile.figure));
  for (const tile of tiles) load(tile.img, tile.source);
}

/** The chosen image by every method, above the tables; a click opens it in the viewer. */
function showGlance() {
  const shown = sources().filter((source) => source.path !== null);
  find("glance").replaceChildren(
    ...shown.map((source) => {
      const img = make("img", { alt: "" });
      const open = () => {
        if (source.key !== state.left) state.right = source.key;
        showSides();
        find("images").scrollIntoView();
      };
      const box = make("button", { type: "button", "aria-label": `${source.label} in the viewer`, onclick: open }, img);
      const figure = make("figure", {}, box, make("figcaption", { title: source.label }, source.label));
      load(img, source);
      return figure;
    }),
  );
}

function showCrops() {
  const crops = of(data.images, state.dataset, state.image, "crops") || [];
  find("crops").hidden = crops.length === 0;
  find("crops").replaceChildren(
    make("span", { class: "name" }, "Largest differences"),
    make(
      "span",
      { class: "joined" },
      crops.map((crop, i) =>
        make(
          "button",
          {
            type: "button",
            title: `${crop.size} pixels from (${crop.x}, ${crop.y})`,
            "aria-label": `Place ${i + 1} of largest difference, ${crop.size} pixels from (${crop.x}, ${crop.y})`,
            onclick: () => showCrop(crop),
          },
          `${i + 1}`,
        ),
      ),
    ),
  );
}

/** The numbers of the chosen image. */
function showImageTable() {
  const found = of(data.values, state.dataset) || {};
  const metrics = measured("values").filter((metric) =>
    methods.some((name) => of(found, name, metric.id, state.image) !== null),
  );
  const columns = metrics.map((metric) => ({
    label: metric.label,
    note: `${metric.id}, ${better(metric)}\n${metric.protocol}`,
    arrow: arrow(metric),
    low: metric.lower_better,
  }));
  const rows = methods
    .filter((name) => metrics.some((metric) => of(found, name, metric.id, state.image) !== null))
    .map((name) => ({
      name,
      tags: tags(name),
      cells: metrics.map((metric) => {
        const value = number(of(found, name, metric.id, state.image));
        return { key: value, lines: [fixed(value, metric.digits)] };
      }),
    }));
  if (rows.length) table(find("image-table"), `Values of ${state.image}`, [{ label: "This image" }, ...columns], rows);
  else find("image-table").replaceChildren();
}

function showImage(name) {
  state.image = name;
  find("image").value = name;
  showGlance();
  showTiles();
  showSides();
  showCrops();
  showImageTable();
  fitView();
}

function showViewer() {
  const names = pictured();
  find("images").hidden = find("glance").hidden = names.length === 0;
  if (names.length === 0) return;
  state.image = options(
    find("image"),
    names.map((name) => ({ key: name, label: name })),
    state.image,
  );
  const run = methods.findLast((name) => kind(name) === "run") || methods[methods.length - 1];
  state.left = state.left || `method ${data.reference}`;
  state.right = state.right || `method ${run}`;
  showImage(state.image);
}

// ------------------------------------------------------------------------------------------------------------- plots

/** About `most` round numbers from low to high. */
function ticks(low, high, most) {
  const rough = (high - low) / most;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((factor) => factor * power >= rough);
  const first = Math.ceil(low / step);
  const digits = Math.max(0, -Math.floor(Math.log10(step) + 1e-9));
  const found = [];
  for (let i = first; i * step <= high + step * 1e-9; i += 1)
    found.push({ value: i * step, text: fixed(i * step, digits) });
  return found;
}

/** Room around numbers, so that none lies on the frame. */
function range(values) {
  const finite = values.filter((value) => value !== null && Number.isFinite(value));
  if (finite.length === 0) return [0, 1];
  const low = finite.reduce((a, b) => Math.min(a, b));
  const high = finite.reduce((a, b) => Math.max(a, b));
  const room = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
  return [low - room, high + room];
}

function look(name) {
  return name === data.reference ? "reference" : kind(name) === "run" ? "run" : "other";
}

function frame(svg, width, height) {
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.style.maxWidth = `${width}px`;
  svg.replaceChildren();
}

function showScatter() {
  const svg = find("scatter");
  const metrics = measured("means");
  find("tradeoff").hidden = metrics.length < 2;
  if (metrics.length < 2) return;
  const [first, second] = ["metric-x", "metric-y"].map((id) =>
    data.metrics.find((metric) => metric.id === find(id).value),
  );
  const found = data.means[state.dataset];
  const shown = methods
    .map((name) => ({ name, x: of(found, name, first.id), y: of(found, name, second.id) }))
    .filter(({ x, y }) =>
      [x, y].every((part) => part && number(part.mean) !== null && Number.isFinite(number(part.mean))),
    );
  const [width, height] = [Math.min(Math.max(svg.parentElement.clientWidth, 320), 860), 460];
  const [left, right, top, bottom] = [76, 24, 16, 56];
  const ends = (part) => [number(part.mean), number(part.low), number(part.high)];
  const [xl, xh] = range(shown.flatMap(({ x }) => ends(x)));
  const [yl, yh] = range(shown.flatMap(({ y }) => ends(y)));
  const at = (value) => left + ((value - xl) / (xh - xl)) * (width - left - right);
  const up = (value) => height - bottom - ((value - yl) / (yh - yl)) * (height - top - bottom);
  frame(svg, width, height);
  for (const { value, text } of ticks(xl, xh, width / 110)) {
    svg.append(
      draw("line", { class: "rule", x1: at(value), x2: at(value), y1: top, y2: height - bottom }),
      draw("text", { class: "tick", x: at(value), y: height - bottom + 18, "text-anchor": "middle" }, text),
    );
  }
  for (const { value, text } of ticks(yl, yh, 6)) {
    svg.append(
      draw("line", { class: "rule", x1: left, x2: width - right, y1: up(value), y2: up(value) }),
      draw("text", { class: "tick", x: left - 8, y: up(value) + 4, "text-anchor": "end" }, text),
    );
  }
  const middle = (top + height - bottom) / 2;
  svg.append(
    draw(
      "text",
      { class: "axis", x: (left + width - right) / 2, y: height - 12, "text-anchor": "middle" },
      `${first.label} ${arrow(first)}`,
    ),
    draw(
      "text",
      { class: "axis", x: 16, y: middle, "text-anchor": "middle", transform: `rotate(-90 16 ${middle})` },
      `${second.label} ${arrow(second)}`,
    ),
  );
  for (const { name, x, y } of shown) {
    const [cx, cy] = [at(number(x.mean)), up(number(y.mean))];
    const told = [x, y].map((part, i) => {
      const metric = [first, second][i];
      return `${metric.label} ${fixed(part.mean, metric.digits)} ${interval(part, metric.digits) || ""}`.trim();
    });
    const point = draw(
      "g",
      { class: `point ${look(name)}`, tabindex: "0", role: "img", "aria-label": [name, ...told].join(", ") },
      draw("title", {}, [name, ...told].join("\n")),
    );
    if (number(x.low) !== null) {
      point.append(draw("line", { x1: at(number(x.low)), x2: at(number(x.high)), y1: cy, y2: cy }));
    }
    if (number(y.low) !== null) {
      point.append(draw("line", { x1: cx, x2: cx, y1: up(number(y.low)), y2: up(number(y.high)) }));
    }
    point.append(draw("circle", { cx, cy, r: 5 }));
    svg.append(point);
  }
  nameMarks(
    svg,
    shown.map(({ name, x, y }) => ({ name, x: at(number(x.mean)), y: up(number(y.mean)) })),
    width,
  );
  const least = methods.length - shown.length;
  find("scatter-caption").textContent =
    `Means of ${first.label} (${better(first)}) and ${second.label} (${better(second)}) with 95 % intervals.` +
    ` Ring: the reference; grey: baselines and foreign results.` +
    (least ? ` ${count(least, "method")} without both numbers left out.` : "");
}

/** Name points beside them; names that would overlap are moved apart and joined to their points. */
function nameMarks(svg, marks, width) {
  const line = 16;
  const sides = [marks.filter((mark) => mark.x <= width * 0.7), marks.filter((mark) => mark.x > width * 0.7)];
  sides.forEach((side, i) => {
    const sign = i === 0 ? 1 : -1;
    const done = [];
    for (const mark of [...side].sort((a, b) => a.y - b.y)) {
      const text = cut(mark.name, width * 0.27);
      const long = wide(text) + 12;
      let y = mark.y - 9;
      const hit = (other) => Math.abs(other.y - y) < line && Math.abs(other.x - mark.x) < Math.max(long, other.long);
      while (done.some(hit)) y += 2;
      done.push({ x: mark.x, y, long });
      if (Math.abs(y - mark.y) > line) {
        svg.append(draw("line", { class: "leader", x1: mark.x, y1: mark.y, x2: mark.x + sign * 8, y2: y }));
      }
      svg.append(
        draw(
          "text",
          { class: "mark", x: mark.x + sign * 10, y: y + 4, "text-anchor": i === 0 ? "start" : "end" },
          text,
        ),
      );
    }
  });
}

/** A number in [-1, 1] that belongs to a place in a list: spreads points without chance. */
const jitter = (i) => ((i * 0.618034) % 1) * 2 - 1;

function showStrip() {
  const svg = find("strip");
  const metrics = measured("values");
  find("strips").hidden = metrics.length === 0;
  if (metrics.length === 0) return;
  const metric = data.metrics.find(({ id }) => id === find("metric-strip").value);
  const found = data.values[state.dataset];
  const names = dataset().images;
  const rows = methods
    .map((name) => {
      const values = of(found, name, metric.id) || {};
      const known = names.map((image, i) => ({ image, i, value: number(of(values, image)) }));
      return { name, points: known.filter(({ value }) => value !== null && Number.isFinite(value)) };
    })
    .filter(({ points }) => points.length);
  const width = Math.min(Math.max(svg.parentElement.clientWidth, 320), 1200);
  const [tall, top, bottom, right] = [46, 8, 56, 20];
  const left = clamp(Math.max(...rows.map(({ name }) => wide(name))) + 20, 80, Math.min(280, width / 3));
  const height = top + rows.length * tall + bottom;
  const [low, high] = range(rows.flatMap(({ points }) => points.map(({ value }) => value)));
  const at = (value) => left + ((value - low) / (high - low)) * (width - left - right);
  frame(svg, width, height);
  for (const { value, text } of ticks(low, high, width / 110)) {
    svg.append(
      draw("line", { class: "rule", x1: at(value), x2: at(value), y1: top, y2: height - bottom }),
      draw("text", { class: "tick", x: at(value), y: height - bottom + 18, "text-anchor": "middle" }, text),
    );
  }
  svg.append(
    draw(
      "text",
      { class: "axis", x: (left + width - right) / 2, y: height - 12, "text-anchor": "middle" },
      `${metric.label} ${arrow(metric)}`,
    ),
    draw("path", { class: "thread", d: "" }),
  );
  const radius = names.length > 400 ? 2 : 3.5;
  rows.forEach((row, r) => {
    const middle = top + (r + 0.5) * tall;
    const mean = of(data.means, state.dataset, row.name, metric.id);
    svg.append(
      draw("line", { class: "rule", x1: left, x2: width - right, y1: middle + tall / 2, y2: middle + tall / 2 }),
      draw(
        "text",
        { class: "row", x: left - 12, y: middle + 4, "text-anchor": "end" },
        draw("title", {}, row.name),
        cut(row.name, left - 20),
      ),
    );
    const group = draw("g", {
      class: `dots ${look(row.name)}`,
      tabindex: "0",
      role: "group",
      "aria-label": `${row.name}, ${count(row.points.length, "image")}; arrows go from image to image, Enter opens`,
    });
    row.points.forEach(({ image, i, value }) => {
      group.append(
        draw("circle", {
          cx: at(value),
          cy: middle + jitter(i) * tall * 0.32,
          r: radius,
          "data-i": i,
          "data-value": value,
        }),
      );
    });
    group.dataset.name = row.name;
    svg.append(group);
    if (mean && Number.isFinite(number(mean.mean))) {
      const sides = number(mean.low) === null ? null : [at(number(mean.low)), at(number(mean.high))];
      svg.append(
        draw(
          "g",
          { class: "mean" },
          sides && draw("line", { x1: sides[0], x2: sides[1], y1: middle, y2: middle }),
          draw("line", { x1: at(number(mean.mean)), x2: at(number(mean.mean)), y1: middle - 9, y2: middle + 9 }),
        ),
      );
    }
  });
  find("strip-caption").textContent =
    `${metric.label} (${better(metric)}) of every image; the bar is the mean with its 95 % interval. ` +
    "Point at a dot to find its image in every row, click it to see the image above.";
  find("named").textContent = "";
}

/** Say which image a dot is, and join its dots in all rows. */
function pointOut(dot) {
  const svg = find("strip");
  for (const other of svg.querySelectorAll(".hit")) other.classList.remove("hit");
  const thread = svg.querySelector(".thread");
  if (thread === null) return;
  if (dot === null) {
    thread.setAttribute("d", "");
    find("named").textContent = "";
    return;
  }
  const all = [...svg.querySelectorAll(`circle[data-i="${dot.dataset.i}"]`)];
  for (const other of all) other.classList.add("hit");
  thread.setAttribute(
    "d",
    `M${all.map((other) => `${other.getAttribute("cx")} ${other.getAttribute("cy")}`).join("L")}`,
  );
  const metric = data.metrics.find(({ id }) => id === find("metric-strip").value);
  const value = fixed(dot.dataset.value, metric.digits);
  find("named").textContent = `${dataset().images[dot.dataset.i]}: ${value} with ${dot.parentElement.dataset.name}`;
}

function openDot(dot) {
  const image = dataset().images[dot.dataset.i];
  if (!pictured().includes(image)) {
    find("named").textContent = `${image}: no pictures of it were kept`;
    return;
  }
  const key = `method ${dot.parentElement.dataset.name}`;
  if (key !== state.left) state.right = key;
  showImage(image);
  find("images").scrollIntoView();
  stage.focus({ preventScroll: true });
}

function stripKeys(event) {
  const group = event.target.closest(".dots");
  if (group === null) return;
  const dots = [...group.querySelectorAll("circle")].sort((a, b) => a.dataset.value - b.dataset.value);
  const now = dots.findIndex((dot) => dot.classList.contains("hit"));
  if (event.key === "Enter" && now >= 0) openDot(dots[now]);
  const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (step === undefined) return;
  event.preventDefault();
  pointOut(dots[now < 0 ? 0 : clamp(now + step, 0, dots.length - 1)]);
}

function showPlots() {
  const metrics = measured("means");
  const entries = (some) => some.map((metric) => ({ key: metric.id, label: `${metric.label} ${arrow(metric)}` }));
  if (metrics.length > 1) {
    const chosen = (id) => metrics.find((metric) => metric.id === find(id).value);
    const first = chosen("metric-x") || metrics[0];
    const others = metrics.filter((metric) => metric !== first);
    const second = others.find((metric) => metric.lower_better !== first.lower_better) || others[0];
    options(find("metric-x"), entries(metrics), first.id);
    options(find("metric-y"), entries(metrics), (chosen("metric-y") || second).id);
  }
  options(find("metric-strip"), entries(measured("values")), find("metric-strip").value);
  showScatter();
  showStrip();
}

function bindPlots() {
  for (const id of ["metric-x", "metric-y"]) find(id).addEventListener("change", showScatter);
  find("metric-strip").addEventListener("change", showStrip);
  const svg = find("strip");
  const dot = (event) => (event.target.matches("circle") ? event.target : null);
  svg.addEventListener("pointerover", (event) => dot(event) && pointOut(dot(event)));
  svg.addEventListener("pointerleave", () => svg.contains(document.activeElement) || pointOut(null));
  svg.addEventListener("click", (event) => dot(event) && openDot(dot(event)));
  svg.addEventListener("keydown", stripKeys);
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 2) return;
    width = entry.contentRect.width;
    showScatter();
    showStrip();
  }).observe(document.querySelector("main"));
}

// -------------------------------------------------------------------------------------------------------------- page

function showFigures() {
  const shown = data.figures.filter((figure) => figure.path !== null);
  find("figures").hidden = shown.length === 0;
  find("figures-list").replaceChildren(
    ...shown.map((figure) =>
      make(
        "figure",
        {},
        make("img", { loading: "lazy", src: address(figure.path), alt: `${figure.label}: ${figure.caption}` }),
        make("figcaption", {}, make("b", {}, figure.label), " ", figure.caption),
      ),
    ),
  );
}

function showDataset(name) {
  state.dataset = name;
  for (const place of document.querySelectorAll(".dataset")) place.textContent = name;
  showTables();
  showPlots();
  showViewer();
  showNav();
}

function showNav() {
  find("nav").replaceChildren(
    ...[...document.querySelectorAll("main section")]
      .filter((section) => !section.hidden)
      .map((section) => make("a", { href: `#${section.id}` }, section.dataset.nav)),
  );
}

function showHead() {
  for (const place of document.querySelectorAll(".reference")) place.textContent = data.reference;
  const images = data.datasets.map(
    ({ name, images, paired }) => `${name} (${count(images.length, "image")}${paired ? "" : ", no ground truth"})`,
  );
  find("summary").textContent =
    `${count(methods.length, "method")} on ${images.join(", ")}. Reference: ${data.reference}.`;
  const [first, ...rest] = data.notes;
  find("notes").hidden = data.notes.length === 0;
  find("notes").replaceChildren(
    make("p", {}, first || ""),
    ...(rest.length
      ? [
          make(
            "details",
            {},
            make("summary", {}, `${count(rest.length, "more note")}`),
            make(
              "ul",
              {},
              rest.map((note) => make("li", {}, note)),
            ),
          ),
        ]
      : []),
  );
  find("datasets").hidden = data.datasets.length < 2;
  find("datasets").append(
    ...data.datasets.map(({ name }, i) =>
      make(
        "label",
        {},
        make("input", {
          type: "radio",
          name: "dataset",
          value: name,
          checked: i === 0 ? "" : null,
          onchange: () => showDataset(name),
        }),
        make("span", {}, name),
      ),
    ),
  );
}

showHead();
showEfficiency();
showPublished();
showGaps();
showProtocols();
showSources();
bindViewer();
bindPlots();
if (data.datasets.length) showDataset(data.datasets[0].name);
window.addEventListener("beforeprint", () => {
  for (const img of document.querySelectorAll("img[loading]")) img.loading = "eager";
  for (const details of document.querySelectorAll("details")) details.open = true;
});
document.addEventListener("DOMContentLoaded", () => {
  showFigures(); // whose embedded pictures come after this script
  showNav();
});
