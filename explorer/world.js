/**
 * The built-in model's small world: random scenes and their pictures. The counterpart of tiny/world.py.
 *
 *     makeThings, makeGround --paint--> a canvas of any size;  --picture--> RGBA (side, side, 4), what the model sees
 *
 * A thing is {colour, shape, size, x, y, radius, tint}. Unlike in Python it may be anywhere: x and y go from 0 to 96.
 */

import { canvas } from "./figures.js";

export const COLOURS = {
  red: [214, 39, 40],
  orange: [255, 140, 20],
  yellow: [240, 220, 50],
  green: [40, 160, 60],
  blue: [40, 90, 220],
  purple: [150, 70, 190],
  pink: [245, 130, 190],
  cyan: [60, 200, 220],
};
export const SHAPES = ["circle", "square", "triangle", "star", "cross", "diamond", "heart"];
export const SIZES = { small: [8, 10], large: [13, 15] }; // range of the radius in pixels
export const HELD_OUT = ["red star", "blue triangle", "yellow square"]; // in no training picture
export const SIDE = 96; // the world's coordinates, whatever the size of the canvas
export const CELL = SIDE / 3; // of the grid, in whose cells the things of the training pictures are
export const FINE = 3; // drawn larger by this factor and then reduced, which smooths the edges

const uniform = (low, high) => low + Math.random() * (high - low);
const integer = (low, high) => Math.floor(uniform(low, high + 1));
export const choose = (list) => list[integer(0, list.length - 1)];
export const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

/** The corners of any shape but a circle, centred at (x, y). */
export function outline(shape, x, y, radius) {
  const around = (corners) => corners.map(([dx, dy]) => [x + radius * dx, y + radius * dy]);
  if (shape === "square") return around([[-0.88, -0.88], [0.88, -0.88], [0.88, 0.88], [-0.88, 0.88]]);
  if (shape === "diamond") return around([[0, -1], [0.8, 0], [0, 1], [-0.8, 0]]);
  if (shape === "cross") {
    const half = [[-0.36, -1], [0.36, -1], [0.36, -0.36], [1, -0.36], [1, 0.36], [0.36, 0.36]];
    return around([...half, ...half.map(([dx, dy]) => [-dx, -dy])]);
  }
  if (shape === "heart") {
    return Array.from({ length: 24 }, (_, i) => {
      const [one, two, three, four] = [1, 2, 3, 4].map((k) => Math.cos((k * Math.PI * i) / 12));
      const height = (13 * one - 5 * two - 2 * three - four) / 16;
      return [x + radius * Math.sin((Math.PI * i) / 12) ** 3, y - radius * height];
    });
  }
  const [points, inner] = shape === "triangle" ? [3, 0.55] : [5, 0.42];
  return Array.from({ length: 2 * points }, (_, i) => {
    const r = radius * (i % 2 ? inner : 1.1);
    const angle = Math.PI * (i / points - 0.5);
    return [x + r * Math.cos(angle), y + r * Math.sin(angle)];
  });
}

/** A thing with the small variations of the world: tint, and radius within its size. */
export function makeThing(colour, shape, size, x, y) {
  const thing = { shape, x, y };
  recolour(thing, colour);
  resize(thing, size);
  return thing;
}

export function recolour(thing, colour) {
  thing.colour = colour;
  thing.tint = COLOURS[colour].map((value) => clamp(value + integer(-15, 15), 0, 255));
}

export function resize(thing, size) {
  thing.size = size;
  thing.radius = uniform(...SIZES[size]);
}

/** A random ground, as a canvas: grey, slightly tinted, shading from corner to corner. */
export function makeGround() {
  const base = integer(0, 255);
  const corners = Array.from({ length: 4 }, () => {
    const grey = base + integer(-40, 40);
    return Array.from({ length: 3 }, () => clamp(grey + integer(-12, 12), 0, 255));
  });
  return groundCanvas(corners);
}

/** A random scene of one to three things in different cells of the grid, as in the training data. */
export function makeThings() {
  const pairs = Object.keys(COLOURS).flatMap((colour) => SHAPES.map((shape) => [colour, shape]));
  const known = pairs.filter((pair) => !HELD_OUT.includes(pair.join(" ")));
  const cells = [...Array(9).keys()];
  return Array.from({ length: choose([1, 2, 2, 2, 3, 3, 3, 3, 3, 3]) }, () => {
    const [pair] = known.splice(integer(0, known.length - 1), 1);
    const [cell] = cells.splice(integer(0, cells.length - 1), 1);
    const [x, y] = [cell % 3, Math.floor(cell / 3)].map((place) => CELL * (place + 0.5) + uniform(-2, 2));
    return makeThing(...pair, choose(Object.keys(SIZES)), x, y);
  });
}

/** The ground as a canvas: its corners, interpolated as Pillow's bilinear resize does it. */
export function groundCanvas(corners) {
  const width = FINE * SIDE;
  const image = new ImageData(width, width);
  const place = (i) => clamp(((i + 0.5) * 2) / width - 0.5, 0, 1);
  const mix = (a, b, share) => a * (1 - share) + b * share;
  for (let i = 0; i < image.data.length; i++) {
    const [c, x, y] = [i % 4, place((i >> 2) % width), place(Math.floor((i >> 2) / width))];
    const [top, bottom] = [mix(corners[0][c], corners[1][c], x), mix(corners[2][c], corners[3][c], x)];
    image.data[i] = c === 3 ? 255 : Math.round(mix(top, bottom, y));
  }
  const ground = canvas(width, width);
  ground.getContext("2d").putImageData(image, 0, 0);
  return ground;
}

/** Draws ground and things onto a square canvas. */
export function paint(target, ground, things) {
  const context = target.getContext("2d");
  const scale = target.width / SIDE;
  context.drawImage(ground, 0, 0, target.width, target.width);
  for (const { shape, x, y, radius, tint } of things) {
    context.fillStyle = `rgb(${tint})`;
    context.beginPath();
    if (shape === "circle") context.arc(scale * x, scale * y, scale * radius, 0, 2 * Math.PI);
    else for (const [a, b] of outline(shape, x, y, radius)) context.lineTo(scale * a, scale * b);
    context.fill();
  }
}

/** What draw(canvas) draws, as the model gets it: drawn larger and then reduced, which smooths the edges. RGBA. */
export function picture(side, draw) {
  const width = FINE * side;
  const large = canvas(width, width);
  const context = large.getContext("2d", { willReadFrequently: true });
  draw(large);
  const fine = context.getImageData(0, 0, width, width).data;
  const sums = new Float32Array(4 * side * side);
  for (let i = 0; i < fine.length; i++) {
    const [c, x, y] = [i % 4, (i >> 2) % width, Math.floor((i >> 2) / width)];
    sums[4 * (Math.floor(y / FINE) * side + Math.floor(x / FINE)) + c] += fine[i];
  }
  return Uint8ClampedArray.from(sums, (sum) => sum / FINE ** 2); // rounds to the nearest
}

/** The middle of the cell of the grid that a place is in, along one axis. */
export const middle = (place) => CELL * clamp(Math.floor(place / CELL), 0, 2) + CELL / 2;

/** "top left", "centre", ...: the cell of the grid that a thing is in. */
export function cell({ x, y }) {
  const [row, column] = [y, x].map((place) => clamp(Math.floor(place / CELL), 0, 2));
  const names = [["top", "middle", "bottom"][row], ["left", "centre", "right"][column]];
  return row === 1 && column === 1 ? "centre" : names.join(" ");
}
