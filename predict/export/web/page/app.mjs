// The page: connects the controls, the canvas (stage.mjs), the objects (scene.mjs) and the worker (engine.mjs).

import { Engine, usableThreads } from "./engine.mjs";
import { Scene } from "./scene.mjs";
import { Stage, picture } from "./stage.mjs";

const KEPT = 110; // opacity of 255 of an object's mask, and of the preview under the pointer
const PREVIEW = 80;

const $ = (id) => document.getElementById(id);
const scene = new Scene();
const stage = new Stage($("canvas"), { point, box, hover, say, command });

let engine, ready; // the worker, and the promise that its networks are loaded
let photo = null; // {file, name, width, height, encoded: promise}
let edits = Promise.resolve(); // prompts are decoded one after the other
const hovering = { wanted: null, busy: false, left: true };

// Messages

function say(text) {
  $("status").textContent = text;
}

function complain(error) {
  $("alert").textContent = error.message;
  $("alert").hidden = false;
}

function calm() {
  $("alert").hidden = true;
}

// Loading

function start() {
  engine?.close();
  const own = (engine = new Engine(({ done, total }) => {
    if (own !== engine) return;
    $("loading").hidden = done === total;
    $("progress").value = done / total;
    say(done < total ? `Loading ${megabytes(done)} of ${megabytes(total)} MB` : "Preparing the networks");
  }));
  const chosen = $("processor").value;
  const threads = chosen === "single" ? 1 : usableThreads();
  const processor = { auto: "auto", webgpu: "webgpu" }[chosen] ?? "cpu";
  ready = own.ask("load", { processor, threads });
  ready.then(
    (loaded) => own === engine && show(loaded, threads),
    (error) => {
      if (own !== engine) return;
      $("loading").hidden = true;
      say("The networks could not be loaded.");
      complain(error);
    },
  );
}

function megabytes(bytes) {
  return (bytes / 1e6).toFixed(1);
}

function show({ model, processor, threads, notes, ms }) {
  const teacher = model.teacher ? `, distilled from ${model.teacher}` : "";
  $("about").textContent =
    `${model.student} at ${model.student_size} pixels${teacher}. Your photo stays on this machine: everything is computed here.`;
  const single = self.crossOriginIsolated ? "" : " The server sends no COOP and COEP headers, so that threads can't be used.";
  $("runs-on").textContent = [
    processor === "WebGPU" ? "The encoder runs on WebGPU." : `Runs on the CPU, ${threads} thread${threads === 1 ? "" : "s"}.${single}`,
    `Loaded in ${(ms / 1000).toFixed(1)} s.`,
    ...notes,
  ].join(" ");
  document.body.dataset.state = "ready";
  if (!photo) say("Ready: choose a photo.");
  if (!$("examples").childElementCount) model.examples.forEach(addExample);
}

function addExample({ path, alt, width, height }) {
  const button = document.createElement("button");
  const image = Object.assign(new Image(width, height), { src: path, alt: `Example: ${alt}` });
  button.type = "button";
  button.append(image);
  button.onclick = async () => {
    try {
      const response = await fetch(path);
      if (!response.ok) throw new Error(`${path}: the server answered ${response.status}. The folder is incomplete: export it again.`);
      openPhoto(await response.blob(), path.split("/").at(-1));
    } catch (error) {
      complain(error);
    }
  };
  $("examples").append(button);
}

// Photos

