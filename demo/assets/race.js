// The race: the same questions in four ways, and what may be said about them.
hfab.WAYS = [
  ["one", "One by one", "generate, one question after the other"],
  ["padded", "Padded batch", "generate, one padded batch"],
  ["1", "Continuous, sync", "this engine, one step in flight"],
  ["2", "Continuous, async", "this engine, two steps in flight"],
];
// Two runs of the same work differ by some percent: below this, nothing is said.
hfab.NOISE = 0.05;

// What may be said about the outcomes: a ratio, or null, and sentences.
hfab.verdict = function (outcomes, state) {
  const all = hfab.WAYS.map(([way]) => outcomes[way]);
  if (state.problem) return { ratio: null, told: state.problem };
  if (state.stopped) return { ratio: null, told: "Stopped: there is no verdict." };
  if (all.some(outcome => !outcome)) return { ratio: null, told: "" };
  if (all.some(outcome => outcome.others > 0))
    return { ratio: null, told: "Other visitors were answered at the same time, so there is no verdict. Run it again." };
  const [one, padded, sync, async_] = all.map(outcome => outcome.tokens_per_second), told = [];
  const times = async_ / one, over = async_ / padded, between = async_ / sync;
  const clear = ratio => Math.abs(ratio - 1) >= hfab.NOISE;
  if (clear(over)) told.push(`${hfab.number(over, 1 + (over < 2))}× the speed of a padded batch.`);
  else told.push("No difference to a padded batch beyond the noise.");
  if (!all[3].gpu) told.push("On a CPU nothing overlaps, so sync and async are alike: batching alone makes the difference.");
  else if (clear(between)) told.push(`Async is ${hfab.number(Math.abs(100 * (between - 1)), 0)} % ${between > 1 ? "faster" : "slower"} than sync.`);
  else told.push("No difference between sync and async beyond the noise.");
  if (state.same !== null && state.same !== undefined) told.push(`The same words in all four ways: ${state.same} of ${all[0].chats} answers.`);
  return { ratio: clear(times) ? times : null, told: (clear(times) ? [] : ["No difference to one by one beyond the noise."]).concat(told).join(" ") };
};

hfab.race = function (root, props, watch) {
  const $ = selector => root.querySelector(selector);
  const KEY = "hf_async_batching.race";
  const details = hfab.compare($(".compare"));
  const rows = Object.fromEntries(hfab.WAYS.map(([way, name, how]) => {
    const row = document.createElement("li");
    row.dataset.way = way;
    row.innerHTML = '<span class="name"><b></b> <small></small></span><span class="track"><span></span></span><span class="took"></span>';
    row.querySelector("b").textContent = name;
    row.querySelector("small").textContent = how;
    $("[data-ways]").append(row);
    return [way, row];
  }));
  let kept = { outcomes: {}, state: {} }, last = null;
  try { kept = JSON.parse(sessionStorage.getItem(KEY)) || kept; } catch { /* private windows keep nothing */ }

  function lane(way, done, seconds, speed) {
    const row = rows[way];
    row.querySelector(".track span").style.width = `${100 * done}%`;
    row.querySelector(".took").textContent = seconds ? `${hfab.number(seconds, 1)} s · ${hfab.number(speed, speed < 100 ? 1 : 0)} tokens/s` : "";
  }

  // When all lanes are over, the length of a bar is its time.
  function draw(over) {
    const longest = Math.max(...Object.values(kept.outcomes).map(outcome => outcome.seconds));
    for (const [way] of hfab.WAYS) {
      const outcome = kept.outcomes[way];
      rows[way].classList.toggle("over", Boolean(outcome));
      if (outcome) lane(way, over ? outcome.seconds / longest : 1, outcome.seconds, outcome.tokens_per_second);
      else lane(way, 0, 0, 0);
    }
    details(kept.outcomes);
  }

  function judge() {
    const { ratio, told } = hfab.verdict(kept.outcomes, kept.state);
    $("[data-verdict]").hidden = !told;
    root.dataset.ratio = ratio === null ? "" : ratio.toFixed(3);
    $("[data-ratio]").textContent = ratio === null ? "" : `${hfab.number(ratio, 1)}×`;
    $("[data-told]").textContent = ratio === null ? told : `as fast as one by one. ${told}`;
    $("[data-copy]").hidden = ratio === null;
    $("[data-copied]").textContent = "";
  }

  watch("value", () => {
    if (!props.value || props.value === last) return;
    last = props.value;
    const state = JSON.parse(last);
    root.dataset.over = Boolean(state.over);
    if (!state.over && !state.outcomes) { kept = { outcomes: {}, state: {} }; $("[data-verdict]").hidden = true; draw(false); }
    if (state.outcomes) { kept.outcomes = state.outcomes; draw(Boolean(state.over)); }
    if (state.place) $("[data-sum]").textContent = `Another race is running: place ${state.place} in line …`;
    else if (state.over) {
      kept.state = { stopped: state.stopped, same: state.same, problem: state.problem };
      try { sessionStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* as above */ }
      $("[data-sum]").textContent = state.problem || state.stopped ? "" : "The same questions, the same answers: shorter is better.";
      judge();
    } else {
      const running = hfab.WAYS.find(([way]) => way === state.way);
      if (!state.outcomes?.[state.way]) lane(state.way, state.done, state.seconds, state.speed);
      $("[data-sum]").textContent = state.seconds ? `${running[1]} …` : "Waiting until everything is compiled …";
    }
  });

  $("[data-copy]").addEventListener("click", async () => { $("[data-copied]").textContent = await hfab.copyPicture(kept, $("[data-ratio]").textContent, $("[data-told]").textContent); });
  if (Object.keys(kept.outcomes).length) { draw(true); judge(); $("[data-sum]").textContent = "What this tab measured last: shorter is better."; }
};
