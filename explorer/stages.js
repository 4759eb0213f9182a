/**
 * The figure: one small picture and one size for each stage between the scene and the next word.
 *
 * createStages(app) fills the stage buttons of index.html and returns a function that shows the state of `app` in them.
 */

import { children, element, featureColours, row, spotlight, tiles, word } from "./figures.js";
import { distribution } from "./sampling.js";

const square = () => element("canvas", { width: 192, height: 192 });

export function createStages(app) {
  const colours = { tower: featureColours(), features: featureColours() };
  const thumbs = {
    picture: square(),
    patches: square(),
    tower: square(),
    features: square(),
    sequence: element("span", { class: "dots" }),
    layers: element("span", { class: "ladder" }),
    distribution: element("span", { class: "columns" }),
    word: element("span", { class: "next" }, element("b"), element("small")),
  };
  for (const [name, thumb] of Object.entries(thumbs)) document.querySelector(`#stage-${name} .thumb`).append(thumb);
  const span = () => element("span");

  return () => {
    const { trace, picture, patchCount: count, towerWidth, selected, vocabulary, config, changes } = app;
    const across = Math.sqrt(count);
    const side = picture.width;
    const patch = side / across;
    spotlight(thumbs.picture, picture);
    spotlight(thumbs.patches, picture);
    for (const i of changes.hiddenPatches) {
      const size = thumbs.patches.width / across;
      thumbs.patches.getContext("2d").clearRect((i % across) * size, Math.floor(i / across) * size, size, size);
    }
    thumbs.patches.parentElement.style.setProperty("--across", across);
    tiles(thumbs.tower, colours.tower(trace.tower[app.featureLayer].subarray(towerWidth), count));
    tiles(thumbs.features, colours.features(trace.features, count), true);

    thumbs.sequence.style.gridTemplateColumns = `repeat(${Math.ceil(Math.sqrt(trace.ids.length))}, 1fr)`;
    children(thumbs.sequence, trace.ids.length, span).forEach((dot, t) => {
      dot.dataset.kind = trace.isImage[t] ? "image" : t >= trace.answerStart ? "answer" : "prompt";
      dot.toggleAttribute("data-selected", t === selected);
    });
    const last = trace.lens.at(-1)[selected][0];
    children(thumbs.layers, trace.lens.length - 1, span).forEach((bar, i) => {
      const known = trace.lens[i + 1][selected].find(({ piece }) => piece === last.piece);
      bar.style.setProperty("--value", known?.probability ?? 0);
      bar.toggleAttribute("data-off", changes.skipLayers.has(i));
    });
    const probabilities = distribution(row(trace.logits, selected, vocabulary), { temperature: 1 });
    const most = [...probabilities].sort((a, b) => b - a).slice(0, 6);
    children(thumbs.distribution, most.length, span).forEach((bar, i) => bar.style.setProperty("--value", most[i]));
    const [next, before] = thumbs.word.children;
    next.textContent = word(last.piece);
    before.textContent = `after “${word(trace.pieces[selected])}”`;

    const sizes = {
      picture: `${side} × ${side} × 3`,
      patches: `${count} × ${3 * patch * patch}`,
      tower: `${count} × ${towerWidth}`,
      features: `${count} × ${trace.features.length / count}`,
      sequence: `${trace.ids.length} tokens`,
      layers: `${config.text_config.num_hidden_layers} layers`,
      distribution: `${vocabulary} numbers`,
      word: "1 token",
    };
    for (const [name, size] of Object.entries(sizes)) document.querySelector(`#stage-${name} .size`).textContent = size;
  };
}
