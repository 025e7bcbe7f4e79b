// Requests to the server, and elements of the page. Texts are always set as text, never as markup.

// Makes an element with attributes, a style's custom properties (names that begin with --) and children.
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("--")) element.style.setProperty(name, value);
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null) element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}

// Returns the server's description of its models.
export async function getSetup() {
  return (await fetch("/api/setup")).json();
}

// Sends a query and returns its result, the last line of the answer. `image` is a File, or null; `progress(text)` is
// told of the lines before. Throws an Error with the server's message.
export async function query(path, values, image, progress, signal) {
  const fields = new URLSearchParams(values);
  const request = image
    ? [`${path}?${fields}`, { method: "POST", body: image, headers: { "Content-Type": image.type || "image/unknown" }, signal }]
    : [path, { method: "POST", body: JSON.stringify(values), headers: { "Content-Type": "application/json" }, signal }];
  const response = await fetch(...request);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    text += value;
    const lines = text.trimEnd().split("\n");
    if (text.endsWith("\n")) describeProgress(lines.at(-1), progress);
  }
  const last = JSON.parse(text.trimEnd().split("\n").at(-1));
  if (last.error) throw new Error(last.error);
  return last;
}

function describeProgress(line, progress) {
  if (line.length > 60) return; // a result
  const state = JSON.parse(line);
  if ("waiting" in state) progress(`waiting; ${state.waiting} in the queue`);
  else if ("of" in state) progress(`${Math.round((100 * state.done) / state.of)} %`);
}
