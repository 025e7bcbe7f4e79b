// The page: what is on the screen follows from the address, so that a link shows the same again.
import { getSetup, make, query } from "/requests.js";
import { showPair } from "/pair.js";

const find = (id) => document.getElementById(id);
const SHOWN = 20;
const holds = []; // of each model, the function that holds a word or a region of its pair
let setup, running = new AbortController(), file = null, fileUri = "", shown = "";

// The address: `caption`; `image`, a position in what `model` searches; `by=image` if captions were searched for it;
// `word` or `region`, what is held of the explained pair.
function readState() {
  const fields = new URLSearchParams(location.hash.slice(1)), state = Object.fromEntries(fields);
  for (const name of ["image", "model", "word", "region"]) if (name in state) state[name] = Number(state[name]);
  return state;
}

function writeState(state, replace = false) {
  const hash = "#" + new URLSearchParams(Object.entries(state).filter(([, value]) => value !== undefined));
  if (hash === location.hash || (hash === "#" && !location.hash)) return;
  history[replace ? "replaceState" : "pushState"](null, "", hash);
}

// Goes to a state, and scrolls to its explained pair if there is one.
async function go(state) {
  writeState(state);
  await update();
  const pair = document.querySelector(".pair:not(:empty)");
  if (pair && pair.getBoundingClientRect().top < 0) pair.scrollIntoView();
}

// Shows what the address says.
async function update() {
  const state = readState();
  running.abort();
  running = new AbortController();
  const { signal } = running, start = performance.now();
  find("caption").value = state.by === "image" ? "" : (state.caption ?? "");
  document.title = state.caption ? `${state.caption} – captions and images` : "Captions and images";
  find("status").classList.remove("error");
  if (state.by !== "image") file = null;
  const key = JSON.stringify([state.by, state.by === "image" ? [state.model, state.image, fileUri] : state.caption]);
  try {
    if (key !== shown) {
      shown = "";
      find("answers").replaceChildren(...setup.models.map((_, model) => make("section", { class: "model", "data-model": model })));
      if (state.by === "image") await Promise.all(modelsOf(state).map((model) => findCaptions(state, model, signal)));
      else if (state.caption) await Promise.all(setup.models.map((_, model) => findImages(state, model, signal)));
      shown = key;
      if (state.caption || state.by) say(describeAnswers(state, (performance.now() - start) / 1000));
    }
    mark(state);
    const hasPair = state.caption && (state.image !== undefined || (state.by && file));
    if (hasPair) await Promise.all(modelsOf(state).map((model) => explain(state, model, signal)));
    else document.querySelectorAll(".pair").forEach((pair) => pair.replaceChildren());
  } catch (error) {
    if (error.name !== "AbortError") say(error.message, true);
  }
}

function describeAnswers(state, seconds) {
  const notes = [...document.querySelectorAll("section.model")].flatMap((section) => JSON.parse(section.dataset.notes ?? "[]"));
  const counts = modelsOf(state).map((model) => (state.by ? `${setup.models[model].lines} captions` : `${setup.models[model].images} images, ${section(model).dataset.scored} scored by the matcher`));
  const link = file && state.by ? " A link does not contain the image that you gave." : "";
  return `${[...new Set(notes), ...new Set(counts)].join(" ")}, best first, in ${seconds.toFixed(2)} s.${link}`;
}

function say(text, isError = false) {
  find("status").textContent = text;
  find("status").classList.toggle("error", isError);
}

// The models that an image of the state belongs to: all that search the same images, or for a given file all.
function modelsOf(state) {
  const own = setup.models[state.model ?? 0];
  return setup.models.flatMap((model, k) => ((file && state.by) || model.gallery === own.gallery ? [k] : []));
}

const section = (model) => document.querySelector(`section.model[data-model="${model}"]`);

async function ask(path, values, image, model, signal) {
  const name = setup.models.length > 1 ? `${setup.models[model].name}: ` : "";
  say("…");
  return query(path, { model, ...values }, image, (text) => say(name + text), signal);
}

async function findImages(state, model, signal) {
  const answer = await ask("/api/search", { caption: state.caption, top_k: SHOWN }, null, model, signal);
  const results = answer.results.map(({ position, name, score }, k) => make("li", {}, make("button", {
    type: "button", class: "result", "data-position": position, onclick: () => go({ caption: state.caption, model, image: position }),
  }, photo(model, position), make("span", { class: "rank" }, `${k + 1}.`), ` ${score.toFixed(4)} `, make("span", { class: "file" }, name))));
  fill(model, `Images for “${state.caption}”`, answer, make("ol", { class: "found" }, ...results));
}

