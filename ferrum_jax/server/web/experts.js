// The picture of a mixture's experts: a row for each layer, a column for each expert.
//
// The server computes the conversation once more, without an output, and says which experts each token of the answer went to.
// While a token is looked at, the picture shows its experts alone; otherwise what share of the answer's tokens each one had.

import { ask } from "./api.js";
import { h, percent } from "./dom.js";
import { settings } from "./settings.js";

export class Experts {
  /** `longest`: how many tokens the server can compute; an answer that fills the context is one longer. */
  constructor(node, longest) {
    Object.assign(this, { node, longest });
    this.canvas = h("canvas", { role: "img", tabindex: 0 });
    this.caption = h("figcaption", { "aria-live": "polite" }, "Looking up the experts …");
    this.element = h("figure", { class: "experts" }, this.canvas, this.caption);
    this.index = -1;
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#describe());
    new ResizeObserver(() => this.#draw()).observe(this.element);
  }

  async load() {
    const { promptIds, tokens } = this.node;
    const ids = [...promptIds, ...tokens.map((token) => token.id)].slice(0, this.longest);
    const body = { tokens: ids, start: promptIds.length };
    if (settings.model) body.model = settings.model;
    try {
      this.routing = await (await ask("routing", { body, key: settings.key })).json();
      this.count = this.routing.expert_ids[0].length;
      this.shares = this.#shares([...Array(this.count).keys()]);
      this.#draw();
      this.#describe();
    } catch (error) {
      this.caption.textContent = error.message;
    }
  }

  /** Shows the experts of one token; -1: those of all. */
  show(index) {
    this.index = index < this.count ? index : -1;
    this.#draw();
    this.#describe();
  }

  /** [layer][expert]: the share of some tokens that went to each expert; of a single token, the weight it gave the expert. */
  #shares(indices) {
    const { expert_ids: ids, expert_weights: weights, num_experts: count } = this.routing;
    return ids.map((layer, row) => {
      const shares = new Float64Array(count);
      for (const i of indices) {
        layer[i].forEach((expert, rank) => (shares[expert] += indices.length > 1 ? 1 / indices.length : weights[row][i][rank]));
      }
      return shares;
    });
  }

  get #shown() {
    return this.index < 0 ? this.shares : this.#shares([this.index]);
  }

  #draw() {
    if (!this.routing) return;
    const rows = this.#shown;
    const columns = this.routing.num_experts;
    const width = this.element.clientWidth;
    const cell = Math.min(width / columns, 18);
    const scale = devicePixelRatio;
    Object.assign(this.canvas, { width: cell * columns * scale, height: cell * rows.length * scale });
    this.canvas.style.width = `${cell * columns}px`;
    const context = this.canvas.getContext("2d");
    const style = getComputedStyle(this.element);
    context.scale(scale, scale);
    const gap = cell > 4 ? 1 : 0;
    rows.forEach((shares, row) => {
      const most = Math.max(...shares);
      shares.forEach((share, expert) => {
        context.globalAlpha = 1;
        context.fillStyle = style.fill;
        context.fillRect(expert * cell, row * cell, cell - gap, cell - gap);
        if (!share) return;
        context.globalAlpha = 0.15 + (0.85 * share) / most;
        context.fillStyle = style.color;
        context.fillRect(expert * cell, row * cell, cell - gap, cell - gap);
      });
    });
    this.cell = cell;
  }

  #describe() {
    if (!this.routing) return;
    const { layers, num_experts: count, experts_per_token: used } = this.routing;
    const what = this.index < 0 ? `${this.count} tokens` : `token ${this.index + 1}`;
    const how = `${used} of ${count} experts in each of ${layers.length} layers`;
    this.caption.textContent = `${what}: ${how}. Rows are layers, columns experts.`;
    this.canvas.setAttribute("aria-label", `${this.caption.textContent} ${this.#most()}`);
  }

  #most() {
    let best = { share: -1 };
    this.#shown.forEach((shares, row) => shares.forEach((share, expert) => {
      if (share > best.share) best = { share, expert, layer: this.routing.layers[row] };
    }));
    return `Most: expert ${best.expert} of layer ${best.layer}, ${percent(best.share)}.`;
  }

  #point(event) {
    if (!this.routing) return;
    const row = Math.floor(event.offsetY / this.cell);
    const expert = Math.floor(event.offsetX / this.cell);
    const share = this.#shown[row]?.[expert];
    if (share === undefined) return;
    const of = this.index < 0 ? "of the tokens" : "of the weight";
    this.caption.textContent = `Layer ${this.routing.layers[row]}, expert ${expert}: ${percent(share)} ${of}`;
  }
}
