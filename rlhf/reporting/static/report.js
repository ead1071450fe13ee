// Draws the plots of a report from the JSON beside it, a group when it is opened, and the parts of sessions. Holds no data
// and fetches nothing. `drawParts` is in the same script.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const drawn = [];

  function tell(value) {
    if (value == null) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
    return String(Number(value.toPrecision(4)));
  }

  function bands(plot, ranges) {
    const { ctx, bbox } = plot;
    ctx.save();
    for (const [first, last, severity] of ranges) {
      const left = Math.max(plot.valToPos(first, "x", true), bbox.left);
      const right = Math.min(Math.max(plot.valToPos(last, "x", true), left + 3), bbox.left + bbox.width);
      ctx.globalAlpha = 0.13;
      ctx.fillStyle = css("--" + severity);
      if (right > left) ctx.fillRect(left, bbox.top, right - left, bbox.height);
    }
    ctx.restore();
  }

  function draw(place) {
    const found = data.groups[place.dataset.group].plots[place.dataset.plot];
    const runs = data.groups[place.dataset.group].runs;
    const few = found.x.length < 40;
    const axis = { stroke: css("--dim"), grid: { stroke: css("--line"), width: 1 }, ticks: { stroke: css("--line") } };
    const series = runs.map((run, index) => ({
      label: runs.length > 1 ? run.name : "value", stroke: run.color, width: 1.6, spanGaps: true,
      points: { show: few || found.y[index].filter((y) => y != null).length < 40, size: 5 }, value: (_, y) => tell(y),
    }));
    const options = {
      width: Math.max(place.clientWidth, 200), height: 170,
      scales: { x: { time: false } },
      axes: [{ ...axis, size: 34, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 1e6] },
             { ...axis, size: 58, values: (_, ticks) => ticks.map(tell) }],
      series: [{ label: "step" }, ...series],
      cursor: { sync: { key: "step" + place.dataset.group } },
      hooks: { drawClear: [(plot) => bands(plot, found.bands)] },
    };
    const plot = new uPlot(options, [found.x, ...found.y], place);
    drawn.push({ plot, place });
  }

  function show(root) {
    for (const place of root.querySelectorAll(".canvas")) {
      const fold = place.closest("details");
      if (place.childElementCount === 0 && (!fold || fold.open)) draw(place);
    }
  }

  function again() {
    for (const { plot, place } of drawn.splice(0)) { plot.destroy(); place.replaceChildren(); }
    show(document);
  }

  for (const place of document.querySelectorAll(".session")) {
    const tokens = JSON.parse(place.dataset.tokens);
    drawParts(place, tokens, tokens.ids.length, (block, i) => block.append(tokens.texts[i]));
  }

  document.addEventListener("toggle", (event) => { if (event.target.open) show(event.target); }, true);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  let waiting = 0;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(again, 200); });
  addEventListener("beforeprint", () => { for (const fold of document.querySelectorAll("details.group")) fold.open = true; });
  show(document);
  document.documentElement.dataset.drawn = drawn.length;
})();
