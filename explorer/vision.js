/**
 * The image side: preprocessing, and CLIP's vision transformer. The counterpart of vision.py, for one image.
 *
 *     RGBA (96, 96, 4) --imageProcessor--> pixels (3, 96, 96) --toPatches--> patches (P, 3 * p * p)
 *                      --clipVisionModel--> L + 1 hidden states (1 + P, Dv), CLS first
 *
 * P patches of p x p pixels, Dv width of the vision tower, H heads, L layers. Parameter names are the checkpoint's.
 */

import { ACTIVATIONS, add, layerNorm, linear, scaledDotProductAttention } from "./tensor.js";

/**
 * LlavaImageProcessor, for an image that already has the model's size: RGBA (S, S, 4) of 0 to 255, composited onto
 * white, -> (3, S, S), rescaled and normalised.
 */
export function imageProcessor(rgba, config) {
  const count = rgba.length / 4;
  const pixels = new Float32Array(3 * count);
  for (let channel = 0; channel < 3; channel++) {
    const mean = Math.fround(config.imageMean[channel]);
    const std = Math.fround(config.imageStd[channel]);
    for (let i = 0; i < count; i++) {
      const alpha = rgba[4 * i + 3];
      const value = Math.round((rgba[4 * i + channel] * alpha + 255 * (255 - alpha)) / 255);
      // Rounded to 32 bits after each step, as NumPy does.
      pixels[channel * count + i] = Math.fround(Math.fround(value / 255) - mean) / std;
    }
  }
  return pixels;
}

/**
 * Cuts pixels (3, S, S) into patches (P, 3 * p * p), row by row from the top left, each channel by channel. Python
 * leaves this to nn.Conv2d, whose stride is the size of its kernel: a linear layer on each patch.
 */
export function toPatches(pixels, config) {
  const { image_size: side, patch_size: patch } = config;
  const grid = Math.floor(side / patch);
  const patches = new Float32Array(grid * grid * 3 * patch * patch);
  let start = 0;
  for (let row = 0; row < grid; row++) {
    for (let column = 0; column < grid; column++) {
      for (let channel = 0; channel < 3; channel++) {
        for (let y = 0; y < patch; y++) {
          const line = (channel * side + row * patch + y) * side + column * patch;
          patches.set(pixels.subarray(line, line + patch), start);
          start += patch;
        }
      }
    }
  }
  return patches;
}

/** CLIPVisionEmbeddings: patches (P, 3 * p * p) -> (1 + P, Dv): CLS, then the patches, plus position embeddings. */
function clipVisionEmbeddings(patches, embeddings) {
  const { class_embedding, patch_embedding, position_embedding } = embeddings;
  const tokens = new Float32Array(position_embedding.weight.data.length);
  tokens.set(class_embedding.data);
  tokens.set(linear(patches, patch_embedding), class_embedding.data.length);
  return add(tokens, position_embedding.weight.data);
}

/** CLIPAttention, without a mask: x (1 + P, Dv) -> {output (1 + P, Dv), weights (H, 1 + P, 1 + P)} */
function clipAttention(x, attention, config) {
  const heads = config.num_attention_heads;
  const [q, k, v] = [attention.q_proj, attention.k_proj, attention.v_proj].map((proj) => linear(x, proj));
  const { output, weights } = scaledDotProductAttention(q, k, v, config.hidden_size / heads, heads, false);
  return { output: linear(output, attention.out_proj), weights };
}

/** CLIPMLP: (1 + P, Dv) -> (1 + P, Dv) */
function clipMLP(x, mlp, config) {
  return linear(linear(x, mlp.fc1).map(ACTIVATIONS[config.hidden_act]), mlp.fc2);
}

/** CLIPEncoderLayer, a pre-norm block with residual connections: x (1 + P, Dv) -> {x, weights} as `clipAttention`. */
function clipEncoderLayer(x, layer, config) {
  const eps = config.layer_norm_eps;
  const { output, weights } = clipAttention(layerNorm(x, layer.layer_norm1, eps), layer.self_attn, config);
  x = add(x, output);
  x = add(x, clipMLP(layerNorm(x, layer.layer_norm2, eps), layer.mlp, config));
  return { x, weights };
}

/**
 * CLIPVisionModel: patches (P, 3 * p * p) -> {hiddenStates: L + 1 of (1 + P, Dv), even those after the layer that LLaVA
 * uses, where 0 is the input of the first layer; attention: L weights (H, 1 + P, 1 + P)}.
 */
export function clipVisionModel(patches, tower, config) {
  let x = layerNorm(clipVisionEmbeddings(patches, tower.embeddings), tower.pre_layrnorm, config.layer_norm_eps);
  const hiddenStates = [x];
  const attention = [];
  for (const layer of Object.values(tower.encoder.layers)) {
    const result = clipEncoderLayer(x, layer, config);
    x = result.x;
    hiddenStates.push(x);
    attention.push(result.weights);
  }
  return { hiddenStates, attention };
}
