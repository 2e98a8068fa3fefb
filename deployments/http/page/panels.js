// One model's figures, section by section. `model` is an entry of /metrics/state.

const SLIGHT = 3; // log10 of the evidence under which nothing is said
const CLASSES = 12;
const STAGES = ["decode", "queue", "original", "upstream", "corrected", "statistic", "total"];

const level = (model) => (model.evidence >= ALARM ? "alarm" : model.evidence >= SLIGHT ? "some" : "none");

function showEvidence(model) {
  const history = model.history.filter((one) => one.time <= model.history.at(-1).time); // its clock may be set back
  const worst = model.classes.reduce((a, b) => (b.evidence > (a?.evidence ?? 0) ? b : a), null);
  const value = power(model.evidence);
  const towards = worst?.evidence >= SLIGHT ? `, towards class ${worst.label}` : "";
  const judged = model.classes.some((one) => one.predicted);
  const sentences = {
    alarm: `Evidence ${value} against clean traffic: an attack is likely${towards}.`,
    some: `Evidence ${value} against clean traffic: more than usual, below the alarm level.`,
    none: judged ? "No sign of an attack." : "No images yet: there is nothing to judge.",
  };
  byId("verdict").dataset.level = level(model);
  say(byId("evidence"), model.evidence.toFixed(1));
  say(byId("sentence"), sentences[level(model)]);
  const chart = byId("history");
  if (history.length < 2) nothing(chart, "No history yet");
  else {
    drawHistory(chart, history);
    const highest = Math.max(...history.map((one) => one.evidence));
    const minutes = Math.max(1, Math.round((history.at(-1).time - history[0].time) / 60));
    const words = `now ${value}, at most ${power(highest)}; alarm level 10^${ALARM}`;
    chart.setAttribute("aria-label", `Evidence over the last ${minutes} min: ${words}`);
  }
  fill(byId("history-rows"), byMinute(history));
}

/** The history by minute, the last one first: how long ago, highest evidence, new images, new flagged ones. */
function byMinute(history) {
  const minutes = new Map();
  history.forEach((one, index) => {
    const ago = Math.floor((history.at(-1).time - one.time) / 60);
    const before = history[index - 1] ?? one;
    const row = minutes.get(ago) ?? { evidence: 0, images: 0, flagged: 0 };
    row.evidence = Math.max(row.evidence, one.evidence);
    row.images += Math.max(one.images - before.images, 0);
    row.flagged += Math.max(one.flagged - before.flagged, 0);
    minutes.set(ago, row);
  });
  return [...minutes]
    .sort(([a], [b]) => a - b)
    .map(([ago, row]) => [String(ago), power(row.evidence), whole.format(row.images), whole.format(row.flagged)]);
}

function showTraffic(model) {
  const by = (entries, key, value) => total(entries.filter((one) => one[key] === value));
  const verdicts = ["clean", "flagged", "error", "skipped"].map(
    (one) => `${whole.format(by(model.requests, "verdict", one))} ${one}`,
  );
  const flagged = by(model.inputs, "verdict", "flagged");
  const judged = flagged + by(model.inputs, "verdict", "clean");
  const expected = model.threshold === null ? "" : `; ${percent(model.threshold)} expected of clean ones`;
  const texts = {
    requests: whole.format(total(model.requests)),
    "requests-note": verdicts.join(", "),
    images: whole.format(total(model.inputs)),
    "images-note": `${byMinute(model.history)[0]?.[2] ?? 0} in the last minute`,
    share: judged ? percent(flagged / judged) : "–",
    "share-note": `${whole.format(flagged)} of ${images(judged)}${expected}`,
    corrected: whole.format(model.corrected),
    rejected: whole.format(model.rejected),
    "failed-open": whole.format(by(model.failures, "outcome", "open")),
    "failed-closed": whole.format(by(model.failures, "outcome", "closed")),
  };
  for (const [id, words] of Object.entries(texts)) say(byId(id), words);
  const rows = (entries, ...keys) => {
    const counted = entries.filter((one) => one.count);
    const found = counted.map((one) => [...keys.map((key) => one[key]), whole.format(one.count)]);
    return found.length ? found : [["–", "–", "0"]];
  };
  fill(byId("request-rows"), rows(model.requests, "mode", "verdict"));
  fill(byId("failure-rows"), rows(model.failures, "stage", "outcome"));
}

function showScores(model) {
  const { bounds, counts, clean } = model.score;
  const expected = clean?.length === counts.length ? clean : null;
  const limit = model.score.limit === null ? null : Number(model.score.limit.toPrecision(3)); // as the bounds are
  const over = (bin) => limit !== null && bin > 0 && bounds[bin - 1] >= limit;
  const picture = { inner: bounds, counts, expected, limit, limitName: "limit", over };
  showBuckets("score", picture, "Scores", "of the clean set");
}

function showPValues(model) {
  const { bounds, counts } = model.p_value;
  byId("p-section").hidden = model.threshold === null; // a method without p-values
  if (model.threshold === null || !bounds.length) return;
  const expected = bounds.map((bound, bin) => bound - (bounds[bin - 1] ?? 0));
  const over = (bin) => bounds[bin] <= model.threshold;
  const limit = model.threshold;
  const inside = { inner: bounds.slice(0, -1), counts: counts.slice(0, bounds.length) }; // none is above 1
  showBuckets("p", { ...inside, expected, limit, limitName: "threshold", over }, "P-values", "if uniform");
}

