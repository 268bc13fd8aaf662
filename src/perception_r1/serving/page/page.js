"use strict";

const find = (id) => document.getElementById(id);
const [form, drop, file, hint] = ["question", "drop", "file", "hint"].map(find);
const [send, status, error, query] = ["send", "status", "error", "query"].map(find);
const SVG = "http://www.w3.org/2000/svg";
let image = null; // the picture as a data URL
let reading = null; // what reads the picture that was chosen last
let pending = null; // what stops the question that waits for its answer

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const options = body && { method: "POST", headers, body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer.");
  }
  const found = await response.json().catch(() => ({}));
  if (!response.ok) throw new Error(found.error?.message ?? `The server answers with ${response.status}.`);
  return found;
}

function task() {
  return form.elements.task && [...form.querySelectorAll("input[name=task]")].find((each) => each.checked);
}

function update() {
  const chosen = task();
  find("asks").hidden = !chosen || chosen.dataset.asks !== "true";
  send.disabled = Boolean(pending) || !image || !chosen;
}

async function offerTasks() {
  const { model, tasks } = await call("/tasks");
  find("model").textContent = model;
  tasks.forEach(({ name, prompt, asks }, index) => {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "task", value: name });
    input.checked = index === 0;
    input.dataset.asks = asks;
    label.title = prompt;
    label.append(input, name);
    find("tasks").append(label);
  });
  update();
}

function clear() {
  for (const id of ["overlays", "objects", "description", "completion"]) find(id).replaceChildren();
  find("raw").hidden = true;
  error.textContent = status.textContent = "";
}

// An answer belongs to one picture and one task: with another of them it goes, and one that is awaited is not shown.
function dropAnswer() {
  pending?.abort();
  pending = null;
  clear();
  update();
}

function take(chosen) {
  if (!chosen) return;
  if (!chosen.type.startsWith("image/")) {
    error.textContent = `${chosen.name} is no picture.`;
    return;
  }
  image = null;
  dropAnswer();
  const reader = new FileReader();
  reading = reader;
  reader.onload = () => {
    if (reader !== reading) return; // another picture was chosen meanwhile
    image = reader.result;
    find("picture").src = image;
    find("picture").alt = chosen.name || "The picture";
    hint.textContent = chosen.name || "A picture from the clipboard";
    update();
  };
  reader.onerror = () => {
    if (reader === reading) error.textContent = `${chosen.name} cannot be read.`;
  };
  reader.readAsDataURL(chosen);
}

// A small picture is enlarged, a large one fits the window.
find("picture").addEventListener("load", ({ target }) => {
  const { naturalWidth: width, naturalHeight: height } = target;
  const scale = Math.max(1, 480 / Math.max(width, height));
  find("stage").style.width = `min(100%, ${width * scale}px, ${(75 * width) / height}vh)`;
});

function rectangle(shape, kind) {
  const [x1, y1, x2, y2] = shape.length === 4 ? shape : [shape[0] - 0.008, shape[1] - 0.008, shape[0] + 0.008, shape[1] + 0.008];
  const made = document.createElementNS(SVG, "rect");
  for (const [name, value] of Object.entries({ x: x1, y: y1, width: x2 - x1, height: y2 - y1, class: kind })) {
    made.setAttribute(name, value);
  }
  return made;
}

function show(answer) {
  const overlays = find("overlays");
  overlays.setAttribute("viewBox", "0 0 1 1");
  overlays.setAttribute("preserveAspectRatio", "none");
  answer.overlays.forEach(({ shape, caption }, index) => {
    const group = document.createElementNS(SVG, "g");
    group.append(rectangle(shape, "halo"), rectangle(shape, "box"));
    overlays.append(group);
    const button = Object.assign(document.createElement("button"), { type: "button" });
    button.textContent = `${index + 1} ${caption}`.trim();
    button.setAttribute("aria-pressed", "false");
    const choose = (isChosen) => {
      group.classList.toggle("chosen", isChosen);
      button.setAttribute("aria-pressed", isChosen);
    };
    button.addEventListener("click", () => choose(button.getAttribute("aria-pressed") !== "true"));
    const item = document.createElement("li");
    item.append(button);
    find("objects").append(item);
  });
  find("description").textContent = answer.is_read ? answer.description : "No answer could be read from what the model wrote.";
  if (answer.is_truncated) find("description").textContent += " (It was cut off.)";
  find("completion").textContent = answer.completion;
  find("raw").hidden = false;
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const chosen = task();
  if (send.disabled || !chosen) return;
  const text = chosen.dataset.asks === "true" ? query.value : "";
  clear();
  const own = new AbortController();
  pending = own;
  update();
  status.textContent = "The model writes …";
  const started = performance.now();
  try {
    const answer = await call("/answer", { task: chosen.value, query: text, image }, own.signal);
    if (own !== pending) return;
    show(answer);
    const asked = text ? `${chosen.value} “${text}”` : chosen.value;
    status.textContent = `Answered ${asked} in ${((performance.now() - started) / 1000).toFixed(1)} s.`;
  } catch (problem) {
    if (own !== pending) return;
    status.textContent = "";
    error.textContent = problem.message;
  }
  pending = null;
  update();
});

find("tasks").addEventListener("change", dropAnswer);
file.addEventListener("change", () => take(file.files[0]));
document.addEventListener("paste", (event) => {
  const pasted = [...event.clipboardData.files][0];
  if (pasted) take(pasted);
});
for (const name of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(name, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", name === "dragover");
    if (name === "drop") take(event.dataTransfer.files[0]);
  });
}
offerTasks().catch((problem) => { error.textContent = problem.message; });
