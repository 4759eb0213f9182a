/**
 * From logits to the next token: greedy decoding, or sampling with temperature, top-k and top-p. The counterpart of
 * sampling.py, for logits (V) of one position.
 */

import { argmax, softmax } from "./tensor.js";

/**
 * Logits (V) -> logits (V) of the distribution to sample from: divided by the temperature (above 0), then -Infinity for
 * all but the k most likely tokens, then for all but the smallest set of most likely tokens whose probabilities sum to
 * at least p.
 */
function filterLogits(logits, { temperature, topK, topP }) {
  logits = logits.map((logit) => logit / temperature);
  if (topK) {
    const kth = logits.slice().sort().at(-Math.min(topK, logits.length));
    logits = logits.map((logit) => (logit < kth ? -Infinity : logit));
  }
  if (topP && topP < 1) {
    const order = Array.from(logits.keys()).sort((a, b) => logits[a] - logits[b]); // ascending
    const probabilities = softmax(logits);
    let sum = 0;
    for (const id of order.slice(0, -1)) {
      sum += probabilities[id];
      if (sum <= 1 - topP) logits[id] = -Infinity; // the most likely token is never dropped
    }
  }
  return logits;
}

/** Logits (V) -> probabilities of the next token (V). A temperature of 0 is greedy decoding: 1 for the likeliest. */
export function distribution(logits, { temperature = 0, topK, topP } = {}) {
  if (temperature === 0) {
    const best = argmax(logits);
    return logits.map((_, id) => (id === best ? 1 : 0));
  }
  return softmax(filterLogits(logits, { temperature, topK, topP }));
}

/** Samples from probabilities (V) -> an id; random() returns numbers in [0, 1), as Math.random does. */
export function sample(probabilities, random) {
  let rest = random();
  let last = 0;
  for (let id = 0; id < probabilities.length; id++) {
    if (probabilities[id] === 0) continue;
    last = id;
    rest -= probabilities[id];
    if (rest < 0) break;
  }
  return last; // rounding can leave a rest above 0
}

/** A generator of random numbers in [0, 1) that repeats them for the same seed: mulberry32, by Tommy Ettinger. */
export function randomGenerator(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let bits = Math.imul(state ^ (state >>> 15), state | 1);
    bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
    return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
  };
}
