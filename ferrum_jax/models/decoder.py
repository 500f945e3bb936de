"""One decoder for all families that generate text, over the flat ragged token axis.

Differences between the families are in the configuration and in the parameters that a file has: biases (Qwen2), norms of
queries and keys (Qwen3), norms after the parts of a layer (Gemma), experts. Layers are scanned by index: the stacks are never
sliced, only a counter changes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import ferrum_jax.models.latent
import ferrum_jax.models.short_conv  # noqa: F401 - as latent a kind of mixer, which it adds to MIXERS
from ferrum_jax.adapters import COLUMNS, without_adapters
from ferrum_jax.config import Attention, GatedDeltaNet, Mixture, ModelConfig, Rope
from ferrum_jax.models.delta_net import sequences_of
from ferrum_jax.models.layers import ROUTING, Block, Paged, clamp_of, router_of
from ferrum_jax.models.recurrence import Recurrence, recurrence
from ferrum_jax.models.rope import rope_angles
from ferrum_jax.models.scan import scan_layers
from ferrum_jax.quantized import Layer, LayerStack, QuantizedTensor, linear
from ferrum_jax.state import DecodeState, KVCache, kv_layers, page_kinds, recurrent_kinds
from pallas_kernels.decoder_layers import Attending, LayerShape, Part, Recurring, Stack, backend_for
from pallas_kernels.delta_net import DeltaState
from pallas_kernels.derivatives import derivative_of
from pallas_kernels.paged_attention import Tables, make_metadata
from pallas_kernels.reductions import product, rms_norm

Cache = KVCache | DecodeState  # for layers of one kind, or of several
Params = Mapping[str, Any]
Angles = tuple[tuple[jax.Array, jax.Array], ...]  # cos and sin, for each of `ropes`
Routing = tuple[jax.Array, ...]  # expert_ids and expert_weights, or nothing
Carry = tuple[jax.Array, tuple[Any, ...], Routing]


class RaggedBatch(NamedTuple):
    """Tokens of several sequences one after the other; decode, prefill chunks and mixtures alike. All int32.

    Attributes:
      tokens: [T], the ids.
      positions: [T], of each token in its sequence.
      slots: [T], where each token's KV goes: page * page_size + offset, -1 for padding.
      query_starts: [S + 1]; tokens of sequence s are query_starts[s] .. query_starts[s + 1] - 1.
      kv_lengths: [S], cached tokens of the sequence, including these.
      page_table: [S, P], the pages of each sequence in order. If a model has several pools of pages, `slots` [pools * T] and
        `page_table` [pools * S, P] may have a block for each, one after the other; a single block serves all pools.
      logits_rows: [R], the tokens whose logits are needed.
      adapters: [T], the index of each token's adapter in the parameters, -1 for none; None: no token has one.
      states: [S], the place of each sequence's state in layers that recur, -1 for padding; None: sequence s has place s.
      state_writes: [T], places for the state after each token, -1 for nowhere; None: the state after the last token of each
        sequence goes to its place.
    """

    tokens: jax.Array
    positions: jax.Array
    slots: jax.Array
    query_starts: jax.Array
    kv_lengths: jax.Array
    page_table: jax.Array
    logits_rows: jax.Array
    adapters: jax.Array | None = None
    states: jax.Array | None = None
    state_writes: jax.Array | None = None


class Decoder(nn.Module):
    """Parameters: `embedding` [vocab, hidden], `unembedding` (absent if tied to the embedding), `final_norm` [hidden],
    `rope_factors` (optional) and `layers`, a tree of `LayerStack`s; with adapters those of `adapters`. For layers with
    separate inputs: `inputs_embedding` [vocab, layers * width], `inputs_projection` [layers * width, hidden] and
    `inputs_norm` [width].

    If the collection `ROUTING` is mutable, "experts" in it has the experts of every token, int32, and their weights, float32,
    both [layers with experts, T, top_k]; otherwise nothing is recorded and the program is the same."""

    config: ModelConfig

    def hidden(self, state: Cache, batch: RaggedBatch) -> tuple[jax.Array, Cache]:
        """The normalized output of the last layer: float32 [T, hidden_size], and the state with this batch written."""
        access = _access(self.config, state, batch)
        x, inputs, angles = self.embedded(batch.tokens, batch.positions)
        layers = self.variables["params"]["layers"]
        record = self.is_mutable_collection(ROUTING)
        if batch.adapters is None:
            x, parts, routing = run_layers(self.config, without_adapters(layers), x, access, angles, record, inputs)
        else:
            columns: jax.Array | None = self.get_variable("params", COLUMNS)
            if columns is None:
                raise ValueError("RaggedBatch.adapters: the parameters have no adapters; load the model with some")
            mask = batch.adapters[:, None] == columns
            x, parts, routing = _composed(self.config, layers, x, access, angles, mask, record, inputs)
        self.sow(ROUTING, "experts", routing)
        pools = len(access.pools)
        state = DecodeState(parts[:pools], parts[pools:]) if isinstance(state, DecodeState) else parts[0]
        return rms_norm(x, self.get_variable("params", "final_norm"), self.config.rms_norm_eps), state

    def embedded(self, tokens: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array | None, Angles]:
        """The residual stream before the first layer, float32 [T, hidden_size]; `inputs`; the angles of `ropes`."""
        with jax.named_scope("embedding"):
            x: jax.Array = self.get_variable("params", "embedding").gather(tokens)
            if self.config.embedding_scale != 1.0:
                x = product(x, self.config.embedding_scale)
        factors: jax.Array | None = self.get_variable("params", "rope_factors")
        angles = tuple(rope_angles(rope, positions, factors) for rope in ropes(self.config))
        return x, self.inputs(x, tokens), angles

    def inputs(self, x: jax.Array, tokens: jax.Array) -> jax.Array | None:
        """What each layer alone gets of each token, from its id and its embedding x float32 [T, hidden_size]: float32 [T,
        layers, input_width], or None."""
        config, params = self.config, self.variables["params"]
        embedding: QuantizedTensor | None = params.get("inputs_embedding")
        if embedding is None:
            return None
        with jax.named_scope("layer_inputs"):
            x = x.astype(config.activations)
            made = linear(x, params["inputs_projection"], None, config.dtype, config.implementation) * x.shape[1] ** -0.5
            made = rms_norm(made.reshape(x.shape[0], config.num_layers, -1), params["inputs_norm"], config.rms_norm_eps)
            known = product(embedding.gather(tokens).reshape(made.shape), made.shape[-1] ** 0.5)
            return product(made + known, 0.5**0.5)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden [R, hidden_size] -> float32 [R, vocab_size]."""
        with jax.named_scope("unembedding"):
            config, hidden = self.config, hidden.astype(self.config.activations)
            matrix = unembedding(self.variables["params"])
            logits = linear(hidden, matrix, arithmetic=config.dtype, implementation=config.implementation)
            if over := matrix.over(-2):
                logits = lax.all_gather(logits, over, axis=1, tiled=True)
            cap = config.logit_softcap
            return cap * jnp.tanh(logits / cap) if cap else logits

    def __call__(self, state: Cache, batch: RaggedBatch) -> tuple[jax.Array, Cache]:
        hidden, state = self.hidden(state, batch)
        return self.logits(hidden[batch.logits_rows]), state


