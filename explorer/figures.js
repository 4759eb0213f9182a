/**
 * What the panels are made of: pictures under a grid of patches, strips of tokens, bars, and colours for features.
 *
 * Attention is shown as light: the more weight a patch or a word gets, the more of it is visible.
 */

/** Makes an element: element("p", {class: "note"}, "text", child). */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** A <div> of a class. */
export const div = (name, ...nodes) => element("div", { class: name }, ...nodes);

/** The legend of a figure, of texts and [class of a colour, text] pairs. */
export function legend(...parts) {
  const entry = ([colour, text]) => [element("i", { class: colour }), ` ${text} `];
  return element("p", { class: "legend" }, ...parts.flatMap((part) => (Array.isArray(part) ? entry(part) : part)));
}

/** The headings over the columns of a table of layers. */
export const columnHeads = (...texts) => div("layer head-row", ...texts.map((text) => element("span", {}, text)));

/** A button that calls `onClick`. */
export function button(text, onClick, attributes = {}) {
  const node = element("button", { type: "button", ...attributes }, text);
  node.addEventListener("click", onClick);
  return node;
}

/** Gives `parent` exactly `count` children, keeping those that it has, and returns them. */
export function children(parent, count, make) {
  while (parent.children.length > count) parent.lastChild.remove();
  while (parent.children.length < count) parent.append(make(parent.children.length));
  return [...parent.children];
}

/** A piece of the vocabulary as a reader would write it. */
export function word(piece) {
  if (piece === "</s>") return "end";
  if (piece === "<0x0A>") return "↵";
  return piece.replace(/^▁(?=.)/, "").replace("▁", "␣");
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
  if (head !== null) return rows[head];
  return rows[0].map((_, key) => rows.reduce((sum, weights) => sum + weights[key], 0) / heads);
}

/** Draws each patch of a picture as visible as its weight; without weights, all of it. */
export function spotlight(canvas, picture, weights = null) {
  const context = canvas.getContext("2d");
  const width = canvas.width;
  context.imageSmoothingEnabled = false;
  context.strokeStyle = "#e69f00";
  context.clearRect(0, 0, width, width);
  if (!weights) return context.drawImage(picture, 0, 0, width, width);
  const across = Math.sqrt(weights.length);
  const from = picture.width / across;
  const to = width / across;
  const most = Math.max(0.04, ...weights); // a head that hardly looks at the picture leaves it pale
  weights.forEach((weight, i) => {
    const x = i % across;
    const y = Math.floor(i / across);
    const light = weight / most;
    const edge = 0.05 * to;
    context.globalAlpha = 0.15 + 0.85 * light;
    context.drawImage(picture, x * from, y * from, from, from, x * to, y * to, to, to);
    context.globalAlpha = light;
    context.lineWidth = 2 * edge;
    context.strokeRect(x * to + edge, y * to + edge, to - 2 * edge, to - 2 * edge);
  });
  context.globalAlpha = 1;
}

/** Draws one square (or disc) of a colour for each patch. */
export function tiles(canvas, colours, round = false) {
  const context = canvas.getContext("2d");
  const across = Math.sqrt(colours.length);
  const step = canvas.width / across;
  context.clearRect(0, 0, canvas.width, canvas.width);
  colours.forEach((colour, i) => {
    context.fillStyle = colour;
    context.beginPath();
    const x = (i % across) * step;
    const y = Math.floor(i / across) * step;
    if (round) context.arc(x + step / 2, y + step / 2, 0.42 * step, 0, 2 * Math.PI);
    else context.rect(x, y, step + 0.5, step + 0.5);
    context.fill();
  });
}

/** Draws a vector as a row of stripes, from blue (negative) over the ground to orange (positive). */
export function stripes(canvas, vector) {
  const context = canvas.getContext("2d");
  const step = canvas.width / vector.length;
  const most = Math.max(0.2, ...vector.map(Math.abs));
  context.clearRect(0, 0, canvas.width, canvas.height);
  vector.forEach((value, i) => {
    context.globalAlpha = Math.abs(value) / most;
    context.fillStyle = value > 0 ? "#d55e00" : "#0072b2";
    context.fillRect(i * step, 0, step, canvas.height);
  });
  context.globalAlpha = 1;
}

/**
 * Makes a function that gives similar features similar colours: their three principal components as a colour.
 *
 * The components are found by subspace iteration, which starts from those of the last call: while a shape is dragged,
 * the colours change no more than the features.
 * @returns {(features: Float32Array, count: number) => string[]} (P, D) -> P colours
 */
