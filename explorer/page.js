/**
 * The page: scene and question go to the model's worker, and its trace into the answer, the figure and the open panel.
 *
 *     scene, question, changes --answer()--> worker --trace--> show(): answer, figure, panel
 *
 * While an answer is computed, further changes wait; only the newest is computed next. So everything follows a dragged
 * shape as fast as the machine can.
 */

import { button, canvas, element, word } from "./figures.js";
import { distributionPanel, layersPanel, sequencePanel, wordPanel } from "./panels_llama.js";
import { featuresPanel, patchesPanel, picturePanel, towerPanel } from "./panels_vision.js";
import { createScene } from "./scene.js";
import { buildStages, createStages } from "./stages.js";
import { createWorker, fetchModel, selfContained } from "./start.js";
import { imageProcessor } from "./vision.js";
import { COLOURS, SHAPES, SIZES } from "./world.js";

const find = (id) => document.getElementById(id);
const VISION = { picture: picturePanel, patches: patchesPanel, tower: towerPanel, features: featuresPanel };
const LANGUAGE = { sequence: sequencePanel, layers: layersPanel, distribution: distributionPanel, word: wordPanel };
// The words that an answer hangs on: the first of them that the question does not say is the one to look at.
const OTHERS = "no one two three top middle bottom left centre right yes nothing none".split(" ");
const TELLING = [...Object.keys(COLOURS), ...SHAPES, ...Object.keys(SIZES), ...OTHERS];

/** The state that stages and panels show. `show` changes it, `answer` asks the model again. */
const app = {
  trace: null, // of the last answer, see llava.js
  runs: 0, // answers so far
  picture: canvas(0, 0), // the scene in the model's size
  seen: canvas(0, 0), // the same with the hidden patches in the mean colour
  tokenPicture: null, // the picture that the image tokens are of: that of another scene if they were swapped
  selected: 0, // the position that the decoder's panels look at
  picked: false, // whether the reader chose it
  patch: 0, // the patch that the tower's panels look at
  towerView: null, // the attention that is shown large, {layer, head}; head null: the average of the heads
  view: null, // the same in the decoder; null: where the next word becomes readable
  sampling: { temperature: 1, topK: 21, topP: 1 },
  changes: { hiddenPatches: new Set(), zeroHeads: new Set(), skipLayers: new Set(), kept: null, swap: false },
  show,
  answer,
  ask,
  nextToken: (request) => call("nextToken", { interventions: interventions(), ...request }),
};
const panels = {};
const echo = element("p", { class: "echo wide" }); // question and answer once more, in the open panel
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
  const { hiddenPatches, skipLayers, swap } = app.changes;
  const list = [];
  if (hiddenPatches.size) list.push(`${hiddenPatches.size} patch${hiddenPatches.size > 1 ? "es" : ""} hidden`);
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
  again = true;
  if (busy) return;
  busy = true;
  while (again) {
    again = false;
    await answerOnce().catch((error) => (find("status").textContent = `The model could not answer: ${error.message}`));
  }
  busy = false;
}

async function answerOnce() {
  const side = app.config.vision_config.image_size;
  const started = performance.now();
  const rgba = scene.picture(side);
  const pixels = imageProcessor(rgba, app.config);
  const changes = changesInWords();
  const hidden = [...app.changes.hiddenPatches];
  const wordByWord = ({ text }) => find("answer").replaceChildren(element("span", {}, text));
  if (fresh) [app.picked, app.view] = [false, null];
  const asked = ask({ pixels }, fresh ? wordByWord : null);
  fresh = false;
  const trace = await asked;
  const seconds = (performance.now() - started) / 1000;
  const unchanged = changes ? await ask({ pixels, interventions: {} }) : trace;

  draw(rgba, side, hidden);
  app.tokenPicture = app.changes.swap ? app.keptPicture : app.seen;
  // A position that the reader chose in the answer stays the same word of the answer.
  if (app.picked && app.selected >= app.trace.answerStart) app.selected += trace.answerStart - app.trace.answerStart;
  app.selected = app.picked ? Math.min(app.selected, trace.ids.length - 1) : tellingPosition(trace);
  app.trace = trace;
  app.runs += 1;

  const count = trace.ids.length - trace.answerStart;
  find("status").textContent = `${count} token${count === 1 ? "" : "s"} in ${seconds.toFixed(2)} s, on this machine.`;
  find("changes").toggleAttribute("data-none", !changes);
  find("undo").disabled = !changes;
  find("change-list").textContent = changes ? `Changed: ${changes}.` : unchangedText;
  find("baseline").textContent = unchanged.text;
  const now = [`${find("question").value} `, element("strong", {}, trace.text)];
  echo.replaceChildren(...now, ...(changes ? [" Without the changes: ", element("strong", {}, unchanged.text)] : []));
  show({});
  document.body.dataset.answered = app.runs;
}

