/**
 * The panels of the language side: sequence, decoder layers, distribution, word.
 *
 * As in panels_vision.js: (app) -> {nodes, update}. T tokens, D width of the decoder, H heads, V vocabulary size.
 * The hidden state at a position predicts the token at the next one.
 */

import {
  attentionRow, bars, button, checkbox, children, div, element, headTable, legend, patchGrid, percent, placeName, row,
  tokenStrip, word,
} from "./figures.js";
import { distribution, sample } from "./sampling.js";
import { argmax } from "./tensor.js";

const caption = () => element("p", { class: "caption", "aria-live": "polite" });

/** What a position is called: “is”, or image token 8 (row 2, column 2). */
function positionName({ trace, patchCount }, position) {
  if (!trace.isImage[position]) return `“${word(trace.pieces[position])}”`;
  const patch = position - trace.isImage.indexOf(true);
  return `image token ${patch + 1} (${placeName(patch, patchCount)})`;
}

/** The id of the most likely token after the selected position. */
const likeliest = ({ trace, selected, vocabulary }) => argmax(row(trace.logits, selected, vocabulary));

/** The tokens, of which one is selected for all panels of the decoder, and the token that it predicts. */
function positionStrip(app, apart = false) {
  const pick = (selected) => app.show({ selected, picked: true });
  const strip = tokenStrip("Tokens: choose the position to look at", pick, apart);
  const prediction = element("p", { class: "prediction" });
  function update(weights) {
    const { trace, selected, tokenPicture: picture } = app;
    strip.update(trace, { selected, picture, weights });
    prediction.textContent = `At ${positionName(app, selected)}, predicting “${word(app.pieces[likeliest(app)])}”`;
  }
  return { node: div("wide", strip.node, prediction), update };
}

/** The whole sequence, token by token, and where the embedding of the selected one comes from. */
export function sequencePanel(app) {
  const strip = positionStrip(app, true);
  const facts = element("dl", { class: "facts" });

  function update() {
    const { trace, selected } = app;
    const [id, isImage] = [trace.ids[selected], trace.isImage[selected]];
    strip.update();
    const values = {
      position: `${selected + 1} of ${trace.ids.length}`,
      "number in the vocabulary": id,
      "spelling in the vocabulary": trace.pieces[selected],
      embedding: isImage ? `the projector’s, ${positionName(app, selected)}` : `row ${id} of embed_tokens`,
    };
    const fact = ([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, String(value)));
    facts.replaceChildren(...Object.entries(values).map(fact));
  }
  const key = legend(
    ["prompt", "prompt"], ["image", "image tokens"], ["answer-kind", "answer."],
    "␣ is a lone space, ↵ a new line; “start” and “end” frame the sequence. In the vocabulary’s own spelling, " +
    "▁ is the space before a word.",
  );
  return { nodes: [strip.node, div("wide", key, facts)], update };
}

/** The first layer from which on the logit lens shows the word that is predicted in the end; 0: the embeddings. */
function readableFrom({ trace, selected }) {
  const first = trace.lens.map((layer) => layer[selected][0].piece);
  return first.findLastIndex((piece) => piece !== first.at(-1)) + 1;
}

