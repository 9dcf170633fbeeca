// Uses every control of the page once, in a headless Chromium. Arguments: playwright-core's folder, a JSON file with
// {url, plain, browser, photos: {name: path}, grey: {paths, size}, points, box, out}. Writes downloads and results.json into `out`.

import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const { chromium } = createRequire(path.join(process.argv[2], "package.json"))("playwright-core");
const { url, plain, browser: executablePath, photos, grey, points, box, out } = JSON.parse(fs.readFileSync(process.argv[3]));
const results = { requests: [], errors: [] };
const MINUTES = 600_000; // a machine that does much else may take long

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });

async function newPage(options, address = url) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, ...options });
  const page = await context.newPage();
  page.setDefaultTimeout(MINUTES);
  page.on("request", (request) => results.requests.push(request.url()));
  page.on("pageerror", (error) => results.errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && results.errors.push(message.text()));
  await page.goto(address);
  await page.waitForFunction(() => document.body.dataset.state === "ready" || !document.getElementById("alert").hidden);
  return page;
}

const page = await newPage({});
const text = (selector, where = page) => where.locator(selector).innerText();
const photoIs = (state, where = page) => where.waitForFunction((wanted) => document.body.dataset.photo === wanted, state);
const objects = async (where = page) => (await where.locator("#objects small").allInnerTexts()).map((line) => line.split(";")[0]);
const objectsAre = (lines, where = page) =>
  where.waitForFunction(
    (wanted) => wanted === [...document.querySelectorAll("#objects small")].map((small) => small.textContent.split(";")[0]).join("|"),
    lines.join("|"),
  );

/** Place on the screen of a photo's pixel. */
async function place([x, y], where = page) {
  return where.evaluate(
    ([x, y]) => {
      const canvas = document.getElementById("canvas");
      canvas.scrollIntoView({ block: "center" });
      const rect = canvas.getBoundingClientRect();
      const [width, height] = canvas.getAttribute("aria-label").match(/(\d+) by (\d+)/).slice(1).map(Number);
      return [rect.x + ((x + 0.5) * rect.width) / width, rect.y + ((y + 0.5) * rect.height) / height];
    },
    [x, y],
  );
}

const drawn = () =>
  page.evaluate(() => {
    const canvas = document.getElementById("canvas");
    const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
    return data.reduce((sum, value) => (sum * 31 + value) % 1000000007, 7);
  });

async function save(button, name, where = page) {
  const [download] = await Promise.all([where.waitForEvent("download"), where.click(button)]);
  await download.saveAs(path.join(out, name));
  return download.suggestedFilename();
}

// What is there at the beginning.
results.isolated = await page.evaluate(() => crossOriginIsolated);
results.about = await text("#about");
results.runsOn = await text("#runs-on");
results.nameless = await page.evaluate(() =>
  [...document.querySelectorAll("button, input, select, canvas, img, progress")]
    .filter((element) => !(element.ariaLabel || element.alt || element.labels?.length || element.textContent.trim() || element.querySelector?.("img[alt]")))
    .map((element) => element.outerHTML),
);

// A photo that is chosen; the mask under the pointer; points; undo.
await page.evaluate(() => {
  window.ticks = 0; // of the page's own thread while a photo is encoded
  setInterval(() => document.body.dataset.photo === "loading" && window.ticks++, 5);
});
await page.setInputFiles("#file", photos.first);
await photoIs("ready");
results.ticks = await page.evaluate(() => window.ticks);
results.encoder = await text("#encoder-ms");
results.plain = await drawn();
await page.mouse.move(...(await place(points[0])));
await page.waitForFunction((wanted) => document.body.dataset.hovered === wanted, points[0].join(" "));
results.hovered = await drawn();
await page.mouse.click(...(await place(points[0])));
await objectsAre(["1 point"]);
results.decoder = await text("#decoder-ms");
results.fileName = await save("#save-rle", "one-point.json");
await page.keyboard.down("Shift");
await page.mouse.click(...(await place(points[1])));
await page.keyboard.up("Shift");
await objectsAre(["2 points"]);
await save("#save-rle", "two-points.json");
await page.click("#undo");
await objectsAre(["1 point"]);
await save("#save-rle", "undone.json");

// A second object: a box, drawn with the mouse, then a point off it by the tool.
await page.click("#new");
await page.mouse.move(...(await place(box.slice(0, 2))));
await page.mouse.down();
await page.mouse.move(...(await place([box[2] - 5, box[3] - 5])), { steps: 4 });
await page.mouse.move(...(await place([box[2] - 1, box[3] - 1])));
await page.mouse.up();
await objectsAre(["1 point", "box"]);
await save("#save-rle", "box.json");
await page.locator("[name=tool][value=off]").check();
await page.mouse.click(...(await place(points[1])));
await objectsAre(["1 point", "1 point, box"]);
await save("#save-rle", "box-and-point.json");
await page.locator("[name=tool][value=on]").check();
results.maskName = await save("#save-mask", "mask.png");
await save("#save-cutout", "cutout.png");