/** Draws the scene as the model gets it, once whole and once with the hidden patches in the mean colour. */
function draw(rgba, side, hidden) {
  for (const target of [app.picture, app.seen]) {
    [target.width, target.height] = [side, side];
    target.getContext("2d").putImageData(new ImageData(rgba, side, side), 0, 0);
  }
  const pen = app.seen.getContext("2d");
  pen.fillStyle = `rgb(${app.config.imageMean.map((mean) => Math.round(255 * mean))})`;
  const across = Math.sqrt(app.patchCount);
  const size = side / across;
  for (const i of hidden) pen.fillRect((i % across) * size, Math.floor(i / across) * size, size, size);
}

/** The position that wrote the word on which the answer hangs. */
function tellingPosition({ pieces, answerStart }) {
  const asked = find("question").value.toLowerCase();
  const tells = (name) => TELLING.includes(name) && !asked.includes(name);
  const t = pieces.findIndex((piece, t) => t >= answerStart && tells(word(piece).toLowerCase()));
  return (t < 0 ? answerStart : t) - 1;
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
    const pick = (i) => () => show({ selected: app.trace.answerStart + i - 1, picked: true, view: null });
    const parts = tokens.flatMap((piece, i) => [piece.startsWith("▁") ? " " : "", button(word(piece), pick(i))]);
    box.replaceChildren(...(parts.length ? parts : [element("span", { class: "waiting" }, "(no words)")]));
    box.classList.toggle("long", text.length > 80);
    find("answer-text").textContent = text;
  }
  const pressed = app.selected + 1 - answerStart;
  box.querySelectorAll("button").forEach((token, i) => token.setAttribute("aria-pressed", i === pressed));
}

/** Questions about the things that are there. */
function suggest() {
  const [a, b] = scene.things;
  const alone = a && scene.things.filter(({ shape }) => shape === a.shape).length === 1;
  const name = ({ colour, shape }) => `${colour} ${shape}`;
  const many = (shape) => (shape === "cross" ? "crosses" : `${shape}s`);
  const questions = ["Describe the picture."];
  if (a) questions.unshift(`What colour is the ${a.shape}?`, `Where is the ${alone ? a.shape : name(a)}?`);
  if (b) questions.push(`Is the ${name(a)} left of the ${name(b)}?`, `What is below the ${name(b)}?`);
  if (a) questions.push(`How many ${many(a.shape)} are there?`);
  questions.push("Is there a green heart?");
  const put = (question) => () => {
    find("question").value = question;
    answer(true);
  };
  find("suggestions").replaceChildren(...questions.map((question) => button(question, put(question))));
}

/** Opens the panel of one stage, or closes it if it is open. */
function open(name) {
  for (const other of Object.keys(panels)) {
    const panel = find(`panel-${other}`);
    panel.hidden = other !== name || !panel.hidden;
    find(`stage-${other}`).setAttribute("aria-expanded", !panel.hidden);
  }
  if (!panels[name] || find(`panel-${name}`).hidden) return;
  find(`panel-${name}`).querySelector(".figure").prepend(echo);
  panels[name].update();
}

const unchangedText = find("change-list").textContent;

async function main() {
  buildStages(find("way"), open);
  // The Python files are beside the page in the repository only.
  if (selfContained) for (const link of document.querySelectorAll('a[href^="../"]')) link.replaceWith(link.textContent);
  scene = createScene((changed) => {
    if (changed === "things") suggest();
    answer();
  });
  suggest();
  call = makeCall(createWorker());
  const { config } = await call("load", { buffer: await fetchModel() });
  const { vision_config: tower, text_config: text } = config;
  const fromEnd = config.vision_feature_layer < 0 ? tower.num_hidden_layers + 1 : 0;
  Object.assign(app, {
    config,
    pieces: Array.from({ length: text.vocab_size }, (_, id) => config.pieces[id] ?? `row ${id}`), // some rows are spare
    patchCount: (tower.image_size / tower.patch_size) ** 2,
    towerWidth: tower.hidden_size,
    vocabulary: text.vocab_size,
    featureLayer: fromEnd + config.vision_feature_layer,
  });
  app.towerView = { layer: app.featureLayer - 1, head: null };
  showStages = createStages(app);
  await answer(true);
  for (const [name, make] of Object.entries({ ...VISION, ...LANGUAGE })) {
    panels[name] = make(app);
    find(`panel-${name}`).append(element("div", { class: "figure" }, ...panels[name].nodes));
  }
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
