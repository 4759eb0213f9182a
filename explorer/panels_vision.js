/**
 * The panels of the vision side: picture, patches, vision tower, image tokens.
 *
 * A panel is made once, by a function (app) -> {nodes, update}: `nodes` are its elements, and `update` shows the state
 * of `app` (see page.js) in them. P patches, Dv width of the tower, D width of the decoder, H heads.
 */

import {
  attentionRow,
  button,
  children,
  columnHeads,
  div,
  element,
  featureColours,
  legend,
  patchGrid,
  row,
  spotlight,
  stripes,
  tiles,
} from "./figures.js";

const two = (value) => value.toFixed(2).replace("-", "−");
/** A canvas; one without a label is the content of a labelled button or box. */
const canvas = (width, height, label) =>
  element("canvas", { width, height, role: label && "img", "aria-label": label });
const labelled = (text, ...nodes) => div("labelled", ...nodes, element("span", {}, text));

/** "patch in row 2, column 5" */
export function patchName(app, patch = app.patch) {
  const across = Math.sqrt(app.patchCount);
  return `patch in row ${Math.floor(patch / across) + 1}, column ${(patch % across) + 1}`;
}

/** The three channels, and what becomes of one pixel: the byte, its fraction of 255, the normalised number. */
export function picturePanel(app) {
  const pixel = { x: 17, y: 16 };
  const view = canvas(576, 576);
  const box = element(
    "div",
    { class: "pixel-view", tabindex: 0, role: "application", "aria-label": "Picture: the arrow keys choose a pixel" },
    view,
    element("i"),
  );
  const channels = ["red", "green", "blue"].map((name) => [name, canvas(96, 96, `${name} channel`)]);
  const table = element("table", { class: "numbers" });
  const choose = (x, y) => {
    const last = app.picture.width - 1;
    [pixel.x, pixel.y] = [x, y].map((value) => Math.min(last, Math.max(0, Math.floor(value))));
    update();
  };
  const point = ({ clientX, clientY }) => {
    const { left, top, width } = box.getBoundingClientRect();
    const side = app.picture.width;
    choose(((clientX - left) / width) * side, ((clientY - top) / width) * side);
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("keydown", (event) => {
    const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key] ?? [];
    if (dx === undefined) return;
    event.preventDefault();
    choose(pixel.x + dx, pixel.y + dy);
  });

  function update() {
    const side = app.picture.width;
    const { imageMean, imageStd } = app.config;
    spotlight(view, app.picture);
    const { data } = app.picture.getContext("2d").getImageData(0, 0, side, side);
    channels.forEach(([, channel], c) => {
      [channel.width, channel.height] = [side, side];
      const grey = new ImageData(side, side);
      for (let i = 0; i < data.length; i++) grey.data[i] = i % 4 === 3 ? 255 : data[i - (i % 4) + c];
      channel.getContext("2d").putImageData(grey, 0, 0);
    });
    const marker = box.querySelector("i").style;
    [marker.left, marker.top, marker.width] = [pixel.x, pixel.y, 1].map((value) => `${(100 * value) / side}%`);
    const bytes = [0, 1, 2].map((c) => data[4 * (pixel.y * side + pixel.x) + c]);
    const rows = [
      ["channel", ...channels.map(([name]) => name)],
      ["pixel value", ...bytes],
      ["divided by 255", ...bytes.map((byte) => two(byte / 255))],
      ["minus the mean", ...imageMean.map((mean) => `− ${two(mean)}`)],
      ["divided by the deviation", ...imageStd.map((deviation) => `÷ ${two(deviation)}`)],
      ["the model gets", ...bytes.map((byte, c) => two((byte / 255 - imageMean[c]) / imageStd[c]))],
    ];
    table.replaceChildren(
      element("caption", {}, `Pixel ${pixel.x}, ${pixel.y}`),
      ...rows.map((cells, i) =>
        element("tr", {}, ...cells.map((cell, j) => element(i && j ? "td" : "th", {}, String(cell)))),
      ),
    );
  }
  const strip = div("row", ...channels.map(([name, channel]) => labelled(name, channel)));
  return { nodes: [labelled("point at a pixel", box), element("div", {}, strip, table)], update };
}

/** Hiding patches; the pixels of one patch as numbers, and the vector that the tower starts with. */
export function patchesPanel(app) {
  const { hiddenPatches } = app.changes;
  const grid = patchGrid("Patches: press one to hide it or show it again", (patch) => {
    if (!hiddenPatches.delete(patch)) hiddenPatches.add(patch);
    app.show({ patch });
    app.answer();
  });
  const all = (hide) => () => {
    hiddenPatches.clear();
    for (let patch = 0; hide && patch < app.patchCount; patch++) hiddenPatches.add(patch);
    app.answer();
  };
  const name = element("h3");
  const crop = canvas(96, 96, "the patch, enlarged");
  const before = canvas(768, 28, "the numbers of the patch");
  const after = canvas(768, 28, "the vector of the patch");
  const numbers = element("span");
  const features = element("span");

  function update() {
    const { picture, trace, patch, patchCount, towerWidth } = app;
    grid.update({ picture, pressed: hiddenPatches, count: patchCount });
    const across = Math.sqrt(patchCount);
    const size = picture.width / across;
    const pen = crop.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, (patch % across) * size, Math.floor(patch / across) * size, size, size, 0, 0, 96, 96);
    name.textContent = `The ${patchName(app)}${hiddenPatches.has(patch) ? ", hidden" : ""}`;
    numbers.textContent = `${size} × ${size} pixels × 3 channels = ${3 * size * size} numbers`;
    features.textContent = `linear layer, position embedding, layer norm: ${towerWidth} numbers`;
    stripes(before, row(trace.patches, patch, trace.patches.length / patchCount));
    stripes(after, row(trace.tower[0], patch + 1, towerWidth));
  }
  const buttons = div("actions", button("Hide all", all(true)), button("Show all", all(false)));
  const key = legend("Each stripe is one number: ", ["negative", "negative,"], ["positive", "positive."]);
  const detail = div("detail", name, crop, before, numbers, after, features, key);
  return { nodes: [element("div", {}, grid.node, buttons), detail], update };
}