def unembedding(params: Params) -> QuantizedTensor:
    """The output matrix [vocab, hidden]."""
    return params.get("unembedding") or params["embedding"]


def ropes(config: ModelConfig) -> tuple[Rope, ...]:
    """The distinct rotations of the layers."""
    return tuple(dict.fromkeys(mixer.rope for mixer in config.attentions))


class Access(NamedTuple):
    """Where the layers of each kind read and write: for `page_kinds` the pools, the slots int32 [T] in them and the tables; for
    `recurrent_kinds` the arrays and their `Recurrence`."""

    pools: tuple[KVCache, ...]
    kv_slots: tuple[jax.Array, ...]
    tables: tuple[Tables, ...]
    recurrent: tuple[dict[str, jax.Array], ...] = ()
    recurrence: Recurrence | None = None


def _access(config: ModelConfig, state: Cache, batch: RaggedBatch) -> Access:
    """The `Access` of a batch. ValueError for a state of another model."""
    pools = state.pools if isinstance(state, DecodeState) else (state,)
    count, tokens, sequences = len(page_kinds(config)), batch.tokens.shape[0], batch.kv_lengths.shape[0]
    if len(pools) != count:
        raise ValueError(
            f"the state has {len(pools)} pools of pages, but the model's layers need {count}: make it with new_cache"
        )
    kv_slots = jnp.broadcast_to(batch.slots.reshape(-1, tokens), (count, tokens))
    page_table = batch.page_table.reshape(-1, sequences, batch.page_table.shape[1])
    page_table = jnp.broadcast_to(page_table, (count, *page_table.shape[1:]))
    tables = (Tables(batch.positions, batch.query_starts, batch.kv_lengths, page_table[pool]) for pool in range(count))
    if not isinstance(state, DecodeState) or not state.recurrent:
        return Access(pools, tuple(kv_slots), tuple(tables))
    told = recurrence(batch.positions, batch.query_starts, kv_slots[0] >= 0, batch.states, batch.state_writes)
    return Access(pools, tuple(kv_slots), tuple(tables), state.recurrent, told)


