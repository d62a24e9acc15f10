const WIDTH = 400, HEIGHT = 190, LEFT = 48, RIGHT = 8, TOP = 8, BOTTOM = 22;

/** Returns a chart of the shown runs, or null if no run has data for the chart. */
function chart(spec, runs, smoothing, onStep) {
  const series = runs.flatMap((run) => seriesOf(spec, run, runs.length > 1));
  if (!series.length) return null;
  if (spec.kind === "stack") stack(series);
  else for (const one of series) one.drawn = smoothed(one.points, smoothing);
  const steps = [...new Set(series.flatMap((one) => one.points.map((p) => p[0])))].sort((a, b) => a - b);
  const x = axis(steps[0], steps.at(-1), LEFT, WIDTH - RIGHT);
  const y = axis(...valueRange(spec, series), HEIGHT - BOTTOM, TOP);
  const cursor = drawing("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const svg = drawing(
    "svg",
    { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: "0", "aria-label": `${spec.title}, over steps` },
    ...grid(x, y),
    ...series.flatMap((one) => marks(one, x, y, smoothing)),
    cursor,
  );
  const legend = element("ul", { class: "legend", "aria-live": "off" });
  const show = (step) => writeLegend(legend, series, step);
  handleCursor(svg, cursor, steps, x, show, onStep);
  show(null);
  const notes = spec.note ? [element("span", { class: "note" }, spec.note)] : [];
  const title = element("h3", {}, spec.title, ...notes);
  return element("figure", { class: "card chart", "data-title": spec.title }, title, svg, legend);
}

function seriesOf(spec, run, several) {
  const one = spec.lines.length === 1;
  return spec.lines.flatMap((line, number) => {
    const points = run.metrics[line.metric] ?? [];
    if (!points.length) return [];
    const label = several ? (one ? run.name : `${run.name}: ${line.label}`) : line.label;
    const colour = several && spec.kind !== "stack" ? run.number : one ? run.number : number;
    return [{ run, label, points, colour: `c${colour % 9}`, dash: several ? `dash${number % 4}` : "", band: bandOf(line, run, points) }];
  });
}

function bandOf(line, run, points) {
  const at = (name) => new Map(run.metrics[name] ?? []);
  if (line.spread) {
    const spread = at(line.spread);
    return points.filter(([s]) => spread.has(s)).map(([s, v]) => [s, v - spread.get(s), v + spread.get(s)]);
  }
  const low = at(line.low), high = at(line.high);
  return points.filter(([s]) => low.has(s) && high.has(s)).map(([s]) => [s, low.get(s), high.get(s)]);
}

/** Stacks the parts of each run: `area` holds the lower and upper edges, `drawn` the upper edge. */
function stack(series) {
  const heights = new Map();
  for (const one of series) {
    const key = (step) => `${one.run.number} ${step}`;
    one.area = one.points.map(([step, value]) => {
      const below = heights.get(key(step)) ?? 0;
      heights.set(key(step), below + value);
      return [step, below, below + value];
    });
    one.band = [];
    one.drawn = one.area.map(([step, , top]) => [step, top]);
  }
}

/** Returns the exponential average of points, without a bias to 0 at the start. */
function smoothed(points, weight) {
  let sum = 0, total = 0;
  return points.map(([step, value]) => {
    sum = weight * sum + value;
    total = weight * total + 1;
    return [step, sum / total];
  });
}

function valueRange(spec, series) {
  const values = series.flatMap((one) => [
    ...one.points.map((p) => p[1]),
    ...one.drawn.map((p) => p[1]),
    ...one.band.flatMap(([, low, high]) => [low, high]),
  ]);
  const low = values.reduce((a, b) => Math.min(a, b));
  const high = values.reduce((a, b) => Math.max(a, b));
  const bottom = spec.zero ? Math.min(0, low) : low;
  // Room above, so that no line touches the edge.
  return [bottom, high + (high - bottom) * 0.06];
}

