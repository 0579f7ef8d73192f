"use strict";
// Keys, the picture viewer, and the state kept when a page is loaded again; all pages work without.
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const items = () => all("[data-item]");
  const lightbox = document.getElementById("lightbox");
  let at = 0;

  const focusBy = (step) => {
    const list = items();
    if (!list.length) return;
    const now = list.indexOf(document.activeElement);
    const next = now < 0 ? (step > 0 ? 0 : list.length - 1) : now + step;
    list[Math.min(Math.max(next, 0), list.length - 1)].focus();
  };

  const columns = () => {
    const tops = all(".grid .tile").map((tile) => tile.offsetTop);
    return tops.filter((top) => top === tops[0]).length;
  };

  // --- the viewer ---

  const shown = () => all("[data-full]");

  const show = (place) => {
    const tiles = shown();
    at = Math.min(Math.max(place, 0), tiles.length - 1);
    const tile = tiles[at];
    const film = tile.dataset.kind === "video";
    const made = document.createElement(film ? "video" : "img");
    if (film) made.controls = true;
    else made.alt = tile.querySelector("img")?.alt ?? "";
    made.src = tile.dataset.full;
    lightbox.querySelector(".stage").replaceChildren(made);
    lightbox.querySelector("[data-details]").href = tile.href;
    if (!lightbox.open) lightbox.showModal();
  };

  lightbox?.addEventListener("close", () => {
    lightbox.querySelector(".stage").replaceChildren();
    shown()[at]?.focus();
  });

  document.addEventListener("click", (event) => {
    const step = event.target.closest("[data-step]");
    if (step) return show(at + Number(step.dataset.step));
    const tile = event.target.closest("[data-full]");
    if (!tile || !lightbox || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    show(shown().indexOf(tile));
  });

  // --- keys ---

  const arrows = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: "up", ArrowDown: "down" };
  const keys = {
    "/": () => document.querySelector("[data-search]")?.focus(),
    j: () => focusBy(1),
    k: () => focusBy(-1),
    r: () => location.reload(),
    "?": () => document.getElementById("keys")?.showModal(),
  };

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (lightbox?.open) {
      const step = arrows[event.key];
      if (typeof step === "number") { event.preventDefault(); show(at + step); }
      return;
    }
    if (document.querySelector("dialog[open]")) return;
    if (event.target.closest("input, textarea, select")) return;
    const step = arrows[event.key];
    if (step && document.activeElement?.matches(".tile")) {
      event.preventDefault();
      focusBy(step === "up" ? -columns() : step === "down" ? columns() : step);
    } else if (Object.hasOwn(keys, event.key)) {
      event.preventDefault();
      keys[event.key]();
    }
  });

  // --- a hidden page holds no connection: a browser has six of them for all its tabs ---

  class Source extends EventTarget {
    constructor(url) {
      super();
      this.url = new URL(url, location.href);
      this.look = () => (document.hidden ? this.shut() : this.open());
      document.addEventListener("visibilitychange", this.look);
      this.look();
    }

    open() {
      if (this.inner) return;
      this.inner = new EventSource(this.url);
      this.inner.onopen = (event) => this.onopen?.(event);
      this.inner.onerror = (event) => this.onerror?.(event);
      this.inner.addEventListener("changed", (event) => {
        this.url.searchParams.set("after", event.lastEventId);
        this.dispatchEvent(new MessageEvent("changed", { data: event.data }));
      });
    }

    shut() {
      this.inner?.close();
      this.inner = null;
    }

    close() {
      document.removeEventListener("visibilitychange", this.look);
      this.shut();
    }

    get readyState() {
      return this.inner ? this.inner.readyState : EventSource.OPEN;
    }
  }

  if (window.htmx) window.htmx.createEventSource = (url) => new Source(url);

  // --- open details and the focus are kept when a part of the page is loaded again ---

  let open = [], focused = null;
  document.addEventListener("htmx:beforeSwap", () => {
    open = all("details[open][id]").map((each) => each.id);
    focused = document.activeElement?.closest("#live") ? document.activeElement.href : null;
  });
  document.addEventListener("htmx:afterSettle", () => {
    for (const id of open) document.getElementById(id)?.setAttribute("open", "");
    if (focused) items().find((each) => each.href === focused)?.focus({ preventScroll: true });
  });
})();
