/**
 * The panels of the vision side: picture, patches, vision tower, image tokens.
 *
 * A panel is made once, by a function (app) -> {nodes, update}: `nodes` are its elements, and `update` shows the state
 * of `app` (see page.js) in them. P patches, Dv width of the tower, D width of the decoder, H heads.
 */

import {
  attentionRow, button, canvas, centred, checkbox, div, dot, drawPatch, element, featureColours, headTable, legend,
  patchGrid, placeName, row, spotlight, stripes, tiles,
} from "./figures.js";

const two = (value) => value.toFixed(2).replace("-", "−");
const labelled = (text, ...nodes) => div("labelled", ...nodes, element("span", {}, text));
const caption = (...parts) => element("p", { class: "caption" }, ...parts);

/** The three channels, and what becomes of one pixel: the byte, its fraction of 255, the normalised number. */
export function picturePanel(app) {
  const pixel = { x: 17, y: 16 };
  const view = canvas(576, 576);
  const marker = element("i");
  const name = { tabindex: 0, role: "application", "aria-label": "Picture: the arrow keys choose a pixel" };
  const box = element("div", { class: "pixel-view", ...name }, view, marker);
  const channels = ["red", "green", "blue"].map((colour) => [colour, canvas(96, 96, `${colour} channel`)]);
  const table = element("table", { class: "numbers" });
  const choose = (x, y) => {
    const last = app.picture.width - 1;
    [pixel.x, pixel.y] = [x, y].map((value) => Math.min(last, Math.max(0, Math.floor(value))));
    update();
  };
  const point = ({ clientX, clientY }) => {
    const { left, top, width } = box.getBoundingClientRect();
    const scale = app.picture.width / width;
    choose((clientX - left) * scale, (clientY - top) * scale);
  };
  box.addEventListener("pointermove", point);
  box.addEventListener("pointerdown", point);
  box.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    choose(pixel.x + step[0], pixel.y + step[1]);
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
    const { style } = marker;
    [style.left, style.top, style.width] = [pixel.x, pixel.y, 1].map((value) => `${(100 * value) / side}%`);
    const bytes = [0, 1, 2].map((c) => data[4 * (pixel.y * side + pixel.x) + c]);
    const rows = [
      ["channel", ...channels.map(([colour]) => colour)],
      ["pixel value", ...bytes],
      ["divided by 255", ...bytes.map((byte) => two(byte / 255))],
      ["minus the mean", ...imageMean.map((mean) => `− ${two(mean)}`)],
      ["divided by the deviation", ...imageStd.map((deviation) => `÷ ${two(deviation)}`)],
      ["the model gets", ...bytes.map((byte, c) => two((byte / 255 - imageMean[c]) / imageStd[c]))],
    ];
    const line = (cells, i) => cells.map((cell, j) => element(i && j ? "td" : "th", {}, String(cell)));
    const title = element("caption", {}, `Pixel ${pixel.x}, ${pixel.y}`);
    table.replaceChildren(title, ...rows.map((cells, i) => element("tr", {}, ...line(cells, i))));
  }
  const strip = div("row", ...channels.map(([colour, channel]) => labelled(colour, channel)));
  return { nodes: [labelled("Point at a pixel", box), element("div", {}, strip, table)], update };
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
  const [before, after] = ["the numbers of the patch", "the vector of the patch"].map((text) => canvas(768, 28, text));
  const [numbers, features] = [element("span"), element("span")];

  function update() {
    const { picture, seen, trace, patch, patchCount: count, towerWidth } = app;
    const hidden = hiddenPatches.has(patch);
    grid.update({ picture: seen, pressed: hiddenPatches, count });
    drawPatch(crop, seen, patch, count);
    name.textContent = `Patch in ${placeName(patch, count)}${hidden ? ", hidden" : ""}`;
    const side = picture.width / Math.sqrt(count);
    const size = `${side} × ${side} pixels × 3 channels = ${3 * side * side} numbers`;
    numbers.textContent = size + (hidden ? ", all zero: the mean colour" : "");
    features.textContent = `after the linear layer, with its position added, normalised: ${towerWidth} numbers`;
    stripes(before, row(trace.patches, patch, trace.patches.length / count));
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
  const maps = colours.map((_, i) => canvas(96, 96, `features after layer ${i}`));
  const grid = patchGrid("Patches: choose the one that looks", (patch) => app.show({ patch }));
  const use = (i) => (i === app.featureLayer ? "the projector reads this" : i > app.featureLayer ? "not used" : "");
  const table = headTable({
    layers,
    heads,
    titles: ["Heads: where the outlined patch looks", "Features"],
    label: (i) => [i ? `Layer ${i}` : "Embeddings", element("small", {}, use(i))],
    end: (i) => maps[i],
    onView: (towerView) => app.show({ towerView }),
  });

  function update() {
    const { trace, seen, patch, patchCount: count, towerView } = app;
    // The weights on the patches; the rest is on the CLS token, which stands in front of them.
    const look = (i, h) => attentionRow(trace.towerAttention[i], heads, count + 1, patch + 1, h).subarray(1);
    grid.update({ picture: seen, weights: look(towerView.layer, towerView.head), selected: patch, count });
    table.update(seen, towerView, look);
    maps.forEach((map, i) => tiles(map, colours[i](trace.tower[i].subarray(app.towerWidth), count)));
  }
  return { nodes: [element("div", {}, grid.node, ...table.nodes), table.table], update };
}

