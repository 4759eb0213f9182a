/**
 * Starts the model's worker and fetches its weights, for the page.
 *
 * Served over HTTP, both are files beside this one. In the self-contained file that `export.py --html` writes, they are
 * the texts of two <script> elements, because a page opened from file:// must not load other files.
 */

/** The text of an inlined file, or undefined if the page is served over HTTP. */
const inlined = (name) => document.getElementById(name)?.textContent;

/** Whether this is the self-contained file. */
export const selfContained = inlined("model.bin") !== undefined;

/** Starts the worker, which answers messages as worker.js describes. The first one must be {call: "load", buffer}. */
export function createWorker() {
  const source = inlined("worker.js");
  if (!source) return new Worker(new URL("worker.js", import.meta.url), { type: "module" });
  return new Worker(URL.createObjectURL(new Blob([source], { type: "text/javascript" })));
}

/** Fetches model.bin: a promise of its ArrayBuffer. */
export async function fetchModel() {
  const base64 = inlined("model.bin");
  if (base64) return Uint8Array.from(atob(base64), (character) => character.charCodeAt(0)).buffer;
  const response = await fetch(new URL("model.bin", import.meta.url));
  if (!response.ok) throw new Error(`model.bin could not be loaded: ${response.status} ${response.statusText}`);
  return response.arrayBuffer();
}
