"use strict";
// Asks the server for the state of one sweep every two seconds, and shows it. All text is set as text, never as HTML.

const POLL_MS = 2000;
const MAX_ROWS = 300;
const readOnly = document.documentElement.dataset.readOnly === "yes";
const place = (id) => document.getElementById(id);

if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname); // the token is neither in the history nor on the screen
}
const token = sessionStorage.getItem("token") || "";
let shown = 0;
let names = [];
const waiting = new Set(); // commands without an answer, as text

async function ask(path, options = {}) {
  const answer = await fetch(path, { ...options, headers: { "x-handpose-token": token, ...options.headers } });
  if (answer.status === 403 && !options.method) throw new Error(await answer.text());
  const body = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (body && body.error) throw new Error(body.error);
  return body;
}

function report(problem) {
  place("problem").hidden = !problem;
  place("problem").textContent = problem || "";
}

function make(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  if (className) made.className = className;
  return made;
}

function duration(seconds) {
  if (seconds === null) return "unknown";
  const s = Math.round(seconds), pad = (number) => String(number).padStart(2, "0");
  return s < 3600 ? `${Math.floor(s / 60)}:${pad(s % 60)}` : `${Math.floor(s / 3600)}:${pad(Math.floor(s / 60) % 60)}:${pad(s % 60)}`;
}

function number(value) {
  return typeof value === "number" ? String(Number(value.toPrecision(4))) : value === null || value === undefined ? "-" : String(value);
}

// --- commands ---------------------------------------------------------------------------------------------------------

async function command(action, trial) {
  const text = trial === undefined ? action : `${action} ${trial}`;
  const sweep = shown;
  waiting.add(text);
  place("answer").textContent = `${text}: waiting for the sweep`;
  try {
    const body = JSON.stringify(trial === undefined ? { action } : { action, trial });
    const { id } = await ask(`/sweeps/${sweep}/commands`, { method: "POST", body, headers: { "content-type": "application/json" } });
    for (let tries = 0; tries < 30; tries += 1) {
      const answer = await ask(`/sweeps/${sweep}/commands/${id}`);
      if (answer) {
        place("answer").textContent = `${text}: ${answer.accepted ? "accepted" : "refused"}, ${answer.sentence}`;
        return;
      }
      await new Promise((resolve) => { setTimeout(resolve, 500); });
    }
    place("answer").textContent = `${text}: no process runs the sweep now; the command waits until it is resumed`;
  } catch (error) {
    place("answer").textContent = `${text}: ${error.message}`;
  } finally {
    waiting.delete(text);
    update();
  }
}

function button(label, action, trial) {
  const made = make("button", label);
  made.type = "button";
  made.disabled = waiting.has(trial === undefined ? action : `${action} ${trial}`);
  made.addEventListener("click", () => { made.disabled = true; command(action, trial); });
  return made;
}

function actionsOf(trial) {
  if (["running", "waiting", "paused"].includes(trial.state)) return [["Stop", "stop"], ["Keep", "keep"]];
  if (["failed", "stopped"].includes(trial.state)) return [["Retry", "retry"]];
  return [];
}

// --- what is shown ----------------------------------------------------------------------------------------------------

function card(value, text) {
  const made = make("div", "", "card");
  made.append(make("b", value), make("span", text));
  return made;
}

function showHead(status) {
  place("name").textContent = status.name;
  document.title = `${status.name}: ${status.state}`;
  const counts = Object.entries(status.counts).map(([state, count]) => `${count} ${state}`).join(", ");
  const silent = status.state === "running" && status.silent_s > 120 ? `; the last event was ${duration(status.silent_s)} ago` : "";
  place("lead").textContent = `${status.state}${silent}: ${status.trials.length} of ${status.num_trials} trials (${counts || "none yet"})`;
  const best = status.trials.find((trial) => trial.number === status.best);
  place("cards").replaceChildren(
    card(best ? number(best.metrics[status.metric]) : "-", best ? `best ${status.metric}: trial ${best.number}, epoch ${best.epochs}` : `best ${status.metric}`),
    card(duration(status.used_s), "used"),
    card(status.state === "running" ? duration(status.left_s) : "0:00", "expected to be left"),
    card(`${status.counts.running || 0} of ${status.num_slots}`, "slots in use"),
    ...(status.gpu_hours ? [card(status.gpu_hours.toFixed(1), "GPU-hours")] : []),
    ...(status.retrained ? [card(number(status.retrained[`test/${status.metric.split("/").pop()}`]), "test, after the retraining")] : []),
  );
}

