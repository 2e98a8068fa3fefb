// The drawings. Each is drawn anew at the width that it has, so that letters keep their size.

const ALARM = 9; // log10 of the evidence at which an attack is likely
const TOP = 12; // the evidence goes no higher
const GAP_S = 15; // without a look for longer the line is broken

const line = (x1, y1, x2, y2, kind) => svg("line", { x1, y1, x2, y2, class: kind });
const text = (x, y, words, anchor = "middle", kind = "") =>
  svg("text", { x, y, "text-anchor": anchor, class: kind }, words);

/** The room for a drawing inside `chart`, in pixels. */
function room(chart) {
  const { width, height } = chart.getBoundingClientRect();
  return { left: 40, right: width - 10, top: 20, bottom: height - 24 };
}

function nothing(chart, words) {
  const { left, right, top, bottom } = room(chart);
  chart.replaceChildren(line(left, bottom, right, bottom, "axis"), text((left + right) / 2, (top + bottom) / 2, words));
  chart.setAttribute("aria-label", words);
}

/** Evidence over time. history: [{time, evidence}], rising in time, of which there are two or more. */
function drawHistory(chart, history) {
  const { left, right, top, bottom } = room(chart);
  const end = history.at(-1).time;
  const span = Math.max(end - Math.min(...history.map((one) => one.time)), 60);
  const across = (time) => right - ((end - time) / span) * (right - left);
  const up = (evidence) => bottom - (evidence / TOP) * (bottom - top);
  const parts = [];
  for (const exponent of [0, 3, 6, 9, 12]) {
    parts.push(line(left, up(exponent), right, up(exponent), exponent ? "grid" : "axis"));
    const label = text(left - 6, up(exponent) + 4, "10", "end");
    label.append(svg("tspan", { dy: -5, "font-size": 9 }, String(exponent)));
    parts.push(label);
  }
  const every = [15, 60, 120, 300, 600, 1800].find((step) => span / step <= (right - left) / 90) ?? 3600;
  for (let ago = 0; ago <= span; ago += every) {
    const words = ago === 0 ? "now" : every < 60 ? `−${ago} s` : `−${ago / 60} min`;
    parts.push(text(across(end - ago), bottom + 17, words, ago === 0 ? "end" : "middle"));
  }
  for (const piece of pieces(history)) {
    const points = piece.map(({ time, evidence }) => `${across(time).toFixed(1)},${up(evidence).toFixed(1)}`);
    const [first, last] = [across(piece[0].time), across(piece.at(-1).time)];
    parts.push(svg("path", { class: "area", d: `M${first},${bottom}L${points.join("L")}L${last},${bottom}Z` }));
    parts.push(svg("path", { class: "curve", d: `M${points.join("L")}` }));
  }
  parts.push(line(left, up(ALARM), right, up(ALARM), "limit"), text(left + 4, up(ALARM) - 5, "alarm level", "start"));
  chart.replaceChildren(...parts);
}

/** The history, parted where nobody looked for a while. */
function pieces(history) {
  const found = [];
  history.forEach((one, index) => {
    const step = one.time - history[index - 1]?.time;
    if (!(step >= 0 && step <= GAP_S)) found.push([]);
    found.at(-1).push(one);
  });
  return found;
}

/**
 * A histogram of bars of equal width, one a bucket. inner: the bounds between them. shares: one a bucket. expected: as
 * many, or null. limit: a value, or null. over: whether a bucket is flagged.
 */
function drawBuckets(chart, { inner, shares, expected, limit, limitName, over }) {
  const { left, right, top, bottom } = room(chart);
  const step = (right - left) / shares.length;
  const highest = Math.max(...shares, ...(expected ?? []));
  const ceiling = [0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8].find((one) => one >= highest) ?? 1;
  const up = (share) => bottom - (share / ceiling) * (bottom - top);
  const parts = [];
  for (const share of [0, ceiling / 2, ceiling]) {
    parts.push(line(left, up(share), right, up(share), share ? "grid" : "axis"));
    parts.push(text(left - 6, up(share) + 4, share ? `${short(100 * share)}%` : "0", "end"));
  }
  shares.forEach((share, bin) => {
    const height = share && Math.max(bottom - up(share), 1);
    const place = { x: left + bin * step + 1, y: bottom - height, width: Math.max(step - 2, 1), height };
    parts.push(svg("rect", { ...place, class: over(bin) ? "bar over" : "bar" }));
  });
  if (expected) {
    const steps = expected.map((share, bin) => `V${up(share)}H${left + (bin + 1) * step}`);
    parts.push(svg("path", { class: "expected", d: `M${left},${bottom}${steps.join("")}V${bottom}` }));
  }
  let free = left - 20;
  inner.forEach((bound, index) => {
    const [x, words] = [left + (index + 1) * step, short(bound)];
    const half = 3.6 * words.length;
    if (x - half < free || x + half > right + 8) return;
    parts.push(line(x, bottom, x, bottom + 4, "axis"), text(x, bottom + 17, words));
    free = x + half + 8;
  });
  if (limit !== null) {
    const x = left + along(inner, limit) * step;
    const late = x > (left + right) / 2;
    parts.push(line(x, top - 6, x, bottom, "limit"));
    parts.push(text(x + (late ? -5 : 5), top - 8, `${limitName} ${short(limit)}`, late ? "end" : "start", "strong"));
  }
  chart.replaceChildren(...parts);
}

/** Where `value` lies, in buckets from the left; in an open one, in its middle. */
function along(inner, value) {
  const bin = inner.findIndex((bound) => value <= bound);
  if (bin === -1) return inner.length + 0.5;
  if (value === inner[bin]) return bin + 1;
  return bin ? bin + (value - inner[bin - 1]) / (inner[bin] - inner[bin - 1]) : 0.5;
}
