"use strict";
// The browser of cases. Everything shown comes from a run and is untrusted: it enters the page as text, never as markup.
const OUTCOMES = {
  valid: ["✓", "good", "right, derivation valid"],
  unchecked: ["○", "mixed", "right, derivation not checkable"],
  invalid: ["≈", "mixed", "right, derivation not valid"],
  missed: ["✗", "bad", "not reached"],
};
const RANK = Object.keys(OUTCOMES);
const PAGE = 100;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

async function unpack(text) {
  const bytes = Uint8Array.from(atob(text.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

function mark(kind) {
  const [sign, tone, words] = OUTCOMES[kind];
  return el("span", { class: `mark ${tone}`, title: words }, sign);
}

function option(value, text) {
  return el("option", { value }, text);
}

class Browser {
  constructor(root, data) {
    this.root = root;
    this.key = root.dataset.key;
    this.data = data;
    this.find = (name) => root.querySelector(`[data-part="${name}"]`);
    this.sort = { column: "order", down: false };
    this.limit = PAGE;
    this.open = null;
    this.controls();
    this.draw();
    const wanted = decodeURIComponent(location.hash.slice(1));
    const at = data.prompts.findIndex((p) => `${this.key}/${p.id}` === wanted);
    if (at >= 0) this.show(at);
  }

  controls() {
    const arms = this.find("arm");
    arms.append(option("", "any strategy"), ...this.data.arms.map((arm) => option(arm, arm)));
    const kinds = new Set();
    const guards = new Set();
    for (const prompt of this.data.prompts) {
      for (const entry of Object.values(prompt.arms)) {
        kinds.add(entry.outcome);
        for (const code of (entry.guard || "").split(",")) if (code) guards.add(code);
      }
    }
    this.find("outcome").append(
      option("", "any outcome"),
      ...RANK.filter((kind) => kinds.has(kind)).map((kind) => option(kind, OUTCOMES[kind][2])),
    );
    this.find("guard").append(
      option("", "any guard"), option("admitted", "admitted"), ...[...guards].sort().map((code) => option(code, code)),
    );
    for (const name of ["arm", "outcome", "guard", "text"]) {
      this.find(name).addEventListener("input", () => { this.limit = PAGE; this.draw(); });
    }
  }

  matching() {
    const arm = this.find("arm").value;
    const kind = this.find("outcome").value;
    const guard = this.find("guard").value;
    const text = this.find("text").value.toLowerCase();
    const rows = this.data.prompts.map((prompt, index) => ({ prompt, index })).filter(({ prompt }) => {
      const entries = arm ? [prompt.arms[arm]].filter(Boolean) : Object.values(prompt.arms);
      const fits = entries.some((entry) =>
        (!kind || entry.outcome === kind) &&
        (!guard || (guard === "admitted" ? entry.admitted > 0 : (entry.guard || "").split(",").includes(guard))));
      if (!fits) return false;
      if (!text) return true;
      const parts = [prompt.id, prompt.prompt, prompt.answer, ...entries.map((entry) => entry.text)];
      return parts.some((part) => part.toLowerCase().includes(text));
    });
    const { column, down } = this.sort;
    const value = ({ prompt, index }) => {
      if (column === "order") return index;
      if (column === "hits") return -Object.values(prompt.arms).reduce((sum, entry) => sum + entry.hits, 0);
      const entry = prompt.arms[column];
      return entry ? RANK.indexOf(entry.outcome) - entry.hits / (entry.of + 1) : RANK.length;
    };
    rows.sort((a, b) => (value(a) - value(b) || a.index - b.index) * (down ? -1 : 1));
    return rows;
  }

  draw() {
    const rows = this.matching();
    const head = (column, text) => {
      const own = this.sort.column === column;
      const button = el("button", { type: "button" }, text, own ? (this.sort.down ? " ↓" : " ↑") : "");
      button.addEventListener("click", () => {
        this.sort = { column, down: own && !this.sort.down };
        this.draw();
      });
      return el("th", { scope: "col", "aria-sort": own ? (this.sort.down ? "descending" : "ascending") : null }, button);
    };
    const body = rows.slice(0, this.limit).map(({ prompt, index }) => {
      const button = el("button", { type: "button", class: "gist", title: prompt.id }, prompt.prompt);
      button.addEventListener("click", () => this.show(index, true));
      const cells = this.data.arms.map((arm) => {
        const entry = prompt.arms[arm];
        return el("td", {}, ...(entry ? [mark(entry.outcome), el("small", {}, ` ${entry.hits}/${entry.of}`)] : ["–"]));
      });
      return el("tr", { "data-prompt": prompt.id, class: index === this.open ? "open" : null },
        el("th", { scope: "row" }, button), el("td", {}, el("code", {}, prompt.answer)), ...cells);
    });
    this.find("table").replaceChildren(
      el("thead", {}, el("tr", {}, head("order", "Prompt"), el("th", { scope: "col" }, "Answer"),
        ...this.data.arms.map((arm) => head(arm, arm)))),
      el("tbody", {}, ...body),
    );
    this.find("count").textContent = `${rows.length} of ${this.data.prompts.length} prompts`;
    const more = this.find("more");
    more.hidden = rows.length <= this.limit;
    more.onclick = () => { this.limit += PAGE; this.draw(); };
  }

  show(index, go = false) {
    this.open = index;
    const prompt = this.data.prompts[index];
    const arms = Object.keys(prompt.arms);
    const chosen = this.find("arm").value;
    const best = [...arms].sort((a, b) => RANK.indexOf(prompt.arms[a].outcome) - RANK.indexOf(prompt.arms[b].outcome));
    const left = prompt.arms[chosen] ? chosen : best[0];
    const panes = [this.pane(prompt, left), this.pane(prompt, arms.find((arm) => arm !== left) || "")];
    const close = el("button", { type: "button" }, "close");
    close.addEventListener("click", () => { this.open = null; this.find("case").replaceChildren(); this.draw(); });
    const target = this.find("case");
    target.replaceChildren(
      el("div", { class: "bar" }, el("h4", {}, prompt.id), close),
      el("h5", {}, "Prompt ", el("small", {}, "answer ", el("code", {}, prompt.answer))),
      el("pre", { tabindex: 0 }, prompt.prompt),
      el("div", { class: "panes" }, ...panes),
    );
    this.draw();
    if (go) {
      history.replaceState(null, "", `#${encodeURIComponent(`${this.key}/${prompt.id}`)}`);
      target.scrollIntoView({ block: "start", behavior: "smooth" });
    }
  }

  pane(prompt, arm) {
    const select = el("select", { "aria-label": "Strategy" }, option("", "nothing beside it"),
      ...Object.keys(prompt.arms).map((name) => option(name, name)));
    select.value = arm;
    const content = el("div", {});
    const fill = () => content.replaceChildren(...(select.value ? this.entry(prompt, prompt.arms[select.value]) : []));
    select.addEventListener("input", fill);
    fill();
    return el("section", { class: "pane" }, select, content);
  }

  entry(prompt, entry) {
    const failed = prompt.failed[entry.parent] || Object.values(prompt.failed)[0];
    const nodes = [
      el("p", {}, mark(entry.outcome), ` ${OUTCOMES[entry.outcome][2]}; got `,
        entry.extracted === null ? "no answer" : el("code", {}, entry.extracted),
        `; ${entry.hits} of ${entry.of} samples reach the target`,
        entry.target !== prompt.answer ? el("span", {}, ", aimed at ", el("code", {}, entry.target)) : null),
    ];
    if (entry.guard) {
      nodes.push(el("p", { class: "notice" }, "Kept out of the training data by ",
        el("code", {}, entry.guard.split(",").join(", ")), "."));
    }
    if (failed) {
      nodes.push(el("h5", {}, "Failed rollout ", failed[1] === null ? null :
        el("small", {}, "answered ", el("code", {}, failed[1]))), el("pre", { tabindex: 0 }, failed[0]));
    }
    if (entry.heat) nodes.push(...this.heat(entry));
    const logprobs = entry.logprob === null ? null : el("small", {}, `mean log-prob ${entry.logprob.toFixed(2)} as sampled`,
      entry.plain === null ? "" : `, ${entry.plain.toFixed(2)} under the plain prefix`);
    nodes.push(el("h5", {}, entry.outcome === "missed" ? "Continuation " : "Trajectory ", logprobs),
      el("pre", { tabindex: 0 }, entry.prefix ? el("span", { class: "prefix" }, entry.prefix) : null, entry.text));
    if (entry.prefix) {
      nodes.push(el("p", { class: "legend" }, el("span", { class: "prefix" }, "shaded"), entry.latent ?
        ": the prefix as plain tokens (the mixture was fed); the rest was sampled." : ": the prefix; the rest was sampled."));
    }
    if (entry.steps.length) {
      const state = (ok) => (ok === null ? ["unchecked", "·", "not checked"] : ok ? ["ok", "✓", "holds"] :
        ["bad", "✗", "does not hold"]);
      nodes.push(el("h5", {}, "Checked steps"), el("ol", { class: "steps" }, ...entry.steps.map(([text, ok]) => {
        const [name, sign, words] = state(ok);
        return el("li", { class: name }, el("span", { "aria-label": words }, sign), " ", el("code", {}, text));
      })));
    }
    nodes.push(el("p", { class: "legend" }, "Sample ", el("code", {}, entry.sample)));
    return nodes;
  }

  heat(entry) {
    const { columns, of } = entry.heat;
    if (!columns.length) return [];
    const piece = (at) => this.data.pieces[at];
    const depth = Math.max(...columns.map((column) => column.atoms.length));
    const line = (name, cells) => el("tr", { class: name.split(" ")[0] }, el("th", { scope: "row" }, name), ...cells);
    const rows = [line("original", columns.map((column) => el("td", {}, piece(column.original))))];
    for (let rank = 0; rank < depth; rank++) {
      rows.push(line(`atom ${rank + 1}`, columns.map((column) => {
        const atom = column.atoms[rank];
        if (!atom) return el("td", {});
        const [text, weight, kept] = atom;
        const cell = el("td", { class: kept ? "atom kept" : "atom", title: `weight ${weight.toFixed(4)}` },
          piece(text), el("small", {}, weight.toFixed(2)));
        cell.style.setProperty("--w", weight.toFixed(3));
        return cell;
      })));
    }
    rows.push(line("entropy", columns.map((column) => el("td", {}, column.entropy.toFixed(2)))));
    if (columns.some((column) => column.fed !== null)) {
      rows.push(line("fed", columns.map((column) => el("td", {}, column.fed === null ? "" : piece(column.fed)))));
    }
    const part = columns.length < of ? ` The ${columns.length} of ${of} positions that moved furthest are shown.` : "";
    return [
      el("h5", {}, "Revised prefix ", el("small", {}, entry.latent ? "the mixture itself is fed to the model" :
        "rounded: the last row is fed to the model")),
      el("div", { class: "scroll", role: "region", "aria-label": "Token mixtures of the revised prefix", tabindex: 0 },
        el("table", { class: "heat" }, el("thead", {}, el("tr", {}, el("th", { scope: "row" }, "position"),
          ...columns.map((column) => el("th", { scope: "col" }, String(column.at))))), el("tbody", {}, ...rows))),
      el("p", { class: "legend" }, el("span", { class: "swatch" }), " deeper colour: more weight; ",
        el("span", { class: "box" }, "outlined"), `: the original token.${part}`),
    ];
  }
}

for (const root of document.querySelectorAll("[data-browser]")) {
  unpack(document.getElementById(root.dataset.browser).textContent)
    .then((data) => new Browser(root, data))
    .catch((error) => { root.querySelector("[data-part=count]").textContent = `The cases can't be shown: ${error}`; });
}
