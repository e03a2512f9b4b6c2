// Draws the lanes of CPU, H2D, compute and D2H from recorded steps, on a canvas. Used by the panel and the comparison.
// A step is [number, decoding rows, prompt tokens, tokens, plan, settle, h2d, compute, d2h], spans in microseconds.
window.hfab = window.hfab || {};

hfab.PAUSE = 10_000;
hfab.LANES = ["CPU", "H2D", "compute", "D2H"];

hfab.bars = function (steps) {
  const bars = [];
  let end = null, settled = 0;
  for (const [number, rows, prompt, tokens, plan, settle, h2d, compute, d2h] of steps) {
    const what = prompt ? `${prompt} prompt tokens, ${rows} rows decode` : `${rows} rows decode`;
    const add = (lane, kind, name, span) => span && bars.push({ lane, kind, name, number, what, a: span[0], b: span[1] });
    add(0, "plan", "plan and launch", plan);
    add(0, "settle", "read and hand on", settle);
    add(1, "copy", "inputs", h2d);
    if (end !== null && compute[0] > end) {
      // If even the planning of the step came late, there was nothing to do.
      const waits = plan[0] - settled < hfab.PAUSE;
      const what = waits ? "the device waits for the host" : "nothing to do";
      bars.push({ lane: 2, kind: waits ? "idle" : "pause", name: waits ? "idle" : "no requests", number, what, a: end, b: compute[0] });
    }
    add(2, "compute", prompt ? "prefill and decode" : "decode", compute);
    add(3, "copy", `${tokens} tokens`, d2h);
    end = compute[1];
    settled = settle[1];
  }
  return bars;
};

hfab.time = function (us) {
  return us >= 1e6 ? `${(us / 1e6).toFixed(2)} s` : us >= 1000 ? `${(us / 1000).toFixed(us >= 1e5 ? 0 : 2)} ms` : `${Math.round(us)} µs`;
};

hfab.describe = function (bar) {
  return `Step ${bar.number} · ${hfab.LANES[bar.lane]} · ${bar.name} · ${hfab.time(bar.b - bar.a)} · ${bar.what}`;
};

hfab.color = function (element, name) {
  return getComputedStyle(element).getPropertyValue(`--hfab-${name}`).trim();
};

// Gives a canvas the screen's pixels; returns its context, scaled to CSS pixels, or null while it is hidden.
hfab.fit = function (canvas) {
  const width = canvas.clientWidth, height = canvas.clientHeight, scale = window.devicePixelRatio || 1;
  if (!width || !height) return null;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const context = canvas.getContext("2d");
  context.setTransform(scale, 0, 0, scale, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
};

// Makes a canvas show lanes: .show(steps, microseconds of the whole width), hover, arrow keys.
hfab.Lanes = class {
  constructor(canvas, tip) {
    this.canvas = canvas;
    this.tip = tip;
    this.bars = [];
    this.chosen = -1;
    this.held = false;
    canvas.addEventListener("pointermove", event => this.point(event));
    canvas.addEventListener("pointerdown", event => this.point(event));
    canvas.addEventListener("pointerleave", () => this.release());
    canvas.addEventListener("blur", () => this.release());
    canvas.addEventListener("keydown", event => this.key(event));
    new ResizeObserver(() => this.draw()).observe(canvas);
  }

  // While a visitor looks at a step, newer steps are not drawn.
  show(steps, span) {
    if (this.held) return;
    this.bars = hfab.bars(steps);
    this.start = this.bars.length ? Math.min(...this.bars.map(bar => bar.a)) : 0;
    this.span = span || (this.bars.length ? Math.max(...this.bars.map(bar => bar.b)) - this.start : 1);
    this.draw();
  }

  draw() {
    const fitted = hfab.fit(this.canvas);
    if (!fitted) return;
    const { context, width, height } = fitted;
    const left = 58, lane = Math.floor((height - 20) / 4), bar = lane - 4;
    const color = Object.fromEntries(
      ["plan", "settle", "copy", "compute", "idle", "pause", "track", "faint", "ink"].map(name => [name, hfab.color(this.canvas, name)])
    );
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    hfab.LANES.forEach((name, i) => {
      context.fillStyle = color.faint;
      context.textAlign = "right";
      context.fillText(name, left - 8, i * lane + bar / 2 + 1);
      context.fillStyle = color.track;
      context.fillRect(left, i * lane, width - left, bar);
    });
    this.left = left;
    this.lane = lane;
    this.scale = (width - left) / this.span;
    context.save();
    context.beginPath();
    context.rect(left, 0, width - left, height);
    context.clip();
    this.bars.forEach((b, i) => {
      const x = left + (b.a - this.start) * this.scale, wide = (b.b - b.a) * this.scale;
      context.fillStyle = color[b.kind];
      // A gap must not look wider than it is; a copy of a few bytes must be seen at all.
      context.fillRect(x, b.lane * lane, b.kind === "idle" || b.kind === "pause" ? wide : Math.max(1.5, wide - (b.kind === "compute" ? 0.75 : 0)), bar);
      if (i === this.chosen) {
        context.strokeStyle = color.ink;
        context.lineWidth = 2;
        context.strokeRect(x, b.lane * lane, Math.max(2, wide), bar);
      }
    });
    context.restore();
    this.axis(context, color.faint, width, height);
  }

  axis(context, color, width, height) {
    let step = 1;
    for (const power of [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7])
      for (const factor of [1, 2, 5]) if (this.span / step > (width < 500 ? 4 : 8)) step = factor * power;
    context.fillStyle = color;
    for (let us = 0; us < this.span; us += step) {
      const x = this.left + us * this.scale;
      if (x > width - 44) break;
      context.textAlign = us ? "center" : "left";
      context.fillText(us ? hfab.time(us).replace(".00", "") : "0", x, height - 7);
    }
  }

  point(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, lane = Math.floor((event.clientY - box.top) / this.lane);
    let best = -1, nearest = 6;
    this.bars.forEach((bar, i) => {
      if (bar.lane !== lane) return;
      const a = this.left + (bar.a - this.start) * this.scale, b = this.left + (bar.b - this.start) * this.scale;
      const away = x < a ? a - x : x > b ? x - b : 0;
      if (away < nearest) [best, nearest] = [i, away];
    });
    this.choose(best);
  }

  key(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === "Escape") this.release();
    if (!step || !this.bars.length) return;
    event.preventDefault();
    this.choose((this.chosen + step + this.bars.length) % this.bars.length);
  }

  choose(index) {
    this.held = index >= 0;
    if (index === this.chosen) return;
    this.chosen = index;
    this.tip.textContent = index < 0 ? this.tip.dataset.idle || "" : hfab.describe(this.bars[index]);
    this.draw();
  }

  release() {
    this.choose(-1);
  }
};
