// Compressed matmul on CPU: the interface of the kernels. There are no XLA types here; only ffi.cc uses XLA.
//
// One arithmetic serves every instruction set, any number of rows and of threads, so that a row's result has the same
// bits everywhere. "int8": a row of activations is quantized in blocks of 32 (int8 values, a float32 scale). The dot
// product of two blocks is an exact integer; blocks are then summed in float32 in eight lanes, block b in lane b % 8,
// in ascending order, each by
//
//     lane = fma(float(dot) * x_scale, w_scale, lane);  with an offset: lane = fma(-x_scale * x_sum, w_offset, lane)
//
// and the lanes are folded in halves. Where the two halves of a block have factors of its scale, "parts", dot is
// fma(dot of the second, its part, dot of the first * its part), an exact integer again but for NVFP4, whose parts are E4M3;
// likewise x_sum, if they have factors of the offset. "float32": weights are decoded exactly and summed in sixteen lanes, weight j in
// lane j % 16, by fma. No product here feeds a plain addition, so a compiler cannot contract one into an fma.
#pragma once

#include <cstddef>
#include <cstdint>

#include "tables.h"  // Type, Arithmetic, KvType and Role: see ../tables.py

namespace ferrum {

// A block format, of ggml or of pallas_kernels.blocks.groups. In a block, w = scale * q - offset.
struct Format {
  const char* name;
  Type type;
  int block_weights, block_bytes;
  constexpr bool plain() const { return block_weights == 1; }
  int64_t row_bytes(int64_t k) const { return k / block_weights * block_bytes; }
};

constexpr Format kFormats[] = {FERRUM_FORMATS};  // in the order of Type

// The format with ggml's name of `length` characters; nullptr if there are no kernels for it.
const Format* find_format(const char* name, size_t length);

// Raw blocks as in the file: n rows of k weights.
struct Matrix {
  const Format* format;
  const uint8_t* blocks;
  int64_t n, k;
  const uint8_t* row(int64_t i) const { return blocks + i * format->row_bytes(k); }
};

// Runs fn(arg, i) for i = 0 .. count - 1 on some threads, including the calling one, and waits for all of them.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void parallel_for(int64_t count, void (*fn)(void*, int64_t), void* arg) = 0;
};

// The arithmetic int8x2 is only for matmuls: the error of quantizing a row is quantized as a second row, and the two results
// are added, so activations keep about 15 bits.

// y[i] [m, n_i] = x [m, k] times matrix i, transposed.
void matmuls(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix* matrices, int count,
             float* const* y);

// y [m, n] = silu(x gateT) * (x upT).
void swiglu(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix& gate, const Matrix& up,
            float* y);

// What a mixture may have in addition. Biases of the products: gate and up [experts, n], down [experts, k], or nullptr. With a
// limit (not 0) a hidden value is (u + 1) * g * sigmoid(alpha * g), g = min(gate, limit), u = up from -limit to limit.
struct Additions {
  const float *gate = nullptr, *up = nullptr, *down = nullptr;
  float limit = 0, alpha = 0;
};

// y [tokens, k]: over the ranks of a token in order, the sum of weight * down_e(silu(gate_e x) * up_e x), where expert e of
// [tokens, top_k] lies `e * matrix bytes` after the given matrices; ids of num_experts or more mean no expert.
void experts(Pool& pool, Arithmetic arithmetic, const float* x, int64_t tokens, int64_t k, const int32_t* ids,
             const float* weights, int64_t top_k, int64_t num_experts, const Matrix& gate, const Matrix& up,
             const Matrix& down, const Additions& more, float* y);

// One layer of a paged cache: [pages, page_size, 2 kv_heads, head_dim], keys of head h at 2 h, values at 2 h + 1; and where a
// step is in it, as in paged_attention: kv_slots [tokens] are places or -1, page_table is [sequences, max_pages].
struct KvCache {
  uint8_t* pages;
  float* scales;  // for int8, one for each row of head_dim elements
  KvType type;
  int64_t num_pages, page_size, kv_heads, head_dim, max_pages;
  const int32_t *kv_slots, *page_table;
  int64_t item_bytes() const { return type == KvType::float32 ? 4 : type == KvType::float16 || type == KvType::bfloat16 ? 2 : 1; }
  // The row of the keys of a head at a place of a page.
  int64_t row(int64_t page, int64_t place, int64_t head) const {
    const int64_t known = page < 0 ? 0 : page < num_pages ? page : num_pages - 1;
    return (known * page_size + place) * 2 * kv_heads + 2 * head;
  }
};

