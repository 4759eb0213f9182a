/**
 * The tokenizer: text to token ids and back, and the prompt of a question, as LLaVA was trained on it. The counterpart of
 * tokenizer.py, with SentencePiece's BPE, which Python leaves to the sentencepiece library.
 *
 *     "What is this?" -> "▁What▁is▁this?" -> characters, merged in pairs into pieces -> ids
 *
 * A character outside the vocabulary becomes one byte piece for each of its bytes in UTF-8: "<0xC3>", "<0xA9>".
 */

export const IMAGE_TOKEN = "<image>";
const SPACE = "\u2581"; // "▁", which stands for a space inside a piece

/** The paper's response-format prompt (section 3.2), appended to a question to get a short answer. */
export const SHORT_ANSWER = "\nAnswer the question using a single word or phrase.";

const NORMAL = 1; // SentencePiece's number for the type of a piece that is text; the others used here are below
const BYTE = 6; // "<0x00>" to "<0xFF>"

export class LlamaTokenizer {
  /** The config of model.bin has the texts of the vocabulary, SentencePiece's first, with their scores and types. */
  constructor(config) {
    this.config = config;
    this.scores = new Map(); // text of each piece that text may contain -> its score
    this.ids = new Map(); // text of each of these pieces, and of each byte piece -> its id
    config.pieceTypes.forEach((type, id) => {
      if (type === NORMAL) this.scores.set(config.pieces[id], config.pieceScores[id]);
      if (type === NORMAL || type === BYTE) this.ids.set(config.pieces[id], id);
    });
  }

  // From text to ids

  /**
   * Encodes a question as `encode_chat` does: "<s>USER: {question} ASSISTANT:" -> ids, with one `<image>` for each in
   * the question. Nothing else that is typed becomes a control token.
   */
  encodePrompt(question) {
    const { addBosToken, bosTokenId, image_token_index } = this.config;
    const [first, ...rest] = `USER: ${question} ASSISTANT:`.split(IMAGE_TOKEN).map((text) => this.encodePlain(text));
    return [...(addBosToken ? [bosTokenId] : []), ...first, ...rest.flatMap((ids) => [image_token_index, ...ids])];
  }

  /** SentencePiece's encoding of plain text: a space in front, then BPE. Text -> ids. */
  encodePlain(text) {
    if (!text) return [];
    // Through UTF-8, in which a lone surrogate, half of a character, becomes U+FFFD.
    const wellFormed = new TextDecoder("utf-8", { ignoreBOM: true }).decode(new TextEncoder().encode(text));
    const symbols = [...` ${wellFormed}`.replaceAll(" ", SPACE)];
    return this.merge(symbols).flatMap((symbol) => this.ids.get(symbol) ?? this.bytes(symbol));
  }

  /** BPE: joins the two neighbours that form the piece of the highest score, until no two form a piece. */
  merge(symbols) {
    const score = (i) => this.scores.get(symbols[i] + symbols[i + 1]) ?? -Infinity;
    const scores = symbols.map((_, i) => score(i)); // of joining symbol i and the next
    while (true) {
      let best = 0; // the leftmost of equal ones
      for (let i = 1; i < scores.length; i++) if (scores[i] > scores[best]) best = i;
      if (scores[best] === -Infinity) return symbols;
      symbols.splice(best, 2, symbols[best] + symbols[best + 1]);
      scores.splice(best, 1);
      scores[best] = score(best);
      if (best > 0) scores[best - 1] = score(best - 1);
    }
  }

  /** The ids of the byte pieces of a character outside the vocabulary. */
  bytes(character) {
    const name = (byte) => `<0x${byte.toString(16).toUpperCase().padStart(2, "0")}>`;
    return Array.from(new TextEncoder().encode(character), (byte) => this.ids.get(name(byte)));
  }

  // From ids to text

  /** The token of each id as the vocabulary spells it, such as "▁cat"; "<unused 650>" for ids beyond the vocabulary. */
  convertIdsToTokens(ids) {
    return Array.from(ids, (id) => this.config.pieces[id] ?? `<unused ${id}>`);
  }

  /** Decodes ids to text, without special tokens. In a run of bytes that is not valid UTF-8, each becomes U+FFFD. */
  decode(ids) {
    const { pieces, pieceTypes, skippedIds } = this.config;
    let text = "";
    let run = [];
    const finish = () => {
      try {
        text += new TextDecoder("utf-8", { fatal: true, ignoreBOM: true }).decode(Uint8Array.from(run));
      } catch {
        text += "\ufffd".repeat(run.length);
      }
      run = [];
    };
    for (const id of ids) {
      if (skippedIds.includes(id) || id >= pieces.length) continue;
      if (pieceTypes[id] === BYTE) {
        run.push(parseInt(pieces[id].slice(1, -1), 16)); // "<0x0A>"
      } else {
        finish();
        text += pieces[id].replaceAll(SPACE, " ");
      }
    }
    finish();
    return text.replace(/^ /, ""); // the one that encoding adds
  }
}
