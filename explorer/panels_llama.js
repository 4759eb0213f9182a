/**
 * The panels of the language side: sequence, decoder layers, distribution, word.
 *
 * As in panels_vision.js: (app) -> {nodes, update}. T tokens, D width of the decoder, H heads, V vocabulary size.
 * The hidden state at a position predicts the token at the next one.
 */

import {
  attentionRow,
  bars,
  button,
  children,
  columnHeads,
  div,
  element,
  legend,
  patchGrid,
  percent,
  row,
  spotlight,
  tokenStrip,
  word,
} from "./figures.js";
import { patchName } from "./panels_vision.js";
import { distribution, sample } from "./sampling.js";

/** The tokens, of which one is chosen for all panels of the decoder. */
function positionStrip(app, apart = false) {
  return tokenStrip(
    "Tokens: choose the position to look at",
    (selected) => app.show({ selected, picked: true }),
    apart,
  );
}

/** The text up to a position: the answer so far, or the last pieces of the prompt. */
function context({ pieces, answerStart }, position) {
  const inPrompt = position < answerStart;
  const text = pieces.slice(inPrompt ? Math.max(0, position - 4) : answerStart, position + 1).join("");
  return (inPrompt ? "… " : "") + text.replaceAll("▁", " ").trim();
}

/** The whole sequence, token by token, and where the embedding of the chosen one comes from. */
export function sequencePanel(app) {
  const strip = positionStrip(app, true);
  const facts = element("dl", { class: "facts" });

  function update() {
    const { trace, selected, tokenPicture: picture } = app;
    const isImage = trace.isImage[selected];
    strip.update(trace, { selected, picture });
    const patch = selected - trace.isImage.indexOf(true);
    const values = {
      position: `${selected} of ${trace.ids.length}`,
      id: trace.ids[selected],
      piece: isImage ? "<image>" : trace.pieces[selected],
      embedding: isImage ? `image token of the ${patchName(app, patch)}` : `row ${trace.ids[selected]} of embed_tokens`,
    };
    facts.replaceChildren(
      ...Object.entries(values).map(([name, value]) =>
        element("div", {}, element("dt", {}, name), element("dd", {}, String(value))),
      ),
    );
  }
  const key = legend(["prompt", "prompt"], ["image", "image tokens"], ["answer-kind", "answer."], "▁ is a space.");
  return { nodes: [div("wide", strip.node, key, facts)], update };
}

/** Attention and logit lens, layer by layer; heads and layers can be switched off. */
export function layersPanel(app) {
  const { num_hidden_layers: layers, num_attention_heads: heads } = app.config.text_config;
  const { zeroHeads, skipLayers } = app.changes;
  const strip = positionStrip(app);
  const grid = patchGrid("Image tokens: choose the one that looks", (patch) =>
    app.show({ selected: app.trace.isImage.indexOf(true) + patch, picked: true }),
  );
  const caption = element("p", { class: "caption" });
  const average = button("Average of the heads", () => app.show({ view: { ...app.view, head: null } }));

  /** A checkbox that is off while `key` is in `off`. */
  function toggle(off, key, label) {
    const box = element("input", { type: "checkbox", "aria-label": label });
    box.addEventListener("change", () => {
      if (box.checked) off.delete(key);
      else off.add(key);
      app.answer();
    });
    return {
      box,
      node: element("label", { class: "toggle", title: label }, box),
      update: () => (box.checked = !off.has(key)),
    };
  }

  const title = columnHeads("", "Heads: where the token looks", "Next word, if the model ended here");
  const rows = Array.from({ length: layers + 1 }, (_, i) => {
    const on = i ? toggle(skipLayers, i - 1, `layer ${i} on`) : null;
    const label = element("span", { class: "layer-name" }, ...(on ? [on.node] : []), i ? `Layer ${i}` : "Embeddings");
    const minis = Array.from({ length: i ? heads : 0 }, (_, head) => {
      const name = `layer ${i}, head ${head + 1}`;
      const share = element("small");
      const picture = element("canvas", { width: 72, height: 72 });
      const mini = button(picture, () => app.show({ view: { layer: i - 1, head } }), {
        class: "mini",
        "aria-label": name,
      });
      const switched = toggle(zeroHeads, `${i - 1}.${head}`, `${name} on`);
      return {
        mini,
        picture,
        share,
        switched,
        node: element("span", { class: "head" }, mini, element("span", {}, switched.node, share)),
      };
    });
    const lens = element("ol", { class: "lens" });
    const node = div("layer", label, element("span", { class: "minis" }, ...minis.map((mini) => mini.node)), lens);
    return { node, on, minis, lens };
  });

  function update() {
    const {
      trace,
      tokenPicture: picture,
      selected,
      patchCount: count,
      view: { layer, head },
    } = app;
    const length = trace.ids.length;
    const first = trace.isImage.indexOf(true);
    const look = (i, h) => attentionRow(trace.attention[i], heads, length, selected, h);
    const weights = look(layer, head);
    const onPicture = (all) => all.subarray(first, first + count);
    const share = (all) => percent(onPicture(all).reduce((sum, weight) => sum + weight, 0));
    strip.update(trace, { selected, picture, weights });
    const inside = selected >= first && selected < first + count;
    grid.update({ picture, weights: onPicture(weights), selected: inside ? selected - first : -1, count });
    const name = head === null ? "average of the heads" : `head ${head + 1}`;
    caption.textContent = `Layer ${layer + 1}, ${name}: ${share(weights)} of its attention is on the picture`;
    average.disabled = head === null;
    rows.forEach(({ node, on, minis, lens }, i) => {
      on?.update();
      node.toggleAttribute("data-off", Boolean(on) && !on.box.checked);
      minis.forEach(({ mini, picture: small, share: label, switched, node: cell }, h) => {
        const row = look(i - 1, h);
        spotlight(small, picture, onPicture(row));
        label.textContent = share(row);
        mini.setAttribute("aria-current", i - 1 === layer && h === head);
        switched.update();
        cell.toggleAttribute("data-off", !switched.box.checked);
      });
      children(lens, 3, () => element("li", {}, element("span"), element("small"))).forEach((item, k) => {
        const { piece, probability } = trace.lens[i][selected][k];
        item.firstChild.textContent = word(piece);
        item.lastChild.textContent = percent(probability);
        item.style.setProperty("--value", probability);
      });
    });
  }
  const left = element("div", {}, grid.node, caption, average);
  return {
    nodes: [div("wide", strip.node), left, div("layers", title, ...rows.map(({ node }) => node))],
    update,
  };
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
  return {
    node: div("sliders", ...sliders.map(({ node }) => node)),
    update: () => sliders.forEach((slider) => slider.update()),
  };
}

