// What the operations share: rows of activations in the forms that matrices need, and products in chunks on the threads.
#pragma once

#include <cstring>
#include <type_traits>

#include "isa.h"

namespace ferrum {

template <typename F>
void parallel(Pool& pool, int64_t count, F&& fn) {
  pool.parallel_for(count, [](void* arg, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(arg))(i); }, &fn);
}

template <typename F>
void maybe_parallel(bool wanted, Pool& pool, int64_t count, F&& fn) {
  if (wanted) return parallel(pool, count, fn);
  for (int64_t i = 0; i < count; ++i) fn(i);
}

// Below this many bytes of weights (times a factor for many rows), waking another thread costs more than it saves.
constexpr int64_t kSerialBytes = 64 << 10;  // for one row of x
constexpr int64_t kChunkBytes = 48 << 10;
constexpr int64_t kMaxMatrices = 16;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a matrix that make a chunk for m rows of x: whole panels with enough work to be worth an atomic increment; with many
// rows of x several panels, which share the part of x in the cache.
inline int64_t chunk_rows(const Matrix& matrix, int64_t m) {
  if (m > 4 * kPanel) return 4 * kPanel;
  const int64_t bytes = matrix.format->row_bytes(matrix.k) * ceil_div(m, kPanel);
  return bytes == 0 ? matrix.n : kPanel * (1 + kChunkBytes / (kPanel * bytes));
}

inline bool serial(int64_t weight_bytes, int64_t m) { return weight_bytes * (3 + m) < 4 * kSerialBytes; }

// Rows of activations in the forms that the given matrices need, and the products with them.
class Activations {
 public:
  Activations(const Isa& isa, int64_t k, bool groups, bool floats)
      : isa_(isa), k_(k), groups_(groups ? groups_of(k) : 0), floats_(floats ? groups_of(k) * kGroup : 0) {}

  size_t row_bytes() const { return size_t(groups_) * sizeof(Group) + size_t(floats_) * sizeof(float); }
  int64_t groups() const { return groups_; }
  int64_t columns() const { return k_; }

  // Writes one row's forms to `to`, row_bytes() long.
  void convert(const float* x, uint8_t* to) const {
    if (groups_) isa_.quantize(x, k_, reinterpret_cast<Group*>(to));
    if (floats_) {
      float* out = reinterpret_cast<float*>(to + size_t(groups_) * sizeof(Group));
      bool finite = true;
      for (int64_t i = 0; i < k_; ++i) finite &= (x[i] - x[i]) == 0;
      if (finite) {
        std::memcpy(out, x, size_t(k_) * sizeof(float));
        std::memset(out + k_, 0, size_t(floats_ - k_) * sizeof(float));
      } else {
        for (int64_t i = 0; i < floats_; ++i) out[i] = __builtin_nanf("");
      }
    }
  }

  const Group* as_groups(const uint8_t* row) const { return reinterpret_cast<const Group*>(row); }
  const float* as_floats(const uint8_t* row) const {
    return reinterpret_cast<const float*>(row + size_t(groups_) * sizeof(Group));
  }

 private:
  const Isa& isa_;
  int64_t k_, groups_, floats_;
};

// Some rows to be multiplied by one matrix: pointers to their forms, and panels of the first `panel_rows` of them.
struct Operand {
  const Group* const* groups;
  const float* const* floats;
  const PanelGroup* panels;
  int64_t m, panel_rows;
};

// How many of m rows go through panels: a panel costs about as much as eight rows one by one.
inline int64_t rows_in_panels(const Isa& isa, int64_t m) {
  if (!isa.panels) return 0;
  const int64_t rest = m % kPanel;
  return rest >= 8 ? m : m - rest;
}

inline bool wants_floats(Arithmetic arithmetic, const Matrix& matrix) {
  return arithmetic == Arithmetic::float32 || matrix.format->plain();
}

inline void multiply(const Isa& isa, bool floats, const Rows& w, const Operand& x, Output y) {
  if (floats) return isa.float_dots(w, x.floats, x.m, y);
  if (x.panel_rows) isa.panels(w, x.panels, x.panel_rows, y);
  if (x.m > x.panel_rows) isa.dots(w, x.groups + x.panel_rows, x.m - x.panel_rows, {y.at(x.panel_rows), y.stride});
}