/** Show and encode a photo; `keep` the objects if it is the same one again. */
async function openPhoto(file, name = file.name || "pasted.png", keep = false) {
  calm();
  hovering.wanted = null;
  if (!keep) scene.clear();
  const own = (photo = { file, name, encoded: null });
  document.body.dataset.photo = "loading";
  refresh();
  try {
    say("Opening the photo");
    const { id, result } = engine.askAs("open", { file });
    const encoding = engine.ask("encode", { opened: id });
    encoding.catch(() => {}); // an error of `open` is told alone
    const { width, height, bitmap } = await result;
    if (own !== photo) return;
    Object.assign(photo, { width, height });
    $("start").hidden = true;
    $("canvas").hidden = $("tools").hidden = false;
    $("canvas").setAttribute("aria-label", `Photo ${name}, ${width} by ${height} pixels`);
    stage.setPhoto(bitmap);
    if (document.body.dataset.state === "ready") say("Encoding the photo");
    photo.encoded = encoding;
    const { encoderMs, resizeMs } = await encoding;
    if (own !== photo) return;
    $("encoder-ms").textContent = `${encoderMs.toFixed(0)} ms`;
    $("encoder-ms").title = `and ${resizeMs.toFixed(0)} ms for resizing`;
    document.body.dataset.photo = "ready";
    say(`Ready in ${encoderMs.toFixed(0)} ms: point at something, click to keep it.`);
  } catch (error) {
    if (own !== photo) return;
    if (photo.encoded === null) {
      photo = null;
      stage.setPhoto(null);
      $("start").hidden = false;
      $("canvas").hidden = $("tools").hidden = true;
    }
    document.body.dataset.photo = "failed";
    say("The photo could not be used.");
    complain(error);
  }
  refresh();
}

// Prompts

function point(place, on) {
  edit({ point: [...place, on ? 1 : 0] });
}

function box(corners) {
  edit({ box: corners });
}

/** Add a prompt to the current object, or to a new one, once the prompts before it are decoded. */
function edit(change) {
  if (!photo?.encoded) return;
  const own = photo;
  hovering.wanted = null;
  edits = edits.then(async () => {
    if (own !== photo) return;
    try {
      const prompts = scene.promptsWith(change);
      if (!prompts.box && !prompts.points.some(([, , label]) => label)) {
        say("Begin with a point on the object, or with a box.");
        return;
      }
      const mask = await decode(prompts, change, KEPT);
      if (own !== photo) return;
      scene.setPrompts(prompts, { ...mask, picture: picture(mask) });
      $("decoder-ms").textContent = `${mask.decoderMs.toFixed(0)} ms`;
      const number = scene.objects.indexOf(scene.current) + 1;
      say(`Object ${number}: ${percent(mask.share)} of the photo, predicted quality ${percent(mask.iou)}.`);
      calm();
    } catch (error) {
      if (own === photo) complain(error);
    }
    refresh();
  });
}

async function decode(prompts, change, opacity) {
  await ready;
  await photo.encoded;
  const current = scene.current;
  return engine.ask("decode", {
    prompts,
    previous: current && !change.box ? current.mask.logits : null, // another box begins afresh
    colour: current?.colour ?? scene.nextColour,
    opacity,
  });
}

function percent(share) {
  return `${(100 * Math.min(share, 1)).toFixed(share < 0.1 ? 1 : 0)}%`;
}

/** Show what a point at the pointer would give; one request at a time, the newest place first. */
async function hover(place, on = true) {
  hovering.left = !place;
  hovering.wanted = place && document.body.dataset.photo === "ready" ? { place, on } : null;
  if (!hovering.wanted) stage.show({ hover: null });
  if (hovering.busy) return;
  hovering.busy = true;
  while (hovering.wanted) {
    await edits;
    if (!hovering.wanted) break;
    const { place, on } = hovering.wanted;
    hovering.wanted = null;
    if (!on && !scene.current) continue; // a point off the object needs one
    const [own, state] = [photo, scene.state];
    const change = { point: [...place, on ? 1 : 0] };
    try {
      const mask = await decode(scene.promptsWith(change), change, PREVIEW);
      if (own !== photo || state !== scene.state || hovering.left) continue;
      stage.show({ hover: picture(mask) });
      document.body.dataset.hovered = place.join(" ");
    } catch (error) {
      if (own === photo) complain(error);
    }
  }
  hovering.busy = false;
}

// Controls

function command(name) {
  hovering.wanted = null;
  edits = edits.then(() => {
    if (name === "undo") {
      if (!scene.canUndo) return say("There is nothing to undo.");
      scene.undo();
      say("Undone.");
    } else if (name === "new") {
      scene.finish();
      say("The next point or box begins a new object.");
    } else if (scene.current) {
      scene.remove(scene.current.id);
      say("The object is deleted.");
    }
    refresh();
  });
}

