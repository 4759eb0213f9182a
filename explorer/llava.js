/**
 * LLaVA-1.5 in the browser: answers a question about an image and records everything on the way.
 *
 *     ids (T) --embed_tokens------------------------------+
 *                                                         v
 *     pixels (3, 96, 96) --CLIP--> (P, Dv) --MLP--> (P, D) --> (T, D) --Llama--> logits (T, V)
 *
 * The counterpart of llava.py, for one image, one question and a batch of one. Weights have the checkpoint's names:
 * `model.vision_tower.encoder.layers[0].self_attn.q_proj.weight` is a {shape, data}. Activations are plain
 * Float32Arrays, row by row, with their shapes in comments: T tokens, P patches, Dv width of the vision tower, D width
 * of the decoder, H heads, V vocabulary size, L layers.
 */

import { KVCache, llamaModel } from "./llama.js";
import { distribution, randomGenerator, sample } from "./sampling.js";
import { ACTIVATIONS, argmax, float16, linear, rmsNorm, softmax } from "./tensor.js";
import { IMAGE_TOKEN, LlamaTokenizer, SHORT_ANSWER } from "./tokenizer.js";
import { clipVisionModel, toPatches } from "./vision.js";

/**
 * Reads model.bin, as export.py writes it: the length of the header (4 bytes), the header in JSON, {config, tensors:
 * {name: {shape, offset}}}, and the weights in float16, whose `offset` counts numbers -> the model: {config, tokenizer,
 * vision_tower, multi_modal_projector, language_model}
 */
export function loadModel(buffer) {
  const start = 4 + new DataView(buffer).getUint32(0, true);
  const { config, tensors } = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, start - 4)));
  const stored = new Uint16Array(buffer, start);
  const model = { config, tokenizer: new LlamaTokenizer(config) };
  for (const [name, { shape, offset }] of Object.entries(tensors)) {
    const size = shape.reduce((product, length) => product * length, 1);
    const path = name.split(".");
    const last = path.pop();
    let module = model;
    for (const part of path) module = module[part] ??= {};
    module[last] = { shape, data: float16(stored.subarray(offset, offset + size)) };
  }
  return model;
}

/** Encodes a question, with each `<image>` repeated once per patch -> {ids (T), pieces (T), isImage (T)}. */
export function encodePrompt(model, question) {
  const { image_token_index, vision_config } = model.config;
  const patches = Math.floor(vision_config.image_size / vision_config.patch_size) ** 2;
  const repeated = (id) => (id === image_token_index ? Array(patches).fill(id) : [id]);
  const ids = model.tokenizer.encodePrompt(question).flatMap(repeated);
  const isImage = ids.map((id) => id === image_token_index);
  return { ids: Int32Array.from(ids), pieces: model.tokenizer.convertIdsToTokens(ids), isImage };
}

/**
 * Pixels (3, 96, 96) -> {patches (P, 3 * p * p), hiddenStates [(1 + P, Dv)], attention [(H, 1 + P, 1 + P)],
 * features (P, D)}
 */
function getImageFeatures(model, pixels, hiddenPatches = []) {
  const { vision_config, vision_feature_layer, projector_hidden_act } = model.config;
  const patches = toPatches(pixels, vision_config);
  const size = 3 * vision_config.patch_size ** 2;
  for (const patch of hiddenPatches) patches.fill(0, patch * size, (patch + 1) * size); // 0 is the mean colour
  const { hiddenStates, attention } = clipVisionModel(patches, model.vision_tower, vision_config);
  const { linear_1, linear_2 } = model.multi_modal_projector;
  const x = hiddenStates.at(vision_feature_layer).subarray(vision_config.hidden_size); // (P, Dv): without CLS
  const features = linear(linear(x, linear_1).map(ACTIVATIONS[projector_hidden_act]), linear_2);
  return { patches, hiddenStates, attention, features };
}

/**
 * Ids (T) -> embeddings (T, D), in which the image features (P, D) replace those of the first P `<image>` tokens. The
 * others, which the model generated itself, keep their embeddings, as all do without features.
 */
function embed(model, ids, features) {
  const { image_token_index, text_config } = model.config;
  const width = text_config.hidden_size;
  const table = model.language_model.model.embed_tokens.weight.data; // (V, D)
  const embeddings = new Float32Array(ids.length * width);
  const patches = features ? features.length / width : 0;
  let patch = 0;
  ids.forEach((id, t) => {
    const [rows, row] = id === image_token_index && patch < patches ? [features, patch++] : [table, id];
    embeddings.set(rows.subarray(row * width, (row + 1) * width), t * width);
  });
  return embeddings;
}

/** Yields the ids of the answer, including the end-of-sequence token, as soon as each is chosen. */
function* generateStream(model, prompt, features, request) {
  const { temperature = 0, topK, topP, seed = 0, maxNewTokens = 64, interventions } = request;
  const { text_config, eos_token_id } = model.config;
  const { model: decoder, lm_head } = model.language_model;
  const random = randomGenerator(seed);
  const steps = Math.min(maxNewTokens, text_config.max_position_embeddings - prompt.length);
  const cache = new KVCache(text_config, prompt.length + steps);
  let ids = prompt;
  for (let step = 0; step < steps; step++) {
    const { hidden } = llamaModel(embed(model, ids, features), decoder, text_config, cache, interventions);
    const logits = linear(hidden.subarray(-text_config.hidden_size), lm_head); // (V): of the last position
    const id = sample(distribution(logits, { temperature, topK, topP }), random);
    yield id;
    if (eos_token_id.includes(id)) return;
    ids = [id];
    features = null; // the cache has them now
  }
}