async function findCaptions(state, model, signal) {
  const values = file ? { top_k: SHOWN } : { position: state.image, top_k: SHOWN };
  const answer = await ask("/api/lines", values, file, model, signal);
  const results = answer.results.map(({ position, name, score }, k) => make("li", {}, make("button", {
    type: "button", class: "result line", "data-position": position, onclick: () => go({ ...state, caption: name, word: undefined, region: undefined }),
  }, make("span", { class: "rank" }, `${k + 1}.`), ` ${score.toFixed(4)} `, make("span", { class: "text" }, name))));
  const image = file ? make("img", { src: fileUri, alt: "the image that you gave", class: "given" }) : photo(model, state.image);
  fill(model, "Captions for this image", answer, make("div", { class: "asked" }, image), make("ol", { class: "lines" }, ...results));
}

function fill(model, title, answer, ...content) {
  const about = setup.models[model], name = setup.models.length > 1 ? `${about.name} (${about.system}): ` : "";
  section(model).dataset.scored = answer.scored;
  section(model).dataset.notes = JSON.stringify(answer.notes);
  section(model).replaceChildren(make("h2", {}, name + title), make("div", { class: "pair", "aria-label": "explained pair", role: "region" }), ...content);
}

function photo(model, position) {
  if (!setup.models[model].has_photos) return "";
  const image = make("img", { src: `/image?model=${model}&position=${position}&version=${setup.version}`, alt: "", width: 176, height: 176 });
  image.addEventListener("error", () => image.replaceWith(make("span", { class: "missing" }, "cannot be shown")));
  return image;
}

// Marks the result that is explained.
function mark(state) {
  for (const [model] of setup.models.entries()) {
    section(model)?.querySelectorAll(".result").forEach((button) => {
      const isShown = state.by ? button.querySelector(".text").textContent === state.caption : modelsOf(state).includes(model) && Number(button.dataset.position) === state.image;
      button.setAttribute("aria-pressed", isShown);
    });
  }
}

async function explain(state, model, signal) {
  const element = section(model).querySelector(".pair"), about = setup.models[model];
  if (about.explains === "scores") {
    element.replaceChildren(make("p", {}, "This model compares one vector of the image with one of the caption, so it has no attention or weights to show."));
    return;
  }
  const key = JSON.stringify([state.caption, state.image, fileUri]);
  if (element.dataset.key === key) return;
  const values = file && state.by ? { caption: state.caption } : { caption: state.caption, position: state.image };
  const pair = await query("/api/explain", { model, ...values }, state.by ? file : null, () => {}, signal);
  const pinned = state.word !== undefined ? { word: state.word } : state.region !== undefined ? { region: state.region } : {};
  holds[model] = showPair(element, pair, pinned, (to) => {
    writeState({ ...readState(), word: undefined, region: undefined, ...to }, true);
    setup.models.forEach((_, other) => other !== model && holds[other]?.(to)); // side by side, both show the same
  });
  element.dataset.key = key;
  if (!file && about.lines && !state.by) element.append(make("button", { type: "button", class: "turn", onclick: () => go({ by: "image", model, image: state.image }) }, "Find the captions of this image"));
}

function takeFile(given) {
  if (!given) return;
  if (given.size > setup.limits.image) return say(`The image has ${given.size} bytes; at most ${setup.limits.image} are accepted; choose a smaller file.`, true);
  URL.revokeObjectURL(fileUri);
  file = given;
  fileUri = URL.createObjectURL(given);
  shown = "";
  go({ by: "image" });
}

function listen() {
  find("search").addEventListener("submit", (event) => {
    event.preventDefault();
    const caption = find("caption").value.trim();
    if (caption) go({ caption });
  });
  find("file").addEventListener("change", (event) => takeFile(event.target.files[0]));
  addEventListener("dragover", (event) => event.preventDefault());
  addEventListener("drop", (event) => {
    event.preventDefault();
    takeFile(event.dataTransfer.files[0]);
  });
  addEventListener("popstate", update);
  addEventListener("hashchange", update);
}

async function begin() {
  setup = await getSetup();
  find("about").textContent = setup.models.map((m) => `${m.name} (${m.system}, step ${m.step}): ${m.images} images of ${m.source}`).join("; ");
  find("caption").maxLength = setup.limits.caption;
  find("drop").hidden = !setup.models.some((model) => model.takes_images && model.lines);
  const examples = setup.models[0].examples.map((text) => make("button", { type: "button", class: "example", onclick: () => go({ caption: text }) }, text));
  find("examples").append(...(examples.length ? ["for example: ", ...examples] : []));
  document.body.classList.toggle("two", setup.models.length > 1);
  listen();
  await update();
}

begin().catch((error) => say(error.message, true));
