/**
 * The page: scene and question go to the model's worker, and its trace into the answer, the figure and the open panel.
 *
 *     scene, question, changes --answer()--> worker --trace--> show(): answer, figure, panel
 *
 * While an answer is computed, further changes wait; only the newest is computed next. So everything follows a dragged
 * shape as fast as the machine can.
 */

import { attentionRow, button, element, word } from "./figures.js";
import { distributionPanel, layersPanel, sequencePanel, wordPanel } from "./panels_llama.js";
import { featuresPanel, patchesPanel, picturePanel, towerPanel } from "./panels_vision.js";
import { createScene } from "./scene.js";
import { createStages } from "./stages.js";
import { createWorker, fetchModel } from "./start.js";
import { imageProcessor } from "./vision.js";
import { COLOURS, SHAPES, SIZES } from "./world.js";

const find = (id) => document.getElementById(id);
const PANELS = {
  picture: picturePanel,
  patches: patchesPanel,
  tower: towerPanel,
  features: featuresPanel,
  sequence: sequencePanel,
  layers: layersPanel,
  distribution: distributionPanel,
  word: wordPanel,
};
const NUMBERS = ["zero", "no", "one", "two", "three"];
const PLACES = ["top", "middle", "bottom", "left", "centre", "right"];
const OTHERS = ["yes", "nothing", "none"];
// The words that an answer hangs on: the first of them that the question does not say is the one to look at.
const TELLING = [Object.keys(COLOURS), SHAPES, Object.keys(SIZES), NUMBERS, PLACES, OTHERS].flat();

/** The state that stages and panels show. `show` changes it, `answer` asks the model again. */
const app = {
  trace: null, // of the last answer, see llava.js
  picture: element("canvas"), // what the model sees
  tokenPicture: null, // the picture that the image tokens are of: another one if they were swapped
  selected: 0, // the position that the decoder's panels look at
  picked: false, // whether the reader chose it
  patch: 7, // the patch that the tower's panels look at
  towerView: { layer: 0, head: null }, // the attention that is shown large; null: the average of the heads
  view: { layer: 0, head: null },
  sampling: { temperature: 1, topK: 21, topP: 1 },
  changes: {
    hiddenPatches: new Set(),
    zeroHeads: new Set(),
    skipLayers: new Set(),
    kept: null,
    keptPicture: null,
    swap: false,
  },
  show,
  answer,
  ask,
};
const panels = {};
let scene;
let showStages;
let call; // of the worker

/** Makes the function that calls the worker: call(name, arguments, onToken) -> a promise of its reply. */
function makeCall(worker) {
  const waiting = new Map();
  let last = 0;
  worker.onmessage = ({ data: { id, token, error, ...result } }) => {
    const { resolve, reject, onToken } = waiting.get(id);
    if (token) return onToken?.(token);
    waiting.delete(id);
    if (error) reject(new Error(error));
    else resolve(result);
  };
  return (call, args, onToken) =>
    new Promise((resolve, reject) => {
      waiting.set(++last, { resolve, reject, onToken });
      worker.postMessage({ id: last, call, ...args });
    });
}

/** The interventions as `answer` of llava.js takes them. */
function interventions() {
  const { hiddenPatches, zeroHeads, skipLayers, kept, swap } = app.changes;
  return {
    hiddenPatches: [...hiddenPatches],
    zeroHeads: [...zeroHeads].map((key) => key.split(".").map(Number)).map(([layer, head]) => ({ layer, head })),
    skipLayers: [...skipLayers],
    ...(swap ? { imageFeatures: kept } : {}),
  };
}

/** The changes in words, for the list beside the answer. */
function changesInWords() {
  const { hiddenPatches, zeroHeads, skipLayers, swap } = app.changes;
  const list = [];
  if (hiddenPatches.size === 1) list.push("1 patch hidden");
  if (hiddenPatches.size > 1) list.push(`${hiddenPatches.size} patches hidden`);
  if (swap) list.push("image tokens of the kept scene");
  for (const { layer, head } of interventions().zeroHeads) list.push(`head ${head + 1} of layer ${layer + 1} off`);
  for (const layer of skipLayers) list.push(`layer ${layer + 1} off`);
  return list.join(", ");
}