/** The sampling settings as llava.js takes them. */
function samplingOptions({ temperature, topK, topP }) {
  return { temperature, topK: topK > 20 ? undefined : topK, topP: topP === 1 ? undefined : topP };
}

/** The probabilities after the chosen position (V), and the most likely ids in their order. */
function nextWords(app, options) {
  const { trace, selected, vocabulary } = app;
  const probabilities = distribution(row(trace.logits, selected, vocabulary), options);
  const plain = distribution(row(trace.logits, selected, vocabulary), { temperature: 1 });
  const order = [...plain.keys()].sort((a, b) => plain[b] - plain[a]);
  return { probabilities, plain, order };
}

/** The most likely next words, before and after temperature, top-k and top-p. */
export function distributionPanel(app) {
  const strip = positionStrip(app);
  const sliders = samplingSliders(app);
  const chart = bars();
  const heading = element("h3");

  function update() {
    const { probabilities, plain, order } = nextWords(app, samplingOptions(app.sampling));
    strip.update(app.trace, app);
    sliders.update();
    heading.textContent = `After “${context(app.trace, app.selected)}”`;
    chart.update(
      order.slice(0, 10).map((id) => ({ piece: app.pieces[id], probability: probabilities[id], was: plain[id] })),
    );
  }
  const key = legend(["now", "with these settings"], ["was", "as the model gave them"]);
  return {
    nodes: [div("wide", strip.node), sliders.node, element("div", {}, heading, chart.node, key)],
    update,
  };
}

/** A draw from the distribution: the words as segments of a line; and whole sampled answers. */
export function wordPanel(app) {
  const strip = positionStrip(app);
  const sliders = samplingSliders(app);
  const heading = element("h3");
  const line = element("div", { class: "line" });
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
    const options = samplingOptions(app.sampling);
    const { probabilities, order } = nextWords(app, options);
    strip.update(app.trace, app);
    sliders.update();
    heading.textContent = `After “${context(app.trace, app.selected)}”`;
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
    const greedy = word(app.pieces[order[0]]);
    const drawn = word(app.pieces[order[sample(sorted, () => number)]]);
    const text = `Greedy decoding takes “${greedy}”. Sampling with ${number.toFixed(3)} takes “${drawn}”.`;
    if (result.textContent !== text) result.textContent = text;
  }
  const right = element(
    "div",
    {},
    heading,
    div("line-box", line, marker),
    result,
    div("actions", draw, several),
    answers,
  );
  return { nodes: [div("wide", strip.node), sliders.node, right], update };
}
