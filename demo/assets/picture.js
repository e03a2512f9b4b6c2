// The outcome of a race as a picture: copied, or downloaded where the browser copies no pictures.
hfab.drawRace = function (kept, ratio, told) {
  const canvas = document.createElement("canvas"), width = 1200, height = 630;
  canvas.width = width;
  canvas.height = height;
  const context = canvas.getContext("2d"), font = (size, weight = 400) => { context.font = `${weight} ${size}px system-ui, sans-serif`; };
  context.fillStyle = "#0f172a";
  context.fillRect(0, 0, width, height);
  context.fillStyle = "#2dd4bf";
  font(120, 700);
  context.fillText(ratio, 60, 150);
  const after = 60 + context.measureText(ratio).width + 30;
  context.fillStyle = "#f1f5f9";
  font(34, 600);
  context.fillText("as fast as one by one", after, 105);
  context.fillStyle = "#94a3b8";
  font(24);
  context.fillText(document.querySelector("[data-model]")?.innerText || "", after, 145);
  const longest = Math.max(...Object.values(kept.outcomes).map(outcome => outcome.seconds));
  hfab.WAYS.forEach(([way, name], i) => {
    const y = 215 + i * 72, outcome = kept.outcomes[way];
    context.fillStyle = "#f1f5f9";
    font(26, 600);
    context.fillText(name, 60, y + 30);
    context.fillStyle = way.length > 1 ? "#64748b" : "#2dd4bf";
    context.fillRect(330, y, Math.max(6, (560 * outcome.seconds) / longest), 42);
    context.fillStyle = "#cbd5e1";
    font(22);
    context.fillText(`${hfab.number(outcome.seconds, 1)} s · ${hfab.number(outcome.tokens_per_second, 0)} tokens/s`, 910, y + 30);
  });
  context.fillStyle = "#94a3b8";
  font(20);
  const words = told.replace("as fast as one by one. ", "").split(" ");
  let line = "", y = 535;
  for (const word of words) {
    if (context.measureText(`${line} ${word}`).width > width - 120) { context.fillText(line, 60, y); line = ""; y += 28; }
    line = line ? `${line} ${word}` : word;
  }
  context.fillText(line, 60, y);
  context.fillText("hf_async_batching", width - 60 - context.measureText("hf_async_batching").width, 605);
  return canvas;
};

hfab.copyPicture = async function (kept, ratio, told) {
  const canvas = hfab.drawRace(kept, ratio, told);
  const blob = await new Promise(resolve => canvas.toBlob(resolve, "image/png"));
  try {
    await navigator.clipboard.write([new ClipboardItem({ "image/png": blob })]);
    return "Copied.";
  } catch {
    hfab.download(blob, "hf_async_batching-race.png");
    return "Downloaded.";
  }
};

hfab.download = function (blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};
