/**
 * The Llama decoder with its key-value cache. The counterpart of llama.py, for a batch of one, without grouped heads.
 *
 *     embeddings (T, D) --L x (attention, MLP)--> norm --> hidden states (T, D)
 *
 * T new tokens, S tokens seen (cached and new), D model width, H heads, Dh head width, L layers. Parameter names are
 * the checkpoint's.
 */

import { ACTIVATIONS, add, linear, rmsNorm, scaledDotProductAttention } from "./tensor.js";

/** RoPE's rotation per position, in radians, for each pair of channels: (Dh / 2). In 32 bits, as in PyTorch. */
function ropeFrequencies(config) {
  const { head_dim, rope_parameters } = config;
  const power = (i) => Math.fround(rope_parameters.rope_theta ** Math.fround((2 * i) / head_dim));
  return Float32Array.from({ length: head_dim / 2 }, (_, i) => 1 / power(i));
}

/** Applies RoPE in place to queries or keys (T, H * Dh) from position `start` on: rotates channels i and i + Dh / 2. */
function rotate(x, start, config) {
  const { head_dim, num_attention_heads } = config;
  const frequencies = ropeFrequencies(config);
  const half = head_dim / 2;
  for (let head = 0; head < x.length / head_dim; head++) {
    const position = start + Math.floor(head / num_attention_heads);
    for (let i = head * head_dim, pair = 0; pair < half; i++, pair++) {
      const angle = Math.fround(position * frequencies[pair]);
      const [first, second, cos, sin] = [x[i], x[i + half], Math.cos(angle), Math.sin(angle)];
      x[i] = first * cos - second * sin;
      x[i + half] = second * cos + first * sin;
    }
  }
}

/** The keys and values of all tokens so far, per layer (S, H * Dh). */
export class KVCache {
  constructor(config, maxLength) {
    const allocate = () => new Float32Array(maxLength * config.num_attention_heads * config.head_dim);
    this.keys = Array.from({ length: config.num_hidden_layers }, allocate);
    this.values = Array.from({ length: config.num_hidden_layers }, allocate);
    this.width = config.num_attention_heads * config.head_dim;
    this.length = 0; // tokens stored so far
  }

  /** Stores one layer's new keys and values (T, H * Dh) and returns all of that layer's, (S, H * Dh). */
  append(layer, k, v) {
    const start = this.length * this.width;
    this.keys[layer].set(k, start);
    this.values[layer].set(v, start);
    const end = start + k.length;
    return [this.keys[layer].subarray(0, end), this.values[layer].subarray(0, end)];
  }
}

/** LlamaAttention: x (T, D) -> {output (T, D), weights (H, T, S)}. The output of the heads in `zeroHeads` is zeroed. */
function llamaAttention(x, attention, config, index, cache, zeroHeads) {
  const { head_dim, num_attention_heads } = config;
  const { q_proj, k_proj, v_proj, o_proj } = attention;
  const [q, k, v] = [q_proj, k_proj, v_proj].map((proj) => linear(x, proj)); // (T, H * Dh)
  rotate(q, cache.length, config);
  rotate(k, cache.length, config);
  const [keys, values] = cache.append(index, k, v); // (S, H * Dh)
  const { output, weights } = scaledDotProductAttention(q, keys, values, head_dim, num_attention_heads, true);
  for (const head of zeroHeads) {
    for (let t = head * head_dim; t < output.length; t += cache.width) output.fill(0, t, t + head_dim);
  }
  return { output: linear(output, o_proj), weights };
}

/** LlamaMLP, SwiGLU: `gate_proj`, after the activation, gates `up_proj` elementwise. (T, D) -> (T, D) */
function llamaMLP(x, mlp, config) {
  const gate = linear(x, mlp.gate_proj).map(ACTIVATIONS[config.hidden_act]);
  return linear(
    linear(x, mlp.up_proj).map((value, i) => value * gate[i]),
    mlp.down_proj,
  );
}

/** LlamaDecoderLayer, a pre-norm block with residual connections: x (T, D) -> {x, weights} as `llamaAttention`. */
function llamaDecoderLayer(x, layer, config, index, cache, zeroHeads) {
  const normed = rmsNorm(x, layer.input_layernorm, config.rms_norm_eps);
  const { output, weights } = llamaAttention(normed, layer.self_attn, config, index, cache, zeroHeads);
  x = add(x, output);
  x = add(x, llamaMLP(rmsNorm(x, layer.post_attention_layernorm, config.rms_norm_eps), layer.mlp, config));
  return { x, weights };
}

/**
 * LlamaModel: the decoder without its head. x (T, D), embeddings of the tokens that follow those in the cache, which it
 * updates -> {hidden: normalised hidden states (T, D); hiddenStates: L + 1 before the norm (T, D), where 0 are the
 * embeddings; attention: L weights (H, T, S)}.
 *
 * Interventions: the output of each head in `zeroHeads`, [{layer, head}], is zeroed; each layer in `skipLayers` returns
 * its input, and its attention is 0.
 */
export function llamaModel(x, decoder, config, cache, { zeroHeads = [], skipLayers = [] } = {}) {
  const length = x.length / config.hidden_size;
  const hiddenStates = [x];
  const attention = [];
  for (const [index, layer] of Object.values(decoder.layers).entries()) {
    if (skipLayers.includes(index)) {
      attention.push(new Float32Array(config.num_attention_heads * length * (cache.length + length)));
    } else {
      const heads = zeroHeads.filter((zero) => zero.layer === index).map((zero) => zero.head);
      const result = llamaDecoderLayer(x, layer, config, index, cache, heads);
      x = result.x;
      attention.push(result.weights);
    }
    hiddenStates.push(x);
  }
  cache.length += length;
  return { hidden: rmsNorm(x, decoder.norm, config.rms_norm_eps), hiddenStates, attention };
}
