// Shows one chat of the wall in full: questions, answers, and a button that copies them.
hfab.reader = function (dialog) {
  const $ = name => dialog.querySelector(`[data-${name}]`);
  const reader = {
    one: null,
    show(one) {
      reader.one = one;
      $("said").textContent = "";
      reader.draw();
      if (!dialog.open) dialog.showModal();
    },
    draw() {
      const { one } = reader;
      $("title").textContent = `Chat ${one.index + 1}`;
      $("talk").replaceChildren(...one.turns.flatMap(([asked, answer]) => [["h3", asked], ["p", answer.trim() || "…"]].map(([name, text]) => {
        const made = document.createElement(name);
        made.textContent = text;
        return made;
      })));
    },
  };
  dialog.addEventListener("close", () => { const { one } = reader; reader.one = null; one?.open.focus(); });
  dialog.addEventListener("click", event => { if (event.target === dialog) dialog.close(); });
  $("close").addEventListener("click", () => dialog.close());
  $("copy").addEventListener("click", async () => {
    const text = reader.one.turns.map(turn => turn.join("\n\n")).join("\n\n");
    try { await navigator.clipboard.writeText(text); $("said").textContent = "Copied."; } catch { $("said").textContent = "The browser does not copy here."; }
  });
  return reader;
};
