// Asking the server, again and again, and saying how that goes.

const EVERY_MS = 2000;
const PATIENCE_MS = 8000;
const LATE_S = 10; // without a look at the counters for longer the figures are old
const KEY = "guard-key";
// Beside the page, whatever a proxy in front puts before both.
const STATE = location.pathname.replace(/\/guard\/?$/, "/metrics/state");

let state = null; // the last answer
let answered = null; // when it came
let timer = 0;

/** One of the parts of the page, or none of them. */
function show(part) {
  for (const id of ["locked", "empty", "figures"]) byId(id).hidden = id !== part;
  byId("footer").hidden = part === "locked";
  byId("forget").hidden = !sessionStorage.getItem(KEY);
}

function status(kind, text, updated = "") {
  byId("status").dataset.state = kind;
  say(byId("status-text"), text);
  say(byId("updated"), updated);
}

/** Ask once, and say how it went. */
async function ask() {
  const key = sessionStorage.getItem(KEY);
  const headers = key ? { Authorization: `Bearer ${key}` } : {};
  try {
    const answer = await fetch(STATE, { headers, cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
    if (answer.status === 401 || answer.status === 403) return lock(key, answer.status);
    if (!answer.ok) return trouble(`Answer ${answer.status} from ${STATE}`);
    state = await answer.json();
  } catch {
    return trouble("No answer");
  }
  answered = new Date();
  draw();
  timer = setTimeout(ask, EVERY_MS);
}

/** What is wrong, and of when the figures are; short, so that the page below stays where it is. */
function trouble(text) {
  status("trouble", `${text}${answered ? ` since ${clock.format(answered)}` : " yet"}: trying.`);
  timer = setTimeout(ask, EVERY_MS);
}

/** Nothing is shown, or asked again, before there is another key. */
function lock(key, code) {
  sessionStorage.removeItem(KEY);
  state = null;
  status("waiting", "This server wants a key.");
  show("locked");
  const unfit = code === 403 ? "This key has another role than administration." : "The server does not know this key.";
  say(byId("key-error"), key ? unfit : "");
  byId("key").focus();
}

/** The last answer, at the width of now. */
function draw() {
  if (!state) return;
  if (!state.models.length) {
    show("empty");
    status("live", "Connected.", `Updated ${clock.format(answered)}`);
    return;
  }
  show("figures");
  choose();
  const model = state.models.find((one) => one.model === byId("model").value);
  showModel(model, state.quarantine);
  const looked = model.history.at(-1)?.time ?? state.time;
  if (state.time - looked > LATE_S) {
    status("trouble", `Old figures: not counted since ${clock.format(looked * 1000)}.`);
  } else status("live", "Live.", `Updated ${clock.format(answered)}`);
  announce();
}

/** The selector offers the models there are, and keeps what was chosen, at first what the address says. */
function choose() {
  const select = byId("model");
  const names = state.models.map((one) => one.model);
  if (names.join("\n") !== [...select.options].map((one) => one.value).join("\n")) {
    const chosen = select.value || location.hash.slice(1);
    const wanted = names.find((name) => [name, encodeURIComponent(name)].includes(chosen));
    select.replaceChildren(...names.map((name) => new Option(name, name)));
    select.value = wanted ?? names[0];
  }
  state.models.forEach((one, index) => {
    say(select.options[index], level(one) === "alarm" ? `${one.model} (alarm)` : one.model);
  });
  byId("choice").hidden = names.length < 2;
  say(byId("alone"), names.length < 2 ? `Model ${names[0]}` : "");
}

/** Alarms of all models, in the title and, once, to who listens. */
function announce() {
  const alarms = state.models.filter((one) => level(one) === "alarm").map((one) => one.model);
  say(byId("announcement"), alarms.length ? `An attack is likely: ${alarms.join(", ")}` : "");
  document.title = alarms.length ? `Attack likely: ${alarms.join(", ")} – the guard` : "The guard";
}

byId("model").addEventListener("change", () => {
  history.replaceState(null, "", `#${encodeURIComponent(byId("model").value)}`);
  draw();
});
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const key = byId("key").value.trim();
  if (!/^[!-~]+$/.test(key)) return say(byId("key-error"), "A key has letters, digits and signs, without spaces.");
  byId("key").value = "";
  sessionStorage.setItem(KEY, key);
  clearTimeout(timer);
  ask();
});
byId("forget").addEventListener("click", () => {
  sessionStorage.removeItem(KEY);
  location.reload();
});
addEventListener("resize", draw);
ask();