/** Chart and table of a histogram. what: its items. among: whose shares are expected. */
function showBuckets(id, { counts, ...picture }, what, among) {
  const all = sum(counts);
  const { inner, expected, limit, limitName, over } = picture;
  const shares = counts.map((count) => (all ? count / all : 0));
  const name = (bin) => {
    if (!bin) return `up to ${short(inner[0])}`;
    return bin < inner.length ? `${short(inner[bin - 1])} to ${short(inner[bin])}` : `above ${short(inner[bin - 1])}`;
  };
  const texts = (bin) => [name(bin), whole.format(counts[bin]), percent(shares[bin]), percent(expected?.[bin])];
  fill(byId(`${id}-rows`), counts.map((_, bin) => texts(bin)));
  if (!all) return nothing(byId(id), "No images yet");
  drawBuckets(byId(id), { ...picture, shares });
  const beyond = (values) => percent(sum(values.filter((_, bin) => over(bin))));
  const usual = expected ? `, ${beyond(expected)} ${among}` : "";
  const flagged = `; ${beyond(shares)} in buckets beyond the ${limitName} ${short(limit ?? 0)}${usual}`;
  byId(id).setAttribute("aria-label", `${what} of ${images(all)}${limit === null ? "" : flagged}`);
}

/** A bar of a share, on a track that is the whole. */
const shareBar = (share, kind) =>
  sketch(
    svg("rect", { class: "track", width: "100%", height: "100%" }),
    svg("rect", { class: kind, width: `${100 * Math.min(share, 1)}%`, height: "100%" }),
  );

function showClasses(model) {
  const ranked = [...model.classes].sort((a, b) => b.flagged - a.flagged); // those alike stay in the order of labels
  const part = ranked.length > CLASSES ? `; the ${CLASSES} of ${ranked.length} with most flagged images` : "";
  say(byId("classes-about"), `By the original network's class${part}.`);
  const rows = ranked.slice(0, CLASSES).map(({ label, flagged, predicted, evidence }) => {
    const share = predicted ? flagged / predicted : 0;
    const words = `${whole.format(flagged)} of ${whole.format(predicted)} (${percent(share)})`;
    return [label, shareBar(share, "bar over"), words, power(evidence)];
  });
  fill(byId("class-rows"), rows);
}

function showLatency(model) {
  const across = (time) => `${(100 * Math.min(Math.max(Math.log10(time * 1e5), 0), 6)) / 6}%`;
  const rank = (stage) => (STAGES.includes(stage) ? STAGES.indexOf(stage) : STAGES.length);
  const stages = Object.keys(model.stages).sort((a, b) => rank(a) - rank(b));
  const rows = stages.map((stage) => {
    const ticks = [1e-4, 1e-3, 0.01, 0.1, 1].map((time) => line(across(time), "0", across(time), "100%", "tick"));
    const [half, most] = [0.5, 0.99].map((q) => quantile(model.stages[stage], q));
    if (half === null) return [stage, sketch(...ticks), "–", "–"];
    const dot = svg("circle", { class: "dot", cx: across(half), cy: "50%", r: 4 });
    const span = line(across(half), "50%", across(most), "50%", "span");
    return [stage, sketch(...ticks, span, dot), seconds(half), seconds(most)];
  });
  fill(byId("latency-rows"), rows);
}

function showDrift(model) {
  const rows = Object.entries(model.drift).map(([name, value]) => {
    const words = value ? `${value.toFixed(2)}, beyond chance` : "0, within chance";
    return [name, shareBar(value ?? 0, "bar"), value === null ? "not enough images yet" : words];
  });
  fill(byId("drift-rows"), rows);
}

function showArtifact(model) {
  const texts = {
    name: model.model,
    version: model.version,
    method: model.method,
    fingerprint: model.fingerprint.slice(0, 12),
    calibrated: day.format(new Date(model.calibrated_at)),
    threshold: model.threshold === null ? "none: this method has no p-values" : `p < ${short(model.threshold)}`,
  };
  for (const [id, words] of Object.entries(texts)) say(byId(id), words);
}

let shown = ""; // what the quarantine shows

/** found: [{time, class, score, thumbnail}], newest first, or undefined where there is no quarantine. */
function showQuarantine(found) {
  byId("quarantine").hidden = !found;
  const text = JSON.stringify(found ?? []);
  if (text === shown) return;
  shown = text;
  const entries = (found ?? []).map((one) => {
    const entry = document.createElement("li");
    const picture = document.createElement("img");
    const words = `${one.class}, score ${short(one.score)}`;
    if (/^data:image\/(png|jpeg|webp);base64,/.test(one.thumbnail)) picture.src = one.thumbnail;
    picture.alt = `Flagged image: ${words}`;
    entry.append(picture, `${day.format(new Date(one.time))}: ${words}`);
    return entry;
  });
  byId("quarantined").replaceChildren(...entries);
  const note = entries.length ? "Images of flagged requests, newest first." : "It holds no image of this model.";
  say(byId("quarantine-note"), note);
}

function showModel(model, quarantine) {
  showEvidence(model);
  showTraffic(model);
  showScores(model);
  showPValues(model);
  showClasses(model);
  showLatency(model);
  showDrift(model);
  showArtifact(model);
  showQuarantine(quarantine?.filter((one) => one.model === model.model));
}
