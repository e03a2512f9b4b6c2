// The chat wall: applies the changes that come as one stream of frames, and draws all tiles in one go per frame.
hfab.wall = function (root, props, watch, server, trigger) {
  const WORDS = { soon: "to come", waiting: "waiting", prefill: "reading", decoding: "writing" };
  const reader = hfab.reader(root.querySelector("dialog"));
  const grid = root.querySelector("[data-grid]"), sum = root.querySelector("[data-sum]");
  let run = "", seen = 0, tiles = new Map(), missing = false, last = null, due = false;
  let queue = [], times = [], told = "";

  const element = (name, kind, text) => {
    const made = document.createElement(name);
    if (kind) made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  };

  function tile(index) {
    let one = tiles.get(index);
    if (one) return one;
    const box = element("div", "tile"), head = element("div", "head"), talk = element("div", "talk"), inner = element("div");
    box.setAttribute("role", "listitem");
    one = {
      box, inner, index, state: "", shown: {}, turns: [],
      open: element("button", "open", `${index + 1}`), badge: element("span", "state"), first: element("span", "first"), speed: element("span", "speed"),
      close: element("button", "close", "×"),
    };
    one.first.title = "Time to the first token";
    one.speed.title = "Tokens per second";
    one.close.type = "button";
    one.close.title = `Stop chat ${index + 1}`;
    one.close.setAttribute("aria-label", `Stop chat ${index + 1}`);
    one.close.addEventListener("click", event => { event.stopPropagation(); server.stop_one([run, index]); });
    one.open.type = "button";
    one.open.setAttribute("aria-label", `Open chat ${index + 1}`);
    // One chat of the wall is reached with Tab, the others with the arrow keys from there.
    one.open.tabIndex = one.close.tabIndex = tiles.size ? -1 : 0;
    box.addEventListener("click", () => { reach(one); reader.show(one); });
    box.addEventListener("focusin", () => reach(one));
    const figures = element("div", "paces");
    head.append(one.open, one.badge, one.close);
    figures.append(one.speed, one.first);
    talk.append(inner);
    box.append(head, figures, talk);
    tiles.set(index, one);
    grid.append(box);
    return one;
  }

  function reach(one) {
    for (const other of tiles.values()) other.open.tabIndex = other.close.tabIndex = other === one ? 0 : -1;
  }

  grid.addEventListener("keydown", event => {
    const all = [...tiles.values()], at = all.findIndex(one => one.box.contains(event.target));
    if (at < 0) return;
    const across = Math.max(1, getComputedStyle(grid).gridTemplateColumns.split(" ").length);
    const next = { ArrowRight: at + 1, ArrowLeft: at - 1, ArrowDown: at + across, ArrowUp: at - across, Home: 0, End: all.length - 1 }[event.key];
    if (next === undefined || !all[next]) return;
    event.preventDefault();
    reach(all[next]);
    all[next].open.focus();
    all[next].box.scrollIntoView({ block: "nearest" });
  });

  function question(one, text) {
    one.turns.push([text, ""]);
    one.inner.append(element("p", "question", text));
    one.answer = document.createTextNode("");
    const answer = element("p", "answer");
    answer.append(one.answer);
    one.inner.append(answer);
  }

  function change(one, index, c) {
    // In this order: the end of an answer and the next question may come together.
    if (c.t !== undefined && one.answer) { one.answer.appendData(c.t); one.turns[one.turns.length - 1][1] += c.t; }
    if (c.q !== undefined) question(one, c.q);
    for (const key of ["s", "n", "p", "f", "v", "e"]) if (c[key] !== undefined) one.shown[key] = c[key];
    const { s: state, n: tokens, p: place, f: first, v: speed, e: problem } = one.shown;
    if (c.s !== undefined || c.p !== undefined) {
      one.box.dataset.state = state;
      one.badge.textContent = WORDS[state] ? (state === "waiting" && place ? `place ${place}` : WORDS[state]) : state;
      one.close.disabled = ["done", "stopped", "failed"].includes(state);
    }
    if (c.f !== undefined) one.first.textContent = `${first.toFixed(2)} s`;
    if (c.v !== undefined) one.speed.textContent = speed >= 100 ? Math.round(speed) : speed.toFixed(1);
    if (c.e !== undefined) one.inner.append(element("p", "problem", problem));
    if (c.s !== undefined) one.box.setAttribute("aria-label", `Chat ${index + 1}, ${WORDS[state] || state}, ${tokens} tokens`);
    if (reader.one === one) reader.draw();
  }

  function clear() {
    tiles = new Map();
    grid.replaceChildren();
  }

  function density(count) {
    const want = count <= 4 ? "1" : count <= 16 ? "2" : count <= 36 ? "3" : "4";
    if (grid.dataset.density !== want) grid.dataset.density = want;
  }

  function restore(index, turns, shown) {
    const one = tile(index);
    for (const [asked, answer] of turns) { question(one, asked); one.answer.appendData(answer); one.turns[one.turns.length - 1][1] = answer; }
    change(one, index, shown);
  }

  async function resync() {
    missing = true;
    const whole = await server.whole(run);
    missing = false;
    if (!whole || whole.run !== run) return;
    clear();
    for (const { i, turns, ...rest } of whole.tiles) restore(i, turns, rest);
    seen = whole.n;
  }

  function apply(frame) {
    if (frame.problem) { sum.textContent = frame.problem; sum.classList.add("problem"); return; }
    sum.classList.remove("problem");
    if (!frame.run) { sum.textContent = `Other walls are running: place ${frame.place} in line …`; return; }
    if (frame.run !== run) { run = frame.run; seen = 0; clear(); density(frame.sum.chats); }
    if (missing) return;
    for (const [number, changes] of frame.d) {
      if (number <= seen) continue;
      if (number > seen + 1) { resync(); return; }
      for (const c of changes) change(tile(c.i), c.i, c);
      seen = number;
    }
    density(frame.sum.chats);
    summary(frame);
  }

  function summary({ sum: s, over }) {
    const parts = [`${s.chats} chats`];
    if (s.soon) parts.push(`${s.soon} to come`);
    if (s.running) parts.push(`${s.running} running`);
    if (s.waiting) parts.push(`${s.waiting} waiting`);
    for (const kind of ["done", "stopped", "failed"]) if (s[kind]) parts.push(`${s[kind]} ${kind}`);
    parts.push(`${s.tokens.toLocaleString("en")} tokens in ${s.seconds.toFixed(1)} s`, `${s.speed.toLocaleString("en")} tok/s`);
    const text = parts.join(" · ");
    if (text !== told) { sum.firstChild ? (sum.firstChild.data = text) : (sum.textContent = text); told = text; }
    // A screen reader is told the beginning and the end, and not every frame between.
    sum.setAttribute("aria-live", over ? "polite" : "off");
    root.dataset.over = over;
  }

  function draw() {
    due = false;
    const frames = queue;
    queue = [];
    for (const frame of frames) apply(frame);
    const now = performance.now();
    times = [...times.filter(time => time > now - 2000), now];
    root.dataset.frames = Number(root.dataset.frames || 0) + 1;
    root.dataset.fps = (times.length > 1 ? ((times.length - 1) * 1000) / (now - times[0]) : 0).toFixed(1);
  }

  const over = state => ["done", "stopped", "failed"].includes(state);

  // The server has ended the chats of this wall: say so. What was written stays.
  function ended(text) {
    for (const [index, one] of tiles) if (!over(one.shown.s)) change(one, index, { s: "stopped", p: 0 });
    sum.textContent = told = text;
    sum.classList.add("problem");
    root.dataset.over = true;
  }
  const LOST = "The connection was lost, and the server has ended these chats. What was written stays.";
  const LEFT = "The page was loaded again, which has ended these chats. What was written stays.";

  let lost = false;
  document.addEventListener("hfab:lost", () => {
    lost = true;
    if (!run || root.dataset.over === "true") return;
    sum.textContent = told = "The connection is lost. Trying again …";
    sum.classList.add("problem");
  });
  document.addEventListener("hfab:back", async () => {
    lost = false;
    if (!run || root.dataset.over === "true") return;
    let whole = {};
    try { whole = await server.whole(run); } catch { /* another server: it knows nothing of the wall */ }
    if (whole.run === run) { sum.classList.remove("problem"); resync(); return; }
    ended(LOST);
    trigger("stop");
  });

  // A server that has started again makes Gradio load the page anew. What this tab showed is kept until then.
  const KEY = "hf_async_batching.wall";
  addEventListener("pagehide", () => {
    if (!run || root.dataset.over === "true") return;
    const kept = [...tiles.values()].map(one => ({ index: one.index, turns: one.turns, shown: one.shown }));
    try { sessionStorage.setItem(KEY, JSON.stringify({ lost, kept })); } catch { /* private windows keep nothing */ }
  });
  try {
    const left = JSON.parse(sessionStorage.getItem(KEY));
    sessionStorage.removeItem(KEY);
    if (left?.kept.length) {
      grid.replaceChildren();
      density(left.kept.length);
      for (const { index, turns, shown } of left.kept) restore(index, turns, shown);
      ended(left.lost ? LOST : LEFT);
    }
  } catch { /* as above */ }

  watch("value", () => {
    const value = props.value;
    if (!value || value === last) return;
    last = value;
    try { queue.push(JSON.parse(value)); } catch { return; }
    if (!due) { due = true; requestAnimationFrame(draw); }
    // A page in the background gets no animation frames, but must not fall behind.
    if (document.hidden) draw();
  });
};
