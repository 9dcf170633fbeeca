// The objects of a photo and their history. A state is never changed: each action makes a new one, undo drops it.

export const COLOURS = [
  [0, 140, 255], [255, 130, 0], [0, 190, 110], [235, 60, 160], [250, 210, 0], [150, 100, 255], [0, 200, 220], [230, 50, 50],
];

const NOTHING = { objects: [], current: null, made: 0 };

/** Objects {id, colour, points: [[x, y, label]], box, mask, hidden}, the id of the current one, and undo. */
export class Scene {
  #states = [NOTHING];

  get state() {
    return this.#states.at(-1);
  }

  get canUndo() {
    return this.#states.length > 1;
  }

  get objects() {
    return this.state.objects;
  }

  /** The object that prompts are added to; null before the first prompt of a new one. */
  get current() {
    return this.objects.find(({ id }) => id === this.state.current) ?? null;
  }

  get nextColour() {
    return COLOURS[this.state.made % COLOURS.length];
  }

  clear() {
    this.#states = [NOTHING];
  }

  undo() {
    if (this.canUndo) this.#states.pop();
  }

  #push(change) {
    this.#states.push({ ...this.state, ...change });
  }

  /** The current object's prompts, or those of a new one, with one more point or another box. */
  promptsWith({ point, box }) {
    const { points = [], box: old = null } = this.current ?? {};
    return { points: point ? [...points, point] : points, box: box ?? old };
  }

  /** Give the current object, or a new one, these prompts and the mask that belongs to them. */
  setPrompts({ points, box }, mask) {
    const { current, objects, made } = { ...this.state, current: this.current };
    const object = { id: made + 1, colour: this.nextColour, hidden: false, ...current, points, box, mask };
    this.#push(
      current
        ? { objects: objects.map((each) => (each === current ? object : each)) }
        : { objects: [...objects, object], current: object.id, made: made + 1 },
    );
  }

  /** Begin a new object with the next prompt. */
  finish() {
    if (this.state.current !== null) this.#push({ current: null });
  }

  select(id) {
    if (id !== this.state.current) this.#push({ current: id });
  }

  remove(id) {
    const objects = this.objects.filter((each) => each.id !== id);
    this.#push({ objects, current: this.state.current === id ? null : this.state.current });
  }

  /** Show or hide an object; not an action to undo. */
  toggle(id) {
    const objects = this.objects.map((each) => (each.id === id ? { ...each, hidden: !each.hidden } : each));
    this.#states[this.#states.length - 1] = { ...this.state, objects };
  }
}