/** Attention of one patch in every layer and head of the tower, and the hidden states as colours. */
export function towerPanel(app) {
  const { num_hidden_layers: layers, num_attention_heads: heads } = app.config.vision_config;
  const colours = Array.from({ length: layers + 1 }, featureColours);
  const grid = patchGrid("Patches: choose the one that looks", (patch) => app.show({ patch }));
  const caption = element("p", { class: "caption" });
  const average = button("Average of the heads", () => app.show({ towerView: { ...app.towerView, head: null } }));
  const title = columnHeads("", "Heads: where the patch looks", "Features");
  const rows = Array.from({ length: layers + 1 }, (_, i) => {
    const use = i === app.featureLayer ? "read by LLaVA" : i > app.featureLayer ? "not used" : "";
    const label = element("span", { class: "layer-name" }, i ? `Layer ${i}` : "Embeddings", element("small", {}, use));
    const minis = Array.from({ length: i ? heads : 0 }, (_, head) =>
      button(canvas(72, 72), () => app.show({ towerView: { layer: i - 1, head } }), {
        class: "mini",
        "aria-label": `layer ${i}, head ${head + 1}`,
      }),
    );
    const map = canvas(72, 72, `features after layer ${i}`);
    return {
      node: div("layer", label, element("span", { class: "minis" }, ...minis), map),
      minis,
      map,
    };
  });

  function update() {
    const {
      trace,
      picture,
      patch,
      patchCount: count,
      towerView: { layer, head },
    } = app;
    const withCls = (i, h) => attentionRow(trace.towerAttention[i], heads, count + 1, patch + 1, h);
    const look = (i, h) => withCls(i, h).subarray(1);
    grid.update({ picture, weights: look(layer, head), selected: patch, count });
    caption.textContent = `Layer ${layer + 1}, ${head === null ? "average of the heads" : `head ${head + 1}`}`;
    average.disabled = head === null;
    rows.forEach(({ minis, map }, i) => {
      minis.forEach((mini, h) => {
        spotlight(mini.firstChild, picture, look(i - 1, h));
        mini.setAttribute("aria-current", i - 1 === layer && h === head);
      });
      tiles(map, colours[i](trace.tower[i].subarray(app.towerWidth), count));
    });
  }
  const left = element("div", {}, grid.node, caption, average);
  return { nodes: [left, div("layers", title, ...rows.map(({ node }) => node))], update };
}

/** One patch before and after the projector, the tokens most like it, and the swap with another scene's tokens. */
export function featuresPanel(app) {
  const { changes } = app;
  const grid = patchGrid("Image tokens: choose one", (patch) => app.show({ patch }));
  const name = element("h3");
  const before = canvas(768, 28, "features of the patch");
  const after = canvas(768, 28, "image token");
  const from = element("span");
  const to = element("span");
  const kept = canvas(96, 96, "the scene whose tokens were kept");
  const keptLabel = element("span");
  const swap = element("input", { type: "checkbox", id: "swap" });
  const keep = button("Keep the tokens of this scene", () => {
    changes.kept = app.trace.features;
    changes.keptPicture = element("canvas", { width: app.picture.width, height: app.picture.width });
    for (const copy of [changes.keptPicture, kept]) spotlight(copy, app.picture);
    update();
  });
  swap.addEventListener("change", () => {
    changes.swap = swap.checked;
    app.answer();
  });

  function update() {
    const { trace, tokenPicture: picture, patch, patchCount: count, towerWidth } = app;
    const features = trace.features;
    const width = features.length / count;
    const rows = Array.from({ length: count }, (_, i) => row(features, i, width));
    const mean = rows[0].map((_, c) => rows.reduce((sum, token) => sum + token[c], 0) / count);
    const centred = rows.map((token) => token.map((value, c) => value - mean[c]));
    const dot = (a, b) => a.reduce((sum, value, c) => sum + value * b[c], 0);
    const like = centred.map((token) =>
      Math.max(0, dot(token, centred[patch]) / Math.sqrt(dot(token, token) * dot(centred[patch], centred[patch]))),
    );
    grid.update({ picture, weights: like, selected: patch, count });
    name.textContent = `The ${patchName(app)}`;
    from.textContent = `features from the tower: ${towerWidth} numbers`;
    to.textContent = `image token, ${changes.swap ? "of the kept scene" : "after the projector"}: ${width} numbers`;
    stripes(before, row(trace.tower[app.featureLayer], patch + 1, towerWidth));
    stripes(after, rows[patch]);
    kept.hidden = !changes.kept;
    keptLabel.textContent = changes.kept ? "kept" : "No tokens are kept yet.";
    [swap.disabled, swap.checked, keep.disabled] = [!changes.kept, changes.swap, changes.swap];
  }
  const detail = div(
    "detail",
    name,
    before,
    from,
    after,
    to,
    element("h3", {}, "Swap the image tokens of two scenes"),
    div("actions", keep, element("label", { class: "switch" }, swap, " Use the kept tokens")),
    div("labelled", kept, keptLabel),
  );
  return {
    nodes: [
      element("div", {}, grid.node, element("p", { class: "caption" }, "Lit: tokens similar to the outlined one")),
      detail,
    ],
    update,
  };
}
