// The end of an axis: the smallest round number that is not below a value.
hfab.ceiling = function (value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 1.5, 2, 3, 4, 5, 6, 8, 10].find(factor => factor * power >= value);
};

// Splits a history at pauses without measurements, because no line may bridge a pause.
hfab.stretches = function (history) {
  const parts = [];
  history.forEach((point, i) => {
    if (!i || point[0] - history[i - 1][0] > 4) parts.push([]);
    parts[parts.length - 1].push(point);
  });
  return parts;
};

// The engine's live panel: asks for figures a few times a second while the page is visible, and draws them.
hfab.panel = function (root, server) {
  const $ = selector => root.querySelector(selector);
  const cells = Object.fromEntries([...root.querySelectorAll("[data-f]")].map(cell => [cell.dataset.f, cell]));
  const bars = Object.fromEntries([...root.querySelectorAll("[data-bar]")].map(bar => [bar.dataset.bar, bar]));
  const lanes = new hfab.Lanes($("[data-lanes]"), $("[data-tip]"));
  const plot = $("[data-plot]");
  let history = [], now = 0, facts = "";

  // Gradio mounts the parts above the panel late and in pieces, which would push the panel about. So the panel is shown
  // only after it has stood still for a while.
  const begun = performance.now();
  let place = NaN, placed = begun;
  function settle() {
    const now = performance.now(), top = root.getBoundingClientRect().top;
    if (top !== place || !document.querySelector("#compare")?.offsetHeight) [place, placed] = [top, now];
    if (now - placed < 600 && now - begun < 8000) requestAnimationFrame(settle);
    else root.classList.remove("settling");
  }
  settle();

  const put = (name, text) => { if (cells[name] && cells[name].textContent !== text) cells[name].textContent = text; };
  const number = hfab.number;

  function figures(f) {
    if (f.running === undefined) return;
    put("tokens_per_second", number(f.tokens_per_second, f.tokens_per_second < 1000 ? 1 : 0));
    put("running", number(f.running));
    put("rows", `of ${number(f.rows)} rows`);
    put("waiting", number(f.waiting));
    put("busy_of", `${f.busy_of} busy`);
    for (const name of ["busy", "mbu", "prefix_hits"]) {
      put(name, `${number(f[name])} %`);
      bars[name].style.width = `${Math.min(100, f[name])}%`;
    }
    root.classList.toggle("quiet", !f.running && !f.waiting && !f.tokens_per_second);
    put("ms_per_step", f.ms_per_step ? `${number(f.ms_per_step, f.ms_per_step < 10 ? 2 : 0)} ms` : "–");
    put("host", f.ms_per_step ? `host ${number(f.host_ms_per_step, 2)} ms` : "host –");
    put("pages", number(f.pages));
    cells.pages.title = `${number(f.pages)} of ${number(f.pages_total)} KV pages in use`;
    bars.pages.style.width = `${f.pages_total ? (100 * f.pages) / f.pages_total : 0}%`;
    put("requests_per_second", `${number(f.requests_per_second, f.requests_per_second < 10 ? 2 : 0)}/s`);
    put("depth", `depth ${f.depth}: ${f.depth > 1 ? "async" : "sync"}`);
  }

  function loading([stage, stages, text, failed]) {
    const box = $("[data-loading]"), busy = stage <= stages;
    box.hidden = !busy;
    box.classList.toggle("failed", failed);
    if (!busy) return;
    const told = failed ? `The model is not there. ${text}` : `${stage}/${stages} · ${text}`;
    if ($("[data-stage]").textContent !== told) $("[data-stage]").textContent = told;
    $("[data-loaded]").style.width = `${(100 * (stage - 0.5)) / stages}%`;
  }

  function line(values) {
    const text = JSON.stringify(values);
    if (text === facts || !values.length) return;
    facts = text;
    $("[data-facts]").title = values.map(pair => pair.filter(Boolean).join(" ")).join(" · ");
    $("[data-facts]").replaceChildren(
      ...values.map(([name, value]) => {
        const item = document.createElement("span"), bold = document.createElement("b");
        bold.textContent = value;
        if (name) item.append(`${name} `, bold);
        else item.textContent = value;
        return item;
      })
    );
  }

  function draw() {
    const fitted = hfab.fit(plot);
    if (!fitted) return;
    const { context, width, height } = fitted, base = height - 16, top = 6, left = 34, right = width - 26;
    const at = seconds => right + ((seconds - now) / 60) * (right - left);
    const speed = hfab.ceiling(Math.max(10, ...history.map(point => point[1])));
    const batch = hfab.ceiling(Math.max(4, ...history.map(point => point[2])));
    const y = (value, scale) => base - (value / scale) * (base - top);
    context.strokeStyle = hfab.color(plot, "track");
    context.lineWidth = 1;
    context.beginPath();
    for (const part of [0, 0.5, 1]) { context.moveTo(left, Math.round(y(part, 1)) + 0.5); context.lineTo(right, Math.round(y(part, 1)) + 0.5); }
    context.stroke();
    context.save();
    context.beginPath();
    context.rect(left, 0, right - left, height);
    context.clip();
    for (const part of hfab.stretches(history)) {
      context.fillStyle = hfab.color(plot, "batch");
      context.beginPath();
      context.moveTo(at(part[0][0]), base);
      for (const point of part) context.lineTo(at(point[0]), y(point[2], batch));
      context.lineTo(at(part[part.length - 1][0]), base);
      context.fill();
      context.strokeStyle = hfab.color(plot, "compute");
      context.lineWidth = 2;
      context.lineJoin = "round";
      context.beginPath();
      for (const point of part) context.lineTo(at(point[0]), y(point[1], speed));
      context.stroke();
    }
    context.restore();
    context.fillStyle = hfab.color(plot, "faint");
    context.font = "11px system-ui, sans-serif";
    const compact = value => value.toLocaleString("en", { notation: "compact" });
    for (const [align, x, most] of [["right", left - 5, speed], ["left", right + 5, batch]]) {
      context.textAlign = align;
      context.fillText(compact(most), x, top + 5);
      context.fillText("0", x, base + 2);
    }
    context.textAlign = "left";
    context.fillText("60 s ago", left, height - 3);
    context.textAlign = "right";
    context.fillText("now", right, height - 3);
    // For screen readers and for tests.
    plot.dataset.scale = `${speed} tokens/s, ${batch} rows`;
  }

  // The last steps, but none from before a long pause.
  function recent(steps) {
    let first = Math.max(0, steps.length - 12);
    for (let i = first + 1; i < steps.length - 2; i++) if (steps[i][4][0] - steps[i - 1][5][1] > 150_000) first = i;
    return steps.slice(first);
  }

  let failures = 0;
  async function beat() {
    let pause = 350;
    try {
      if (!document.hidden && root.isConnected) {
        const pulse = await server.pulse(now || null);
        if (now - pulse.now > 1 || failures > 3) history = [];  // another server, with another clock
        now = pulse.now;
        history.push(...pulse.history);
        history = history.filter(point => point[0] > now - 62);
        if (failures) document.dispatchEvent(new Event("hfab:back"));
        root.classList.remove("lost");
        failures = 0;
        line(pulse.facts);
        loading(pulse.stage);
        hfab.model(pulse.facts, pulse.stage);
        figures(pulse.figures);
        if (pulse.steps.steps) lanes.show(recent(pulse.steps.steps));
        draw();
        root.dataset.beats = Number(root.dataset.beats || 0) + 1;
      }
    } catch {
      failures += 1;
      if (failures === 2) document.dispatchEvent(new Event("hfab:lost"));
      pause = Math.min(5000, 700 * failures);
      root.classList.add("lost");
    }
    if (root.isConnected) setTimeout(beat, pause);
  }

  $("[data-trace]").addEventListener("click", async () => {
    const text = await server.trace();
    hfab.download(new Blob([text], { type: "application/json" }), "hf_async_batching-trace.json");
  });
  new ResizeObserver(draw).observe(plot);
  new MutationObserver(() => { draw(); lanes.draw(); }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  beat();
};