/** Asks the model about the scene as it is now, unless other pixels are given: a promise of the trace. */
function ask(options = {}, onToken) {
  const pixels = options.pixels ?? imageProcessor(scene.picture(app.config.vision_config.image_size), app.config);
  const request = { pixels, question: find("question").value, short: find("short").checked, maxNewTokens: 120 };
  return call("answer", { ...request, interventions: interventions(), ...options }, onToken);
}

let busy = false;
let again = false;
let fresh = false;

/** Asks the model and shows what it did; if it is still busy, once more as soon as it is ready. */
async function answer(newQuestion = false) {
  if (!app.config) return;
  fresh ||= newQuestion;
  if (busy) {
    again = true;
    return;
  }
  busy = true;
  do {
    again = false;
    try {
      await answerOnce();
    } catch (error) {
      find("status").textContent = `The model could not answer: ${error.message}`;
    }
  } while (again);
  busy = false;
}

async function answerOnce() {
  const side = app.config.vision_config.image_size;
  const started = performance.now();
  const rgba = scene.picture(side);
  const pixels = imageProcessor(rgba, app.config);
  const changes = changesInWords();
  const wordByWord = ({ text }) => find("answer").replaceChildren(element("span", {}, text));
  if (fresh) app.picked = false;
  const asked = ask({ pixels }, fresh ? wordByWord : null);
  fresh = false;
  const trace = await asked;
  const seconds = (performance.now() - started) / 1000;
  const unchanged = changes ? await ask({ pixels, interventions: {} }) : trace;

  app.picture.width = app.picture.height = side;
  app.picture.getContext("2d").putImageData(new ImageData(rgba, side, side), 0, 0);
  app.tokenPicture = app.changes.swap ? app.changes.keptPicture : app.picture;
  // A position that the reader chose in the answer stays the same word of the answer.
  if (app.picked && app.selected >= app.trace.answerStart) app.selected += trace.answerStart - app.trace.answerStart;
  app.selected = app.picked ? Math.min(app.selected, trace.ids.length - 1) : tellingPosition(trace);
  app.trace = trace;

  const count = trace.ids.length - trace.answerStart;
  find("status").textContent = `${count} token${count === 1 ? "" : "s"} in ${seconds.toFixed(2)} s, on this machine.`;
  find("changes").hidden = !changes;
  find("change-list").textContent = `Changed: ${changes}.`;
  find("baseline").textContent = unchanged.text;
  document.body.dataset.answered = Number(document.body.dataset.answered ?? 0) + 1;
  show({});
}

/** The position that wrote the word on which the answer hangs. */
function tellingPosition({ pieces, answerStart }) {
  const asked = find("question").value.toLowerCase();
  const tells = (piece, t) =>
    t >= answerStart && TELLING.includes(word(piece).toLowerCase()) && !asked.includes(word(piece));
  const t = pieces.findIndex(tells);
  return (t < 0 ? answerStart : t) - 1;
}

/** The decoder head whose attention lies most on a single patch: the one to show at first. */
function strongestHead({ attention, ids, isImage }) {
  const length = ids.length;
  const first = isImage.indexOf(true);
  const heads = app.config.text_config.num_attention_heads;
  const peaks = attention.flatMap((weights, layer) =>
    Array.from({ length: heads }, (_, head) => {
      const all = attentionRow(weights, heads, length, app.selected, head);
      return { layer, head, peak: Math.max(...all.subarray(first, first + app.patchCount)) };
    }),
  );
  return peaks.sort((a, b) => b.peak - a.peak)[0];
}

/** Changes the state and shows it: the answer, the figure and the open panel. */
function show(changed) {
  Object.assign(app, changed);
  showAnswer();
  showStages();
  for (const [name, panel] of Object.entries(panels)) if (!find(`panel-${name}`).hidden) panel.update();
}

