// The worker as promises.

/** A worker that is loading; `progress` is called with {done, total} bytes. */
export class Engine {
  #worker = new Worker(new URL("./worker.mjs", import.meta.url), { type: "module" });
  #waiting = new Map();
  #number = 0;

  constructor(progress) {
    this.#worker.onmessage = ({ data }) => {
      if (data.progress) return progress(data.progress);
      const { resolve, reject } = this.#waiting.get(data.id);
      this.#waiting.delete(data.id);
      if (data.error) reject(new Error(data.error));
      else resolve(data.result);
    };
    this.#worker.onerror = (event) => {
      const reason = event.message ? `: ${event.message}` : "";
      this.#fail(`The page's worker has stopped${reason}. Load the page again; a current browser is needed.`);
    };
  }

  #fail(message) {
    for (const { reject } of this.#waiting.values()) reject(new Error(message));
    this.#waiting.clear();
  }

  /** Send a request; resolves with the worker's result. */
  ask(kind, message = {}) {
    return this.askAs(kind, message).result;
  }

  /** Send a request; returns its number, too. */
  askAs(kind, message = {}) {
    const id = ++this.#number;
    const result = new Promise((resolve, reject) => this.#waiting.set(id, { resolve, reject }));
    this.#worker.postMessage({ id, kind, ...message });
    return { id, result };
  }

  close() {
    this.#worker.terminate();
    this.#fail("This was stopped, since the page now runs elsewhere. Try it again.");
  }
}

/** Threads that this browser may use: one without the headers for shared memory, and on iOS, where more ran out of memory. */
export function usableThreads() {
  const ios = /iP(hone|ad|od)/.test(navigator.userAgent) || (/Mac/.test(navigator.userAgent) && navigator.maxTouchPoints > 1);
  return self.crossOriginIsolated && !ios ? Math.min(4, navigator.hardwareConcurrency || 1) : 1;
}