// Rows of activations, converted on the threads of the pool, as an operand that lives in the scratch memory of this thread.
// row(r) is row r as floats; twice: m more rows follow, with the quantization error of each.
template <typename Source>
Operand prepare(Pool& pool, const Isa& isa, const Activations& form, int64_t m, bool twice, bool alone, Source&& row) {
  const int64_t k = form.columns(), total = twice && form.groups() ? 2 * m : m;
  const int64_t panel_rows = form.groups() ? rows_in_panels(isa, total) : 0, panels = ceil_div(panel_rows, kPanel);
  const size_t panel_bytes = size_t(panels * form.groups()) * sizeof(PanelGroup), rows_bytes = size_t(total) * form.row_bytes();
  auto* memory = static_cast<uint8_t*>(scratch(kActivations, panel_bytes + rows_bytes + size_t(2 * total) * sizeof(void*)));
  auto* panel = reinterpret_cast<PanelGroup*>(memory);
  uint8_t* rows = memory + panel_bytes;
  auto** groups = reinterpret_cast<const Group**>(rows + rows_bytes);
  auto** floats = reinterpret_cast<const float**>(groups + total);
  const bool many = !alone && m * k > 1 << 14;
  maybe_parallel(many, pool, ceil_div(m, kPanel), [&](int64_t p) {
    const int64_t last = (p + 1) * kPanel < m ? (p + 1) * kPanel : m;
    for (int64_t r = p * kPanel; r < last; ++r) {
      const float* from = row(r);
      for (int64_t at = r; at < total; at += m) {
        uint8_t* to = rows + size_t(at) * form.row_bytes();
        if (at > r) {
          auto* rest = static_cast<float*>(scratch(kRest, size_t(k) * sizeof(float)));
          isa.rest(from, k, groups[r], rest);
          from = rest;
        }
        form.convert(from, to);
        groups[at] = form.as_groups(to);
        floats[at] = form.as_floats(to);
      }
    }
  });
  maybe_parallel(many, pool, panels, [&](int64_t p) {
    const int64_t first = p * kPanel, left = total - first;
    isa.pack(groups + first, left < kPanel ? left : kPanel, form.groups(), panel + p * form.groups());
  });
  return {groups, floats, panel, total, panel_rows};
}

// The forms of the same rows that some matrices need.
inline Activations forms(const Isa& isa, Arithmetic arithmetic, int64_t k, const Matrix* matrices, int count) {
  bool groups = false, floats = false;
  for (int i = 0; i < count; ++i) (wants_floats(arithmetic, matrices[i]) ? floats : groups) = true;
  return Activations(isa, k, groups, floats);
}

// x, m rows, times some matrices: store(i, first, width, part) gets the results of rows first .. first + width - 1 of matrix i:
// part [m, width]. x has 2 m rows if the sum of both halves is to be computed; of the first `once` matrices it is not.
template <typename Store>
void products(Pool& pool, const Isa& isa, Arithmetic arithmetic, const Operand& x, int64_t m, const Matrix* matrices, int count,
              bool alone, Store&& store, int once = 0) {
  int64_t starts[kMaxMatrices + 1] = {0}, rows[kMaxMatrices];
  for (int i = 0; i < count; ++i) {
    rows[i] = chunk_rows(matrices[i], m);
    starts[i + 1] = starts[i] + ceil_div(matrices[i].n, rows[i]);
  }
  maybe_parallel(!alone, pool, starts[count], [&](int64_t chunk) {
    int i = 0;
    while (chunk >= starts[i + 1]) ++i;
    const int64_t first = (chunk - starts[i]) * rows[i], left = matrices[i].n - first;
    const Rows w = rows_of(matrices[i], first, left < rows[i] ? left : rows[i]);
    const bool floats = wants_floats(arithmetic, matrices[i]);
    auto* part = static_cast<float*>(scratch(kParts, size_t(x.m * w.count) * sizeof(float)));
    Operand own = x;
    if (floats || i < once) own.m = m, own.panel_rows = x.panel_rows < m ? x.panel_rows : m;
    multiply(isa, floats, w, own, {part, w.count});
    if (own.m > m)
      for (int64_t j = 0; j < m * w.count; ++j) part[j] += part[m * w.count + j];
    store(i, first, w.count, part);
  });
}

inline bool serial(const Matrix* matrices, int count, int64_t m) {
  int64_t bytes = 0;
  for (int i = 0; i < count; ++i) bytes += matrices[i].n * matrices[i].format->row_bytes(matrices[i].k);
  return serial(bytes, m);
}

// Rows first .. first + count - 1 of silu(x gateT) * (x upT), or what `more`, of this expert, makes of the two products. next: the
// rows of a gate that are read after them.
inline void gated_rows(const Isa& isa, Arithmetic arithmetic, const Matrix& gate, const Matrix& up, int64_t first, int64_t count,
                const Operand& x, Output y, const Additions& more = {}, const uint8_t* next = nullptr) {
  auto* part = static_cast<float*>(scratch(kParts, size_t(2 * x.m * count) * sizeof(float)));
  float* other = part + x.m * count;
  multiply(isa, wants_floats(arithmetic, gate), rows_of(gate, first, count, up.row(first)), x, {part, count});
  multiply(isa, wants_floats(arithmetic, up), rows_of(up, first, count, next ? next : gate.row(first + count)), x, {other, count});
  for (int64_t r = 0; r < x.m; ++r) {
    float *g = part + r * count, *u = other + r * count;
    for (int64_t i = 0; more.gate && i < count; ++i) g[i] += more.gate[first + i], u[i] += more.up[first + i];
    more.limit > 0 ? isa.clamped(g, u, count, more.limit, more.alpha, y.at(r) + first) : isa.gated(g, u, count, y.at(r) + first);
  }
}

// silu(x gateT) * (x upT): y [rows of x, rows of gate].
inline void gated(Pool& pool, const Isa& isa, Arithmetic arithmetic, const Operand& x, const Matrix& gate, const Matrix& up,
                  bool alone, float* y) {
  const int64_t rows = chunk_rows(gate, x.m), n = gate.n;
  maybe_parallel(!alone, pool, ceil_div(n, rows), [&](int64_t chunk) {
    const int64_t first = chunk * rows;
    gated_rows(isa, arithmetic, gate, up, first, n - first < rows ? n - first : rows, x, {y, n});
  });
}

const Isa& current_isa();

}  // namespace ferrum
