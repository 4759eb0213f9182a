/**
 * The scene editor: shapes that can be dragged and changed, or an image file in their place.
 *
 * Each thing on the canvas is covered by a transparent button, its handle, which makes it reachable by mouse, touch and
 * keyboard alike. Where it is dropped it snaps to the middle of its cell, unless "Place freely" is checked.
 */

import { element } from "./figures.js";
import {
  CELL, cell, choose, clamp, COLOURS, FINE, groundCanvas, HELD_OUT, makeGround, makeThing, makeThings, middle, outline,
  paint, picture, recolour, resize, SHAPES, SIDE, SIZES,
} from "./world.js";

const MOST = 6; // things in a scene

/** A small drawing of a shape for the buttons. */
function icon(shape) {
  const path = shape === "circle" ? "M2 10a8 8 0 1 0 16 0a8 8 0 1 0-16 0Z" : `M${outline(shape, 10, 10, 8).join("L")}Z`;
  const holder = element("span");
  holder.innerHTML = `<svg viewBox="0 0 20 20" aria-hidden="true"><path d="${path}"/></svg>`;
  return holder.firstChild;
}

/** Makes the editor. onChange("things" or "places") is called after each change of what is there or of where it is. */
export function createScene(onChange) {
  const find = (id) => document.getElementById(id);
  const view = find("view");
  const canvas = find("scene-canvas");
  const note = find("scene-note");
  const file = find("photo-file");
  const pickers = find("pickers");
  let ground = groundCanvas([[196, 199, 203], [228, 226, 222], [168, 165, 170], [204, 207, 202]]);
  let things = [
    makeThing("red", "circle", "large", 17, 16),
    makeThing("blue", "star", "large", 79, 47),
    makeThing("yellow", "heart", "small", 49, 80),
  ];
  let photo = null; // a square canvas in place of the shapes
  let selected = 0;

  const choices = {
    shape: SHAPES.map((shape) => [shape, icon(shape)]),
    colour: Object.entries(COLOURS).map(([name, rgb]) => [name, element("i", { style: `background: rgb(${rgb})` })]),
    size: Object.keys(SIZES).map((size) => [size, size]),
  };
  for (const [attribute, values] of Object.entries(choices)) {
    find(`pick-${attribute}`).append(
      ...values.map(([value, content]) => {
        const radio = element("input", { type: "radio", name: attribute, value, "aria-label": value });
        radio.addEventListener("change", () => change(attribute, value));
        return element("label", { title: value }, radio, content);
      }),
    );
  }

  function change(attribute, value) {
    const thing = things[selected];
    if (attribute === "colour") recolour(thing, value);
    else if (attribute === "size") resize(thing, value);
    else thing.shape = value;
    refresh();
    onChange("things");
  }

  function move(thing, x, y) {
    thing.x = clamp(x, 4, SIDE - 4);
    thing.y = clamp(y, 4, SIDE - 4);
    refresh();
    onChange("places");
  }

  /** Moves a thing to the middle of the cell at (x, y). One that is already there gets its old place, `from`. */
  function snap(thing, x, y, from) {
    const [column, row] = [middle(x), middle(y)];
    const there = things.find((other) => other !== thing && middle(other.x) === column && middle(other.y) === row);
    if (there) [there.x, there.y] = from.map(middle);
    move(thing, column, row);
  }

  /** The handle of the i-th thing: a button on top of it, dragged by pointer or moved by the arrow keys. */
  function makeHandle(i) {
    const handle = element("button", { class: "handle", type: "button" });
    const step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    let grip = null; // where in the thing it is held, and where that was
    const place = (event) => {
      const box = view.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * SIDE, ((event.clientY - box.top) / box.height) * SIDE];
    };
    handle.addEventListener("focus", () => select(i));
    handle.addEventListener("pointerdown", (event) => {
      handle.setPointerCapture(event.pointerId);
      handle.focus();
      const [x, y] = place(event);
      grip = { dx: x - things[i].x, dy: y - things[i].y, from: [things[i].x, things[i].y] };
      select(i);
    });
    handle.addEventListener("pointermove", (event) => {
      if (!grip) return;
      view.dataset.dragging = "";
      const [x, y] = place(event);
      move(things[i], x - grip.dx, y - grip.dy);
    });
    for (const end of ["pointerup", "pointercancel"]) {
      handle.addEventListener(end, () => {
        const thing = things[i];
        if ("dragging" in view.dataset && !find("free").checked) snap(thing, thing.x, thing.y, grip.from);
        delete view.dataset.dragging;
        grip = null;
      });
    }
    handle.addEventListener("keydown", (event) => {
      const thing = things[i];
      const key = event.key.toLowerCase();
      const cycle = (list, value) => list[(list.indexOf(value) + 1) % list.length];
      const [dx, dy] = step[event.key] ?? [0, 0];
      const free = event.shiftKey || find("free").checked;
      if ((dx || dy) && free) move(thing, thing.x + 2 * dx, thing.y + 2 * dy);
      else if (dx || dy) snap(thing, thing.x + CELL * dx, thing.y + CELL * dy, [thing.x, thing.y]);
      else if (event.key === "Delete" || event.key === "Backspace") remove();
      else if (event.ctrlKey || event.metaKey || event.altKey) return;
      else if (key === "c") change("colour", cycle(Object.keys(COLOURS), thing.colour));
      else if (key === "s") change("shape", cycle(SHAPES, thing.shape));
      else if (key === "z") change("size", cycle(Object.keys(SIZES), thing.size));
      else return;
      event.preventDefault();
    });
    return handle;
  }

  function select(i) {
    selected = i;
    refresh();
  }

  function add() {
    const free = [4, 0, 8, 2, 6, 1, 7, 3, 5].map((i) => [CELL * (i % 3) + 16, CELL * Math.floor(i / 3) + 16]);
    const far = ([x, y]) => Math.min(...things.map((thing) => Math.hypot(thing.x - x, thing.y - y)));
    const [x, y] = free.find((spot) => far(spot) > 24) ?? free[0];
    const taken = things.map(({ colour }) => colour);
    const colour = choose(Object.keys(COLOURS).filter((name) => !taken.includes(name)));
    const shape = choose(SHAPES.filter((name) => !HELD_OUT.includes(`${colour} ${name}`)));
    things.push(makeThing(colour, shape, "large", x, y));
    select(things.length - 1);
    view.querySelectorAll(".handle")[selected].focus();
    onChange("things");
  }

  function remove() {
    things.splice(selected, 1);
    select(Math.max(0, selected - 1));
    view.querySelectorAll(".handle")[selected]?.focus();
    onChange("things");
  }

  /** Reads an image file, cuts its centre square out and shows that in place of the shapes. */
  async function usePhoto(blob) {
    const image = await createImageBitmap(blob).catch(() => null);
    if (!image) {
      note.textContent = "This file is not an image that the browser can read.";
      return;
    }
    const side = Math.min(image.width, image.height);
    const width = FINE * SIDE;
    photo = element("canvas", { width, height: width });
    const context = photo.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.fillStyle = "white";
    context.fillRect(0, 0, width, width);
    context.drawImage(image, (image.width - side) / 2, (image.height - side) / 2, side, side, 0, 0, width, width);
    refresh();
    onChange("things");
  }

  function remark() {
    if (photo) return "The model was trained on drawn shapes only: it will describe any photo in their words.";
    const name = ({ colour, shape }) => `${colour} ${shape}`;
    const astray = things.find(({ x, y }) => [x, y].some((place) => Math.abs(place - middle(place)) > 6));
    if (astray)
      return (
        `The ${name(astray)} lies between the cells of the 3 × 3 grid, where no training picture has a shape: ` +
        "the answer may be wrong."
      );
    if (new Set(things.map(cell)).size < things.length)
      return "Two shapes are in the same cell, as in no training picture: the answer may be wrong.";
    if (things.length > 3) return "The model has never seen more than three things. See what it makes of these.";
    const unseen = things.find((thing) => HELD_OUT.includes(name(thing)));
    if (unseen) return `No training picture has a ${name(unseen)}: the model has to combine what it knows.`;
    if (things.length === 0) return "Every training picture has at least one thing. See what it makes of none.";
    return "";
  }

  function draw(target) {
    if (photo) target.getContext("2d").drawImage(photo, 0, 0, target.width, target.width);
    else paint(target, ground, things);
  }

  function refresh() {
    draw(canvas);
    const shown = photo ? [] : things;
    const handles = view.getElementsByClassName("handle");
    while (handles.length > shown.length) handles[handles.length - 1].remove();
    while (handles.length < shown.length) view.append(makeHandle(handles.length));
    shown.forEach((thing, i) => {
      const { style } = handles[i];
      const percent = (value) => `${(100 * value) / SIDE}%`;
      [style.left, style.top, style.width] = [thing.x, thing.y, 2.3 * thing.radius].map(percent);
      handles[i].setAttribute("aria-label", `${thing.size} ${thing.colour} ${thing.shape}, ${cell(thing)}`);
      handles[i].toggleAttribute("data-selected", i === selected);
    });
    const thing = shown[selected];
    pickers.disabled = !thing;
    for (const radio of pickers.querySelectorAll("input")) radio.checked = thing?.[radio.name] === radio.value;
    find("add").disabled = shown.length >= MOST || Boolean(photo);
    find("remove").disabled = !thing;
    find("no-photo").hidden = !photo;
    find("selected-name").textContent = thing ? `${thing.size} ${thing.colour} ${thing.shape}` : "";
    note.textContent = remark();
  }

  find("add").addEventListener("click", add);
  find("remove").addEventListener("click", remove);
  find("new-scene").addEventListener("click", () => {
    [photo, ground, things] = [null, makeGround(), makeThings()];
    select(0);
    onChange("things");
  });
  find("no-photo").addEventListener("click", () => {
    photo = null;
    refresh();
    onChange("things");
  });
  find("photo").addEventListener("click", () => file.click());
  file.addEventListener("change", () => {
    if (file.files[0]) usePhoto(file.files[0]);
    file.value = ""; // so that the same file can be chosen again
  });
  view.addEventListener("dragover", (event) => event.preventDefault());
  view.addEventListener("drop", (event) => {
    event.preventDefault();
    if (event.dataTransfer.files[0]) usePhoto(event.dataTransfer.files[0]);
  });
  refresh();

  return {
    picture: (side) => picture(side, draw),
    /** The things of the scene; none where a photo is shown. */
    get things() {
      return photo ? [] : things;
    },
  };
}
