"use strict";

// --- the table of modules: sorted by a click on a heading, filtered by words ---

const table = document.getElementById("table");

function sortBy(heading) {
  const column = heading.cellIndex;
  const up = heading.getAttribute("aria-sort") === "descending" || (!heading.classList.contains("n") && !heading.hasAttribute("aria-sort"));
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
  const rows = [...table.tBodies[0].rows];
  const isNumber = heading.classList.contains("n");
  rows.sort((a, b) => isNumber ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
  if (!up) rows.reverse();
  table.tBodies[0].append(...rows);
}

function filterRows() {
  const words = document.getElementById("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  let found = 0;
  for (const row of table.tBodies[0].rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !words.every((word) => text.includes(word));
    found += !row.hidden;
  }
  const all = table.tBodies[0].rows.length;
  document.getElementById("found").textContent = (words.length ? `${found} of ${all}` : `${all}`) + " modules";
}

if (table) {
  for (const heading of table.tHead.rows[0].cells) heading.firstChild.addEventListener("click", () => sortBy(heading));
  document.getElementById("filter").addEventListener("input", filterRows);
}

// --- the plots ---

const plots = JSON.parse(document.getElementById("plots").textContent);
const dark = matchMedia("(prefers-color-scheme: dark)");

// A value with the colours of the theme in the place of the names of CSS variables.
function themed(value, style) {
  if (typeof value === "string") return value.replace(/^var\((--[\w-]+)\)$/, (_, name) => style.getPropertyValue(name).trim());
  if (Array.isArray(value)) return value.map((item) => themed(item, style));
  if (value === null || typeof value !== "object") return value;
  return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
}

const AXIS = { gridcolor: "var(--line)", zerolinecolor: "var(--line)", linecolor: "var(--line)", fixedrange: true, automargin: true };
const LAYOUT = {
  paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", dragmode: false, hovermode: "closest",
  font: { color: "var(--text)", size: 12, family: "system-ui, -apple-system, Segoe UI, Roboto, sans-serif" },
  hoverlabel: { bgcolor: "var(--panel)", bordercolor: "var(--muted)", font: { color: "var(--text)" }, align: "left", namelength: -1 },
};

function draw(place) {
  const { data, layout } = plots[place.dataset.plot];
  const style = getComputedStyle(document.documentElement);
  const whole = { ...LAYOUT, ...layout };
  for (const name of Object.keys(layout).filter((key) => /^[xy]axis/.test(key))) whole[name] = { ...AXIS, ...layout[name] };
  const options = { responsive: true, displayModeBar: false };
  return Plotly.react(place, themed(data, style), themed(whole, style), options);
}

function find(event) {
  const path = event.points[0].customdata;
  if (typeof path !== "string" || !table) return;
  document.getElementById("filter").value = path;
  filterRows();
  document.getElementById("modules").scrollIntoView();
}

async function unpack(text) {
  const packed = Uint8Array.from(atob(text), (char) => char.charCodeAt(0));
  return new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}

async function drawAll() {
  const places = [...document.querySelectorAll("[data-plot]")];
  try {
    const library = document.createElement("script");
    library.textContent = await unpack(document.getElementById("library").textContent);
    document.head.append(library);
    for (const place of places) await draw(place);
  } catch (error) {
    console.error(error);
    for (const place of places.filter((p) => !p.firstChild)) {
      place.classList.add("missing");
      place.textContent = "This browser cannot draw the plot.";
    }
    return;
  }
  for (const place of places) if (plots[place.dataset.plot].data[0].type === "heatmap") place.on("plotly_click", find);
  dark.addEventListener("change", () => places.forEach(draw));
  document.documentElement.dataset.drawn = places.length;
}

drawAll();
