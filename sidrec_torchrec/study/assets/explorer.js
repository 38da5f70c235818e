"use strict";
(() => {
  const root = document.getElementById("explorer");
  const { ids, texts, digits } = JSON.parse(document.getElementById("explorer-data").textContent);
  const MOST = 25;
  const which = root.querySelector("select"), search = root.querySelector("input");
  const path = root.querySelector(".path"), choices = root.querySelector(".choices");
  const heading = root.querySelector(".heading"), list = root.querySelector(".members");
  let prefix = [];

  const make = (tag, text, of = {}) => Object.assign(document.createElement(tag), { textContent: text, ...of });
  const count = (n) => `${n.toLocaleString("en")} item${n === 1 ? "" : "s"}`;
  const button = (text, to) => make("button", text, { type: "button", onclick: () => go(to) });

  function under(start) {
    const own = digits[which.value];
    return ids.map((_, i) => i).filter((i) => own[i] && start.every((digit, j) => own[i][j] === digit));
  }

  // The digits that all of these items have in common.
  function shared(items) {
    const own = digits[which.value];
    let depth = 0;
    while (depth < own[items[0]].length && items.every((i) => own[i][depth] === own[items[0]][depth])) depth++;
    return own[items[0]].slice(0, depth);
  }

  function go(to) {
    prefix = to;
    search.value = "";
    render();
  }

  function renderPath(common) {
    path.replaceChildren(button("all items", []));
    prefix.forEach((digit, j) => path.append(button(`digit ${j + 1} is ${digit}`, prefix.slice(0, j + 1))));
    const rest = common.slice(prefix.length);
    if (rest.length) {
      const last = common.length, where = rest.length > 1 ? `digits ${prefix.length + 1} to ${last} are` : `digit ${last} is`;
      path.append(make("span", `${where} ${rest.join(" ")} for all of them`, { className: "quiet" }));
    }
  }

  function renderChoices(items, common) {
    const own = digits[which.value], groups = new Map();
    if (common.length < own[items[0]].length)
      for (const i of items) groups.set(own[i][common.length], [...(groups.get(own[i][common.length]) || []), i]);
    const rows = [...groups].sort(([a], [b]) => a - b).map(([digit, its]) => {
      const row = button("", [...common, digit]);
      row.append(make("b", `digit ${common.length + 1}: ${digit}`), make("span", count(its.length)), make("span", texts[its[0]]));
      return row;
    });
    choices.replaceChildren(...rows);
  }

  function renderItems(items, depth) {
    const own = digits[which.value];
    list.replaceChildren(...items.slice(0, MOST).map((i) => {
      const row = make("li", ""), sid = make("span", "", { className: "sid" });
      sid.append(make("b", own[i].slice(0, depth).join(" ")), ` ${own[i].slice(depth).join(" ")}`);
      row.append(make("b", ids[i]), ` ${texts[i]}`, sid);
      return row;
    }));
  }

  function render() {
    const words = search.value.trim().toLowerCase();
    const found = words && under([]).filter((i) => `${ids[i]} ${texts[i]}`.toLowerCase().includes(words));
    const items = words ? found : under(prefix);
    const more = items.length > MOST ? `, of which the first ${MOST}` : "";
    if (words || !items.length) {
      path.replaceChildren(button("all items", []));
      choices.replaceChildren();
      heading.textContent = `${count(items.length)} with “${search.value.trim()}”${more}`;
      return renderItems(items, 0);
    }
    const common = shared(items), isLeaf = common.length === digits[which.value][items[0]].length;
    renderPath(common);
    renderChoices(items, common);
    heading.textContent = isLeaf ? `${count(items.length)} of this SID${more}` : `${count(items.length)} here${more}`;
    renderItems(items, common.length);
  }

  which.addEventListener("change", () => go([]));
  search.addEventListener("input", render);
  root.hidden = false;
  render();
})();