/** Attention and logit lens, layer by layer, in which heads and layers can be switched off; the carriers. */
export function layersPanel(app) {
  const { num_hidden_layers: layers, num_attention_heads: heads } = app.config.text_config;
  const { zeroHeads, skipLayers } = app.changes;
  const strip = positionStrip(app);
  const pick = (patch) => app.show({ selected: app.trace.isImage.indexOf(true) + patch, picked: true });
  const grid = patchGrid("Image tokens: choose the one that looks", pick);
  const carriers = carriersFigure(app, pick);
  const readable = element("p", { class: "readable" });

  /** A checkbox that is off while `key` is in the set `off`. */
  function toggle(off, key, label) {
    const box = checkbox(label, (checked) => {
      if (checked) off.delete(key);
      else off.add(key);
      app.answer();
    });
    return { box, node: element("label", { class: "toggle", title: label }, box), has: () => off.has(key) };
  }
  const layerToggles = Array.from({ length: layers }, (_, i) => toggle(skipLayers, i, `layer ${i + 1} on`));
  const headToggles = layerToggles.map((_, layer) =>
    Array.from({ length: heads }, (_, head) => ({
      ...toggle(zeroHeads, `${layer}.${head}`, `layer ${layer + 1}, head ${head + 1} on`),
      share: element("small", { title: "share of its attention that is on the picture" }),
    })),
  );
  const lenses = Array.from({ length: layers + 1 }, () => element("ol", { class: "lens" }));
  const table = headTable({
    layers,
    heads,
    titles: ["Heads: where the token looks, with the share of its attention that is on the picture", "Next word, if it ended here"],
    label: (i) => (i ? [layerToggles[i - 1].node, `Layer ${i}`] : ["Embeddings"]),
    foot: (layer, head) => [element("span", {}, headToggles[layer][head].node, headToggles[layer][head].share)],
    end: (i) => lenses[i],
    onView: (view) => app.show({ view }),
  });

  function update() {
    const { trace, tokenPicture: picture, selected, patchCount: count } = app;
    const first = trace.isImage.indexOf(true);
    const from = readableFrom(app);
    const view = app.view ?? { layer: Math.max(0, from - 1), head: null };
    const all = (i, h) => attentionRow(trace.attention[i], heads, trace.ids.length, selected, h);
    const look = (i, h) => all(i, h).subarray(first, first + count);
    const share = (i, h) => percent(look(i, h).reduce((sum, weight) => sum + weight, 0));
    strip.update(all(view.layer, view.head));
    grid.update({ picture, weights: look(view.layer, view.head), selected: selected - first, count });
    table.update(picture, view, look);
    table.caption.textContent += skipLayers.has(view.layer)
      ? ": switched off"
      : `: ${share(view.layer, view.head)} of its attention is on the picture, the rest on words`;
    const piece = trace.lens.at(-1)[selected][0].piece;
    readable.textContent =
      from === 0
        ? `“${word(piece)}” is the likeliest next word before any layer.`
        : `“${word(piece)}” is the likeliest next word from layer ${from} on. It need not be made only there: later ` +
          "layers can make up for one that is switched off.";
    table.rows.forEach((node, i) => {
      const off = i > 0 && layerToggles[i - 1].has();
      node.toggleAttribute("data-off", off);
      node.toggleAttribute("data-readable", i >= from);
      if (i) layerToggles[i - 1].box.checked = !off;
      for (const [h, { box, share: label, has }] of (headToggles[i - 1] ?? []).entries()) {
        [box.checked, box.disabled] = [!has(), off];
        label.textContent = off ? "–" : share(i - 1, h);
        table.cells[i - 1][h].firstChild.disabled = off;
        table.cells[i - 1][h].toggleAttribute("data-off", off || has());
      }
      const item = () => element("li", {}, element("span"), element("small"));
      children(lenses[i], 3, item).forEach((line, k) => {
        const { piece: guess, probability } = trace.lens[i][selected][k];
        line.firstChild.textContent = word(guess);
        line.lastChild.textContent = percent(probability);
        line.style.setProperty("--value", probability);
        line.toggleAttribute("data-final", guess === piece);
      });
    });
    carriers.update();
  }
  const sums = element(
    "p",
    { class: "caption" },
    "Each head’s attention sums to 100 %, over words and picture. A head that finds nothing must still look somewhere: ",
    "a share of 100 % may be spread over empty ground, and bring nothing.",
  );
  const left = element("div", {}, grid.node, ...table.nodes, carriers.node);
  return { nodes: [strip.node, left, element("div", {}, readable, table.table, sums)], update };
}

/**
 * Which image tokens carry the next word: each of them alone, among those of an empty picture, and how likely the word
 * then is. That is an experiment of one run of the decoder per image token, which starts when the page is at rest.
 */
