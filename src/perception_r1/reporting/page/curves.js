const BOX = { width: 380, height: 200, left: 50, right: 12, top: 10, bottom: 28 };
const DOTS = 40; // a curve with no more points shows each of them
const ROWS = 20; // of the table beside a chart
const UNSMOOTHED = /^val\/|\/(lr|skipped_steps|group_size|num_prompts)$/;

// A running mean that forgets, and starts without a bias towards zero.
function smooth(values, weight) {
  let mean = 0, mass = 0;
  return values.map((value) => {
    if (value === null) return null;
    mean = weight * mean + (1 - weight) * value;
    mass = weight * mass + (1 - weight);
    return mean / mass;
  });
}

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k += 1) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function extent(numbers) {
  let [low, high] = [Infinity, -Infinity];
  for (const each of numbers) {
    if (each < low) low = each;
    if (each > high) high = each;
  }
  if (low === high) [low, high] = [low - (Math.abs(low) || 1) / 2, high + (Math.abs(high) || 1) / 2];
  return [low, high];
}

// Parts of a line between which values are missing.
function path(points) {
  let isDown = false;
  return points.map(([x, y]) => {
    if (y === null) { isDown = false; return ""; }
    const word = `${isDown ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`;
    isDown = true;
    return word;
  }).join("");
}

class Chart {
  constructor({ tag, series }, runs) {
    this.tag = tag;
    this.runs = runs;
    this.series = series;
    this.steps = [...new Set(series.flatMap((each) => each.steps))].sort((a, b) => a - b);
    this.readout = make("output", { class: "readout" });
    this.figure = make("figure", { class: "chart" }, make("figcaption", {}, make("span", { class: "tag" }, tag), this.readout));
    this.plot = draw("svg", { viewBox: `0 0 ${BOX.width} ${BOX.height}`, role: "img", tabindex: "0", "aria-label": this.summary() });
    this.figure.append(this.plot, this.table());
    this.at = null;
    this.listen();
  }

  isConstant() {
    const values = this.series.flatMap((each) => each.values);
    return values.every((value) => value === values[0]);
  }

  summary() {
    const told = this.series.map(({ run, steps, values }) => {
      const known = values.map((value, index) => [steps[index], value]).filter(([, value]) => value !== null);
      if (!known.length) return `${this.runs[run]}: no numbers`;
      const [first, last] = [known[0], known[known.length - 1]];
      return `${this.runs[run]}: ${shown(first[1])} at step ${first[0]}, ${shown(last[1])} at step ${last[0]}`;
    });
    return `${this.tag}. ${told.join(". ")}. The arrow keys move over the steps.`;
  }

  scale() {
    const bounds = this.series.flatMap(({ values, margins }) => values.flatMap((value, index) => {
      const margin = margins?.[index] ?? 0;
      return value === null ? [] : [value - margin, value + margin];
    }));
    const [low, high] = extent(bounds.length ? bounds : [0, 1]), room = (high - low) * 0.05;
    this.y = { low: low - room, high: high + room };
    this.x = { low: this.steps[0], high: this.steps[this.steps.length - 1] };
    if (this.x.low === this.x.high) this.x = { low: this.x.low - 1, high: this.x.high + 1 };
  }

  px(step) { return BOX.left + (step - this.x.low) / (this.x.high - this.x.low) * (BOX.width - BOX.left - BOX.right); }
  py(value) { return BOX.top + (this.y.high - value) / (this.y.high - this.y.low) * (BOX.height - BOX.top - BOX.bottom); }

  render(weight) {
    this.scale();
    this.plot.replaceChildren();
    for (const value of ticks(this.y.low, this.y.high, 4)) {
      const y = this.py(value).toFixed(1);
      this.plot.append(draw("line", { x1: BOX.left, x2: BOX.width - BOX.right, y1: y, y2: y, class: "grid-line" }));
      this.plot.append(draw("text", { x: BOX.left - 6, y, class: "tick y" }, shown(value)));
    }
    for (const step of ticks(this.x.low, this.x.high, 5).filter((each) => Number.isInteger(each) && this.px(each) < BOX.width - 60)) {
      this.plot.append(draw("text", { x: this.px(step).toFixed(1), y: BOX.height - 8, class: "tick" }, step.toLocaleString("en")));
    }
    this.plot.append(draw("text", { x: BOX.width - BOX.right, y: BOX.height - 8, class: "tick end" }, "step"));
    this.smoothed = this.series.map(({ values }) => UNSMOOTHED.test(this.tag) ? values : smooth(values, weight));
    this.series.forEach((each, index) => this.line(each, this.smoothed[index]));
    this.cursor = draw("g", { class: "cursor" });
    this.plot.append(this.cursor);
    this.show(this.at);
  }

