// An explained pair: the words of a caption, the regions of an image, and what they make of each other.
import { make } from "/requests.js";
import { RegionMap, findLit, useArrowKeys } from "/regions.js";

const MOST_ROWS = 16; // regions in the table: those with the largest weights
const VIRIDIS = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

// Shows an explanation in an element. `pinned` is `{word}` or `{region}`, or empty; `onPin(pinned)` is told of changes.
// Returns a function that holds another word or region.
export function showPair(element, pair, pinned, onPin) {
  let current = { ...pinned };
  const point = (to) => show(to ?? current);
  const pin = (to) => {
    current = JSON.stringify(to) === JSON.stringify(current) ? {} : to;
    onPin(current);
    show(current);
  };
  const words = makeWords(pair, point, pin);
  const regions = new RegionMap(pair, (k) => point(k === null ? null : { region: k }), (k) => pin({ region: k }));
  const table = makeTable(pair, point, pin);
  const reading = make("p", { class: "reading", role: "status" });
  const photo = pair.photo && pair.boxes ? [make("img", { class: "plain", src: pair.photo, alt: "the image, not darkened" })] : [];

  function show({ word, region }) {
    const values = word !== undefined ? pair.attention.map((row) => row[word]) : null;
    const lit = word !== undefined ? findLit(values) : region !== undefined ? [region] : [];
    const only = region !== undefined ? pair.attention.map((_, k) => (k === region ? 1 : 0)) : null;
    regions.show(values ?? only ?? pair.region_weights, lit);
    regions.pin(current.region);
    const litWords = region !== undefined ? findLit(pair.attention[region]) : word !== undefined ? [word] : [];
    words.querySelectorAll(".word").forEach((button, k) => {
      button.classList.toggle("lit", litWords.includes(k));
      button.setAttribute("aria-pressed", k === current.word);
    });
    table.querySelectorAll("[data-row]").forEach((row) => row.classList.toggle("lit", lit.includes(Number(row.dataset.row))));
    table.querySelectorAll("[data-column]").forEach((cell) => cell.classList.toggle("lit", litWords.includes(Number(cell.dataset.column))));
    reading.textContent = describe(pair, word, region);
  }

  element.replaceChildren(
    make("h3", {}, pair.title), words, reading,
    make("div", { class: "parts" },
      make("div", {}, make("div", { class: "photos" }, ...photo, regions.element), makeTerms(pair)),
      make("div", { class: "scroll", tabindex: 0, role: "group", "aria-label": "table of regions and words" }, table)),
  );
  const hold = (to) => {
    current = to.word < pair.words.length || to.region < pair.attention.length ? to : {};
    show(current);
  };
  hold(current);
  return hold;
}

function describe(pair, word, region) {
  const list = (values, name) => findLit(values).sort((a, b) => values[b] - values[a]).map((k) => `${name(k)} (${values[k].toFixed(2)})`).join(", ");
  if (word !== undefined) {
    const weight = pair.word_weights ? ` (weight ${pair.word_weights[word].toFixed(2)})` : "";
    return `“${pair.words[word]}”${weight} attends to ${list(pair.attention.map((row) => row[word]), (k) => `region ${k + 1}`)}`;
  }
  if (region !== undefined) {
    const weight = pair.region_weights ? ` (weight ${pair.region_weights[region].toFixed(2)})` : "";
    return `region ${region + 1}${weight} gets attention from ${list(pair.attention[region], (k) => `“${pair.words[k]}”`)}`;
  }
  const brightness = pair.region_weights ? " The brightness shows the regions' weights." : "";
  return `Point at a word to see its regions, or at a region to see its words; click to keep it selected.${brightness}`;
}

function makeWords(pair, point, pin) {
  const largest = pair.word_weights ? Math.max(...pair.word_weights) : 1;
  const buttons = pair.words.map((word, k) => make("button", {
    type: "button", class: "word", "data-word": k, "aria-pressed": "false", tabindex: k ? -1 : 0,
    title: pair.word_weights ? `weight ${pair.word_weights[k].toFixed(3)}` : null, "--share": pair.word_weights ? pair.word_weights[k] / largest : 0,
    onmouseenter: () => point({ word: k }), onmouseleave: () => point(null), onfocus: () => point({ word: k }), onblur: () => point(null), onclick: () => pin({ word: k }),
  }, word));
  const words = make("div", { class: "words", role: "group", "aria-label": "words of the caption" }, ...buttons);
  useArrowKeys(words);
  return words;
}

