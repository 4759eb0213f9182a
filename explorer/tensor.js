/**
 * The array operations of the model, each the counterpart of one in PyTorch.
 *
 * A weight is a {shape, data}; an activation is a Float32Array of T rows, whose width follows from the weights.
 * Numbers are stored in 32 bits, like PyTorch's on a CPU, and JavaScript adds them in 64.
 */

// 16-bit patterns -> numbers: a sign, 5 bits of exponent, 10 of fraction; exponent 0 has no leading 1. The exporter
// refuses infinities and NaN, which have exponent 31.
const FLOAT16 = Float32Array.from({ length: 65536 }, (_, bits) => {
  const exponent = (bits >> 10) & 31;
  const fraction = (bits & 1023) / 1024;
  return (bits >> 15 ? -1 : 1) * (exponent ? (1 + fraction) * 2 ** (exponent - 15) : fraction * 2 ** -14);
});

/** Float16 numbers as bit patterns (n) -> the same numbers in 32 bits (n). */
export function float16(patterns) {
  return new Float32Array(patterns).map((bits) => FLOAT16[bits]);
}

/** erf(x), by its series of positive terms: 2 / sqrt(pi) * exp(-x^2) * (x + 2 x^3 / 3 + 4 x^5 / 15 + ...) */
function erf(x) {
  if (Math.abs(x) > 6) return Math.sign(x);
  let term = x;
  let sum = x;
  for (let n = 3; Math.abs(term) > 1e-17 * Math.abs(sum); n += 2) {
    term *= (2 * x * x) / n;
    sum += term;
  }
  return (2 / Math.sqrt(Math.PI)) * Math.exp(-x * x) * sum;
}

/** The nonlinearities of the built-in model, number -> number. export.py accepts these names only. */
export const ACTIVATIONS = {
  quick_gelu: (x) => x / (1 + Math.exp(-1.702 * x)), // CLIP's approximation
  gelu: (x) => 0.5 * x * (1 + erf(x / Math.SQRT2)), // exact, with erf
  silu: (x) => x / (1 + Math.exp(-x)),
};

/** nn.Linear, or nn.Conv2d on patches: x (T, in) -> x weight^T + bias (T, out). The bias is optional. */
export function linear(x, { weight, bias }) {
  const w = weight.data;
  const outputs = weight.shape[0];
  const inputs = w.length / outputs;
  const length = x.length / inputs;
  const y = new Float32Array(length * outputs);
  const row = (i, rows) => Math.min(i, rows - 1);
  // Tiles of 2 x 4 results, twice as fast as one at a time, because each number that is loaded is used in several of
  // them. A tile that reaches past the end repeats the last row.
  for (let o = 0; o < outputs; o += 4) {
    const [o0, o1, o2, o3] = [o, row(o + 1, outputs), row(o + 2, outputs), row(o + 3, outputs)];
    const [w0, w1, w2, w3] = [o0 * inputs, o1 * inputs, o2 * inputs, o3 * inputs];
    for (let t = 0; t < length; t += 2) {
      const next = row(t + 1, length);
      const x0 = t * inputs;
      const x1 = next * inputs;
      let a0 = 0, a1 = 0, a2 = 0, a3 = 0; // an array of them would be slow
      let b0 = 0, b1 = 0, b2 = 0, b3 = 0;
      for (let i = 0; i < inputs; i++) {
        const a = x[x0 + i];
        const b = x[x1 + i];
        a0 += a * w[w0 + i];
        a1 += a * w[w1 + i];
        a2 += a * w[w2 + i];
        a3 += a * w[w3 + i];
        b0 += b * w[w0 + i];
        b1 += b * w[w1 + i];
        b2 += b * w[w2 + i];
        b3 += b * w[w3 + i];
      }
      y[t * outputs + o0] = a0;
      y[t * outputs + o1] = a1;
      y[t * outputs + o2] = a2;
      y[t * outputs + o3] = a3;
      y[next * outputs + o0] = b0;
      y[next * outputs + o1] = b1;
      y[next * outputs + o2] = b2;
      y[next * outputs + o3] = b3;
    }
  }
  if (bias) for (let i = 0; i < y.length; i++) y[i] += bias.data[i % outputs];
  return y;
}

/** Elementwise sum of two arrays of the same shape: the residual connection. */
export function add(a, b) {
  return a.map((value, i) => value + b[i]);
}

/** nn.LayerNorm: (T, D) -> (T, D), each row with mean 0 and variance 1, then scaled and shifted per channel. */
export function layerNorm(x, { weight, bias }, eps) {
  const width = weight.data.length;
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    const row = x.subarray(start, start + width);
    const mean = row.reduce((sum, value) => sum + value, 0) / width;
    const variance = row.reduce((sum, value) => sum + (value - mean) ** 2, 0) / width;
    const scale = 1 / Math.sqrt(variance + eps);
    for (let i = 0; i < width; i++) y[start + i] = (row[i] - mean) * scale * weight.data[i] + bias.data[i];
  }
  return y;
}

/** LlamaRMSNorm: (T, D) -> (T, D), each row divided by its root mean square, then scaled per channel. */
export function rmsNorm(x, { weight }, eps) {
  const width = weight.data.length;
  const y = new Float32Array(x.length);
  for (let start = 0; start < x.length; start += width) {
    const row = x.subarray(start, start + width);
    const scale = 1 / Math.sqrt(row.reduce((sum, value) => sum + value * value, 0) / width + eps);
    for (let i = 0; i < width; i++) y[start + i] = row[i] * scale * weight.data[i];
  }
  return y;
}

/** Scores (n) -> probabilities (n). A score of -Infinity has probability 0. */
export function softmax(scores) {
  const highest = scores.reduce((a, b) => Math.max(a, b), -Infinity);
  const powers = scores.map((score) => Math.exp(score - highest));
  const total = powers.reduce((sum, power) => sum + power, 0);
  return powers.map((power) => power / total);
}

/** The index of the largest number; the first of several. */
export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}

/**
 * F.scaled_dot_product_attention of q (T, H * Dh), k and v (S, H * Dh), which also returns where each query looked:
 * {output (T, H * Dh), weights (H, T, S)}. The queries are the last T of S; with `causal`, they see no later keys.
 */
export function scaledDotProductAttention(q, k, v, headDim, heads, causal) {
  const width = heads * headDim;
  const queries = q.length / width;
  const keys = k.length / width;
  const output = new Float32Array(q.length);
  const weights = new Float32Array(heads * queries * keys);
  for (let head = 0; head < heads; head++) {
    for (let t = 0; t < queries; t++) {
      const visible = causal ? keys - queries + t + 1 : keys;
      const query = t * width + head * headDim;
      const scores = new Float32Array(visible);
      for (let s = 0; s < visible; s++) {
        const key = s * width + head * headDim;
        let dot = 0;
        for (let i = 0; i < headDim; i++) dot += q[query + i] * k[key + i];
        scores[s] = dot / Math.sqrt(headDim);
      }
      const row = softmax(scores);
      weights.set(row, (head * queries + t) * keys);
      for (let s = 0; s < visible; s++) {
        const value = s * width + head * headDim;
        for (let i = 0; i < headDim; i++) output[query + i] += row[s] * v[value + i];
      }
    }
  }
  return { output, weights };
}
