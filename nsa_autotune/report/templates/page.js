"use strict";
// Filters, sorting, tips and the evidence of a winner. Strings of the database enter the page through textContent only.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const tip = document.getElementById("tip");
  const dialog = document.getElementById("evidence");
  document.documentElement.classList.add("script");

  function make(name, text, parent) {
    const element = document.createElement(name);
    element.textContent = text;
    if (parent) parent.append(element);
    return element;
  }

  // filters
  const form = document.querySelector(".filters");
  const keyed = all("[data-k]").map((element) => ({ element, places: element.dataset.k.split(" ") }));
  const shown = (element) => !element.hasAttribute("hidden");

  function applyFilters() {
    const wanted = all("select", form).map((select) => select.value);
    for (const { element, places } of keyed) {
      element.toggleAttribute("hidden", !wanted.every((value, i) => value === "" || places[i] === value));
    }
    for (const figure of all("[data-figure]:not([data-k])")) {
      figure.toggleAttribute("hidden", !all(".mark, tbody tr", figure).some(shown));
    }
    for (const part of all("[data-part]")) {
      const figures = all("[data-figure]", part);
      part.classList.toggle("nothing", figures.length > 0 && !figures.some(shown));
    }
    const rows = all("tbody tr[data-k]");
    form.querySelector("output").textContent = `${rows.filter(shown).length} of ${rows.length} winners shown`;
    all(".plot").forEach(giveOneTabStop);
  }

  // tables
  const collator = new Intl.Collator("en", { numeric: true });

  function cellValue(row, column) {
    const cell = row.cells[column];
    const value = cell.dataset.v ?? cell.textContent;
    const number = Number(value);
    return value === "" ? null : Number.isNaN(number) ? value : number;
  }

  function compare(a, b, sign) {
    if (a === null || b === null) return (a === null) - (b === null); // what is unknown stands last
    return sign * (typeof a === "number" && typeof b === "number" ? a - b : collator.compare(String(a), String(b)));
  }

  function sortBy(header) {
    const down = header.getAttribute("aria-sort") === "ascending";
    const body = header.closest("table").tBodies[0];
    for (const other of header.parentElement.cells) other.removeAttribute("aria-sort");
    header.setAttribute("aria-sort", down ? "descending" : "ascending");
    const keys = [...body.rows].map((row) => [cellValue(row, header.cellIndex), row]);
    keys.sort((one, two) => compare(one[0], two[0], down ? -1 : 1));
    body.append(...keys.map((entry) => entry[1]));
  }

  for (const header of all(".table thead th")) {
    const button = make("button", header.textContent);
    button.type = "button";
    button.addEventListener("click", () => sortBy(header));
    header.replaceChildren(button);
  }

  // tips
  function showTip(mark) {
    tip.textContent = mark.getAttribute("aria-label");
    tip.hidden = false;
    const at = mark.getBoundingClientRect();
    const left = Math.min(at.left + 14, window.innerWidth - tip.offsetWidth - 8);
    const above = at.top - tip.offsetHeight - 6;
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${above > 0 ? above : at.bottom + 6}px`;
  }

  function hideTip() {
    tip.hidden = true;
  }

  function giveOneTabStop(plot) {
    const marks = all(".mark", plot).filter(shown);
    all(".mark", plot).forEach((mark) => mark.setAttribute("tabindex", "-1"));
    if (marks.length) marks[0].setAttribute("tabindex", "0");
  }

  function moveFocus(mark, step) {
    const marks = all(".mark", mark.closest(".plot")).filter(shown);
    const next = marks[(marks.indexOf(mark) + step + marks.length) % marks.length];
    mark.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }

  for (const mark of all(".mark")) {
    const title = mark.querySelector("title");
    mark.setAttribute("aria-label", title.textContent);
    mark.setAttribute("role", mark.dataset.winner ? "button" : "img");
    title.remove(); // the browser would show it as well
    mark.addEventListener("pointerenter", () => showTip(mark));
    mark.addEventListener("pointerleave", hideTip);
    mark.addEventListener("focus", () => showTip(mark));
    mark.addEventListener("blur", hideTip);
    mark.addEventListener("keydown", (event) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
      if (step) moveFocus(mark, step);
      else if ((event.key === "Enter" || event.key === " ") && mark.dataset.winner) showEvidence(mark);
      else return;
      event.preventDefault();
    });
    mark.addEventListener("click", () => (mark.dataset.winner ? showEvidence(mark) : showTip(mark)));
  }
  window.addEventListener("scroll", hideTip, { passive: true });

  // evidence of a winner
  function addTable(title, entries) {
    make("h3", title, dialog);
    const table = make("table", "", dialog);
    for (const [name, value] of entries) {
      const row = make("tr", "", table);
      make("th", name, row);
      make("td", typeof value === "object" ? JSON.stringify(value) : String(value), row);
    }
  }

  function changes(config, base) {
    const names = Object.keys(config).filter((name) => config[name] !== base[name]);
    return names.map((name) => `${name}=${config[name]}`).join(", ") || "the same config";
  }

  function interval(rival) {
    const percent = (value) => `${(100 * Math.expm1(value)).toFixed(1)} %`;
    return `${percent(rival.log_ratio)} slower, ${percent(rival.low)} to ${percent(rival.high)}${rival.tied ? ": tied" : ""}`;
  }

  function showEvidence(source) {
    const winner = data.winners[Number(source.dataset.winner)];
    hideTip();
    dialog.replaceChildren();
    const close = make("button", "Close", dialog);
    close.type = "button";
    close.addEventListener("click", () => dialog.close());
    make("h2", `${winner.keys.family}, ${winner.keys.seq} tokens`, dialog);
    make("p", winner.shape, dialog);
    addTable("Time", [
      ["median", `${winner.median_us} µs`],
      ["20th to 80th percentile", `${winner.p20_us} to ${winner.p80_us} µs, ${winner.samples} samples`],
      ["policy", winner.keys.policy],
      ["measured", winner.created],
      ["verdict", `${winner.verdict}, ${winner.source}${winner.stale ? ", stale" : ""}`],
    ]);
    addTable("Config", Object.entries(winner.config));
    if (winner.rivals.length) {
      addTable("Raced against", winner.rivals.map((rival) => [changes(rival.config, winner.config), interval(rival)]));
    }
    addTable("Machine", [...Object.entries(winner.fingerprint), ["nsa-autotune", winner.tool_version]]);
    dialog.showModal();
    dialog.scrollTop = 0;
  }

  for (const cell of all(".table tbody th")) {
    const button = make("button", cell.textContent);
    button.type = "button";
    button.className = "open";
    button.addEventListener("click", () => showEvidence(cell.parentElement));
    cell.replaceChildren(button);
  }
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());

  if (form) {
    form.addEventListener("change", applyFilters);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(applyFilters)); // after the boxes are reset
    applyFilters();
  }
})();
