/**
 * What the panels are made of: pictures under a grid of patches, strips of tokens, tables of heads, bars, and colours
 * for features. Attention is shown as light: the more weight a patch or a word gets, the more of it is visible.
 */

/** Makes an element: element("p", {class: "note"}, "text", child). */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value != null) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

/** A <div> of a class. */
export const div = (name, ...nodes) => element("div", { class: name }, ...nodes);

/** A canvas; one without a label is the content of a labelled button or box. */
export const canvas = (width, height, label) =>
  element("canvas", { width, height, role: label && "img", "aria-label": label });

/** The legend of a figure, of texts and [class of a colour, text] pairs. */
export function legend(...parts) {
  const entry = ([colour, text]) => [element("i", { class: colour }), ` ${text} `];
  return element("p", { class: "legend" }, ...parts.flatMap((part) => (Array.isArray(part) ? entry(part) : part)));
}

/** A button that calls `onClick`. */
export function button(text, onClick, attributes = {}) {
  const node = element("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", onClick);
  return node;
}

/** A checkbox that calls `onChange(checked)`. */
export function checkbox(label, onChange) {
  const node = element("input", { type: "checkbox", "aria-label": label });
  node.addEventListener("change", () => onChange(node.checked));
  return node;
}

/** Gives `parent` exactly `count` children, keeping those that it has, and returns them. */
export function children(parent, count, make) {
  while (parent.children.length > count) parent.lastChild.remove();
  while (parent.children.length < count) parent.append(make(parent.children.length));
  return [...parent.children];
}

const NAMES = { "<s>": "start", "</s>": "end", "<0x0A>": "↵" };

/** A token as a reader would write it: without the space that it begins with; a lone space is "␣". */
export const word = (piece) => NAMES[piece] ?? piece.replace(/^▁(?=.)/, "").replace("▁", "␣");

/** "row 2, column 5" of patch 10 of 36 */
export function placeName(patch, count) {
  const across = Math.sqrt(count);
  return `row ${Math.floor(patch / across) + 1}, column ${(patch % across) + 1}`;
}

/** 0.273 -> "27 %" */
export const percent = (value) => (value > 0 && value < 0.01 ? "< 1 %" : `${Math.round(100 * value)} %`);

/** 0.00273 -> "0.27 %" */
const finePercent = (value) =>
  value > 0 && value < 1e-4 ? "< 0.01 %" : value < 0.1 ? `${(100 * value).toFixed(2)} %` : percent(value);

/** Row `t` of a matrix stored row by row. */
export const row = (matrix, t, width) => matrix.subarray(t * width, (t + 1) * width);

/** One row of attention weights (H, T, T): of one head, or averaged over all of them (head null) -> (T) */
export function attentionRow(attention, heads, length, query, head) {
  const rows = Array.from({ length: heads }, (_, h) => row(attention, h * length + query, length));
  return head === null ? rows[0].map((_, key) => rows.reduce((sum, all) => sum + all[key], 0) / heads) : rows[head];
}

/** Draws one patch of a picture, enlarged to the whole canvas. */
export function drawPatch(target, picture, patch, count) {
  const across = Math.sqrt(count);
  const size = picture.width / across;
  const context = target.getContext("2d");
  context.imageSmoothingEnabled = false;
  const from = [(patch % across) * size, Math.floor(patch / across) * size, size, size];
  context.drawImage(picture, ...from, 0, 0, target.width, target.height);
}

/** Draws each patch of a picture as visible as its weight; without weights, all of it. */
export function spotlight(target, picture, weights = null) {
  const context = target.getContext("2d");
  const width = target.width;
  context.imageSmoothingEnabled = false;
  context.strokeStyle = "#e69f00";
  context.clearRect(0, 0, width, width);
  if (!weights) return context.drawImage(picture, 0, 0, width, width);
  const across = Math.sqrt(weights.length);
  const from = picture.width / across;
  const to = width / across;
  const most = Math.max(0.04, ...weights); // a head that hardly looks at the picture leaves it pale
  weights.forEach((weight, i) => {
    const [x, y] = [i % across, Math.floor(i / across)];
    const edge = 0.07 * to;
    context.globalAlpha = 0.3 + (0.7 * weight) / most;
    context.drawImage(picture, x * from, y * from, from, from, x * to, y * to, to, to);
    context.globalAlpha = weight / most;
    context.lineWidth = 2 * edge;
    context.strokeRect(x * to + edge, y * to + edge, to - 2 * edge, to - 2 * edge);
  });
  context.globalAlpha = 1;
}

