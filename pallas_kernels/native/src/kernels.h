// Compressed matmul on CPU: what the kernels take and give. No XLA types here; ffi.cc is the only file that knows XLA.
//
// One arithmetic serves every instruction set, any number of rows and of threads, so that a row's result has the same
// bits everywhere. "int8": a row of activations is quantised in blocks of 32 (int8 values, a float32 scale). The dot
// product of two blocks is an exact integer; blocks are then summed in float32 in eight lanes, block b in lane b % 8,
// in ascending order, each by
//
//     lane = fma(float(dot) * x_scale, w_scale, lane);  with an offset: lane = fma(-x_scale * x_sum, w_offset, lane)
//
// and the lanes are folded in halves. "float32": weights are decoded exactly and summed in sixteen lanes, weight j in
// lane j % 16, by fma. No product here feeds a plain addition, so a compiler cannot contract one into an fma.
#pragma once

#include <cstddef>
#include <cstdint>

namespace ferrum {

enum class Type : uint8_t { Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, Q4_K, Q5_K, Q6_K, IQ4_XS, F16, BF16 };

// A ggml block format. In a block, w = scale * q - offset.
struct Format {
  const char* name;
  Type type;
  int block_weights, block_bytes;
  bool plain() const { return block_weights == 1; }
  int64_t row_bytes(int64_t k) const { return k / block_weights * block_bytes; }
};

// By ggml's name of `length` characters; nullptr where there are no kernels for it.
const Format* find_format(const char* name, size_t length);

// Raw blocks as in the file: n rows of k weights.
struct Matrix {
  const Format* format;
  const uint8_t* blocks;
  int64_t n, k;
  const uint8_t* row(int64_t i) const { return blocks + i * format->row_bytes(k); }
};

// Runs fn(arg, i) for i = 0 .. count - 1 on some threads, the calling one included, and waits for all of them.
class Pool {
 public:
  virtual ~Pool() = default;
  virtual int threads() const = 0;
  virtual void parallel_for(int64_t count, void (*fn)(void*, int64_t), void* arg) = 0;
};

// int8x2 is for matmuls alone: what the quantisation of a row leaves out is quantised as a second row, and the two results
// are added, so activations keep about 15 bits.
enum class Arithmetic { int8, int8x2, float32 };

// y[i] [m, n_i] = x [m, k] times matrix i, transposed.
void matmuls(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix* matrices, int count,
             float* const* y);

// y [m, n] = silu(x gateT) * (x upT).
void swiglu(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix& gate, const Matrix& up,
            float* y);

// y [tokens, k]: over the slots of a token in order, the sum of weight * down_e(silu(gate_e x) * up_e x), where expert e
// of [tokens, top_k] lies `e * matrix bytes` after the given matrices; ids of num_experts or more belong to nobody.
void experts(Pool& pool, Arithmetic arithmetic, const float* x, int64_t tokens, int64_t k, const int32_t* ids,
             const float* weights, int64_t top_k, int64_t num_experts, const Matrix& gate, const Matrix& up,
             const Matrix& down, float* y);

// The instruction set in use: "portable", "avx2", "avx512_vnni" or "amx". set_isa says whether this machine has it.
const char* isa();
bool set_isa(const char* name);

}  // namespace ferrum