function carriersFigure(app, onPick) {
  const grid = patchGrid("Image tokens, each alone", onPick);
  const title = element("h3");
  const result = caption();
  let empty; // the image tokens of an empty picture (P, D)
  let key = ""; // of the experiment that is shown
  let timer;

  async function experiment() {
    const { trace, selected, patchCount: count, tokenPicture: picture, config } = app;
    const id = likeliest(app);
    const ids = trace.ids.slice(0, selected + 1);
    const own = key;
    const everything = { interventions: { hiddenPatches: [...Array(count).keys()] }, maxNewTokens: 1 };
    empty ??= (await app.ask(everything)).features;
    const likelihood = async (features) => (await app.nextToken({ ids, features })).probabilities[id];
    const width = config.text_config.hidden_size;
    const without = await likelihood(empty);
    if (without > 0.5) {
      if (own !== key) return; // the page has moved on
      result.textContent = `None is needed: the word is ${percent(without)} likely without the picture, too.`;
      grid.node.dataset.done = "";
      return;
    }
    const alone = [];
    for (let patch = 0; patch < count; patch++) {
      const features = empty.slice();
      features.set(row(trace.features, patch, width), patch * width);
      alone.push(await likelihood(features));
      if (own !== key) return; // the page has moved on
      const weights = Array.from({ length: count }, (_, i) => Math.max(0, (alone[i] ?? 0) - without));
      grid.update({ picture, weights, count });
    }
    const best = argmax(alone);
    const strong = alone.filter((likely) => likely - without > 0.5 * (alone[best] - without)).length;
    const others = strong === 1 ? "" : `, and ${strong - 1} more nearly as well`;
    result.textContent =
      alone[best] - without < 0.1
        ? `None by itself: at best it is ${percent(alone[best])} likely, and ${percent(without)} without the picture.`
        : `The one in ${placeName(best, count)}${others}: alone, it makes the word ${percent(alone[best])} likely. ` +
          `Without the picture it is ${percent(without)}.`;
    grid.node.dataset.done = "";
  }

  function update() {
    const { trace, selected, patchCount: count, tokenPicture: picture, runs } = app;
    const now = `${runs} ${selected}`;
    if (now === key) return;
    key = now;
    clearTimeout(timer);
    delete grid.node.dataset.done;
    title.textContent = `Which image tokens carry “${word(app.pieces[likeliest(app)])}”?`;
    grid.update({ picture, weights: new Float32Array(count), count });
    const after = selected >= trace.isImage.lastIndexOf(true);
    result.textContent = after ? "Trying each image token alone …" : "Choose a token after the picture to see.";
    if (after) timer = setTimeout(experiment, 700);
  }
  const about = element("p", { class: "caption" }, "Lit: tokens with which the word stays likely when all the ",
    "others are replaced with those of an empty picture.");
  return { node: div("carriers", title, grid.node, result, about), update };
}

/** Temperature, top-k and top-p as sliders. */
function samplingSliders(app) {
  const settings = [
    ["temperature", "Temperature", 0, 3, 0.1, (value) => (value === 0 ? "0 (greedy)" : value.toFixed(1))],
    ["topK", "Top-k", 1, 21, 1, (value) => (value > 20 ? "off" : value)],
    ["topP", "Top-p", 0.05, 1, 0.05, (value) => (value === 1 ? "off" : value.toFixed(2))],
  ];
  const sliders = settings.map(([name, label, min, max, step, written]) => {
    const input = element("input", { type: "range", min, max, step, "aria-label": label });
    const value = element("b");
    input.addEventListener("input", () => app.show({ sampling: { ...app.sampling, [name]: Number(input.value) } }));
    const update = () => {
      input.value = app.sampling[name];
      value.textContent = written(app.sampling[name]);
      input.setAttribute("aria-valuetext", value.textContent);
    };
    return { node: element("label", { class: "slider" }, element("span", {}, label, value), input), update };
  });
  const node = div("sliders", ...sliders.map((slider) => slider.node));
  return { node, update: () => sliders.forEach((slider) => slider.update()) };
}

