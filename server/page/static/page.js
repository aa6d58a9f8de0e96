// Keeps the page up to date. The server draws everything; this fetches the page again when a round has ended
// and replaces the parts that changed, so there is one implementation of every chart.

const LEAST_MS_BETWEEN = 1000; // however fast rounds come
const LOOK_FOR_RUNS_MS = 10_000; // while nothing is running

const status = document.getElementById("state");
const drawn = new Map(parts(document).map((part) => [part.id, part.innerHTML]));
let source;
let pending;
let refreshed = 0;

function parts(page) {
  return [...page.querySelectorAll("[data-live]")];
}

function form() {
  return document.getElementById("choose");
}

function say(state, text) {
  status.dataset.state = state;
  if (status.textContent !== text) status.textContent = text;
}

function refreshSoon() {
  pending ??= setTimeout(refresh, Math.max(0, refreshed + LEAST_MS_BETWEEN - Date.now()));
}

async function refresh() {
  clearTimeout(pending);
  pending = undefined;
  refreshed = Date.now();
  const address = location.href;
  const answer = await fetch(address).catch(() => undefined);
  if (!answer?.ok) return say("lost", "the observer does not answer");
  const page = new DOMParser().parseFromString(await answer.text(), "text/html");
  if (address !== location.href) return; // chosen anew in the meantime: that answer is on its way
  if (!form() && page.getElementById("choose")) return location.reload();
  replaceParts(page);
  if (!form() || !page.getElementById("choose")) return;
  replaceChoices(page.getElementById("choose"));
  document.title = page.title;
  await loadSpaces();
}

function replaceParts(page) {
  const fresh = parts(page);
  const main = document.getElementById("main");
  for (const part of fresh) {
    const old = document.getElementById(part.id);
    if (drawn.get(part.id) !== part.innerHTML) {
      drawn.set(part.id, part.innerHTML);
      if (old) keepingPlace(old, () => old.replaceChildren(...part.childNodes));
      else main.append(part);
    }
  }
  parts(document).slice(fresh.length).forEach((part) => {
    drawn.delete(part.id);
    part.remove();
  });
}

// What a reader opened, scrolled to or stands on stays as it is.
function keepingPlace(part, change) {
  const places = "summary, .scroll, a";
  const focus = [...part.querySelectorAll(places)].indexOf(document.activeElement);
  const open = [...part.querySelectorAll("details")].map((one) => one.open);
  const scrolled = [...part.querySelectorAll(".scroll")].map((one) => [one.scrollLeft, one.scrollTop]);
  change();
  part.querySelectorAll("details").forEach((one, index) => (one.open = open[index] ?? false));
  part.querySelectorAll(".scroll").forEach((one, index) => one.scrollTo(...(scrolled[index] ?? [0, 0])));
  if (focus >= 0) part.querySelectorAll(places)[focus]?.focus({ preventScroll: true });
}

function replaceChoices(fresh) {
  for (const select of fresh.querySelectorAll("select")) {
    const old = document.getElementById(select.id);
    const { value } = select; // before its options move
    if (old.innerHTML !== select.innerHTML) old.replaceChildren(...select.childNodes);
    old.value = value;
  }
  const moved = form().dataset.run !== fresh.dataset.run;
  Object.assign(form().dataset, fresh.dataset);
  if (moved) follow();
}

async function loadSpaces() {
  for (const place of document.querySelectorAll("[data-src]")) {
    const answer = await fetch(place.dataset.src).catch(() => undefined);
    if (!answer?.ok) continue;
    const text = await answer.text();
    if (drawn.get(place) === text) continue;
    drawn.set(place, text);
    keepingPlace(place, () => (place.innerHTML = text)); // the server escapes what it was told
  }
}

function follow() {
  source?.close();
  source = undefined;
  const { run, newest, state } = form()?.dataset ?? {};
  if (run && !["running", "lost"].includes(state)) return say(state, state);
  const address = run
    ? `api/runs/${encodeURIComponent(run)}/events?from=${Number(newest) + 1}`
    : "api/events";
  source = new EventSource(address);
  source.addEventListener("open", () => say("live", "live"));
  source.addEventListener("error", () => {
    if (source.readyState !== EventSource.CLOSED) return say("lost", "connection lost, trying again");
    source = undefined; // refused, as where there are too many readers: the timer below goes on
    say("waiting", "not live: looking every ten seconds");
  });
  source.addEventListener("round", ({ data }) => {
    const round = JSON.parse(data);
    say("live", `live: round ${round.round} of ${round.rounds}`);
    refreshSoon();
  });
  source.addEventListener("state", ({ data }) => {
    if (!form()) refreshSoon(); // runs in their first round
    if (data !== "lost" && status.dataset.state !== "lost") return;
    if ((data === "lost") !== (status.dataset.state === "lost")) refreshSoon();
    say(...(data === "lost" ? ["lost", "lost: the process of the run is gone"] : ["live", "live"]));
  });
  source.addEventListener("end", () => {
    source.close();
    source = undefined;
    say("finished", "the run has ended");
  });
}

function choose({ target }) {
  if (target.name === "run") form().elements.round.value = "";
  const chosen = [...new FormData(form())].filter(([, value]) => value);
  history.replaceState(null, "", `?${new URLSearchParams(chosen)}`);
  refresh();
}

if (form()) {
  form().classList.add("scripted"); // every choice is shown at once: no button is needed
  form().addEventListener("change", choose);
}
setInterval(() => source ?? refresh(), LOOK_FOR_RUNS_MS);
follow();
loadSpaces();
