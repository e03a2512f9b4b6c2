// The top of the page: the button that starts the show, the model's name, and the chat's own tab on a phone.
window.hfab = window.hfab || {};

hfab.number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: digits });

hfab.phone = () => matchMedia("(max-width: 640px)").matches;

// Open a tab by the id of its content.
hfab.tab = function (id) {
  document.getElementById(`${id}-button`)?.click();
};

hfab.hero = function (root) {
  root.querySelector("[data-show]").addEventListener("click", () => {
    hfab.tab("wall-tab");
    // Gradio draws the content of a tab when it is opened first.
    let tries = 0;
    const press = () => {
      const start = document.getElementById("start");
      if (start?.offsetParent) start.click();
      else if ((tries += 1) < 100) setTimeout(press, 50);
    };
    press();
  });
  hfab.columns();
};

// Say which model answers, or how far loading has come.
hfab.model = function (facts, stage) {
  const line = document.querySelector("[data-model]");
  if (!line) return;
  const [number, stages, text, failed] = stage, known = Object.fromEntries(facts.filter(([name]) => name));
  const name = failed ? "The model is not there" : known.Model || "The model is being loaded";
  const rest = failed ? text
    : number < stages || !known.Model ? `${number} of ${stages} · ${text}`
    : [known.Size, `on ${known.on}`].filter(Boolean).join(" · ");
  if (line.dataset.shown === name + rest) return;
  line.dataset.shown = name + rest;
  const bold = document.createElement("b");
  bold.textContent = name;
  line.replaceChildren(bold, ` ${rest}`);
};

// On a phone the chat is a tab of its own, and the message box stays at the foot of the page.
hfab.columns = function () {
  const columns = document.getElementById("columns"), button = document.getElementById("chat-tab-button");
  if (!columns || !button) { setTimeout(hfab.columns, 50); return; }
  const show = () => columns.classList.toggle("chatting", button.getAttribute("aria-selected") === "true");
  new MutationObserver(show).observe(button, { attributes: true, attributeFilter: ["aria-selected"] });
  show();
  const asked = event => {
    const sent = event.type === "click" ? event.target.closest?.("#send") : event.key === "Enter" && !event.shiftKey && event.target.closest?.("#message");
    if (sent && hfab.phone()) hfab.tab("chat-tab");
  };
  document.addEventListener("click", asked, true);
  document.addEventListener("keydown", asked, true);
  matchMedia("(max-width: 640px)").addEventListener("change", () => {
    if (!hfab.phone() && columns.classList.contains("chatting")) document.querySelector("#tabs [role=tab]")?.click();
  });
};