def run_layers(
    config: ModelConfig,
    layers: Params,
    x: jax.Array,
    access: Access,
    angles: Angles,
    record: bool = False,
    inputs: jax.Array | None = None,
) -> Carry:
    """The residual stream x float32 [T, hidden_size] after all layers, the parts of the state and, with `record`, the routers'
    choices: in one call if a backend has one. inputs: as of `Block`."""
    shape, parts = _shape(config), _parts(layers, config.num_layers)
    features = _features(config, layers)
    backend = backend_for(*parts, config.hidden_size, shape, config.dtype, config.implementation, features)
    if backend is None:
        return _composed(config, layers, x, access, angles, None, record, inputs)

    @derivative_of(functools.partial(_composed, config, record=record))
    def together(layers: Params, x: jax.Array, access: Access, angles: Angles) -> Carry:
        parts, (pools, kv_slots, tables, recurrent, told) = _parts(layers, config.num_layers), access
        states, sequences = [DeltaState(**arrays) for arrays in recurrent], told and sequences_of(told)
        arguments = x, pools, kv_slots, tables, angles, states, sequences, *parts, _mixers(config), shape, record
        x, pools, states, routing = backend.decoder_layers(*arguments)
        return x, (*pools, *(state._asdict() for state in states)), routing

    with jax.named_scope("layers"):
        return together(layers, x, access, angles)


def _shape(config: ModelConfig) -> LayerShape:
    """The numbers of the first layer and the first mixture, and how many kinds of either there are in what layers must
    share."""
    mixers = [spec.mixer for spec in config.layers]
    first = next(iter(config.attentions), Attention(0, 0, 0, Rope(0.0, 0)))
    alike = (dataclasses.replace(mixer, num_heads=0, num_kv_heads=0, rope=first.rope, window=0) for mixer in config.attentions)
    mixtures = [spec.feed_forward for spec in config.layers if isinstance(spec.feed_forward, Mixture)]
    choices = {(router_of(mixture), clamp_of(mixture)) for mixture in mixtures}
    delta_dims = {dim for m in mixers if isinstance(m, GatedDeltaNet) for dim in (m.key_dim, m.value_dim)}
    kinds = max(len(set(alike)), len(choices))
    shape = LayerShape(first.head_dim, config.rms_norm_eps, kinds=kinds, gated=first.gated, delta_dims=tuple(delta_dims))
    return shape._replace(router=router_of(mixtures[0]), clamp=clamp_of(mixtures[0])) if mixtures else shape


def _features(config: ModelConfig, layers: Params) -> tuple[str, ...]:
    """What the layers have that not every call of all layers knows."""
    attentions, others = config.attentions, {type(spec.mixer) for spec in config.layers} - {Attention, GatedDeltaNet}
    found = sorted(f"{kind.__name__} layers" for kind in others)
    if not attentions:
        found.append("models without attention")
    if any(spec.feed_forward.activation != "silu" for spec in config.layers):
        found.append("GELU")
    if any(mixer.scale for mixer in attentions):
        found.append("scale of the scores")
    if any(mixer.value_norm or mixer.key_is_value or mixer.shared_kv for mixer in attentions):
        found.append("other values than those projected for a layer")
    tensors = jax.tree.leaves(layers, is_leaf=lambda node: isinstance(node, QuantizedTensor))
    if any(any(tensor.cut) for tensor in tensors):
        found.append("sums over devices")
    return tuple(found)


