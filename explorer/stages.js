/**
 * The figure: a button for each stage between the scene and the next word, with a small picture and a size, and the
 * text of the panel that opens below it: what it shows, which Python function does it, a question to try.
 */

import { button, canvas, children, div, element, featureColours, row, spotlight, tiles, word } from "./figures.js";
import { distribution } from "./sampling.js";

const square = () => canvas(192, 192);

const STAGES = [
  {
    name: "picture", title: "Picture", thumb: square(), file: "vision.py", code: "LlavaImageProcessor.preprocess",
    about: "The model gets three numbers per pixel: red, green and blue. Each is divided by 255 and normalised with the mean and the standard deviation of the images that CLIP, the first vision tower of this kind, was trained on.",
    question: "Yellow is red light plus green light. In which channel is a yellow shape the darkest?",
  },
  {
    name: "patches", title: "Patches", thumb: square(), file: "vision.py", code: "CLIPVisionEmbeddings.forward",
    about: "The picture is cut into square patches, and one linear layer turns the pixels of each into a vector. Press a patch to hide it: the model then sees the mean colour in its place.",
    question: "How much of a shape can you hide before the model gets its name wrong?",
  },
  {
    name: "tower", title: "Vision tower", thumb: square(), file: "vision.py", code: "CLIPEncoderLayer.forward",
    about: "In every layer each patch gathers information from all patches; the lit ones are those that the outlined patch attends to. The coloured maps show what has come of it: patches with similar features have similar colours.",
    question: "From which layer on do all patches of a shape differ from the ground in the same way?",
  },
  {
    name: "features", title: "Image tokens", thumb: square(), file: "llava.py", code: "LlavaMultiModalProjector.forward",
    about: "The projector, two linear layers with a bend (GELU) between them, maps the features of each patch to the space of the word embeddings. From here on a patch is a token like any word, and the decoder knows nothing of the picture but these tokens.",
    question: "Keep the tokens of this scene, make a new scene, and swap them. Which of the two does the model describe?",
  },
  {
    name: "sequence", title: "Sequence", thumb: element("span", { class: "dots" }), file: "llava.py",
    code: "LlavaForConditionalGeneration.embed",
    about: "The image tokens stand in the prompt where the mark <image> was, among the tokens of the question: words, or parts of words. The decoder reads this one sequence from left to right, and appends its answer to it.",
    question: "Ask for an elephant. How is a word spelled that the vocabulary does not have?",
  },
  {
    name: "layers", title: "Decoder layers", thumb: element("span", { class: "ladder" }), file: "llama.py",
    code: "LlamaDecoderLayer.forward",
    about: "Each row is a layer: where its heads look from the outlined token, and which word would come next if the model ended there (the “logit lens”). A look is not yet a cause, because heads back each other up: switch some off, or a whole layer, and see whether the answer survives.",
    question: "Is any one head needed? Switch heads off one after the other, then a whole layer.",
  },
  {
    name: "distribution", title: "Distribution", thumb: element("span", { class: "columns" }), file: "sampling.py",
    code: "filter_logits",
    about: "The vector after the last layer gives one score for every word of the vocabulary, and a softmax turns the scores into probabilities. The temperature flattens or sharpens them; top-k and top-p drop the unlikely words.",
    question: "At which temperature does the second word reach 10 %? Would it be a sensible answer?",
  },
  {
    name: "word", title: "Word", thumb: element("span", { class: "next" }, element("b"), element("small")),
    file: "sampling.py", code: "choose_token",
    about: "Greedy decoding takes the most likely word; sampling draws a number between 0 and 1 and takes the word in whose segment it lies. The word joins the sequence and the decoder runs again, until the word is “end”.",
    question: "Sample answers at temperature 1, then at 3. What goes wrong first: the facts or the grammar?",
  },
];
const thumbs = Object.fromEntries(STAGES.map(({ name, thumb }) => [name, thumb]));

/** Adds the stages and their closed panels to `way`; pressing a stage calls onOpen(name). */
export function buildStages(way, onOpen) {
  const span = (name, ...content) => element("span", { class: name }, ...content);
  for (const [i, { name, title, thumb, file, code, about, question }] of STAGES.entries()) {
    const parts = [span("name", title), span("thumb", thumb), span("size")];
    const attributes = { class: "stage", id: `stage-${name}`, "aria-controls": `panel-${name}` };
    const stage = button("", () => onOpen(name), attributes);
    stage.append(...parts);
    stage.style.gridColumn = i + 1; // of the figure, where there is room for all side by side
    const names = code.split(".").flatMap((part, i) => (i ? [".", element("wbr"), part] : [part]));
    const link = element("a", { href: `../${file}` }, file);
    const source = element("p", { class: "code" }, link, element("code", {}, ...names));
    const text = div("about", element("p", {}, about), source, element("p", { class: "try" }, question));
    const panel = { class: "panel", id: `panel-${name}`, hidden: "", "aria-labelledby": `stage-${name}` };
    way.append(stage, element("section", panel, text));
  }
}

/** Makes the function that shows the state of `app` in the stages. */
export function createStages(app) {
  const colours = { tower: featureColours(), features: featureColours() };
  const span = () => element("span");

  return () => {
    const { trace, picture, seen, patchCount: count, towerWidth, selected, vocabulary, config, changes } = app;
    const across = Math.sqrt(count);
    const patch = picture.width / across;
    spotlight(thumbs.picture, picture);
    spotlight(thumbs.patches, seen);
    thumbs.patches.parentElement.style.setProperty("--across", across);
    tiles(thumbs.tower, colours.tower(trace.tower[app.featureLayer].subarray(towerWidth), count));
    tiles(thumbs.features, colours.features(trace.features, count), true);

    thumbs.sequence.style.gridTemplateColumns = `repeat(${Math.ceil(Math.sqrt(trace.ids.length))}, 1fr)`;
    children(thumbs.sequence, trace.ids.length, span).forEach((dot, t) => {
      dot.dataset.kind = trace.isImage[t] ? "image" : t >= trace.answerStart ? "answer" : "prompt";
      dot.toggleAttribute("data-selected", t === selected);
    });
    const last = trace.lens.at(-1)[selected][0];
    children(thumbs.layers, trace.lens.length - 1, span).forEach((bar, i) => {
      const known = trace.lens[i + 1][selected].find(({ piece }) => piece === last.piece);
      bar.style.setProperty("--value", known?.probability ?? 0);
      bar.toggleAttribute("data-off", changes.skipLayers.has(i));
    });
    const probabilities = distribution(row(trace.logits, selected, vocabulary), { temperature: 1 });
    const most = [...probabilities].sort((a, b) => b - a).slice(0, 6);
    children(thumbs.distribution, most.length, span).forEach((bar, i) => bar.style.setProperty("--value", most[i]));
    const [next, before] = thumbs.word.children;
    next.textContent = word(last.piece);
    before.textContent = `after ${trace.isImage[selected] ? "an image token" : `“${word(trace.pieces[selected])}”`}`;

    const sizes = {
      picture: `${picture.width} × ${picture.width} × 3`,
      patches: `${count} × ${3 * patch * patch}`,
      tower: `${count} × ${towerWidth}`,
      features: `${count} × ${trace.features.length / count}`,
      sequence: `${trace.ids.length} tokens`,
      layers: `${config.text_config.num_hidden_layers} layers`,
      distribution: `${vocabulary} numbers`,
      word: "1 token",
    };
    for (const [name, size] of Object.entries(sizes)) document.querySelector(`#stage-${name} .size`).textContent = size;
  };
}
