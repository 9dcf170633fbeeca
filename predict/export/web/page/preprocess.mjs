// From a photo's pixels to the encoder's input, equal to mobilesam's Python: Pillow's bilinear resizing of 8-bit
// channels to the byte, then SAM's normalisation in float32.

const BITS = 22; // fractional bits of Pillow's fixed-point weights

/** A photo's file as a bitmap to show, its sides, and its RGBA bytes: turned as it was held, colour profiles ignored. */
export async function decoded(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, {
      imageOrientation: "from-image", colorSpaceConversion: "none", premultiplyAlpha: "none",
    });
  } catch {
    throw new Error("This file can't be shown as a picture by this browser. Choose a JPEG, PNG, WebP or AVIF file.");
  }
  const { width, height } = bitmap;
  try {
    const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
    context.drawImage(bitmap, 0, 0);
    return { bitmap, width, height, rgba: context.getImageData(0, 0, width, height).data };
  } catch {
    throw new Error(`A photo of ${width} x ${height} pixels is too large for this browser. Choose a smaller copy.`);
  }
}

/** Height and width of a photo whose longest side is resized to `size`: SAM's rule, its rounding included. */
export function resizedSize(height, width, size) {
  const scale = size / Math.max(height, width);
  const result = [Math.floor(height * scale + 0.5), Math.floor(width * scale + 0.5)];
  if (Math.min(...result) < 1)
    throw new Error(`This picture is too thin: ${width} x ${height} pixels. Choose another one.`);
  return result;
}

/** For each output pixel of one axis: the first input pixel, the number of them, and their integer weights. */
function taps(inputs, outputs) {
  const scale = inputs / outputs;
  const support = Math.max(scale, 1); // antialiased: the triangle widens with the reduction
  const most = Math.ceil(support) * 2 + 1;
  const first = new Int32Array(outputs);
  const count = new Int32Array(outputs);
  const weights = new Int32Array(outputs * most);
  for (let out = 0; out < outputs; out++) {
    const centre = (out + 0.5) * scale;
    const low = Math.max(0, Math.trunc(centre - support + 0.5));
    const high = Math.min(inputs, Math.trunc(centre + support + 0.5));
    const values = [];
    let sum = 0;
    for (let i = low; i < high; i++) {
      const value = Math.max(0, 1 - Math.abs((i - centre + 0.5) / support));
      values.push(value);
      sum += value;
    }
    first[out] = low;
    count[out] = high - low;
    values.forEach((value, i) => (weights[out * most + i] = Math.trunc((value / sum) * (1 << BITS) + 0.5)));
  }
  return { first, count, weights, most };
}

/** Resize each row of RGBA bytes to `newWidth` pixels; returns RGB bytes. */
function resizeRows(rgba, width, height, newWidth) {
  const { first, count, weights, most } = taps(width, newWidth);
  const half = 1 << (BITS - 1);
  const result = new Uint8ClampedArray(3 * newWidth * height);
  for (let y = 0, o = 0; y < height; y++)
    for (let x = 0; x < newWidth; x++, o += 3) {
      let red = half, green = half, blue = half;
      let at = 4 * (y * width + first[x]);
      for (let i = x * most, end = i + count[x]; i < end; i++, at += 4) {
        const weight = weights[i];
        red += rgba[at] * weight;
        green += rgba[at + 1] * weight;
        blue += rgba[at + 2] * weight;
      }
      result[o] = red >> BITS;
      result[o + 1] = green >> BITS;
      result[o + 2] = blue >> BITS;
    }
  return result;
}

/** Resize each column to `newHeight` pixels; a row has `stride` bytes. */
function resizeColumns(data, stride, height, newHeight) {
  const { first, count, weights, most } = taps(height, newHeight);
  const half = 1 << (BITS - 1);
  const result = new Uint8ClampedArray(stride * newHeight);
  for (let y = 0; y < newHeight; y++)
    for (let x = 0; x < stride; x++) {
      let sum = half;
      let at = first[y] * stride + x;
      for (let i = y * most, end = i + count[y]; i < end; i++, at += stride) sum += data[at] * weights[i];
      result[y * stride + x] = sum >> BITS;
    }
  return result;
}

function withoutAlpha(rgba) {
  const result = new Uint8ClampedArray((rgba.length / 4) * 3);
  for (let i = 0, o = 0; i < rgba.length; i += 4, o += 3) {
    result[o] = rgba[i];
    result[o + 1] = rgba[i + 1];
    result[o + 2] = rgba[i + 2];
  }
  return result;
}

/**
 * Resize RGBA bytes to RGB bytes, rounded to bytes after each of the two passes, as Pillow does.
 *
 * Rows come first. Since Pillow 13 columns do if that is less work: in pictures more than about twice as high as wide.
 */
export function resize(rgba, width, height, newWidth, newHeight) {
  if (newHeight < height && height - newHeight > 2 * (width - newWidth)) {
    const columns = resizeColumns(rgba, 4 * width, height, newHeight);
    return newWidth === width ? withoutAlpha(columns) : resizeRows(columns, width, newHeight, newWidth);
  }
  const rows = newWidth === width ? withoutAlpha(rgba) : resizeRows(rgba, width, height, newWidth);
  return newHeight === height ? rows : resizeColumns(rows, 3 * newWidth, height, newHeight);
}

/** The encoder's input, float32 (3, size, size): normalised, then padded with zeros to the right and below. */
export function encoderInput(rgb, width, height, size, { mean, std }) {
  const pixels = new Float32Array(3 * size * size);
  for (let channel = 0; channel < 3; channel++) {
    const [m, s] = [Math.fround(mean[channel]), Math.fround(std[channel])];
    const table = Float32Array.from({ length: 256 }, (_, grey) => Math.fround(grey - m) / s);
    for (let y = 0; y < height; y++) {
      const row = (channel * size + y) * size;
      for (let x = 0, at = 3 * y * width + channel; x < width; x++, at += 3) pixels[row + x] = table[rgb[at]];
    }
  }
  return pixels;
}