/** The answer, each token a button that chooses the position which wrote it. */
function showAnswer() {
  const { pieces, answerStart, ids, text } = app.trace;
  const box = find("answer");
  if (find("answer-text").textContent !== text || box.querySelector("span")) {
    const tokens = pieces.slice(answerStart).filter((_, i) => !app.config.eos_token_id.includes(ids[answerStart + i]));
    const pick = (i) => () => show({ selected: app.trace.answerStart + i - 1, picked: true });
    const parts = tokens.flatMap((piece, i) => [piece.startsWith("▁") ? " " : "", button(word(piece), pick(i))]);
    box.replaceChildren(...(parts.length ? parts : [element("span", { class: "waiting" }, "(no words)")]));
    box.classList.toggle("long", text.length > 80);
    find("answer-text").textContent = text;
  }
  [...box.querySelectorAll("button")].forEach((token, i) =>
    token.setAttribute("aria-pressed", answerStart + i - 1 === app.selected),
  );
}

/** Questions that the model was trained on, about the things that are there. */
function suggest() {
  const [a, b] = scene.things;
  const alone = a && scene.things.filter(({ shape }) => shape === a.shape).length === 1;
  const name = ({ colour, shape }) => `${colour} ${shape}`;
  const many = (shape) => (shape === "cross" ? "crosses" : `${shape}s`);
  const questions = ["Describe the picture."];
  if (a) questions.unshift(`What colour is the ${b?.shape ?? a.shape}?`, `Where is the ${alone ? a.shape : name(a)}?`);
  if (b) questions.push(`Is the ${name(a)} left of the ${name(b)}?`, `What is below the ${name(b)}?`);
  if (a) questions.push(`How many ${many(a.shape)} are there?`);
  questions.push("Is there a green heart?");
  const chip = (question) =>
    button(question, () => {
      find("question").value = question;
      answer(true);
    });
  find("suggestions").replaceChildren(...questions.map(chip));
}

/** Opens the panel of one stage, or closes it if it is open. */
function open(name) {
  for (const other of Object.keys(PANELS)) {
    const panel = find(`panel-${other}`);
    panel.hidden = other !== name || !panel.hidden;
    find(`stage-${other}`).setAttribute("aria-expanded", !panel.hidden);
  }
  if (!find(`panel-${name}`).hidden) panels[name].update();
}

async function main() {
  scene = createScene((changed) => {
    if (changed === "things") suggest();
    answer();
  });
  suggest();
  call = makeCall(createWorker());
  const buffer = await fetchModel();
  const { config } = await call("load", { buffer });
  const { vision_config: tower, text_config: text } = config;
  Object.assign(app, {
    config,
    pieces: Array.from({ length: text.vocab_size }, (_, id) => config.pieces[id] ?? `row ${id}`), // some rows are spare
    patchCount: (tower.image_size / tower.patch_size) ** 2,
    towerWidth: tower.hidden_size,
    vocabulary: text.vocab_size,
    featureLayer:
      config.vision_feature_layer < 0
        ? tower.num_hidden_layers + 1 + config.vision_feature_layer
        : config.vision_feature_layer,
    towerView: { layer: tower.num_hidden_layers - 2, head: null },
    view: { layer: text.num_hidden_layers - 2, head: null },
  });
  showStages = createStages(app);
  await answer(true);
  for (const [name, make] of Object.entries(PANELS)) {
    panels[name] = make(app);
    find(`panel-${name}`).append(element("div", { class: "figure" }, ...panels[name].nodes));
    find(`stage-${name}`).addEventListener("click", () => open(name));
  }
  app.view = strongestHead(app.trace);
  open("layers");
  let typing;
  find("question").addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => answer(true), 250);
  });
  find("short").addEventListener("change", () => answer(true));
  find("undo").addEventListener("click", () => {
    for (const set of ["hiddenPatches", "zeroHeads", "skipLayers"]) app.changes[set].clear();
    app.changes.swap = false;
    answer();
  });
}

main().catch((error) => (find("status").textContent = `The explorer could not start: ${error.message}`));
