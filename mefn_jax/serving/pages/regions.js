// The regions of an image: a picture whose brightness follows their values, and a button for each of them.
import { make } from "/requests.js";

export const LIT = 0.5; // share of the largest value from which on a region, or a word, is lit
const MAP_PIXELS = 180, DARKEST = 0.85;

// Returns the indices of the values that are at least LIT times the largest.
export function findLit(values) {
  const largest = Math.max(...values);
  return values.flatMap((value, k) => (value >= LIT * largest && value > 0 ? [k] : []));
}

// Returns the density of region values in each pixel of a square map: a value is spread evenly over its box, and
// overlapping boxes are added.
export function spread(values, boxes) {
  const map = new Float64Array(MAP_PIXELS * MAP_PIXELS);
  boxes.forEach((box, k) => {
    const [left, top, right, bottom] = box.map((x) => Math.min(MAP_PIXELS, Math.max(0, roundHalfEven(x * MAP_PIXELS))));
    const density = (values[k] * MAP_PIXELS * MAP_PIXELS) / ((right - left) * (bottom - top));
    for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) map[y * MAP_PIXELS + x] += density;
  });
  return map;
}

function roundHalfEven(x) {
  return x - Math.floor(x) === 0.5 ? 2 * Math.round(x / 2) : Math.round(x);
}

// The regions over the photograph. `onPoint(region or null)` is called when one is hovered or has the focus, `onPin`
// when it is clicked.
export class RegionMap {
  constructor(pair, onPoint, onPin) {
    this.pair = pair;
    this.canvas = make("canvas", { width: MAP_PIXELS, height: MAP_PIXELS, "aria-hidden": "true" });
    this.buttons = pair.attention.map((_, k) => this.makeButton(k, onPoint, onPin));
    const photo = pair.photo ? [make("img", { src: pair.photo, alt: "the image as the model sees it" })] : [];
    const kind = pair.boxes ? "map" : "map strip";
    this.group = make("div", { class: "regions", role: "group", "aria-label": "regions" }, ...this.buttons);
    this.element = make("div", { class: kind }, ...(pair.boxes ? [...photo, this.canvas] : photo), this.group);
    useArrowKeys(this.group);
  }

  makeButton(k, onPoint, onPin) {
    const button = make("button", {
      type: "button", class: "region", "data-region": k, "aria-label": `region ${k + 1}`, "aria-pressed": "false", tabindex: k ? -1 : 0,
      onmouseenter: () => onPoint(k), onmouseleave: () => onPoint(null),
      onfocus: () => onPoint(k), onblur: () => onPoint(null), onclick: () => onPin(k),
    });
    if (this.pair.boxes) {
      const [left, top, right, bottom] = this.pair.boxes[k].map((x) => `${100 * x}%`);
      Object.assign(button.style, { left, top, right: `calc(100% - ${right})`, bottom: `calc(100% - ${bottom})` });
      button.style.zIndex = 10 + Math.round(100 * (1 - boxArea(this.pair.boxes[k]))); // small ones above large ones
    } else button.textContent = k + 1;
    return button;
  }

  // Shows values of the regions, or the photograph alone for null; frames the lit ones.
  show(values, lit) {
    this.buttons.forEach((button, k) => {
      button.classList.toggle("lit", lit.includes(k));
      button.style.setProperty("--share", values ? values[k] / Math.max(...values) : 0);
      button.title = values ? `region ${k + 1}: ${values[k].toFixed(3)}` : `region ${k + 1}`;
    });
    if (this.pair.boxes) this.draw(values);
  }

  pin(region) {
    this.buttons.forEach((button, k) => button.setAttribute("aria-pressed", k === region));
  }

  draw(values) {
    const context = this.canvas.getContext("2d"), pixels = context.createImageData(MAP_PIXELS, MAP_PIXELS);
    if (values) {
      const map = spread(values, this.pair.boxes), largest = Math.max(1e-9, map.reduce((a, b) => Math.max(a, b)));
      map.forEach((density, k) => {
        const brightness = density / largest;
        if (this.pair.photo) pixels.data[4 * k + 3] = 255 * DARKEST * (1 - brightness);
        else pixels.data.set([255 * brightness, 255 * brightness, 255 * brightness, 255], 4 * k);
      });
    }
    context.putImageData(pixels, 0, 0);
  }
}

function boxArea([left, top, right, bottom]) {
  return (right - left) * (bottom - top);
}

// Makes the buttons of a group one stop of the Tab key, between which the arrow keys go on and back.
export function useArrowKeys(group) {
  group.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    const buttons = [...group.querySelectorAll("button")], at = buttons.indexOf(document.activeElement);
    if (!step || at < 0) return;
    event.preventDefault();
    const next = buttons[(at + step + buttons.length) % buttons.length];
    buttons.forEach((button) => (button.tabIndex = button === next ? 0 : -1));
    next.focus();
  });
}
