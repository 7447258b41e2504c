// The little that pages do themselves: theme, chart, forms that send JSON or files, the viewer.
"use strict";

const root = document.documentElement;
try {
  const kept = localStorage.getItem("theme");
  if (kept) root.dataset.theme = kept;
} catch { /* no storage: the system's colours */ }

function text(tag, words, name) {
  const made = document.createElement(tag);
  made.textContent = words;
  if (name) made.className = name;
  return made;
}

function colour(name) {
  return getComputedStyle(root).getPropertyValue(name).trim();
}

function setTheme() {
  const dark = root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("theme", root.dataset.theme); } catch { /* this page alone */ }
}

// -- engine: points of the last two minutes, from totals ------------------------------------------
function startChart(box, live) {
  const seconds = 120;
  const data = [[], [], [], []];
  let before = null;
  const line = (label, colourName, scale, unit) => ({
    label, stroke: () => colour(colourName), width: 2, scale,
    value: (_, value) => value == null ? "–" : `${value.toFixed(unit === "%" ? 1 : 0)} ${unit}`,
  });
  const axis = (more) => ({ stroke: () => colour("--soft"), grid: { stroke: () => colour("--line") }, ...more });
  const plot = new uPlot({
    width: box.clientWidth, height: 240,
    scales: { "%": { range: [0, 100] }, rows: { range: (_, low, high) => [0, Math.max(10, high)] } },
    series: [
      {},
      line("device busy", "--link", "%", "%"),
      line("promises kept", "--good", "%", "%"),
      line("rows waiting", "--bad", "rows", ""),
    ],
    axes: [axis({}), axis({ scale: "%" }), axis({ scale: "rows", side: 1, grid: { show: false } })],
  }, data, box);
  live.addEventListener("point", (event) => {
    const now = Date.now() / 1000;
    const point = JSON.parse(event.detail.data);
    if (before) {
      const asked = point.calls - before.point.calls;
      const busy = (point.busy - before.point.busy) / (now - before.now);
      data[0].push(now);
      data[1].push(Math.min(100, 100 * busy));
      data[2].push(asked > 0 ? 100 * (point.kept - before.point.kept) / asked : null);
      data[3].push(point.urgent + point.background);
      while (data[0].length > seconds) data.forEach((one) => one.shift());
      plot.setData(data);
    }
    before = { now, point };
  });
  addEventListener("resize", () => plot.setSize({ width: box.clientWidth, height: 240 }));
}

// -- forms ----------------------------------------------------------------------------------------
function valueOf(field) {
  if (field.dataset.kind === "flag") return field.checked;
  if (field.value === "") return undefined;
  if (field.dataset.kind === "number") return Number(field.value);
  if (field.dataset.kind === "json") return JSON.parse(field.value);
  return field.value;
}

function told(box, status, body, good) {
  box.replaceChildren(text("p", status, good ? "good" : "bad"));
  const pre = document.createElement("pre");
  pre.append(text("code", body));
  box.append(pre);
}

function pretty(raw) {
  try { return JSON.stringify(JSON.parse(raw), null, 2); } catch { return raw; }
}

function whereTimeWent(box, header) {
  if (!header) return;
  const timing = JSON.parse(header);
  const words = ["decode", "queue", "device", "encode", "total"]
    .map((part) => `${part} ${timing[`${part}_ms`].toFixed(2)} ms`);
  box.append(text("p", `${words.join(", ")}; largest batch: ${timing.batch_rows} rows`));
}

async function tryIt(form, box) {
  const record = {};
  try {
    for (const field of form.querySelectorAll("[data-kind]")) {
      const value = valueOf(field);
      if (value !== undefined) record[field.name] = value;
    }
  } catch (error) {
    told(box, "A field with parts is not JSON", String(error), false);
    return;
  }
  const headers = { "content-type": "application/json" };
  const deadline = form.querySelector("#deadline").value;
  if (deadline) headers["x-slo-deadline-ms"] = deadline;
  try {
    const answer = await fetch(form.dataset.route, { method: "POST", headers, body: JSON.stringify(record) });
    told(box, `${answer.status} ${answer.headers.get("x-plinth-late") ? "late" : ""}`, pretty(await answer.text()), answer.ok);
    whereTimeWent(box, answer.headers.get("x-plinth-timing"));
  } catch (error) {
    told(box, "The server did not answer", String(error), false);
  }
  box.focus();
}

