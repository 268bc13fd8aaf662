const SWIPE = 50; // pixels
const FILTERS = {
  all: "All",
  worst: "Worst",
  changed: "Changed",
  gained: "Gained",
  lost: "Lost",
};
const MOST_CAPTIONS = 24;

// The samples that a filter lets through, in its order: worst is the quarter with the lowest rewards.
function select(cards, filter, from, to) {
  const reward = (card, column) => card.answers[column].reward;
  const answered = cards.filter((card) => card.answers[to]);
  if (filter === "all") return answered;
  if (filter === "worst") {
    return [...answered].sort((a, b) => reward(a, to) - reward(b, to)).slice(0, Math.ceil(answered.length / 4));
  }
  const gain = (card) => reward(card, to) - reward(card, from);
  const both = answered.filter((card) => card.answers[from]);
  if (filter === "changed") {
    return both.filter((card) => card.answers[from].completion !== card.answers[to].completion)
      .sort((a, b) => Math.abs(gain(b)) - Math.abs(gain(a)));
  }
  const sign = filter === "gained" ? 1 : -1;
  return both.filter((card) => sign * gain(card) > 0).sort((a, b) => sign * (gain(b) - gain(a)));
}

class Cards {
  constructor(root, { cards, columns, runs }) {
    Object.assign(this, { root, cards, columns, runs, filter: "all", index: 0 });
    const whole = columns.findIndex(({ run }, index) => columns[index + 1]?.run === run); // before and after of one run
    this.from = Math.max(0, whole);
    this.to = Math.min(columns.length - 1, this.from + 1);
    this.images = null;
    this.filters = make("div", { class: "filters", role: "group", "aria-label": "Which samples" });
    this.card = make("article", { class: "card", "aria-live": "polite" });
    this.back = make("button", { type: "button", "aria-label": "Sample before" }, "←");
    this.next = make("button", { type: "button", "aria-label": "Next sample" }, "→");
    this.slider = make("input", { type: "range", min: 0, "aria-label": "Position" });
    this.position = make("output");
    const tools = make("div", { class: "tools" }, this.filters, ...this.choices(), ...this.layers());
    root.append(tools, make("div", { class: "pager" }, this.back, this.slider, this.position, this.next), this.card);
    this.listen();
    this.update();
  }

  choices() {
    if (this.columns.length < 2) return [];
    return [["from", "From"], ["to", "to"]].map(([name, label]) => {
      const options = this.columns.map(({ run, when }, index) =>
        make("option", { value: index, selected: index === this[name] }, this.title(run, when)));
      const choice = make("select", { name }, ...options);
      choice.addEventListener("change", () => { this[name] = Number(choice.value); this.index = 0; this.update(); });
      return make("label", {}, `${label} `, choice);
    });
  }

  // A single run needs no name.
  title(run, when) {
    return this.runs.length > 1 ? `${this.runs[run]} ${when}` : when;
  }

  layers() {
    return [["targets", "Targets"], ["predictions", "Predictions"]].map(([name, label]) => {
      const box = make("input", { type: "checkbox", checked: true });
      box.addEventListener("change", () => this.card.classList.toggle(`without-${name}`, !box.checked));
      return make("label", { class: `layer ${name}` }, box, ` ${label}`);
    });
  }

  listen() {
    this.back.addEventListener("click", () => this.turn(this.index - 1));
    this.next.addEventListener("click", () => this.turn(this.index + 1));
    this.slider.addEventListener("input", () => this.turn(Number(this.slider.value)));
    this.root.addEventListener("keydown", (event) => {
      if (event.target.matches("input, select, summary, pre") || event.altKey || event.ctrlKey || event.metaKey) return;
      const next = { ArrowLeft: this.index - 1, ArrowRight: this.index + 1, Home: 0, End: this.chosen.length - 1 }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      this.turn(next);
    });
    let start = null;
    this.card.addEventListener("pointerdown", (event) => { start = event.pointerType === "mouse" ? null : event; });
    this.card.addEventListener("pointerup", (event) => {
      if (!start) return;
      const [dx, dy] = [event.clientX - start.clientX, event.clientY - start.clientY];
      start = null;
      if (Math.abs(dx) > SWIPE && Math.abs(dx) > 2 * Math.abs(dy)) this.turn(this.index + (dx < 0 ? 1 : -1));
    });
    this.card.addEventListener("pointercancel", () => { start = null; });
  }

  turn(index) {
    if (index < 0 || index >= this.chosen.length) return;
    this.index = index;
    this.show();
  }