/** Bring all controls in line with the scene. */
function refresh() {
  const { objects, current } = scene;
  stage.show({ objects, current, hover: null });
  $("undo").disabled = !scene.canUndo;
  $("new").disabled = $("delete").disabled = !current;
  const target = current ?? objects.at(-1);
  $("save-mask").disabled = $("save-cutout").disabled = $("save-rle").disabled = !target;
  $("none").hidden = objects.length > 0;
  $("objects").replaceChildren(...objects.map(row));
}

function row(object, index) {
  const item = document.createElement("li");
  const name = document.createElement("button");
  name.type = "button";
  name.className = "name";
  name.setAttribute("aria-pressed", object === scene.current);
  const text = document.createElement("span");
  text.textContent = `Object ${index + 1}`;
  const facts = document.createElement("small");
  const count = object.points.length;
  const prompts = [count && `${count} point${count === 1 ? "" : "s"}`, object.box && "box"].filter(Boolean).join(", ");
  facts.textContent = `${prompts}; ${percent(object.mask.share)} of the photo, quality ${percent(object.mask.iou)}`;
  text.append(facts);
  name.append(swatch(object.colour), text);
  name.onclick = () => {
    scene.select(object.id);
    refresh();
    focusRow(index);
  };
  const shown = document.createElement("button");
  shown.type = "button";
  shown.textContent = object.hidden ? "Show" : "Hide";
  shown.setAttribute("aria-label", `${shown.textContent} object ${index + 1}`);
  shown.onclick = () => {
    scene.toggle(object.id);
    refresh();
    $("objects").children[index].lastElementChild.focus();
  };
  item.append(name, shown);
  return item;
}

/** The list was made anew: the focus goes to the same row. */
function focusRow(index) {
  $("objects").children[index].firstElementChild.focus();
}

function swatch([red, green, blue]) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("width", 16);
  svg.setAttribute("height", 16);
  svg.setAttribute("aria-hidden", "true");
  const rect = document.createElementNS(svg.namespaceURI, "rect");
  for (const [key, value] of Object.entries({ width: 16, height: 16, fill: `rgb(${red},${green},${blue})` })) rect.setAttribute(key, value);
  svg.append(rect);
  return svg;
}

async function save(what) {
  const stem = photo.name.replace(/\.[^.]*$/, "") || "photo";
  const target = scene.current ?? scene.objects.at(-1);
  const objects = what === "rle" ? scene.objects : [target];
  const name = { mask: `${stem}-mask.png`, cutout: `${stem}-cutout.png`, rle: `${stem}-masks.json` }[what];
  try {
    const plain = objects.map(({ points, mask: { logits, iou } }) => ({ points, logits, iou }));
    const { blob } = await engine.ask("save", { what, objects: plain, name: photo.name });
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
    say(`Saved ${name}.`);
  } catch (error) {
    complain(error);
  }
}

$("file").onchange = ({ target }) => {
  if (target.files.length) openPhoto(target.files[0]);
  target.value = ""; // the same file can be chosen again
};
for (const radio of document.querySelectorAll("[name=tool]")) radio.onchange = () => stage.setTool(radio.value);
for (const name of ["undo", "new", "delete"]) $(name).onclick = () => command(name);
for (const what of ["mask", "cutout", "rle"]) $(`save-${what}`).onclick = () => save(what);
$("processor").onchange = () => {
  calm();
  document.body.dataset.state = "loading";
  start();
  if (photo) openPhoto(photo.file, photo.name, true);
};
document.addEventListener("keydown", (event) => {
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") {
    event.preventDefault();
    command("undo");
  }
});
document.addEventListener("paste", (event) => takeFiles(event.clipboardData.files));
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
for (const end of ["dragleave", "drop"]) document.addEventListener(end, () => document.body.classList.remove("over"));
document.addEventListener("drop", (event) => {
  event.preventDefault();
  takeFiles(event.dataTransfer.files);
});

function takeFiles(files) {
  const file = [...files].find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (file) openPhoto(file);
}

start();
