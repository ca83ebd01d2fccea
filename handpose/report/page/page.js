"use strict";
// Draws the charts when they come into view, in the colours of the style sheet; on paper all of them, in the light ones.

const figures = JSON.parse(document.getElementById("figures").textContent);
const places = [...document.querySelectorAll("[data-figure]")];
const isPhone = matchMedia("(pointer: coarse), (max-width: 600px)");

function resolved(value, style) {
  if (typeof value === "string") return value.startsWith("@") ? style.getPropertyValue(`--${value.slice(1)}`).trim() : value;
  if (Array.isArray(value)) return value.length > 9 && typeof value[0] === "number" ? value : value.map((item) => resolved(item, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
  }
  return value;
}

function layoutOf(given, width) {
  const small = width < 520;
  const axis = { gridcolor: "@grid", linecolor: "@grid", zerolinecolor: "@grid", automargin: true };
  return {
    font: { family: getComputedStyle(document.body).fontFamily, size: small ? 11 : 13, color: "@ink" },
    paper_bgcolor: "@paper", plot_bgcolor: "@paper", margin: { l: 10, r: small ? 10 : 24, t: 10, b: 10 },
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: small ? 10 : 12 } },
    hovermode: "closest", dragmode: isPhone.matches ? false : "zoom",
    hoverlabel: { bgcolor: "@card", bordercolor: "@muted", font: { color: "@ink" } },
    ...given, xaxis: { ...axis, ...given.xaxis }, yaxis: { ...axis, ...given.yaxis },
  };
}

function draw(place, { onPaper = false } = {}) {
  const { data, layout, height } = figures[place.dataset.figure];
  const style = getComputedStyle(document.documentElement);
  const inGrid = place.closest(".grid") !== null;
  const width = onPaper ? (inGrid ? 320 : 660) : place.clientWidth;
  const size = onPaper ? { width, height } : { height, autosize: true };
  const config = { displayModeBar: false, responsive: !onPaper, staticPlot: onPaper };
  Plotly.newPlot(place, resolved(data, style), { ...resolved(layoutOf(layout, width), style), ...size }, config);
  place.dataset.drawn = "yes";
  if (!onPaper) place.on("plotly_click", (event) => show(place, event.points[0].customdata));
}

function show(place, customdata) {
  const number = Array.isArray(customdata) ? customdata[0] : customdata;
  const row = document.getElementById(`${place.dataset.sweep}trial-${number}`);
  if (row) location.hash = row.id;
}

const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) {
    if (entry.isIntersecting && !entry.target.dataset.drawn) draw(entry.target);
  }
}, { rootMargin: "400px" });
for (const place of places) watcher.observe(place);

function redraw(options) {
  for (const place of places) if (place.dataset.drawn || options.onPaper) draw(place, options);
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw({}));
addEventListener("beforeprint", () => {
  document.documentElement.classList.add("on-paper");
  for (const details of document.querySelectorAll("details.print")) details.open = true;
  redraw({ onPaper: true });
});
addEventListener("afterprint", () => {
  document.documentElement.classList.remove("on-paper");
  redraw({});
});

// A click on a table's head sorts it; a second one turns it round.
function sortBy(button) {
  const table = button.closest("table"), column = button.closest("th").cellIndex;
  const ascending = button.dataset.order !== "ascending";
  for (const other of table.querySelectorAll("th button")) delete other.dataset.order;
  button.dataset.order = ascending ? "ascending" : "descending";
  const key = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === "" || y === "") return (x === "") - (y === "");
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y;
    return ascending ? order : -order;
  };
  const body = table.tBodies[0];
  body.append(...[...body.rows].sort(compare));
}
for (const button of document.querySelectorAll("th button")) button.addEventListener("click", () => sortBy(button));

// A click on the number of a trial shows its story.
const stories = JSON.parse(document.getElementById("stories").textContent);
const dialog = document.getElementById("story");
function tell(name, number) {
  const rows = stories[name].map((line) => {
    const row = document.createElement("tr");
    for (const text of line) row.insertCell().textContent = text;
    return row;
  });
  dialog.querySelector("h3").textContent = `Trial ${number}`;
  dialog.querySelector("tbody").replaceChildren(...rows);
  dialog.showModal();
}
addEventListener("click", (event) => {
  const button = event.target.closest("button[data-story]");
  if (button) tell(button.dataset.story, button.textContent);
  else if (event.target === dialog) dialog.close(); // a click beside it
});