/** The sampling settings as llava.js takes them. */
const samplingOptions = ({ temperature, topK, topP }) => ({
  temperature,
  topK: topK > 20 ? undefined : topK,
  topP: topP === 1 ? undefined : topP,
});

/** Probabilities after the selected position (V): as the settings make them, as the model gave them; ids in order. */
function nextWords(app) {
  const logits = row(app.trace.logits, app.selected, app.vocabulary);
  const plain = distribution(logits, { temperature: 1 });
  const order = [...plain.keys()].sort((a, b) => plain[b] - plain[a]);
  return { logits, probabilities: distribution(logits, samplingOptions(app.sampling)), plain, order };
}

/** The most likely next words, before and after temperature, top-k and top-p. */
export function distributionPanel(app) {
  const strip = positionStrip(app);
  const sliders = samplingSliders(app);
  const chart = bars();
  const rest = element("p", { class: "caption" });

  function update() {
    const { logits, probabilities, plain, order } = nextWords(app);
    const warm = distribution(logits, { temperature: app.sampling.temperature }); // before top-k and top-p drop any
    const seen = order.filter((id) => Math.max(plain[id], warm[id]) >= 1e-4);
    const shown = seen.slice(0, 10);
    strip.update();
    sliders.update();
    chart.update(shown.map((id) => ({ piece: app.pieces[id], probability: probabilities[id], was: plain[id] })));
    const others = order.length - seen.length;
    rest.textContent =
      (seen.length > shown.length ? `${seen.length - shown.length} more are less likely than these. ` : "") +
      (others ? `The other ${others} tokens have less than 0.01 % each.` : "");
  }
  const key = legend(["now", "with these settings"], ["was", "as the model gave them"]);
  return { nodes: [strip.node, sliders.node, element("div", {}, chart.node, rest, key)], update };
}

/** A draw from the distribution: the words as segments of a line; and whole sampled answers. */
export function wordPanel(app) {
  const strip = positionStrip(app);
  const sliders = samplingSliders(app);
  const line = div("line");
  const marker = element("i", { class: "marker" });
  const result = element("p", { "aria-live": "polite" });
  const answers = element("ol", { class: "answers" });
  let number = 0.31;
  let seed = 0;
  let trace;
  const draw = button("Draw a number", () => {
    number = Math.random();
    update();
  });
  const several = button("Sample five answers", async () => {
    answers.replaceChildren();
    for (let i = 0; i < 5; i++) {
      const { text } = await app.ask({ ...samplingOptions(app.sampling), seed: seed++ });
      answers.append(element("li", {}, text || "(nothing)"));
    }
  });

  function update() {
    const { probabilities, order } = nextWords(app);
    strip.update();
    sliders.update();
    if (trace !== app.trace) answers.replaceChildren(); // they were about another scene or question
    trace = app.trace;
    // The segments go from the most likely word to the least likely; those too small to see are left grey.
    const sorted = Float32Array.from(order, (id) => probabilities[id]);
    const seen = order.filter((id) => probabilities[id] > 0.004);
    children(line, seen.length, () => element("span")).forEach((segment, i) => {
      const name = word(app.pieces[seen[i]]);
      segment.style.flexGrow = sorted[i];
      segment.textContent = sorted[i] > 0.04 ? name : "";
      segment.title = `${name} ${percent(sorted[i])}`;
    });
    marker.style.left = `${100 * number}%`;
    const [greedy, drawn] = [order[0], order[sample(sorted, () => number)]].map((id) => word(app.pieces[id]));
    const text = `Greedy decoding takes “${greedy}”. Sampling with ${number.toFixed(3)} takes “${drawn}”.`;
    if (result.textContent !== text) result.textContent = text;
  }
  const right = element("div", {}, div("line-box", line, marker), result, div("actions", draw, several), answers);
  return { nodes: [strip.node, sliders.node, right], update };
}
