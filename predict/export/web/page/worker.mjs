// Everything heavy: downloads of the networks, decoding and resizing of photos, encoder, decoder, masks, files.
// Messages are {id, kind, ...}; each is answered by {id, result} or {id, error}. {progress} comes while loading.

import { decoded, encoderInput, resize, resizedSize } from "./preprocess.mjs";
import { bounds, chosenMask, fullMask, overlay, promptInputs, rle } from "./masks.mjs";

const VIEW_SIDE = 1024; // longest side of the masks that are laid over the photo; the canvas scales them further
const WEBGPU_DIFFERENCE = 0.02; // largest difference from the CPU that is accepted, relative to the largest value

let ort, encoder, decoder, model, photo, embedding, newest;
let loading; // promise of the networks: photos are opened meanwhile

const handlers = { load, open, encode, decode, save };
let last = Promise.resolve();
self.onmessage = ({ data }) => {
  if (data.kind === "load") {
    loading = answer(data);
    return;
  }
  if (data.kind === "open") newest = data.id;
  last = last.then(() => answer(data)); // one after the other, in order
};

async function answer({ id, kind, ...message }) {
  try {
    const { transfer = [], ...result } = await handlers[kind](message, id);
    self.postMessage({ id, result }, transfer);
  } catch (error) {
    self.postMessage({ id, error: explain(error) });
  }
}

function explain(error) {
  const text = String(error?.message ?? error);
  if (/out of memory|memory access|Aborted|alloc|Array buffer/i.test(text))
    return `There is not enough memory (${text.slice(0, 120)}). Close other tabs, choose "CPU, one thread" below, or a smaller photo.`;
  return text;
}

// Loading

async function fetched(path) {
  let response;
  try {
    response = await fetch(path);
  } catch {
    throw new Error(`${path} can't be fetched. Is the server still running? Then load the page again.`);
  }
  if (!response.ok)
    throw new Error(`${path}: the server answered ${response.status}. The folder is incomplete: export it again.`);
  return response;
}

/** The bytes of files of the folder, with one progress for all of them. */
async function download(files) {
  const total = files.reduce((sum, file) => sum + file.bytes, 0);
  let done = 0;
  const report = () => self.postMessage({ progress: { done, total } });
  report();
  const load = async (file) => {
    const data = new Uint8Array(file.bytes);
    const reader = (await fetched(file.path)).body.getReader();
    let at = 0;
    for (;;) {
      const { done: end, value } = await reader.read();
      if (end) break;
      if (at + value.length > data.length) throw new Error(`${file.path} is larger than demo.json says: export again.`);
      data.set(value, at);
      at += value.length;
      done += value.length;
      report();
    }
    if (at !== data.length)
      throw new Error(`${file.path} ended after ${at} of ${data.length} bytes. Load the page again.`);
    return data;
  };
  return Promise.all(files.map(load));
}

async function load({ processor, threads }) {
  const began = performance.now();
  model = await (await fetched("./demo.json")).json();
  const notes = [];
  let gpu = processor === "webgpu" || (processor === "auto" && model.runtime.webgpu);
  if (gpu) {
    const reason = await noWebGpu(processor === "auto");
    if (reason) {
      gpu = false;
      if (processor === "webgpu") notes.push(`${reason} The CPU is used.`);
    }
  }
  const networks = await start(gpu ? "webgpu" : "wasm", threads, [model.files.encoder, model.files.decoder]);
  decoder = await ort.InferenceSession.create(networks[1], { executionProviders: ["wasm"] });
  if (gpu) {
    const reason = await tryWebGpu(networks[0]);
    if (reason) {
      gpu = false;
      notes.push(`WebGPU isn't used: ${reason}`);
    }
  }
  if (!gpu) encoder = await ort.InferenceSession.create(networks[0], { executionProviders: ["wasm"] });
  return { model, processor: gpu ? "WebGPU" : "CPU", threads: ort.env.wasm.numThreads, notes, ms: performance.now() - began };
}

/** Import onnxruntime-web and fetch its program with the networks; returns the networks' bytes. */
async function start(build, threads, networks) {
  const { script, program } = model.runtime[build];
  const [bytes, ...others] = await download([program, ...networks]);
  ort = await import(script.path);
  ort.env.wasm.wasmBinary = bytes.buffer;
  ort.env.wasm.numThreads = threads;
  ort.env.logLevel = "error";
  return others;
}

/** Why WebGPU can't be used, else null; an adapter that the CPU plays (`real`: none of these) is slower than the CPU itself. */
async function noWebGpu(real) {
  if (!model.runtime.webgpu) return "This folder was exported without WebGPU.";
  if (!navigator.gpu) return "This browser has no WebGPU.";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  const played = adapter?.isFallbackAdapter || adapter?.info?.isFallbackAdapter || adapter?.info?.architecture === "swiftshader";
  return !adapter || (real && played) ? "WebGPU finds no graphics processor here." : null;
}