// A step of a decoder: `tokens` rows of `sequences` sequences, as in paged_attention; slots of padding are negative.
struct Batch {
  int64_t tokens, sequences;
  const int32_t *positions, *query_starts, *kv_lengths, *slots;
};

// The rotation of a step's positions: [tokens, half].
struct Rope {
  const float *cosine, *sine;
  int64_t half;
};

// A gated delta net as in pallas_kernels.delta_net, of one layer. channels: 2 keys key_dim + heads value_dim.
struct DeltaNet {
  int64_t keys, heads, key_dim, value_dim, taps, channels;
  bool tiled;
};

// Of `sequences` sequences, as the contract has them; places are checked.
struct DeltaRows {
  int64_t sequences;
  const int32_t *starts, *reads, *writes;
  const bool* begins;
};

// tails [places, taps - 1, channels] and memories [places, heads, key_dim, value_dim] are read and written in place; out [tokens,
// heads, value_dim].
void delta_net(Pool& pool, const DeltaNet& net, const float* qkv, const float* log_decay, const float* beta, const float* taps,
               const DeltaRows& rows, float* tails, float* memories, float* out);

// How experts are chosen, as in pallas_kernels.routing.
struct Router {
  int64_t top_k, groups, groups_used, group_best;
  float scale, eps;
  bool normalize, sigmoid;
};

// What all layers of a decoder have in common. gated: after each head's query the matrix `query` has its gate, as many values,
// whose sigmoid multiplies the result of the head.
struct LayerShape {
  int64_t hidden;
  float eps, scale;
  bool gated;
  Router router;
};

// What a layer that recurs has instead of attention: the net and its state, the matrices `qkv` and `gate`, and `beta` and
// `alpha`, or both in `beta`, for each key head the rows of beta, then of alpha, of its value heads. log_decay is `decay` times
// the softplus of alpha + time_bias, beta a sigmoid. A head's result is normalized by `norm` and multiplied by silu(gate).
struct Recurrence {
  DeltaNet net;
  DeltaRows rows;
  float *tails, *memories;
  const float *taps, *decay, *time_bias, *norm;
  Matrix qkv, gate, beta, alpha;
};

// One layer: its cache, the positions that a query sees (window 0: all) and its weights; those that it does not have are nullptr
// or a matrix without blocks. It recurs if it has recurrence.qkv. With a router the feed-forward is a mixture of `experts`, and
// gate, up and down are those of the first expert; with shared_gate every token goes through the shared ones as well, times
// the sigmoid of the product with shared_router if that is there.
struct Layer {
  KvCache cache;
  Rope rope;
  int64_t window;
  Recurrence recurrence;
  const float *attention_norm, *feed_forward_norm, *query_norm, *key_norm;
  const float *query_bias, *key_bias, *value_bias, *output_bias, *down_bias, *router_bias, *selection_bias;
  const float* sinks;  // [heads]: one more score of each, as in paged_attention
  Additions more;      // of the experts
  Matrix query, key, value, output, gate, up, down, router, shared_router, shared_gate, shared_up, shared_down;
  int64_t experts;
  int32_t* ids;  // [tokens, top_k], as weights: receives the router's choice; nullptr: it is not kept
  float* weights;
};

// x [tokens, hidden] through some layers, in place.
void decoder_layers(Pool& pool, const LayerShape& shape, const Batch& batch, const Layer* layers, int64_t count, float* x);

// The instruction set in use: the name of an Isa (isa.h); nullptr if the library has none for this machine.
// set_isa returns whether this machine has it.
const char* isa();
bool set_isa(const char* name);

}  // namespace ferrum
