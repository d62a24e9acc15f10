const GROUPS_A_PAGE = 10;

/** Builds the samples section: filters above, one page of groups below. Returns a function that shows a step. */
function sampleBrowser(runs) {
  const all = runs.flatMap((run) => run.samples.map((sample) => ({ ...sample, run })));
  if (!all.length) {
    byId("samples").remove();
    document.querySelector('nav a[href="#samples"]').remove();
    return () => {};
  }
  const controls = sampleControls(runs, all);
  let page = 0;
  const draw = () => {
    const found = all.filter((sample) => matches(sample, controls));
    const groups = sortedGroups(found, controls.order.value);
    const last = Math.max(0, Math.ceil(groups.length / GROUPS_A_PAGE) - 1);
    page = Math.min(page, last);
    const here = groups.slice(page * GROUPS_A_PAGE, (page + 1) * GROUPS_A_PAGE);
    byId("groups").replaceChildren(...here.map((group) => groupCard(group, runs.length > 1)));
    byId("found").value = foundText(found.length, all.length, runs);
    byId("place").value = `${page + 1} of ${last + 1}`;
    byId("back").disabled = page === 0;
    byId("on").disabled = page === last;
  };
  const turn = (by) => () => { page += by; draw(); byId("samples").scrollIntoView(); };
  byId("back").addEventListener("click", turn(-1));
  byId("on").addEventListener("click", turn(1));
  byId("filters").addEventListener("input", () => { page = 0; draw(); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  draw();
  return (step) => {
    controls.step.value = nearest([...controls.step.options].slice(1).map((o) => +o.value), step);
    page = 0;
    draw();
    byId("samples").scrollIntoView();
  };
}

function sampleControls(runs, all) {
  const rewards = all.map((sample) => sample.reward).filter((reward) => reward !== null);
  const numbers = { type: "number", step: "any" };
  const low = rewards.reduce((a, b) => Math.min(a, b), 0), high = rewards.reduce((a, b) => Math.max(a, b), 0);
  const controls = {
    run: choice(["", "all runs"], ...runs.map((run) => [run.number, run.name])),
    step: choice(["", "all steps"], ...distinct(all.map((s) => s.step)).map((step) => [step, step])),
    least: element("input", { ...numbers, placeholder: short(low) }),
    most: element("input", { ...numbers, placeholder: short(high) }),
    stop: choice(["", "all"], ...distinct(all.map((s) => s.stop_reason)).map((why) => [why, why.replace("_", " ")])),
    order: choice(["first", "first steps first"], ["last", "last steps first"], ["best", "best reward first"], ["worst", "worst reward first"]),
    text: element("input", { type: "search", placeholder: "words" }),
  };
  const labels = { run: "Run", step: "Step", least: "Reward from", most: "to", stop: "Ended by", order: "Order", text: "Text" };
  for (const [name, control] of Object.entries(controls)) {
    if (name === "run" && runs.length === 1) continue;
    control.name = name;
    byId("filters").append(element("label", {}, labels[name], control));
  }
  return controls;
}

const choice = (...options) => element("select", {}, ...options.map(([value, text]) => element("option", { value }, String(text))));
const distinct = (values) => [...new Set(values)].sort((a, b) => (a < b ? -1 : 1));
const nearest = (values, to) => values.reduce((a, b) => (Math.abs(b - to) < Math.abs(a - to) ? b : a));

function matches(sample, { run, step, least, most, stop, text }) {
  const words = text.value.toLowerCase();
  return (
    (run.value === "" || sample.run.number === +run.value) &&
    (step.value === "" || sample.step === +step.value) &&
    (least.value === "" || (sample.reward !== null && sample.reward >= +least.value)) &&
    (most.value === "" || (sample.reward !== null && sample.reward <= +most.value)) &&
    (stop.value === "" || sample.stop_reason === stop.value) &&
    (words === "" || JSON.stringify([sample.prompt, sample.completion]).toLowerCase().includes(JSON.stringify(words).slice(1, -1)))
  );
}

/** Returns the groups of samples in the chosen order, each with its best sample first. */
function sortedGroups(samples, order) {
  const groups = new Map();
  for (const sample of samples) {
    const key = `${sample.run.number} ${sample.step} ${sample.group}`;
    groups.set(key, [...(groups.get(key) ?? []), sample]);
  }
  const found = [...groups.values()];
  for (const group of found) group.sort((a, b) => rewardOf(b) - rewardOf(a));
  const orders = {
    first: (a, b) => a[0].step - b[0].step || a[0].group - b[0].group,
    last: (a, b) => b[0].step - a[0].step || a[0].group - b[0].group,
    best: (a, b) => rewardOf(b[0]) - rewardOf(a[0]),
    worst: (a, b) => rewardOf(a.at(-1)) - rewardOf(b.at(-1)),
  };
  return found.sort(orders[order]);
}

const rewardOf = (sample) => sample.reward ?? -Infinity;

function foundText(found, kept, runs) {
  const total = runs.reduce((sum, run) => sum + run.samples_total, 0);
  const shown = `${found.toLocaleString("en")} of ${kept.toLocaleString("en")}`;
  return total > kept ? `${shown}, chosen over the run from ${total.toLocaleString("en")} in samples.jsonl` : shown;
}

function groupCard(group, several) {
  const [first] = group;
  const named = several ? [element("b", { class: `c${first.run.number % 9}` }, first.run.name)] : [];
  const facts = [`step ${first.step}`, `group ${first.group}`, first.task, `version ${first.version}`];
  const rewards = group.map((sample) => sample.reward).filter((reward) => reward !== null);
  return element(
    "article",
    { class: "card" },
    element("div", { class: "meta" }, ...named, ...facts.map((fact) => element("span", {}, ...visible(String(fact))))),
    element("div", { class: "prompt", tabindex: "0" }, ...conversation(first.prompt)),
    element("div", { class: "members" }, ...group.map((sample) => memberCard(sample, rewards))),
  );
}

function conversation(prompt) {
  if (typeof prompt === "string") return [element("pre", {}, ...visible(prompt))];
  return prompt.flatMap(({ role, content }) => [
    element("div", { class: "role" }, ...visible(String(role))),
    element("pre", {}, ...visible(String(content))),
  ]);
}

function memberCard(sample, rewards) {
  const middle = rewards.reduce((sum, reward) => sum + reward, 0) / rewards.length;
  const side = sample.reward === null || rewards.every((r) => r === rewards[0]) ? (sample.reward > 0 ? "good" : "") : sample.reward > middle ? "good" : "bad";
  const parts = Object.entries(sample.rewards);
  const facts = [
    sample.advantage === null ? "not learned from" : `advantage ${short(sample.advantage)}`,
    ...(parts.length > 1 ? parts.map(([name, value]) => `${name} ${typeof value === "number" ? short(value) : value}`) : []),
    ...Object.entries(sample.metrics ?? {}).map(([name, value]) => `${name} ${typeof value === "number" ? short(value) : value}`),
    `${sample.tokens} tokens`,
    ...(sample.segments ? [`${sample.segments} segments`] : []),
    sample.stop_reason.replace("_", " "),
    ...(sample.error ? [`error: ${sample.error}`] : []),
  ];
  const reward = sample.reward === null ? "no reward" : short(sample.reward);
  return element(
    "div",
    { class: `member ${side}` },
    element("div", { class: "meta" }, element("b", {}, reward), ...facts.map((fact) => element("span", {}, ...visible(fact)))),
    ...(sample.turns ?? [{ completion: sample.completion, replies: [] }]).flatMap((turn) => [
      element("pre", {}, ...visible(turn.completion)),
      ...conversation(turn.replies),
    ]),
  );
}