/** Draws one square (or disc) of a colour for each patch. */
export function tiles(target, colours, round = false) {
  const context = target.getContext("2d");
  const across = Math.sqrt(colours.length);
  const step = target.width / across;
  context.clearRect(0, 0, target.width, target.height);
  colours.forEach((colour, i) => {
    const [x, y] = [(i % across) * step, Math.floor(i / across) * step];
    context.fillStyle = colour;
    context.beginPath();
    if (round) context.arc(x + step / 2, y + step / 2, 0.42 * step, 0, 2 * Math.PI);
    else context.rect(x, y, step + 0.5, step + 0.5);
    context.fill();
  });
}

/** Draws a vector as a row of stripes, from blue (negative) over the ground to orange (positive). */
export function stripes(target, vector) {
  const context = target.getContext("2d");
  const step = target.width / vector.length;
  const most = Math.max(0.2, ...vector.map(Math.abs));
  context.clearRect(0, 0, target.width, target.height);
  vector.forEach((value, i) => {
    context.globalAlpha = Math.abs(value) / most;
    context.fillStyle = value > 0 ? "#d55e00" : "#0072b2";
    context.fillRect(i * step, 0, step, target.height);
  });
  context.globalAlpha = 1;
}

export const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);

/** Features (P, D) -> P vectors, from which their mean is subtracted. */
export function centred(features, count) {
  const rows = Array.from({ length: count }, (_, i) => Array.from(row(features, i, features.length / count)));
  const mean = rows[0].map((_, c) => rows.reduce((sum, vector) => sum + vector[c], 0) / count);
  return rows.map((vector) => vector.map((value, c) => value - mean[c]));
}

/**
 * Makes a function (P, D) -> P colours that gives similar features similar colours: their three principal components
 * as a colour. Subspace iteration finds them, starting from those of the last call: while a shape is dragged, the
 * colours change no more than the features.
 */
export function featureColours() {
  let basis = null;
  return (features, count) => {
    const rows = centred(features, count);
    const rounds = basis ? 3 : 30;
    basis ??= [1, 2, 3].map((k) => rows[0].map((_, c) => Math.sin(k * (c + 1) * (c + 1))));
    for (let round = 0; round < rounds; round++) {
      basis = basis.map((axis) => {
        const scores = rows.map((vector) => dot(vector, axis));
        return axis.map((_, c) => scores.reduce((sum, score, i) => sum + score * rows[i][c], 0));
      });
      basis.forEach((axis, k) => {
        for (const earlier of basis.slice(0, k)) {
          const overlap = dot(axis, earlier);
          earlier.forEach((value, c) => (axis[c] -= overlap * value));
        }
        const length = Math.hypot(...axis) || 1;
        axis.forEach((_, c) => (axis[c] /= length));
      });
    }
    const scores = basis.map((axis) => rows.map((vector) => dot(vector, axis)));
    const most = Math.max(...scores.flat().map(Math.abs)) || 1;
    const [light, a, b] = scores.map((values) => values.map((value) => value / most));
    return rows.map((_, i) => `oklab(${0.66 + 0.26 * light[i]} ${0.16 * a[i]} ${0.16 * b[i]})`);
  };
}

/**
 * A picture under a grid of buttons, one for each patch. One of them is in the tab order; the arrow keys move among
 * them. `label` is for screen readers; `update({picture, count, weights?, selected?, pressed?})` shows the state.
 */
export function patchGrid(label, onPick) {
  const picture = canvas(576, 576);
  const grid = element("div", { class: "patches", role: "group", "aria-label": label });
  let across = 0;

  function make(i) {
    const cell = button("", () => onPick(i), { "aria-label": `patch in ${placeName(i, across ** 2)}` });
    cell.tabIndex = i === 0 ? 0 : -1;
    cell.addEventListener("focus", () => {
      for (const other of grid.children) other.tabIndex = other === cell ? 0 : -1;
    });
    cell.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -across, ArrowDown: across }[event.key];
      if (!step) return;
      event.preventDefault();
      grid.children[i + step]?.focus();
    });
    return cell;
  }

  function update({ picture: shown, count, weights, selected, pressed }) {
    across = Math.sqrt(count);
    grid.style.gridTemplateColumns = `repeat(${across}, 1fr)`;
    spotlight(picture, shown, weights);
    children(grid, count, make).forEach((cell, i) => {
      if (pressed) cell.setAttribute("aria-pressed", pressed.has(i));
      if (selected !== undefined) cell.setAttribute("aria-current", i === selected);
    });
  }
  return { node: div("patch-grid", picture, grid), update };
}