/** Returns a function from values to pixels, and about four round values for the labels. */
function axis(low, high, start, end) {
  if (low === high) [low, high] = low === 0 ? [0, 1] : [Math.min(low, 0), Math.max(high, 0)];
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const gap = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let n = Math.ceil(low / gap - 1e-9); n * gap <= high + gap * 1e-9; n += 1) ticks.push(+(n * gap).toPrecision(12));
  return { at: (value) => start + ((value - low) / (high - low)) * (end - start), ticks };
}

function grid(x, y) {
  const text = (value, px, py, anchor) => drawing("text", { x: px, y: py, "text-anchor": anchor }, short(value));
  const lines = y.ticks.map((v) => drawing("line", { class: "gridline", x1: LEFT, x2: WIDTH - RIGHT, y1: y.at(v), y2: y.at(v) }));
  const beside = y.ticks.map((v) => text(v, LEFT - 6, y.at(v) + 4, "end"));
  const below = x.ticks.filter((v) => Number.isInteger(v) && x.at(v) < WIDTH - 45).map((v) => text(v, x.at(v), HEIGHT - 5, "middle"));
  const unit = drawing("text", { x: WIDTH - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, "step");
  return [...lines, ...beside, ...below, unit];
}

function marks(one, x, y, smoothing) {
  const found = [];
  const band = one.area ?? one.band;
  if (band.length > 1) {
    const edge = [...band.map(([s, , high]) => [s, high]), ...band.map(([s, low]) => [s, low]).reverse()];
    found.push(drawing("path", { class: `${one.area ? "area" : "band"} ${one.colour}`, d: `${path(edge, x, y)}Z` }));
  }
  if (one.area) return found;
  if (smoothing > 0) found.push(drawing("path", { class: `line raw ${one.colour}`, d: path(one.points, x, y) }));
  found.push(drawing("path", { class: `line ${one.dash} ${one.colour}`, d: path(one.drawn, x, y) }));
  if (one.drawn.length <= 12) {
    for (const [s, v] of one.drawn) found.push(drawing("circle", { class: one.colour, cx: x.at(s), cy: y.at(v), r: 2.5 }));
  }
  return found;
}

function path(points, x, y) {
  return points.map(([s, v], n) => `${n ? "L" : "M"}${x.at(s).toFixed(1)},${y.at(v).toFixed(1)}`).join("");
}

/** Writes the name of each line and its value at `step`, or its last value, into the legend. */
function writeLegend(legend, series, step) {
  const rows = series.map((one) => {
    const values = one.area ? one.points : one.drawn;
    const point = step === null ? values.at(-1) : values.findLast((p) => p[0] <= step);
    const sample = drawing("svg", { viewBox: "0 0 18 8", "aria-hidden": "true" }, drawing("path", { class: `line ${one.dash} ${one.colour}`, d: "M0,4H18" }));
    return element("li", {}, sample, `${one.label} ${point ? short(point[1]) : "–"}`);
  });
  legend.replaceChildren(...rows, ...(step === null ? [] : [element("li", { class: "note" }, `step ${step}`)]));
}

/** Moves the cursor with the pointer and the arrow keys. Enter or a click shows the samples of a step. */
function handleCursor(svg, cursor, steps, x, show, onStep) {
  let at = null;
  const go = (place) => {
    at = place === null ? null : Math.max(0, Math.min(steps.length - 1, place));
    cursor.setAttribute("visibility", at === null ? "hidden" : "visible");
    if (at !== null) for (const end of ["x1", "x2"]) cursor.setAttribute(end, x.at(steps[at]));
    show(at === null ? null : steps[at]);
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * WIDTH;
    const distances = steps.map((step) => Math.abs(x.at(step) - place));
    go(distances.indexOf(Math.min(...distances)));
  });
  svg.addEventListener("pointerleave", () => go(null));
  svg.addEventListener("blur", () => go(null));
  svg.addEventListener("click", () => at !== null && onStep(steps[at]));
  svg.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10 };
    if (event.key in moves) go((at ?? (moves[event.key] > 0 ? -1 : steps.length)) + moves[event.key]);
    else if (event.key === "Home" || event.key === "End") go(event.key === "Home" ? 0 : steps.length - 1);
    else if (event.key === "Enter" && at !== null) onStep(steps[at]);
    else if (event.key === "Escape") go(null);
    else return;
    event.preventDefault();
  });
}
