/**
 * The Web Worker around llava.js: the model computes here, so that the page stays responsive.
 *
 *     {id, call: "load", buffer}         -> {id, config}, where buffer is the content of model.bin
 *     {id, call: "answer", ...request}   -> {id, token} for each token, then {id, ...trace}
 *     {id, call: "nextToken", ...}       -> {id, probabilities}
 *
 * `id` is chosen by the page and returned with every reply. A call that fails gets {id, error}, a sentence.
 */

import { answer, loadModel, nextToken } from "./llava.js";

let model;

const calls = {
  load({ buffer }) {
    model = loadModel(buffer);
    return { config: model.config };
  },
  answer({ id, ...request }) {
    return answer(model, request, (token) => self.postMessage({ id, token }));
  },
  nextToken: (request) => nextToken(model, request),
};

self.onmessage = ({ data: { call, ...request } }) => {
  const { id } = request;
  try {
    self.postMessage({ id, ...calls[call](request) });
  } catch (error) {
    self.postMessage({ id, error: error.message });
  }
};