/**
 * A row for each layer, with a small picture for each head, which shows where it looks and chooses it for the large
 * one. Row 0 stands for the embeddings, which have no heads.
 *
 * `label(i)`, `end(i)` and `foot(layer, head)` stand before, behind and below the heads. `onView({layer, head})`
 * is called for another large picture, with the head null for the average of all.
 * Returns {table, rows, cells, caption, update}, `nodes`: the caption and the button for the average, and
 * `update(picture, view, look)`, where look(layer, head) -> the weights of the patches.
 */
export function headTable({ layers, heads, titles, label, end, foot = () => [], onView }) {
  const caption = element("p", { class: "caption" });
  const average = button("Average of the heads", () => onView({ layer: shown.layer, head: null }));
  let shown;
  const cells = Array.from({ length: layers }, (_, layer) =>
    Array.from({ length: heads }, (_, head) => {
      const name = { class: "mini", "aria-label": `layer ${layer + 1}, head ${head + 1}` };
      return div("head", button(canvas(96, 96), () => onView({ layer, head }), name), ...foot(layer, head));
    }),
  );
  const rows = Array.from({ length: layers + 1 }, (_, i) => {
    const name = element("span", { class: "layer-name" }, ...label(i));
    return div("layer", name, div("minis", ...(cells[i - 1] ?? [])), end(i));
  });
  const title = div("layer head-row", ...["", ...titles].map((text) => element("span", {}, text)));

  function update(picture, view, look) {
    shown = view;
    const { layer, head } = view;
    caption.textContent = `Layer ${layer + 1}, ${head === null ? "average of the heads" : `head ${head + 1}`}`;
    average.disabled = head === null;
    for (const [i, row] of cells.entries()) {
      for (const [h, { firstChild: mini }] of row.entries()) {
        spotlight(mini.firstChild, picture, look(i, h));
        mini.setAttribute("aria-current", i === layer && (h === head || head === null));
      }
    }
  }
  return { nodes: [caption, average], table: div("layers", title, ...rows), rows, cells, caption, update };
}

/**
 * The tokens of a sequence as buttons: `onPick(position)`. The image tokens are one button that stands for all of them
 * or, if they are shown `apart`, one each. `update(trace, {selected, picture, weights?})` shows the state.
 */
export function tokenStrip(label, onPick, apart) {
  const node = element("div", { class: "tokens", role: "group", "aria-label": label });
  const make = () => {
    const token = button("", () => onPick(Number(token.dataset.position)), { class: "token" });
    return token;
  };

  function update(trace, { selected, picture, weights }) {
    const first = trace.isImage.indexOf(true);
    const count = trace.isImage.filter(Boolean).length;
    const shown = [...trace.ids.keys()].filter((t) => apart || !trace.isImage[t] || t === first);
    const most = weights ? Math.max(0.04, ...shown.filter((t) => !trace.isImage[t]).map((t) => weights[t])) : 1;
    children(node, shown.length, make).forEach((token, i) => {
      const t = shown[i];
      const isImage = trace.isImage[t];
      token.dataset.position = t;
      token.dataset.kind = isImage ? "image" : t >= trace.answerStart ? "answer" : "prompt";
      token.setAttribute("aria-current", t === selected || (isImage && !apart && trace.isImage[selected]));
      token.style.setProperty("--weight", weights && !isImage ? weights[t] / most : 0);
      token.removeAttribute("aria-label");
      if (isImage && apart) {
        const patch = token.querySelector("canvas") ?? canvas(24, 24);
        drawPatch(patch, picture, t - first, count);
        token.replaceChildren(patch);
        token.setAttribute("aria-label", `image token ${t - first + 1}`);
      } else token.textContent = isImage ? `${count} image tokens` : word(trace.pieces[t]);
    });
  }
  return { node, update };
}

/** A list of tokens with their probabilities as bars: update([{piece, probability, was}]). */
export function bars() {
  const node = element("ol", { class: "bars" });
  const part = (name) => element("span", { class: name });
  const make = () => element("li", {}, part("bar-word"), part("bar"), part("bar-value"));
  function update(words) {
    children(node, words.length, make).forEach((item, i) => {
      const { piece, probability, was } = words[i];
      const [name, bar, value] = item.children;
      name.textContent = word(piece);
      value.textContent = probability === 0 ? "dropped" : finePercent(probability);
      bar.style.setProperty("--value", probability);
      bar.style.setProperty("--was", was);
      item.toggleAttribute("data-cut", probability === 0);
    });
  }
  return { node, update };
}
