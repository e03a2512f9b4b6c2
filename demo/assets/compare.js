// Shows figures and steps of sync and async side by side, and the difference. Returns a function that draws outcomes.
hfab.compare = function (root) {
  const $ = selector => root.querySelector(selector);
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
  const tip = $("[data-tip]");
  const lanes = { 1: new hfab.Lanes($('[data-lanes="1"]'), tip), 2: new hfab.Lanes($('[data-lanes="2"]'), tip) };
  let kept = {};

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
    if (unit === " %") return [`${b >= a ? "+" : "−"}${hfab.number(Math.abs(b - a), 1)} points`, better === null ? 0 : b - a];
    if (!a) return ["–", 0];
    const percent = (100 * (b - a)) / a;
    const good = better === null ? 0 : better ? percent : -percent;
    return [`${percent >= 0 ? "+" : "−"}${hfab.number(Math.abs(percent), 1)} %`, good];
  }

  function draw() {
    const one = kept[1], two = kept[2];
    ROWS.forEach(([, key, digits, unit, better], i) => {
      const [a, b, c] = cells[i];
      a.textContent = one ? hfab.number(one[key], digits) + unit : "–";
      b.textContent = two ? hfab.number(two[key], digits) + unit : "–";
      c.className = "";
      if (!one || !two) { c.textContent = "–"; return; }
      const [text, good] = difference(one[key], two[key], digits, unit, better);
      c.textContent = text;
      if (two.gpu && Math.abs(good) > 100 * hfab.NOISE) c.className = good > 0 ? "good" : "bad";
    });
    const spans = [one, two].map(outcome => outcome ? hfab.bars(outcome.drawn.steps) : []).map(bars => bars.length ? Math.max(...bars.map(bar => bar.b)) - Math.min(...bars.map(bar => bar.a)) : 0);
    for (const depth of [1, 2]) if (kept[depth]) lanes[depth].show(kept[depth].drawn.steps, Math.max(...spans));
  }

  new MutationObserver(() => { lanes[1].draw(); lanes[2].draw(); }).observe(document.body, { attributes: true, attributeFilter: ["class"] });
  root.addEventListener("toggle", () => { if (root.open) draw(); });
  return outcomes => { kept = outcomes; draw(); };
};