/** One patch before and after the projector, the tokens most like it, and the swap with another scene's tokens. */
export function featuresPanel(app) {
  const { changes } = app;
  const grid = patchGrid("Image tokens: choose one", (patch) => app.show({ patch }));
  const likeness = caption();
  const name = element("h3");
  const [before, after] = ["features of the patch", "image token"].map((text) => canvas(768, 28, text));
  const [from, to, keptLabel] = [element("span"), element("span"), element("span")];
  const kept = canvas(96, 96, "the scene whose tokens were kept");
  const keep = button("Keep the tokens of this scene", () => {
    changes.kept = app.trace.features;
    app.keptPicture = canvas(app.picture.width, app.picture.width);
    for (const copy of [app.keptPicture, kept]) spotlight(copy, app.seen);
    update();
  });
  const swap = checkbox("Use the kept tokens", (checked) => {
    changes.swap = checked;
    app.answer();
  });

  function update() {
    const { trace, tokenPicture: picture, patch, patchCount: count, towerWidth } = app;
    const rows = centred(trace.features, count);
    const width = rows[0].length;
    const own = rows[patch];
    const cosines = rows.map((token) => dot(token, own) / Math.sqrt(dot(token, token) * dot(own, own)));
    grid.update({ picture, weights: cosines.map((cosine) => Math.max(0, cosine)), selected: patch, count });
    const [nearest] = [...cosines.keys()].filter((i) => i !== patch).sort((a, b) => cosines[b] - cosines[a]);
    likeness.textContent =
      `Lit: image tokens similar to the outlined one. Most similar is ${placeName(nearest, count)}, with ` +
      `${two(cosines[nearest])}: the cosine of the angle between two tokens, without the mean of all. At 1 they ` +
      "point in the same direction, at 0 they have nothing in common.";
    name.textContent = `Patch in ${placeName(patch, count)}`;
    from.textContent = `features from the vision tower: ${towerWidth} numbers`;
    to.textContent = `image token, ${changes.swap ? "of the kept scene" : "after the projector"}: ${width} numbers`;
    stripes(before, row(trace.tower[app.featureLayer], patch + 1, towerWidth));
    stripes(after, row(trace.features, patch, width));
    kept.hidden = !changes.kept;
    keptLabel.textContent = changes.kept ? "kept" : "No tokens are kept yet.";
    [swap.disabled, swap.checked, keep.disabled] = [!changes.kept, changes.swap, changes.swap];
  }
  const swapping = element("h3", {}, "Swap the image tokens of two scenes");
  const actions = div("actions", keep, element("label", { class: "switch" }, swap, " Use the kept tokens"));
  const detail = div("detail", name, before, from, after, to, swapping, actions, div("labelled", kept, keptLabel));
  return { nodes: [element("div", {}, grid.node, likeness), detail], update };
}