/**
 * The logit lens: the decoder's final norm and head, applied to the hidden state after each layer.
 * @returns {{lens: {piece: string, probability: number}[][][], logits: Float32Array}} as in a trace
 */
function logitLens(model, hiddenStates) {
  const { hidden_size, vocab_size, rms_norm_eps } = model.config.text_config;
  const { model: decoder, lm_head } = model.language_model;
  let logits;
  const lens = hiddenStates.map((x) => {
    logits = linear(rmsNorm(x, decoder.norm, rms_norm_eps), lm_head); // (T, V); in the end the model's own
    const row = (_, t) => mostLikely(model, logits.subarray(t * vocab_size, (t + 1) * vocab_size));
    return Array.from({ length: x.length / hidden_size }, row);
  });
  return { lens, logits };
}

/** Logits (V) -> the three most likely tokens, [{piece, probability}]. */
function mostLikely(model, logits) {
  const probabilities = softmax(logits);
  return [0, 1, 2].map(() => {
    const id = argmax(probabilities);
    const probability = probabilities[id];
    probabilities[id] = -1;
    return { piece: model.tokenizer.convertIdsToTokens([id])[0], probability };
  });
}

/**
 * The probabilities (V) of the token after `ids` (T), with given image features (P, D). The interventions are those of
 * `answer` on the decoder.
 */
export function nextToken(model, { ids, features, interventions }) {
  const { text_config } = model.config;
  const { model: decoder, lm_head } = model.language_model;
  const cache = new KVCache(text_config, ids.length);
  const { hidden } = llamaModel(embed(model, ids, features), decoder, text_config, cache, interventions);
  return { probabilities: softmax(linear(hidden.subarray(-text_config.hidden_size), lm_head)) };
}

/** Throws an Error, in one sentence, unless the prompt has one image and leaves room for an answer. */
function check(model, { ids, isImage }, features) {
  const images = isImage.filter(Boolean).length / (features.length / model.config.text_config.hidden_size);
  if (images !== 1) throw new Error(`The question must contain ${IMAGE_TOKEN} once or not at all.`);
  const limit = model.config.text_config.max_position_embeddings;
  if (ids.length >= limit) throw new Error(`The question is too long: ${ids.length} tokens, of at most ${limit - 1}.`);
}

/**
 * Answers a question about an image, {pixels (3, S, S), question}, and returns a trace. The request may also have
 * `short`, whether to ask for a single word or phrase; `temperature`, `topK`, `topP` and the `seed` of sampling;
 * `maxNewTokens`; and `interventions`: `hiddenPatches` are painted in the mean colour, `imageFeatures` from another
 * trace replace those of the image, `zeroHeads` and `skipLayers` are those of `llamaModel`.
 *
 * @param {(token: {id, piece, text}) => void} [onToken] called with each generated token and the answer so far
 * @returns {object} the trace:
 *     ids Int32Array (T), pieces string[] (T), isImage boolean[] (T): the whole sequence, prompt and answer;
 *     answerStart: the position of the first generated token; text: the answer;
 *     patches (P, 3 * p * p): the normalised pixels of each patch, channel by channel;
 *     tower [(1 + P, Dv)]: the tower's L + 1 hidden states; towerAttention [(H, 1 + P, 1 + P)] per layer;
 *     features (P, D): the image tokens as the decoder gets them;
 *     attention [(H, T, T)] per decoder layer, one row per query;
 *     lens [[[{piece, probability} x 3] x T] x (L + 1)]: the most likely next tokens after each layer, where 0 stands
 *     for the embeddings; logits (T, V).
 */
export function answer(model, request, onToken = () => {}) {
  const { interventions = {}, short = false } = request;
  const image = getImageFeatures(model, request.pixels, interventions.hiddenPatches);
  const features = interventions.imageFeatures ?? image.features;

  let question = request.question + (short ? SHORT_ANSWER : "");
  if (!question.includes(IMAGE_TOKEN)) question = `${IMAGE_TOKEN}\n${question}`;
  const prompt = encodePrompt(model, question);
  check(model, prompt, features);
  const generated = [];
  for (const id of generateStream(model, prompt.ids, features, request)) {
    generated.push(id);
    const [piece] = model.tokenizer.convertIdsToTokens([id]);
    onToken({ id, piece, text: model.tokenizer.decode(generated) });
  }

  // The whole sequence once more, without cached tokens: this records attention and logits at every position.
  const { text_config } = model.config;
  const ids = Int32Array.of(...prompt.ids, ...generated);
  const embeddings = embed(model, ids, features);
  const cache = new KVCache(text_config, ids.length);
  const decoded = llamaModel(embeddings, model.language_model.model, text_config, cache, interventions);
  const { lens, logits } = logitLens(model, decoded.hiddenStates);
  return {
    ids,
    pieces: model.tokenizer.convertIdsToTokens(ids),
    isImage: [...prompt.isImage, ...generated.map(() => false)],
    answerStart: prompt.ids.length,
    text: model.tokenizer.decode(generated),
    patches: image.patches,
    tower: image.hiddenStates,
    towerAttention: image.attention,
    features,
    attention: decoded.attention,
    lens,
    logits,
  };
}