def _mixers(config: ModelConfig) -> list[Attending | Recurring]:
    """What each layer attends to, or its state."""
    kinds: list[tuple[int, Any]] = [*enumerate(page_kinds(config)), *enumerate(recurrent_kinds(config))]
    places = {layer: (number, item) for number, kind in kinds for item, layer in enumerate(kind.layers)}
    rotations = ropes(config)

    def of(layer: int, mixer: Any) -> Attending | Recurring:
        if isinstance(mixer, GatedDeltaNet):
            return Recurring(*places[layer], mixer.tiled)
        return Attending(*places[layer], rotations.index(mixer.rope), mixer.window)

    return [of(layer, spec.mixer) for layer, spec in enumerate(config.layers)]


def _parts(layers: Params, count: int) -> tuple[list[Stack], list[dict[str, Part]]]:
    """The stacks of all parameters, and which of them each layer has by the names of pallas_kernels.decoder_layers."""
    stacks: list[Stack] = []
    parts: list[dict[str, Part]] = [{} for _ in range(count)]
    for path, parameter in jax.tree.leaves_with_path(layers, is_leaf=lambda node: isinstance(node, LayerStack)):
        role = "_".join(["delta"] * (path[0].key == "delta_net") + [path[-1].key])
        numbers = {format: len(stacks) + i for i, format in enumerate(parameter.stacks)}
        stacks += [Stack(tensor.planes[0], tensor.format, tensor.memory_layout) for tensor in parameter.stacks.values()]
        for layer in filter(parameter.has, map(Layer, range(count))):
            _, item = parameter.select(layer)
            parts[layer.first][role] = Part(numbers[parameter.formats[layer.first]], item)
    return stacks, parts


def _composed(
    config: ModelConfig,
    layers: Params,
    x: jax.Array,
    access: Access,
    angles: Angles,
    adapter_mask: jax.Array | None = None,
    record: bool = False,
    inputs: jax.Array | None = None,
) -> Carry:
    """The layers one after the other; `Block` is traced once per distinct body. adapter_mask: as in `LayerModule`; inputs: as
    of `Block`."""
    owned = [-1] * config.num_layers  # the part that a layer has an item of
    of_parts = [kind.layers for kind in page_kinds(config)] + [kind.layers for kind in recurrent_kinds(config)]
    for part, numbers in enumerate(of_parts):
        for number in numbers:
            owned[number] = part
    read = kv_layers(config)
    part_of = [owned[layer] for layer in read]
    of_rope = dict(zip(ropes(config), angles, strict=True))
    told: dict[Any, Any] = {}
    metadata = {}
    for part, mixer in dict.fromkeys((part, spec.mixer) for part, spec in zip(part_of, config.layers, strict=True)):
        if not isinstance(mixer, Attention):
            told[mixer] = access.recurrence
            continue
        value_dim = mixer.latent.width if mixer.latent else None
        if (key := (part, mixer.num_heads, mixer.sinks, value_dim)) not in metadata:
            tables, cache = access.tables[part], access.pools[part]
            arguments = tables, cache, mixer.num_heads, mixer.window, config.implementation
            metadata[key] = make_metadata(*arguments, sinks=mixer.sinks, value_dim=value_dim)
        told[mixer] = Paged(access.kv_slots[part], metadata[key], of_rope[mixer.rope])
    live = access.kv_slots[0] >= 0

    def step(carry: Carry, layer: Layer) -> Carry:
        x, parts, routing = carry
        spec, part, own = config.layers[layer.first], part_of[layer.first], read[layer.first]
        index = layer.index(owned) if own == layer.first else Layer(own).index(owned)
        arguments = x, parts[part], layer, index, told[spec.mixer], live, adapter_mask, inputs
        (x, new), sown = Block(config, spec, parent=None).apply({"params": layers}, *arguments, mutable=[ROUTING])
        if routing and sown:
            (experts,) = sown[ROUTING]["feed_forward"]["experts"]
            routing = tuple(known.at[layer.number].set(new) for known, new in zip(routing, experts, strict=True))
        return x, (*parts[:part], new, *parts[part + 1 :]), routing

    routing: Routing = ()
    if record:
        of_layers = config.num_layers, x.shape[0], config.experts_per_token
        routing = jnp.zeros(of_layers, jnp.int32), jnp.zeros(of_layers, jnp.float32)
    parts = (*access.pools, *access.recurrent)
    bodies = [(spec, own if own != number else -1) for number, (spec, own) in enumerate(zip(config.layers, read, strict=True))]
    x, parts, routing = scan_layers(layers, step, (x, parts, routing), bodies)
    return x, parts, tuple(known[np.asarray(config.expert_layers)] for known in routing)