function upload(form, box) {
  const sent = form.querySelector("#sent");
  const asked = new XMLHttpRequest();
  asked.open("POST", form.dataset.route);
  asked.upload.onprogress = (event) => { sent.hidden = false; sent.value = event.loaded / event.total; };
  asked.onload = () => {
    sent.hidden = true;
    if (asked.status === 202) {
      location.assign(`${form.dataset.list}/${JSON.parse(asked.responseText).id}`);
    } else {
      told(box, String(asked.status), pretty(asked.responseText), false);
    }
  };
  asked.onerror = () => told(box, "The server did not answer", "try again", false);
  asked.send(new FormData(form));
}

// -- a volume with its mask -----------------------------------------------------------------------
async function view(box) {
  const { Niivue } = niivue;
  const canvas = box.querySelector("canvas");
  const place = box.querySelector("[data-part=place]");
  const viewer = new Niivue({
    isColorbar: false, multiplanarShowRender: 1, crosshairWidth: 0.5, crosshairColor: [0.48, 0.69, 1, 0.8], backColor: [0, 0, 0, 1], logLevel: "error",
    onLocationChange: (at) => {
      const [right, anterior, superior] = at.mm;
      const values = at.values.map((one) => Math.round(one.value)).join(", ");
      place.textContent = `left ${(-right).toFixed(1)}, posterior ${(-anterior).toFixed(1)}, superior ${superior.toFixed(1)} mm: ${values}`;
    },
  });
  await viewer.attachToCanvas(canvas);
  const volumes = [{ url: box.dataset.volume, colormap: "gray", cal_min: -1350, cal_max: 150 }];
  if (box.dataset.mask) volumes.push({ url: box.dataset.mask, colormap: "red", opacity: 0.4, cal_min: 0.5, cal_max: 1 });
  await viewer.loadVolumes(volumes);
  viewer.setInterpolation(true);
  viewer.setSliceType(3);
  box.querySelector("[data-part=mask]").addEventListener("input", (event) => {
    if (viewer.volumes.length > 1) viewer.setOpacity(1, Number(event.target.value));
  });
  box.querySelector("[data-part=view]").addEventListener("change", (event) => viewer.setSliceType(Number(event.target.value)));
  box.querySelector("[data-part=window]").addEventListener("change", (event) => {
    [viewer.volumes[0].cal_min, viewer.volumes[0].cal_max] = event.target.value.split(",").map(Number);
    viewer.updateGLVolume();
  });
  for (const button of box.closest("article").querySelectorAll("[data-place]")) {
    button.addEventListener("click", () => {
      const at = button.dataset.place.split(",").map(Number);
      viewer.scene.crosshairPos = viewer.mm2frac(at);
      viewer.createOnLocationChange();
      viewer.drawScene();
      canvas.focus();
    });
  }
  box.dataset.ready = "true";
}

// -- the desk: keys that move in the queue and decide ---------------------------------------------
let deskAlert = null; // kept here, for the queue is drawn again every few seconds

function deskKey(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.closest("input, select, textarea")) return;
  const decision = document.querySelector(`#case [data-key="${CSS.escape(event.key)}"]`);
  if (decision) decision.click();
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const alerts = [...document.querySelectorAll("#queue [data-alert]")];
  const seen = document.activeElement.closest("[data-alert]")?.dataset.alert ?? deskAlert;
  const here = alerts.findIndex((one) => one.dataset.alert === seen);
  const next = alerts[Math.min(alerts.length - 1, Math.max(0, here + step))];
  if (!next) return;
  event.preventDefault();
  deskAlert = next.dataset.alert;
  next.focus();
  next.click();
}

document.addEventListener("DOMContentLoaded", () => {
  if (document.getElementById("work")) document.addEventListener("keydown", deskKey);
  document.getElementById("theme").addEventListener("click", setTheme);
  const chart = document.getElementById("chart");
  if (chart) startChart(chart, document.getElementById("live"));
  const box = document.getElementById("answer");
  const form = document.getElementById("try");
  if (form) form.addEventListener("submit", (event) => { event.preventDefault(); tryIt(form, box); });
  const files = document.getElementById("upload");
  if (files) files.addEventListener("submit", (event) => { event.preventDefault(); upload(files, box); });
  for (const viewer of document.querySelectorAll(".viewer")) {
    view(viewer).catch((error) => viewer.prepend(text("p", `The volume cannot be shown: ${error}`, "bad")));
  }
});
