// The canvas: draws photo, masks and prompts, and turns mouse, touch and keys into prompts in pixels of the photo.

const DRAG = 6; // CSS pixels that a mouse moves before it draws a box

/** A mask's picture, of RGBA bytes, on a canvas of its own. */
export function picture({ pixels, view: [width, height] }) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  canvas.getContext("2d").putImageData(new ImageData(pixels, width, height), 0, 0);
  return canvas;
}

/**
 * Args: the canvas; `events` with point([x, y], on), box([x0, y0, x1, y1]), hover([x, y] or null, on), say(text),
 * and command(name) for the keys N, U and Delete.
 */
export class Stage {
  tool = "on"; // on: points on the object; off: points that aren't; box
  #canvas;
  #events;
  #photo = null;
  #content = { objects: [], current: null, hover: null };
  #corner = null; // where a box begins, in pixels of the photo
  #pointer = null; // the other corner, or the key cursor
  #cursor = null; // place of the keyboard's cross, shown while the canvas has the focus
  #pressed = null;

  constructor(canvas, events) {
    this.#canvas = canvas;
    this.#events = events;
    canvas.addEventListener("pointerdown", (event) => this.#down(event));
    canvas.addEventListener("pointermove", (event) => this.#move(event));
    canvas.addEventListener("pointerup", (event) => this.#up(event));
    canvas.addEventListener("pointercancel", () => this.#cancel());
    canvas.addEventListener("pointerleave", () => this.#events.hover(null));
    canvas.addEventListener("contextmenu", (event) => event.preventDefault());
    canvas.addEventListener("keydown", (event) => this.#key(event));
    canvas.addEventListener("blur", () => {
      this.#cursor = null;
      this.#events.hover(null);
      this.#cancel();
    });
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  /** Show a photo (ImageBitmap), or nothing (null). */
  setPhoto(photo) {
    this.#photo = photo;
    this.#cursor = this.#corner = this.#pressed = null;
    if (photo) this.#canvas.style.setProperty("--ratio", `${photo.width} / ${photo.height}`);
    if (photo) this.#canvas.style.setProperty("--wide", photo.width / photo.height);
    this.show({ objects: [], current: null, hover: null });
  }

  setTool(tool) {
    this.tool = tool;
    this.#canvas.style.touchAction = tool === "box" ? "none" : "manipulation";
    this.#cancel();
  }

  show(content) {
    this.#content = { ...this.#content, ...content };
    this.draw();
  }

  // Input

  #place(event) {
    const box = this.#canvas.getBoundingClientRect();
    return this.#inside([
      ((event.clientX - box.x) * this.#photo.width) / box.width,
      ((event.clientY - box.y) * this.#photo.height) / box.height,
    ]);
  }

  #inside([x, y]) {
    return [
      Math.min(Math.max(Math.floor(x), 0), this.#photo.width - 1),
      Math.min(Math.max(Math.floor(y), 0), this.#photo.height - 1),
    ];
  }

  /** Whether a point of this event is on the object. */
  #on(event) {
    return !(this.tool === "off" || event.shiftKey || event.button === 2 || event.buttons === 2);
  }

  #down(event) {
    if (!this.#photo || this.#pressed || (event.button !== 0 && event.button !== 2)) return;
    this.#cursor = null;
    this.#pressed = { id: event.pointerId, x: event.clientX, y: event.clientY, place: this.#place(event), on: this.#on(event) };
    if (this.tool === "box") {
      this.#corner = this.#pointer = this.#pressed.place;
      this.#events.hover(null);
    }
    if (event.pointerType === "mouse" || this.tool === "box") this.#canvas.setPointerCapture(event.pointerId);
  }

  #move(event) {
    if (!this.#photo) return;
    const pressed = this.#pressed;
    if (!pressed) {
      if (event.pointerType !== "touch" && this.tool !== "box") this.#events.hover(this.#place(event), this.#on(event));
      return;
    }
    if (event.pointerId !== pressed.id) return;
    const far = Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > DRAG;
    if (!this.#corner && far && event.pointerType === "mouse" && pressed.on) {
      this.#corner = this.#pointer = pressed.place; // a mouse draws a box with any tool
      this.#events.hover(null);
    }
    if (this.#corner) {
      this.#pointer = this.#place(event);
      this.draw();
    }
  }

  #up(event) {
    const pressed = this.#pressed;
    if (!pressed || event.pointerId !== pressed.id) return;
    this.#pressed = null;
    if (this.#corner) return this.#finishBox(this.#place(event));
    const far = Math.hypot(event.clientX - pressed.x, event.clientY - pressed.y) > 2 * DRAG;
    if (!far) this.#events.point(pressed.place, pressed.on);
  }

  #cancel() {
    this.#corner = this.#pressed = null;
    this.draw();
  }

  #finishBox([x, y]) {
    const [left, top] = this.#corner;
    this.#corner = null;
    this.draw();
    const box = [Math.min(left, x), Math.min(top, y), Math.max(left, x) + 1, Math.max(top, y) + 1];
    if (box[2] - box[0] < 3 || box[3] - box[1] < 3) this.#events.say("That box is empty: go from one corner to the opposite one.");
    else this.#events.box(box);
  }

  #key(event) {
    if (!this.#photo || event.ctrlKey || event.metaKey || event.altKey) return;
    const { key } = event;
    const arrows = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const commands = { n: "new", u: "undo", Delete: "delete", Backspace: "delete" };
    this.#cursor ??= [this.#photo.width >> 1, this.#photo.height >> 1];
    if (key in arrows) {
      const step = event.shiftKey ? 1 : Math.max(1, Math.round(Math.max(this.#photo.width, this.#photo.height) / 50));
      const [x, y] = arrows[key];
      this.#cursor = this.#inside([this.#cursor[0] + x * step, this.#cursor[1] + y * step]);
      this.#pointer = this.#cursor;
      this.#events.say(`x ${this.#cursor[0]}, y ${this.#cursor[1]}`);
      if (!this.#corner) this.#events.hover(this.#cursor, this.tool !== "off");
    } else if (key === "Enter" || key === " ") {
      if (this.tool !== "box") this.#events.point(this.#cursor, this.tool === "on");
      else if (this.#corner) this.#finishBox(this.#cursor);
      else {
        this.#corner = this.#pointer = this.#cursor;
        this.#events.say("A corner of the box: go to the opposite one and press Enter, or Escape.");
      }
    } else if (key === "+" || key === "=") this.#events.point(this.#cursor, true);
    else if (key === "-") this.#events.point(this.#cursor, false);
    else if (key === "Escape") this.#cancel();
    else if (key in commands) this.#events.command(commands[key]);
    else return;
    event.preventDefault();
    this.draw();
  }

  // Drawing

  draw() {
    const canvas = this.#canvas;
    const photo = this.#photo;
    if (!photo || !canvas.clientWidth) return;
    const dots = window.devicePixelRatio || 1;
    const width = Math.round(canvas.clientWidth * dots);
    const height = Math.max(1, Math.round((width * photo.height) / photo.width));
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.drawImage(photo, 0, 0, width, height);
    const { objects, current, hover } = this.#content;
    for (const object of objects)
      if (!object.hidden && !(hover && object.id === current?.id)) context.drawImage(object.mask.picture, 0, 0, width, height);
    if (hover) context.drawImage(hover, 0, 0, width, height);
    const scale = width / photo.width;
    const drawing = new Drawing(context, scale, dots);
    for (const object of objects)
      if (!object.hidden) {
        if (object.box) drawing.box(object.box, object === current);
        for (const point of object.points) drawing.point(point, object === current);
      }
    if (this.#corner) drawing.box([...this.#corner, ...this.#pointer], true);
    if (this.#cursor) drawing.cross(this.#cursor);
  }
}

/** Marks that are seen on any photo: white in black. */
class Drawing {
  constructor(context, scale, dots) {
    Object.assign(this, { context, scale, dots });
  }

  #strokes(path, width = 2) {
    const { context, dots } = this;
    for (const [style, more] of [["black", 2], ["white", 0]]) {
      context.strokeStyle = style;
      context.lineWidth = (width + more) * dots;
      context.stroke(path);
    }
  }

  box([x0, y0, x1, y1], current) {
    const { context, scale, dots } = this;
    const path = new Path2D();
    path.rect(x0 * scale, y0 * scale, (x1 - x0) * scale, (y1 - y0) * scale);
    context.setLineDash(current ? [] : [4 * dots, 4 * dots]);
    this.#strokes(path, 1.5);
    context.setLineDash([]);
  }

  point([x, y, label], current) {
    const { context, dots } = this;
    const radius = (current ? 8 : 6) * dots;
    const [left, top] = [(x + 0.5) * this.scale, (y + 0.5) * this.scale];
    const disc = new Path2D();
    disc.arc(left, top, radius, 0, 2 * Math.PI);
    context.fillStyle = label ? "#0a7d33" : "#c21d1d";
    context.fill(disc);
    this.#strokes(disc, 1.5);
    const sign = new Path2D();
    sign.moveTo(left - radius / 2, top);
    sign.lineTo(left + radius / 2, top);
    if (label) {
      sign.moveTo(left, top - radius / 2);
      sign.lineTo(left, top + radius / 2);
    }
    context.strokeStyle = "white";
    context.lineWidth = 2 * dots;
    context.stroke(sign);
  }

  cross([x, y]) {
    const [left, top, arm] = [(x + 0.5) * this.scale, (y + 0.5) * this.scale, 14 * this.dots];
    const path = new Path2D();
    path.moveTo(left - arm, top);
    path.lineTo(left + arm, top);
    path.moveTo(left, top - arm);
    path.lineTo(left, top + arm);
    this.#strokes(path);
  }
}
