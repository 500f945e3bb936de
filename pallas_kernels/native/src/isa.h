// What an instruction set provides, and the forms of activations that it takes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace ferrum {

// Weights and activations are handled in groups of 256: eight blocks of 32 (absent blocks at the end of a row are zero). Inside
// a group, block b is at place 2 (b % 4) + b / 4, so that two 256-bit halves of one 512-bit register hold blocks b and b + 4:
// adding four such registers crosswise then leaves the eight dot products in order.
constexpr int kGroup = 256;
constexpr int kBlocks = 8;
inline constexpr int place(int block) { return 2 * (block & 3) + (block >> 2); }
inline int64_t groups_of(int64_t k) { return (k + kGroup - 1) / kGroup; }

// A group of one quantized row. half_sum is of 16 values each: half h of block b at 8 (b / 4) + 4 h + b % 4.
struct alignas(64) Group {
  int8_t q[kGroup];
  float scale[kBlocks];
  float scaled_sum[kBlocks];
  int32_t sum[kBlocks];
  int32_t half_sum[2 * kBlocks];
};

// The same group of 16 rows, for many rows at once: row r in lane r, four neighboring values in each 32-bit word.
constexpr int kPanel = 16;
struct alignas(64) PanelGroup {
  int8_t q[kGroup / 4][kPanel][4];
  float scale[kBlocks][kPanel];
  float scaled_sum[kBlocks][kPanel];
  int32_t sum[kBlocks][kPanel];
  int32_t half_sum[2 * kBlocks][kPanel];
};

// Where results of some rows are stored: row r of x, row i of the matrix at at(r)[i].
struct Output {
  float* y;
  int64_t stride;
  float* at(int64_t r) const { return y + r * stride; }
};

// A few consecutive rows of a matrix. next: the rows that are read after them, so that those can be prefetched.
struct Rows {
  const Format* format;
  const uint8_t* blocks;
  int64_t stride, count, k;
  const uint8_t* next;
};

// Followed by the next rows of the same matrix, unless `next` says otherwise.
inline Rows rows_of(const Matrix& matrix, int64_t first, int64_t count, const uint8_t* next = nullptr) {
  return {matrix.format, matrix.row(first), matrix.format->row_bytes(matrix.k), count, matrix.k, next ? next : matrix.row(first + count)};
}

// A query row of attention: the positions that it sees, low .. high - 1, and its sums so far. out [head_dim] is not divided
// yet.
struct Attending {
  const float* query;
  float* out;
  int64_t low, high;
  float best, total;
};

// A head of a gated delta net and the tokens of a sequence. qkv and out: of the first token; log_decay and beta: of it and the
// head, those of the next token `heads` later. tail: the rows before the first token, nullptr: zeros. query, key, value: the
// head's first channels of each. memory [key_dim, value_dim]: before the first token, and after the last one. After token t
// it is copied to kept + writes[t] * kept_stride, unless that is negative or memory itself.
struct DeltaHead {
  const float *qkv, *tail, *taps, *log_decay, *beta;
  const int32_t* writes;
  float *memory, *kept, *out;
  int64_t channels, taps_count, tokens, heads, query, key, value, key_dim, value_dim, kept_stride;
};

struct Isa {
  const char* name;
  // k floats to groups_of(k) groups.
  void (*quantize)(const float* x, int64_t k, Group* out);
  // The error of quantizing x.
  void (*rest)(const float* x, int64_t k, const Group* groups, float* out);
  // 16 rows as a panel; rows from `count` on are zero.
  void (*pack)(const Group* const* rows, int64_t count, int64_t groups, PanelGroup* out);
  // The matrix's rows times m rows of quantized activations.
  void (*dots)(const Rows& w, const Group* const* x, int64_t m, Output y);
  // The same for the first m rows of panels, `x + p * groups` each. nullptr: dots serves.
  void (*panels)(const Rows& w, const PanelGroup* x, int64_t m, Output y);
  // The matrix's rows times m rows of float32 activations, each padded with zeros after k to a whole number of groups.
  void (*float_dots)(const Rows& w, const float* const* x, int64_t m, Output y);
  // Queries of one head over positions first .. last - 1 of a sequence; sums start at zero.
  void (*attend)(const KvCache& cache, int64_t head, const int32_t* pages, Attending* rows, int64_t count, int64_t first,
                 int64_t last);
  // Merges the sums of a later range of positions into those of the earlier ones.
  void (*merge)(const Attending& later, int64_t width, Attending& row);
  // RMSNorm; n is a multiple of 16.
  void (*rms_norm)(const float* x, const float* weight, int64_t n, float eps, float* out);
  // Rotates value i of a head with value i + half.
  void (*rotate)(float* x, const float* cosine, const float* sine, int64_t half);
  // In place; n is a multiple of 16.
  void (*softmax)(float* x, int64_t n);
  // Writes a row to the cache.
  void (*store_kv)(KvType type, const float* x, int64_t n, uint8_t* to, float* scale);
  // out = silu(gate) * up, element by element.
  void (*gated)(const float* gate, const float* up, int64_t count, float* out);
  // out = (u + 1) * g * sigmoid(alpha * g), g = min(gate, limit) and u = up from -limit to limit, element by element.
  void (*clamped)(const float* gate, const float* up, int64_t count, float limit, float alpha, float* out);
  // Element by element; out may be x.
  void (*sigmoid)(const float* x, int64_t count, float* out);
  void (*softplus)(const float* x, int64_t count, float* out);
  // sum = fma(weight, x, sum), element by element.
  void (*add_scaled)(float weight, const float* x, int64_t count, float* sum);
  // key_dim and value_dim are multiples of 16.
  void (*delta_head)(const DeltaHead& head);
};

extern const Isa portable;
#if defined(__x86_64__)
extern const Isa avx2;
extern const Isa avx512_vnni;
const Isa& amx();
void avx512_quantize(const float* x, int64_t k, Group* out);  // the part of avx512_vnni in avx512_dots.cc
void avx512_dots(const Rows& w, const Group* const* x, int64_t m, Output y);
bool has_avx2();
bool has_avx512_vnni();
bool has_amx();  // also requests the tile registers from the operating system
#elif defined(__aarch64__)
extern const Isa neon_dotprod;
const Isa& neon_i8mm();
bool has_neon_dotprod();
bool has_neon_i8mm();
#endif

// Memory of the calling thread, one block per slot, at least `bytes` long; it is kept and grows. New memory is zero.
enum Slot { kActivations, kInner, kHidden, kLists, kParts, kDecoded, kKeys, kLayer, kNormed, kRest, kRouting, kGroups, kDelta, kMemory, kSlots };
void* scratch(Slot slot, size_t bytes);

}  // namespace ferrum