// Hide, show, select, delete.
const before = await drawn();
await page.locator("#objects li").nth(1).locator("button").nth(1).click();
results.hides = (await drawn()) !== before;
await page.locator("#objects li").nth(1).locator("button").nth(1).click();
results.shows = (await drawn()) === before;
await page.locator("#objects li").nth(0).locator(".name").click();
results.selected = await page.locator("#objects .name").evaluateAll((all) => all.map((each) => each.getAttribute("aria-pressed")));
await page.click("#delete");
await objectsAre(["1 point, box"]);
await page.keyboard.press("Control+z");
await objectsAre(["1 point", "1 point, box"]);

// The keyboard alone: a new object, a point, a point off it, undo, delete, a box.
await page.focus("#canvas");
await page.keyboard.press("n");
await page.keyboard.press("ArrowLeft");
await page.keyboard.press("Shift+ArrowUp");
results.said = await text("#status");
await page.keyboard.press("Enter");
await objectsAre(["1 point", "1 point, box", "1 point"]);
await save("#save-rle", "keys.json");
await page.focus("#canvas");
for (let i = 0; i < 6; i++) await page.keyboard.press("ArrowDown");
await page.keyboard.press("-");
await objectsAre(["1 point", "1 point, box", "2 points"]);
await page.keyboard.press("u");
await objectsAre(["1 point", "1 point, box", "1 point"]);
await page.keyboard.press("Delete");
await objectsAre(["1 point", "1 point, box"]);
await page.locator("[name=tool][value=box]").check();
await page.focus("#canvas");
await page.keyboard.press("Enter");
for (const key of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown", "ArrowDown"]) await page.keyboard.press(key);
await page.keyboard.press("Enter");
await objectsAre(["1 point", "1 point, box", "box"]);
await page.locator("[name=tool][value=on]").check();

// One thread, the same objects.
await page.selectOption("#processor", "single");
await page.waitForFunction(() => document.body.dataset.state === "ready" && document.body.dataset.photo === "ready");
results.single = await text("#runs-on");
results.kept = await objects();

// Photos that are dropped, pasted, examples; a file that is none.
const give = (kind, file) =>
  page.evaluate(
    async ([kind, bytes, name, type]) => {
      const data = new DataTransfer();
      data.items.add(new File([new Uint8Array(bytes)], name, { type }));
      const event = kind === "drop" ? new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true }) : new ClipboardEvent("paste", { clipboardData: data, bubbles: true });
      document.body.dispatchEvent(event);
    },
    [kind, [...fs.readFileSync(file)], path.basename(file), file.endsWith(".png") ? "image/png" : file.endsWith(".jpg") ? "image/jpeg" : "text/plain"],
  );
await give("drop", photos.second);
await photoIs("ready");
results.dropped = await page.locator("#canvas").getAttribute("aria-label");
await page.mouse.click(...(await place(points[2])));
await objectsAre(["1 point"]);
await save("#save-rle", "dropped.json");
await give("paste", photos.first);
await photoIs("ready");
results.pasted = await page.locator("#canvas").getAttribute("aria-label");
results.cleared = await objects();
await give("drop", process.argv[3]);
await photoIs("failed");
results.refused = await text("#alert");
await page.locator("#examples button").first().click();
await photoIs("ready");
results.example = await page.locator("#canvas").getAttribute("aria-label");
results.calm = await page.locator("#alert").isHidden();
await page.locator("summary").click();
results.help = await text("#keys");

// The encoder's pixels of every photo, as the browser decodes and resizes it.
for (const [index, file] of grey.paths.entries()) {
  const base64 = await page.evaluate(
    async ([text, size]) => {
      const { decoded, resize, resizedSize } = await import("./preprocess.mjs");
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      const { rgba, width, height } = await decoded(new Blob([bytes]));
      const [newHeight, newWidth] = resizedSize(height, width, size);
      const small = resize(rgba, width, height, newWidth, newHeight);
      return btoa(Array.from(small, (value) => String.fromCharCode(value)).join(""));
    },
    [fs.readFileSync(file).toString("base64"), grey.size],
  );
  fs.writeFileSync(path.join(out, `grey-${index}`), Buffer.from(base64, "base64"));
}

// Touch, on a narrow and dark screen.
const phone = await newPage({ viewport: { width: 375, height: 740 }, hasTouch: true, isMobile: true, colorScheme: "dark" });
await phone.setInputFiles("#file", photos.first);
await photoIs("ready", phone);
await phone.touchscreen.tap(...(await place(points[0], phone)));
await objectsAre(["1 point"], phone);
await phone.locator("[name=tool][value=off] + span").tap();
await phone.touchscreen.tap(...(await place(points[1], phone)));
await objectsAre(["2 points"], phone);
await save("#save-rle", "touch.json", phone);
results.overflow = await phone.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
const bare = await newPage({}, plain); // a server without the headers
results.bare = await text("#runs-on", bare);
results.background = await phone.evaluate(() => getComputedStyle(document.body).backgroundColor);

await browser.close();
fs.writeFileSync(path.join(out, "results.json"), JSON.stringify(results));
