// The list of runs.
import { duration, element, find, follow, moment, runAddress, setText, times, whole } from "./common.js";

function card(run) {
  const heading = element("h2", {}, element("a", { text: run.run_id, href: runAddress(run.run_id) }));
  const state = element("span", { text: run.state, class: `state ${run.state}` });
  const ranks = run.state === "training" || run.state === "joining"
    ? `${run.connected_ranks} of ${run.ranks} ranks connected` : `${run.ranks} ranks`;
  const start = run.epoch > 1 ? ` · started again ${times(run.epoch - 1)}` : "";
  const parts = [state, ` step ${whole(run.last_step)} · ${ranks}${start}`];
  const names = (role) => run.networks.filter((n) => n.role === role).map((n) => n.name).join(", ");
  const made = element("li", {}, heading, element("p", {}, ...parts));
  made.append(element("p", { class: "soft", text: `teachers: ${names("teacher") || "none"} · students: ${names("student") || "none"}` }));
  const took = run.ended_at && run.started_at ? `, took ${duration(run.ended_at - run.started_at)}` : "";
  made.append(element("p", { class: "soft", text: `started ${moment(run.started_at)}${took}` }));
  if (run.failure) made.append(element("p", { class: "failure", text: run.failure }));
  return made;
}

const shown = new Map(); // by run: its document as text, and its card

function show({ runs, truncated }) {
  const list = find("runs");
  const ids = new Set(runs.map((run) => run.run_id));
  for (const [id, old] of shown) {
    if (!ids.has(id)) { old.card.remove(); shown.delete(id); }
  }
  runs.forEach((run, place) => {
    const text = JSON.stringify(run);
    let known = shown.get(run.run_id);
    if (!known || known.text !== text) {
      const made = card(run);
      if (known) { // the link keeps the keyboard's focus
        const had = known.card.contains(document.activeElement);
        known.card.replaceWith(made);
        if (had) made.querySelector("a").focus();
      }
      known = { text, card: made };
      shown.set(run.run_id, known);
    }
    if (list.children[place] !== known.card) list.insertBefore(known.card, list.children[place] || null);
  });
  find("empty").hidden = runs.length > 0;
  const live = runs.filter((run) => run.state === "training" || run.state === "joining").length;
  setText(find("count"), runs.length ? `${live} running, ${runs.length - live} ended${truncated ? "; older ones are not listed" : ""}` : "");
}

follow("api/events", (event, data) => { if (event === "runs") show(data); });