function searchedKeys(trials) {
  const values = new Map();
  for (const { params } of trials) {
    for (const [key, value] of Object.entries(params)) values.set(key, (values.get(key) || new Set()).add(JSON.stringify(value)));
  }
  return [...values].filter(([, found]) => trials.length === 1 || found.size > 1).map(([key]) => key);
}

function showTrials(status) {
  const keys = searchedKeys(status.trials);
  const titles = ["trial", "state", ...(readOnly ? [] : [""]), "epoch", status.metric, ...keys, "time", "node", "last decision"];
  place("titles").replaceChildren(...titles.map((title) => make("th", title)));
  const order = { running: 0, waiting: 1, paused: 2 };
  const sorted = [...status.trials].sort((one, two) => (order[one.state] ?? 3) - (order[two.state] ?? 3) || two.number - one.number);
  place("trials").replaceChildren(...sorted.slice(0, MAX_ROWS).map((trial) => {
    const row = make("tr", "", trial.number === status.best ? "best" : "");
    row.id = `trial-${trial.number}`;
    row.append(make("td", trial.number), make("td", trial.state, `state-${trial.state}`));
    if (!readOnly) {
      const cell = make("td", "", "actions");
      cell.append(...actionsOf(trial).flatMap(([label, action]) => [button(label, action, trial.number), " "]));
      row.append(cell);
    }
    row.append(
      make("td", `${trial.epochs}/${status.max_epochs}`, "number"),
      make("td", number(trial.metrics[status.metric]), "number"), ...keys.map((key) => make("td", key in trial.params ? number(trial.params[key]) : "", "number")),
      make("td", duration(trial.seconds), "number"), make("td", trial.node), make("td", trial.error || trial.reason, "reason"),
    );
    return row;
  }));
}

function resolved(value, style) {
  if (typeof value === "string") return value.startsWith("@") ? style.getPropertyValue(`--${value.slice(1)}`).trim() : value;
  if (Array.isArray(value)) return value.map((item) => resolved(item, style));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolved(item, style)]));
  return value;
}

function showCharts(charts) {
  const style = getComputedStyle(document.documentElement);
  const axis = { gridcolor: "@grid", linecolor: "@grid", zerolinecolor: "@grid", automargin: true };
  for (const [name, { data, layout, height }] of Object.entries(charts)) {
    const isEmpty = data.every((trace) => !(trace.y || []).length);
    place(name).parentElement.hidden = isEmpty;
    if (isEmpty) continue;
    const whole = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "@ink" }, paper_bgcolor: "@paper", plot_bgcolor: "@paper",
      margin: { l: 10, r: 20, t: 10, b: 10 }, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom" }, hovermode: "closest",
      ...layout, xaxis: { ...axis, ...layout.xaxis }, yaxis: { ...axis, ...layout.yaxis }, height, autosize: true, uirevision: "kept",
    };
    Plotly.react(place(name), resolved(data, style), resolved(whole, style), { displayModeBar: false, responsive: true });
  }
}

// --- polling ----------------------------------------------------------------------------------------------------------

let lastRead = 0;

async function update() {
  const asked = shown;
  try {
    const { status, charts, read_at: readAt } = await ask(`/sweeps/${asked}`);
    if (asked !== shown || readAt === lastRead) return;
    lastRead = readAt;
    showHead(status);
    showTrials(status);
    showCharts(charts);
    report("");
  } catch (error) {
    report(error instanceof TypeError ? "the dashboard no longer answers; start it again" : error.message);
  }
}

function choose(index) {
  [shown, lastRead] = [index, 0];
  place("answer").textContent = "";
  place("sweeps").replaceChildren(...(names.length > 1 ? names : []).map((name, at) => {
    const link = make("a", name);
    link.href = "#";
    if (at === index) link.setAttribute("aria-current", "true");
    link.addEventListener("click", (event) => { event.preventDefault(); choose(at); });
    return link;
  }));
  for (const name of ["best", "curves"]) {
    Plotly.purge(place(name));
    place(name).parentElement.hidden = true;
  }
  for (const id of ["name", "lead"]) place(id).textContent = "";
  for (const id of ["cards", "trials", "titles"]) place(id).replaceChildren();
  update();
}

for (const each of document.querySelectorAll("#controls button")) each.addEventListener("click", () => command(each.dataset.action));
ask("/sweeps").then((found) => {
  names = found;
  choose(0);
  setInterval(update, POLL_MS);
}, (error) => report(error.message));