export function featureColours() {
  let basis = null;
  return (features, count) => {
    const width = features.length / count;
    const rows = Array.from({ length: count }, (_, i) => Array.from(row(features, i, width)));
    const mean = rows[0].map((_, c) => rows.reduce((sum, vector) => sum + vector[c], 0) / count);
    for (const vector of rows) vector.forEach((_, c) => (vector[c] -= mean[c]));
    const dot = (a, b) => a.reduce((sum, value, i) => sum + value * b[i], 0);
    const rounds = basis ? 3 : 30;
    basis ??= [1, 2, 3].map((k) => mean.map((_, c) => Math.sin(k * (c + 1) * (c + 1))));
    for (let round = 0; round < rounds; round++) {
      basis = basis.map((axis) => {
        const scores = rows.map((vector) => dot(vector, axis));
        return mean.map((_, c) => scores.reduce((sum, score, i) => sum + score * rows[i][c], 0));
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
 * A picture under a grid of buttons, one for each patch.
 *
 * One of them is in the tab order; the arrow keys move among them.
 * @param {string} label for screen readers
 * @param {(patch: number) => void} onPick
 * @returns {{node: HTMLElement, update: (shown: {picture, weights?, selected?, pressed?, count: number}) => void}}
 */
export function patchGrid(label, onPick) {
  const canvas = element("canvas", { width: 576, height: 576 });
  const grid = element("div", { class: "patches", role: "group", "aria-label": label });
  const node = element("div", { class: "patch-grid" }, canvas, grid);
  let across = 0;

  function make(i) {
    const cell = button("", () => onPick(i));
    cell.setAttribute("aria-label", `patch in row ${Math.floor(i / across) + 1}, column ${(i % across) + 1}`);
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

  function update({ picture, weights, selected, pressed, count }) {
    across = Math.sqrt(count);
    grid.style.gridTemplateColumns = `repeat(${across}, 1fr)`;
    spotlight(canvas, picture, weights);
    children(grid, count, make).forEach((cell, i) => {
      if (pressed) cell.setAttribute("aria-pressed", pressed.has(i));
      if (selected !== undefined) cell.setAttribute("aria-current", i === selected);
    });
  }
  return { node, update };
}

/**
 * The tokens of a sequence as buttons. The image tokens are one button that stands for all of them, or one each.
 *
 * @param {(position: number) => void} onPick
 * @param {boolean} apart whether each image token has a button of its own, which shows its patch
 * @returns {{node: HTMLElement, update: (trace, shown: {selected, picture, weights?}) => void}}
 */
export function tokenStrip(label, onPick, apart) {
  const node = element("div", { class: "tokens", role: "group", "aria-label": label });

  function make() {
    const token = button("", () => onPick(Number(token.dataset.position)), { class: "token" });
    return token;
  }

  function update(trace, { selected, picture, weights }) {
    const first = trace.isImage.indexOf(true);
    const count = trace.isImage.filter(Boolean).length;
    const shown = [...trace.ids.keys()].filter((t) => apart || !trace.isImage[t] || t === first);
    const most = weights ? Math.max(...shown.filter((t) => !trace.isImage[t]).map((t) => weights[t])) : 1;
    children(node, shown.length, make).forEach((token, i) => {
      const t = shown[i];
      const isImage = trace.isImage[t];
      const inside = selected >= first && selected < first + count;
      token.dataset.position = t;
      token.dataset.kind = isImage ? "image" : t >= trace.answerStart ? "answer" : "prompt";
      token.setAttribute("aria-current", t === selected || (isImage && !apart && inside));
      token.style.setProperty("--weight", weights && !isImage ? weights[t] / Math.max(most, 0.04) : 0);
      if (!isImage) token.textContent = apart ? trace.pieces[t] : word(trace.pieces[t]);
      else if (!apart) token.textContent = `${count} image tokens`;
      else {
        const canvas = token.querySelector("canvas") ?? element("canvas", { width: 24, height: 24 });
        const across = Math.sqrt(count);
        const size = picture.width / across;
        const k = t - first;
        canvas
          .getContext("2d")
          .drawImage(picture, (k % across) * size, Math.floor(k / across) * size, size, size, 0, 0, 24, 24);
        token.replaceChildren(canvas);
        token.setAttribute("aria-label", `image token ${k + 1}`);
      }
      if (!isImage) token.removeAttribute("aria-label");
    });
  }
  return { node, update };
}

/** A list of words with their probabilities as bars: update([{piece, probability, was?}]). */
export function bars() {
  const node = element("ol", { class: "bars" });
  const make = () =>
    element(
      "li",
      {},
      element("span", { class: "bar-word" }),
      element("span", { class: "bar" }),
      element("span", { class: "bar-value" }),
    );
  function update(words) {
    children(node, words.length, make).forEach((item, i) => {
      const { piece, probability, was = 0 } = words[i];
      const [name, bar, value] = item.children;
      name.textContent = word(piece);
      value.textContent = was > 0 && probability === 0 ? "dropped" : finePercent(probability);
      bar.style.setProperty("--value", probability);
      bar.style.setProperty("--was", was);
      item.toggleAttribute("data-cut", was > 0 && probability === 0);
    });
  }
  return { node, update };
}
