/** Adds a box for each run to show or hide it, if there are several runs. */
function runBoxes(runs, onChange) {
  if (runs.length === 1) return;
  for (const run of runs) {
    const box = element("input", { type: "checkbox", checked: "" });
    box.addEventListener("change", () => { run.shown = box.checked; onChange(); });
    byId("runs").append(element("label", {}, box, element("span", { class: `dot c${run.number % 9}` }), run.name));
  }
}

function drawCharts(data, onStep) {
  const shown = data.runs.filter((run) => run.shown);
  const smoothing = +byId("smoothing").value;
  const draw = (more) => data.charts.filter((spec) => spec.more === more).flatMap((spec) => {
    const groups = spec.kind === "stack" ? shown.map((run) => [run]) : [shown];
    return groups.map((runs) => chart(titled(spec, runs, shown), runs, smoothing, onStep)).filter(Boolean);
  });
  byId("charts").replaceChildren(...draw(false));
  const more = draw(true);
  byId("more").hidden = !more.length;
  byId("more-charts").replaceChildren(...more);
}

/** Adds the name of the run to the title of a stacked chart, because each run has its own. */
function titled(spec, runs, shown) {
  return spec.kind === "stack" && shown.length > 1 ? { ...spec, title: `${spec.title}: ${runs[0].name}` } : spec;
}

function showFacts(runs) {
  const lists = runs.map((run) => {
    const name = runs.length > 1 ? [element("div", { class: `name c${run.number % 9}` }, run.name)] : [];
    const facts = run.facts.map(([term, value]) => element("div", {}, element("dt", {}, term), element("dd", {}, value)));
    return element("dl", { class: "facts" }, ...name, ...facts);
  });
  byId("facts").append(...lists);
}

/** Shows the settings of all runs side by side, and marks settings that differ. */
function showSettings(runs) {
  const sections = [...new Set(runs.flatMap((run) => Object.keys(run.config)))];
  if (!sections.length) byId("settings").remove();
  for (const section of sections) {
    const names = [...new Set(runs.flatMap((run) => Object.keys(run.config[section] ?? {})))];
    const rows = names.map((name) => {
      const values = runs.map((run) => run.config[section]?.[name] ?? "–");
      const differ = values.some((value) => value !== values[0]);
      const cells = values.map((value) => element("td", differ ? { class: "differs" } : {}, ...visible(value)));
      return element("tr", {}, element("th", { scope: "row" }, name), ...cells);
    });
    byId("config").append(element("div", { class: "card" }, element("h3", {}, section), element("table", {}, ...rows)));
  }
}

function start() {
  const data = JSON.parse(byId("data").textContent);
  data.runs.forEach((run, number) => Object.assign(run, { number, shown: true }));
  const onStep = sampleBrowser(data.runs);
  const draw = () => drawCharts(data, onStep);
  runBoxes(data.runs, draw);
  byId("smoothing").addEventListener("input", draw);
  showFacts(data.runs);
  showSettings(data.runs);
  draw();
}

start();