function makeTerms(pair) {
  const total = pair.terms.reduce((sum, { value }) => sum + Math.abs(value), 0) || 1;
  const rows = pair.terms.map(({ name, value }) => make("tr", { "data-term": name },
    make("th", { scope: "row" }, name), make("td", {}, signed(value)), make("td", {}, `${Math.round((100 * Math.abs(value)) / total)} %`),
    make("td", {}, make("span", { class: "bar" }, make("span", { class: value < 0 ? "minus" : "plus", "--size": Math.abs(value) / total })))));
  const score = make("tr", { class: "total" }, make("th", { scope: "row" }, "score"), make("td", {}, signed(pair.values.score)), make("td"), make("td"));
  const caption = "MFE" in pair.values ? `MFE ${pair.values.MFE.toFixed(2)} nats, mean entropy ${pair.values.mean_entropy.toFixed(3)}` : "";
  return make("table", { class: "terms" }, make("caption", {}, caption), make("tbody", {}, ...rows, score));
}

function signed(value) {
  return (value < 0 ? "−" : "") + Math.abs(value).toFixed(3);
}

function makeTable(pair, point, pin) {
  const values = pair.H ?? pair.attention, weights = pair.region_weights ?? values.map((row) => Math.max(...row));
  const rows = weights.map((_, k) => k).sort((a, b) => weights[b] - weights[a]).slice(0, MOST_ROWS).sort((a, b) => a - b);
  const largest = Math.max(1e-9, ...rows.flatMap((k) => values[k]));
  const what = pair.H ? "Entropy map, in nats" : "Attention of words over regions", part = rows.length < weights.length ? `: the ${rows.length} of ${weights.length} regions with the largest weight` : "";
  const head = make("tr", {}, make("td"), ...pair.words.map((word, k) => make("th", { scope: "col", "data-column": k, onmouseenter: () => point({ word: k }), onmouseleave: () => point(null) }, make("span", {}, word))));
  const body = rows.map((region) => make("tr", { "data-row": region },
    make("th", { scope: "row", onmouseenter: () => point({ region }), onmouseleave: () => point(null), onclick: () => pin({ region }) }, cut(pair, region), ` ${region + 1}`),
    ...values[region].map((value, word) => make("td", { ...paint(value / largest), onmouseenter: () => point({ word }), onmouseleave: () => point(null) }, value.toFixed(2)))));
  return make("table", { class: "matrix" }, make("caption", {}, what + part), make("thead", {}, head), make("tbody", {}, ...body));
}

// The attributes of a cell of the color map, with text that can be read on it.
function paint(share) {
  const at = Math.min(1, Math.max(0, share)) * (VIRIDIS.length - 1), k = Math.min(VIRIDIS.length - 2, Math.floor(at));
  const color = VIRIDIS[k].map((c, i) => Math.round(c + (at - k) * (VIRIDIS[k + 1][i] - c)));
  const linear = color.map((c) => (c / 255 <= 0.04045 ? c / 255 / 12.92 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  const luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  return { "--cell": `rgb(${color})`, "--on-cell": luminance > 0.18 ? "#000000" : "#ffffff" };
}

// A small picture of a region; empty without a photograph or boxes.
function cut(pair, region) {
  const canvas = make("canvas", { width: 28, height: 28, "aria-hidden": "true" });
  if (!pair.photo || !pair.boxes) return "";
  const image = new Image(), [left, top, right, bottom] = pair.boxes[region];
  image.onload = () => canvas.getContext("2d").drawImage(image, left * image.width, top * image.height, (right - left) * image.width, (bottom - top) * image.height, 0, 0, 28, 28);
  image.src = pair.photo;
  return canvas;
}
