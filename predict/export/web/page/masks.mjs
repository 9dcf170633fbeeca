// From the decoder's low-resolution logits to masks: choice, upscaling as SAM's `postprocess_masks`, pictures, RLE.

/** The decoder's inputs for one object: points first, then the box's corners, or one point of padding without a box. */
export function promptInputs({ points, box }, scaleX, scaleY) {
  const prompts = points.map(([x, y, label]) => [x, y, label]);
  if (box) prompts.push([box[0], box[1], 2], [box[2], box[3], 3]);
  const coords = prompts.flatMap(([x, y]) => [x * scaleX, y * scaleY]);
  const labels = prompts.map(([, , label]) => label);
  if (!box) {
    coords.push(0, 0); // exactly one: more points of padding change masks
    labels.push(-1);
  }
  return { coords: Float32Array.from(coords), labels: Float32Array.from(labels) };
}

/** Index of the mask to show: of the three for a single point, which is ambiguous, the best; else SAM's single mask. */
export function chosenMask(ious, { points, box }) {
  if (points.length !== 1 || box) return 0;
  return [1, 2, 3].reduce((best, index) => (ious[index] > ious[best] ? index : best));
}

/**
 * For each of `outputs` pixels along an axis of the photo: the first of three low-resolution logits, and their weights.
 *
 * SAM upscales the logits to its square of `square` pixels, crops the padding beyond `resized`, and resizes to the
 * photo, each time bilinearly: one linear map of at most three neighbours.
 */
function axis(low, square, resized, outputs) {
  const first = new Int32Array(outputs);
  const weights = new Float32Array(3 * outputs);
  for (let out = 0; out < outputs; out++) {
    const place = Math.max(((out + 0.5) * resized) / outputs - 0.5, 0);
    const row = Math.min(Math.floor(place), resized - 1);
    const share = place - row;
    const start = Math.min(Math.floor(lowPlace(row, low, square)), low - 3);
    first[out] = start;
    for (const [each, part] of [[row, 1 - share], [Math.min(row + 1, resized - 1), share]]) {
      const at = lowPlace(each, low, square);
      const floor = Math.floor(at);
      weights[3 * out + floor - start] += part * (1 - (at - floor));
      weights[3 * out + Math.min(floor + 1, low - 1) - start] += part * (at - floor);
    }
  }
  return { first, weights };
}

function lowPlace(row, low, square) {
  return Math.max(((row + 0.5) * low) / square - 0.5, 0);
}

/** Call `take(y, row)` with each row of the logits upscaled to `width` x `height` pixels; `row` is reused. */
export function upscaledRows(logits, { low, square, resized }, width, height, take) {
  const columns = axis(low, square, resized[1], width);
  const rows = axis(low, square, resized[0], height);
  const wide = new Float32Array(low * width);
  for (let y = 0; y < low; y++)
    for (let x = 0; x < width; x++) {
      const at = y * low + columns.first[x];
      wide[y * width + x] =
        logits[at] * columns.weights[3 * x] +
        logits[at + 1] * columns.weights[3 * x + 1] +
        logits[at + 2] * columns.weights[3 * x + 2];
    }
  const row = new Float32Array(width);
  for (let y = 0; y < height; y++) {
    const at = rows.first[y] * width;
    const [a, b, c] = rows.weights.subarray(3 * y, 3 * y + 3);
    for (let x = 0; x < width; x++)
      row[x] = wide[at + x] * a + wide[at + width + x] * b + wide[at + 2 * width + x] * c;
    take(y, row);
  }
}

/** The mask at the photo's size: 1 inside; its area, and its stability as segment_anything defines it. */
export function fullMask(logits, frame, width, height) {
  const mask = new Uint8Array(width * height);
  let area = 0, either = 0, both = 0;
  upscaledRows(logits, frame, width, height, (y, row) => {
    for (let x = 0, at = y * width; x < width; x++, at++) {
      if (row[x] > 0) {
        mask[at] = 1;
        area++;
      }
      if (row[x] > -1) either++;
      if (row[x] > 1) both++;
    }
  });
  return { mask, area, stability: either ? both / either : null };
}

/** A picture to lay over the photo: RGBA bytes, the inside tinted, with an outline; and the share of it inside. */
export function overlay(logits, frame, width, height, [red, green, blue], opacity) {
  const inside = new Uint8Array(width * height);
  let area = 0;
  upscaledRows(logits, frame, width, height, (y, row) => {
    for (let x = 0; x < width; x++) if (row[x] > 0) area += inside[y * width + x] = 1;
  });
  const pixels = new Uint8ClampedArray(4 * width * height);
  const thick = Math.max(1, Math.round(Math.max(width, height) / 400));
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at++) {
      if (!inside[at]) continue;
      const edge =
        (x >= thick && !inside[at - thick]) ||
        (x + thick < width && !inside[at + thick]) ||
        (y >= thick && !inside[at - thick * width]) ||
        (y + thick < height && !inside[at + thick * width]);
      pixels[4 * at] = red;
      pixels[4 * at + 1] = green;
      pixels[4 * at + 2] = blue;
      pixels[4 * at + 3] = edge ? 255 : opacity;
    }
  return { pixels, share: area / (width * height) };
}

/** COCO's compressed run lengths of a mask (Uint8Array, row by row), the same text as pycocotools writes. */
export function rle(mask, width, height) {
  const runs = [];
  let value = 0, length = 0;
  for (let x = 0; x < width; x++)
    for (let y = 0; y < height; y++) {
      if (mask[y * width + x] !== value) {
        runs.push(length);
        value = 1 - value;
        length = 0;
      }
      length++;
    }
  runs.push(length);
  const letters = [];
  runs.forEach((run, index) => {
    let rest = index > 2 ? run - runs[index - 2] : run;
    for (let more = true; more; ) {
      const five = rest & 31;
      rest >>= 5;
      more = five & 16 ? rest !== -1 : rest !== 0;
      letters.push(String.fromCharCode(five + (more ? 32 : 0) + 48));
    }
  });
  return letters.join("");
}

/** x, y, width and height of the box around a mask; zeros if it is empty. */
export function bounds(mask, width, height) {
  let left = width, top = height, right = -1, bottom = -1;
  for (let y = 0, at = 0; y < height; y++)
    for (let x = 0; x < width; x++, at++)
      if (mask[at]) {
        left = Math.min(left, x);
        right = Math.max(right, x);
        top = Math.min(top, y);
        bottom = y;
      }
  return right < 0 ? [0, 0, 0, 0] : [left, top, right - left + 1, bottom - top + 1];
}