  update() {
    const names = this.columns.length > 1 && this.from !== this.to ? Object.keys(FILTERS) : ["all", "worst"];
    if (!names.includes(this.filter)) this.filter = "all";
    this.filters.replaceChildren(...names.map((name) => {
      const count = select(this.cards, name, this.from, this.to).length;
      const button = make("button", { type: "button", "aria-pressed": String(name === this.filter), "data-filter": name },
        FILTERS[name], make("small", {}, ` ${count}`));
      button.addEventListener("click", () => {
        this.filter = name;
        this.index = 0;
        this.update();
        this.filters.querySelector(`[data-filter=${name}]`).focus();
      });
      return button;
    }));
    this.chosen = select(this.cards, this.filter, this.from, this.to);
    this.show();
  }

  show() {
    const count = this.chosen.length, card = this.chosen[this.index];
    this.slider.max = Math.max(0, count - 1);
    this.slider.value = this.index;
    this.position.textContent = count ? `${this.index + 1} of ${count}` : "none";
    this.back.disabled = this.index <= 0;
    this.next.disabled = this.index >= count - 1;
    if (!card) {
      this.card.replaceChildren(make("p", { class: "note" }, "No sample is like that."));
      return;
    }
    const shownColumns = this.from === this.to || this.columns.length < 2 ? [this.to] : [this.from, this.to];
    const head = make("header", {}, make("h3", {}, card.id), make("p", { class: "note" }, card.task),
      make("p", { class: "prompt" }, card.prompt), make("p", { class: "target" }, make("strong", {}, "Target "), card.target));
    const panels = shownColumns.filter((column) => card.answers[column]).map((column) => this.panel(card, column));
    this.card.replaceChildren(head, make("div", { class: "panels" }, ...panels));
  }

  panel(card, column) {
    const answer = card.answers[column], { run, when } = this.columns[column], before = card.answers[this.from];
    const told = make("figcaption", {}, make("span", { class: `chip r${run}` }, this.title(run, when)),
      make("span", { class: "reward" }, "reward ", make("strong", {}, answer.reward.toFixed(3))));
    if (column === this.to && before && this.from !== this.to) {
      const gain = answer.reward - before.reward;
      const kind = gain > 0 ? "gain" : gain < 0 ? "loss" : "same";
      told.append(make("span", { class: `badge ${kind}` }, gain === 0 ? "same" : signed(gain)));
    }
    const panel = make("figure", { class: "panel" }, told);
    if (card.image !== null) panel.append(this.picture(card, answer));
    const cut = answer.isTruncated ? " (It was cut off.)" : "";
    panel.append(make("p", { class: "words" }, (answer.words ?? "No answer could be read.") + cut));
    const scores = Object.entries(answer.scores).map(([name, value]) => make("span", {}, `${name.replace("reward/", "")} ${shown(value)}`));
    panel.append(make("p", { class: "scores" }, ...scores));
    panel.append(make("details", {}, make("summary", {}, "What the model wrote"), make("pre", { tabindex: "0" }, answer.completion)));
    return panel;
  }

  picture(card, answer) {
    this.images ??= JSON.parse(find("images").textContent);
    const { width, height } = card;
    const picture = draw("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "xMinYMid", role: "img", class: "picture",
      "aria-label": `${card.id}: ${answer.words ?? "no answer could be read"}; target: ${card.target}` });
    picture.append(draw("image", { href: this.images[card.image], width, height, preserveAspectRatio: "none" }));
    picture.append(this.overlays(card, card.overlays, "targets"), this.overlays(card, answer.overlays, "predictions"));
    return picture;
  }

  overlays({ width, height }, overlays, kind) {
    const group = draw("g", { class: kind }), captions = new Set(overlays.map(({ caption }) => caption));
    const size = Math.max(width, height);
    for (const { shape, caption } of overlays) {
      const [x1, y1] = [shape[0] * width, shape[1] * height];
      if (shape.length === 2) {
        for (const layer of ["halo", "box"]) group.append(draw("circle", { cx: x1, cy: y1, r: size / 60, class: layer }));
        continue;
      }
      const place = { x: x1, y: y1, width: Math.max(0, shape[2] * width - x1), height: Math.max(0, shape[3] * height - y1) };
      for (const layer of ["halo", "box"]) group.append(draw("rect", { ...place, class: layer }));
      if (captions.size > 1 && overlays.length <= MOST_CAPTIONS && caption) {
        const below = kind === "predictions";
        group.append(draw("text", { x: x1, y: below ? y1 + place.height + size / 26 : y1 - size / 110, "font-size": size / 28 }, caption.slice(0, 40)));
      }
    }
    return group;
  }
}