  line({ run, steps, values, margins }, smoothed) {
    const place = (numbers) => steps.map((step, index) => [this.px(step), numbers[index] === null ? null : this.py(numbers[index])]);
    if (margins) {
      const edge = (sign) => steps.flatMap((step, index) => values[index] === null || margins[index] === null ? []
        : [`${this.px(step).toFixed(1)} ${this.py(values[index] + sign * margins[index]).toFixed(1)}`]);
      this.plot.append(draw("polygon", { points: [...edge(1), ...edge(-1).reverse()].join(" "), class: `band r${run}` }));
    }
    if (smoothed !== values) this.plot.append(draw("path", { d: path(place(values)), class: `line raw r${run}` }));
    this.plot.append(draw("path", { d: path(place(smoothed)), class: `line r${run}` }));
    if (steps.length <= DOTS && smoothed === values) {
      for (const [x, y] of place(values)) if (y !== null) this.plot.append(draw("circle", { cx: x, cy: y, r: 2.5, class: `dot r${run}` }));
    }
  }

  listen() {
    this.plot.addEventListener("pointermove", ({ clientX }) => {
      const { left, width } = this.plot.getBoundingClientRect();
      const x = (clientX - left) / width * BOX.width;
      this.show(this.steps.reduce((best, step) => Math.abs(this.px(step) - x) < Math.abs(this.px(best) - x) ? step : best));
    });
    this.plot.addEventListener("pointerleave", () => this.show(null));
    this.plot.addEventListener("blur", () => this.show(null));
    this.plot.addEventListener("keydown", (event) => {
      const place = this.at === null ? -1 : this.steps.indexOf(this.at), last = this.steps.length - 1;
      const next = { ArrowRight: Math.min(last, place + 1), ArrowLeft: Math.max(0, place - 1), Home: 0, End: last }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      this.show(this.steps[next]);
    });
  }

  // The values at a step, beside the name of the chart and as dots.
  show(step) {
    this.at = step;
    this.cursor.replaceChildren();
    this.readout.replaceChildren();
    if (step === null) return;
    const x = this.px(step);
    this.cursor.append(draw("line", { x1: x, x2: x, y1: BOX.top, y2: BOX.height - BOX.bottom }));
    this.readout.append(`step ${step.toLocaleString("en")}`);
    this.series.forEach(({ run, steps, values, margins, numSteps }, index) => {
      const place = steps.indexOf(step);
      if (place < 0 || values[place] === null) return;
      this.cursor.append(draw("circle", { cx: x, cy: this.py(this.smoothed[index][place]), r: 4, class: `dot r${run}` }));
      const margin = margins && margins[place] !== null ? ` ± ${shown(margins[place])}` : "";
      const mean = numSteps > 1 ? ` (mean of ${numSteps} steps)` : "";
      this.readout.append(make("span", { class: `value r${run}` }, `${shown(values[place])}${margin}${mean}`));
    });
  }

  // The same in numbers, made when it is opened: at most ROWS steps at even distances, the last one among them.
  table() {
    const details = make("details", {}, make("summary", {}, "Numbers"));
    details.addEventListener("toggle", () => {
      if (details.children.length > 1) return;
      const last = this.steps.length - 1, count = Math.min(ROWS, last + 1);
      const chosen = Array.from({ length: count }, (_, index) => this.steps[Math.round(index * last / Math.max(1, count - 1))]);
      const head = make("tr", {}, make("th", { scope: "col" }, "step"), ...this.series.map(({ run }) => make("th", { scope: "col" }, this.runs[run])));
      const rows = chosen.map((step) => make("tr", {}, make("th", { scope: "row" }, String(step)), ...this.series.map(({ steps, values }) =>
        make("td", {}, steps.includes(step) ? shown(values[steps.indexOf(step)]) : ""))));
      details.append(make("div", { class: "scroll" }, make("table", { class: "numbers" }, make("thead", {}, head), make("tbody", {}, ...rows))));
    });
    return details;
  }
}

function showCurves(groups, runs, names) {
  const charts = [], slider = find("smoothing");
  const weight = () => Number(slider.value) / 100;
  groups.forEach(({ name, charts: found }, index) => {
    const all = found.map((each) => new Chart(each, runs));
    const moving = all.filter((chart) => !chart.isConstant()), constant = all.filter((chart) => chart.isConstant());
    const grid = make("div", { class: "grid" }, ...moving.map((chart) => chart.figure));
    const group = make("details", { class: "group", open: index < 2 }, make("summary", {}, name), grid);
    if (constant.length) {
      const told = constant.map((chart) => `${chart.tag} ${shown(chart.series[0].values[0])}`).join(", ");
      group.append(make("p", { class: "note" }, `The same at every step: ${told}.`));
    }
    group.addEventListener("toggle", () => { if (group.open) moving.forEach((chart) => chart.render(weight())); });
    charts.push(...moving);
    find("charts").append(group);
  });
  if (runs.length > 1) find("legend").append(...names.map((name, run) => make("span", { class: `chip r${run}` }, name)));
  slider.addEventListener("input", () => {
    slider.nextElementSibling.textContent = weight().toFixed(2);
    charts.forEach((chart) => { if (chart.cursor) chart.render(weight()); });
  });
}