/** Make the encoder on WebGPU and compare it with what Python computed of black pixels; returns why it can't be used. */
async function tryWebGpu(bytes) {
  try {
    encoder = await ort.InferenceSession.create(bytes, { executionProviders: ["webgpu"] });
    const size = model.student_size;
    const found = await run(new Float32Array(3 * size * size));
    const { step, values } = model.check;
    const largest = Math.max(...values.map(Math.abs));
    const worst = Math.max(...values.map((value, i) => Math.abs(value - found.data[i * step])));
    if (worst <= WEBGPU_DIFFERENCE * largest) return null;
    await encoder.release();
    return `its results differ from the CPU's by ${(worst / largest).toPrecision(2)}.`;
  } catch (error) {
    return String(error?.message ?? error).slice(0, 200);
  }
}

// Photos

async function open({ file }) {
  photo = embedding = undefined;
  const began = performance.now();
  const { bitmap, ...pixels } = await decoded(file);
  photo = pixels;
  return { width: pixels.width, height: pixels.height, bitmap, ms: performance.now() - began, transfer: [bitmap] };
}

async function run(pixels) {
  const size = model.student_size;
  const outputs = await encoder.run({ pixels: new ort.Tensor("float32", pixels, [1, 3, size, size]) });
  return outputs.image_embeddings;
}

async function encode({ opened }) {
  await loading;
  if (!encoder || !decoder) throw new Error("The networks could not be loaded: load the page again.");
  if (opened !== newest || !photo) return { skipped: true }; // another photo was chosen meanwhile
  const { rgba, width, height } = photo;
  const began = performance.now();
  const [newHeight, newWidth] = resizedSize(height, width, model.student_size);
  const rgb = resize(rgba, width, height, newWidth, newHeight);
  const pixels = encoderInput(rgb, newWidth, newHeight, model.student_size, model.preprocessing.normalize);
  const prepared = performance.now();
  embedding = await run(pixels);
  const square = model.image_size;
  photo.frame = { low: square / 4, square, resized: resizedSize(height, width, square) };
  const scale = Math.min(1, VIEW_SIDE / Math.max(width, height));
  photo.view = [Math.max(1, Math.round(width * scale)), Math.max(1, Math.round(height * scale))];
  return { resizeMs: prepared - began, encoderMs: performance.now() - prepared };
}

// Masks

async function decode({ prompts, previous, colour, opacity }) {
  if (!embedding) throw new Error("Choose a photo first.");
  const began = performance.now();
  const { width, height, frame, view } = photo;
  const [newHeight, newWidth] = frame.resized;
  const { coords, labels } = promptInputs(prompts, newWidth / width, newHeight / height);
  const low = frame.low;
  const tensor = (data, shape) => new ort.Tensor("float32", data, shape);
  const outputs = await decoder.run({
    image_embeddings: embedding,
    point_coords: tensor(coords, [1, labels.length, 2]),
    point_labels: tensor(labels, [1, labels.length]),
    mask_input: tensor(previous ?? new Float32Array(low * low), [1, 1, low, low]),
    has_mask_input: tensor(Float32Array.of(previous ? 1 : 0), [1]),
  });
  const decoderMs = performance.now() - began;
  const ious = outputs.iou_predictions.data;
  const index = chosenMask(ious, prompts);
  const logits = outputs.low_res_masks.data.slice(index * low * low, (index + 1) * low * low);
  const { pixels, share } = overlay(logits, frame, ...view, colour, opacity);
  return {
    logits, iou: ious[index], pixels, view, share, decoderMs, ms: performance.now() - began,
    transfer: [pixels.buffer, logits.buffer],
  };
}

// Files

async function save({ what, objects, name }) {
  const { width, height, rgba, frame } = photo;
  const masks = objects.map((object) => ({ ...object, ...fullMask(object.logits, frame, width, height) }));
  if (what === "rle") return { blob: new Blob([JSON.stringify(sa1b(masks, name))], { type: "application/json" }) };
  const pixels = new Uint8ClampedArray(4 * width * height);
  const inside = masks[0].mask;
  for (let i = 0, at = 0; i < inside.length; i++, at += 4)
    if (what === "mask") {
      pixels[at] = pixels[at + 1] = pixels[at + 2] = 255 * inside[i];
      pixels[at + 3] = 255;
    } else if (inside[i]) {
      pixels.set(rgba.subarray(at, at + 3), at);
      pixels[at + 3] = 255;
    }
  const canvas = new OffscreenCanvas(width, height);
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return { blob: await canvas.convertToBlob({ type: "image/png" }) };
}

/** The layout of SA-1B, as `mobilesam segment --rle` writes it. */
function sa1b(masks, name) {
  const { width, height } = photo;
  return {
    image: { width, height, file_name: name },
    annotations: masks.map(({ mask, area, stability, iou, points }, id) => ({
      id,
      segmentation: { size: [height, width], counts: rle(mask, width, height) },
      area,
      bbox: bounds(mask, width, height),
      predicted_iou: Number.isFinite(iou) ? iou : null,
      stability_score: stability,
      crop_box: [0, 0, width, height],
      point_coords: points.filter(([, , label]) => label === 1).map(([x, y]) => [x, y]),
    })),
  };
}
