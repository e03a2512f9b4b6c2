// Sync and async side by side: keeps the outcome of each depth, and shows the difference.
hfab.compare = function (root, props, watch) {
  const $ = selector => root.querySelector(selector);
  const KEY = "hf_async_batching.outcomes";
  // name, key, digits, unit, whether more is better (null: it is neither)
  const ROWS = [
    ["Tokens/s", "tokens_per_second", 1, "", true],
    ["ms per step", "ms_per_step", 2, "", false],
    ["Device busy", "busy_percent", 1, " %", true],
    ["Host ms per step", "host_ms_per_step", 2, "", null],
    ["MBU", "mbu_percent", 1, " %", true],
    ["Tokens", "tokens", 0, "", null],
    ["Seconds", "seconds", 2, "", false],
  ];
  const number = (value, digits) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });
  const tip = $("[data-tip]");
  const lanes = { 1: new hfab.Lanes($('[data-lanes="1"]'), tip), 2: new hfab.Lanes($('[data-lanes="2"]'), tip) };
  let kept = {}, last = null;
  try { kept = JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { kept = {}; }

  const cells = ROWS.map(([name]) => {
    const row = document.createElement("tr"), head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    row.append(head);
    const made = [0, 1, 2].map(() => { const cell = document.createElement("td"); cell.textContent = "–"; row.append(cell); return cell; });
    $("[data-rows]").append(row);
    return made;
  });

  function difference(a, b, digits, unit, better) {
    if (unit === " %") return [`${b >= a ? "+" : "−"}${number(Math.abs(b - a), 1)} points`, better === null ? 0 : b - a];
    if (!a) return ["–", 0];
    const percent = (100 * (b - a)) / a;
    const good = better === null ? 0 : better ? percent : -percent;
    return [`${percent >= 0 ? "+" : "−"}${number(Math.abs(percent), 1)} %`, good];
  }

  function draw() {
    const one = kept[1], two = kept[2];
    ROWS.forEach(([, key, digits, unit, better], i) => {
      const [a, b, c] = cells[i];
      a.textContent = one ? number(one[key], digits) + unit : "–";
      b.textContent = two ? number(two[key], digits) + unit : "–";
      c.className = "";
      if (!one || !two) { c.textContent = "–"; return; }
      const [text, good] = difference(one[key], two[key], digits, unit, better);
      c.textContent = text;
      if (Math.abs(good) > 0.5) c.className = good > 0 ? "good" : "bad";
    });
    const spans = [one, two].map(outcome => outcome ? hfab.bars(outcome.drawn.steps) : []).map(bars => bars.length ? Math.max(...bars.map(bar => bar.b)) - Math.min(...bars.map(bar => bar.a)) : 0);
    for (const depth of [1, 2]) if (kept[depth]) lanes[depth].show(kept[depth].drawn.steps, Math.max(...spans));
  }

  function verdict(state) {
    const one = kept[1], two = kept[2];
    if (state.problem) return state.problem;
    if (state.stopped) return "Stopped.";
    if (!one || !two) return "Run the other one as well to see the difference.";
    const parts = [`Async took ${number(Math.abs(100 * (1 - two.seconds / one.seconds)), 1)} % ${two.seconds <= one.seconds ? "less" : "more"} time`];
    if (state.same !== undefined && state.same !== null) parts.push(`the same tokens in ${state.same} of ${two.chats} chats`);
    if (one.chats !== two.chats || Math.abs(one.tokens - two.tokens) > 0.02 * one.tokens) parts.push("the runs had different work");
    if (one.others + two.others > 0) parts.push("other requests were in the same batch");
    if (!root.dataset.gpu || root.dataset.gpu === "false") parts.push("on a CPU a step runs while it is launched, so that there is nothing to overlap");
    return `${parts.join("; ")}.`;
  }

  watch("value", () => {
    const value = props.value;
    if (!value || value === last) return;
    last = value;
    const state = JSON.parse(value);
    root.dataset.over = Boolean(state.over);
    if (state.outcomes) {
      kept = { ...kept, ...state.outcomes };
      try { sessionStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* private windows keep nothing */ }
      for (const outcome of Object.values(kept)) root.dataset.gpu = outcome.gpu;
      draw();
    }
    const bar = $("[data-done]");
    if (state.place) $("[data-sum]").textContent = `Another comparison is running: place ${state.place} in line …`;
    else if (state.over) { $("[data-sum]").textContent = verdict(state); bar.style.width = "0"; }
    else {
      $("[data-sum]").textContent = state.speed ? `${state.depth === 1 ? "Synchronous" : "Asynchronous"} run: ${number(state.speed, 1)} tokens/s` : "Waiting until everything is compiled …";
      bar.style.width = `${100 * state.done}%`;
    }
  });
  new MutationObserver(() => { lanes[1].draw(); lanes[2].draw(); }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  if (kept[1] || kept[2]) { draw(); $("[data-sum]").textContent = "What this tab measured last."; }
};
