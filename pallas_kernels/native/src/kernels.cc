// The operations: activations are put into form once, then rows of the matrices are handed to the threads in chunks.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "isa.h"

namespace ferrum {
namespace {

constexpr Format kFormats[] = {
    {"Q4_0", Type::Q4_0, 32, 18},     {"Q4_1", Type::Q4_1, 32, 20},     {"Q5_0", Type::Q5_0, 32, 22},
    {"Q5_1", Type::Q5_1, 32, 24},     {"Q8_0", Type::Q8_0, 32, 34},     {"IQ4_NL", Type::IQ4_NL, 32, 18},
    {"MXFP4", Type::MXFP4, 32, 17},   {"Q4_K", Type::Q4_K, 256, 144},   {"Q5_K", Type::Q5_K, 256, 176},
    {"Q6_K", Type::Q6_K, 256, 210},   {"IQ4_XS", Type::IQ4_XS, 256, 136}, {"F16", Type::F16, 1, 2},
    {"BF16", Type::BF16, 1, 2},
};

const Isa* best() {
#if defined(__x86_64__)
  if (has_amx()) return &amx();
  if (has_avx512_vnni()) return &avx512_vnni;
  if (has_avx2()) return &avx2;
#endif
  return &portable;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{best()};
  return isa;
}

template <typename F>
void parallel(Pool& pool, int64_t count, F&& fn) {
  pool.parallel_for(count, [](void* arg, int64_t i) { (*static_cast<std::remove_reference_t<F>*>(arg))(i); }, &fn);
}

template <typename F>
void maybe_parallel(bool wanted, Pool& pool, int64_t count, F&& fn) {
  if (wanted) return parallel(pool, count, fn);
  for (int64_t i = 0; i < count; ++i) fn(i);
}

// Below so many bytes of weights (times a factor for many rows) waking another thread costs more than it saves.
constexpr int64_t kSerialBytes = 64 << 10;  // for one row of x
constexpr int64_t kChunkBytes = 48 << 10;
constexpr int64_t kMaxMatrices = 16;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of a matrix that make a chunk: whole panels, enough bytes to be worth an atomic increment.
int64_t chunk_rows(const Matrix& matrix) {
  const int64_t bytes = matrix.format->row_bytes(matrix.k);
  return bytes == 0 ? matrix.n : kPanel * (1 + kChunkBytes / (kPanel * bytes));
}

bool serial(int64_t weight_bytes, int64_t m) { return weight_bytes * (3 + m) < 4 * kSerialBytes; }

// Rows of activations in the forms that the matrices at hand want, and the products with them.
class Activations {
 public:
  Activations(const Isa& isa, int64_t k, bool groups, bool floats)
      : isa_(isa), k_(k), groups_(groups ? groups_of(k) : 0), floats_(floats ? groups_of(k) * kGroup : 0) {}

  size_t row_bytes() const { return size_t(groups_) * sizeof(Group) + size_t(floats_) * sizeof(float); }
  int64_t groups() const { return groups_; }

  // Writes one row's forms to `to`, row_bytes() long.
  void convert(const float* x, uint8_t* to) const {
    if (groups_) isa_.quantise(x, k_, reinterpret_cast<Group*>(to));
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
int64_t rows_in_panels(const Isa& isa, int64_t m) {
  if (!isa.panels) return 0;
  const int64_t rest = m % kPanel;
  return rest >= 8 ? m : m - rest;
}

bool wants_floats(Arithmetic arithmetic, const Matrix& matrix) {
  return arithmetic == Arithmetic::float32 || matrix.format->plain();
}

void multiply(const Isa& isa, bool floats, const Rows& w, const Operand& x, Output y) {
  if (floats) return isa.float_dots(w, x.floats, x.m, y);
  if (x.panel_rows) isa.panels(w, x.panels, x.panel_rows, y);
  if (x.m > x.panel_rows) isa.dots(w, x.groups + x.panel_rows, x.m - x.panel_rows, {y.at(x.panel_rows), y.stride});
}

// All rows of x, converted on the threads of the pool, as an operand that lives in the scratch memory of this thread.
Operand prepare(Pool& pool, const Isa& isa, const Activations& form, const float* x, int64_t m, int64_t k, bool alone) {
  const int64_t panel_rows = form.groups() ? rows_in_panels(isa, m) : 0, panels = ceil_div(panel_rows, kPanel);
  const size_t panel_bytes = size_t(panels * form.groups()) * sizeof(PanelGroup), rows_bytes = size_t(m) * form.row_bytes();
  auto* memory = static_cast<uint8_t*>(scratch(kActivations, panel_bytes + rows_bytes + size_t(2 * m) * sizeof(void*)));
  auto* panel = reinterpret_cast<PanelGroup*>(memory);
  uint8_t* rows = memory + panel_bytes;
  auto** groups = reinterpret_cast<const Group**>(rows + rows_bytes);
  auto** floats = reinterpret_cast<const float**>(groups + m);
  const bool many = !alone && m * k > 1 << 16;
  maybe_parallel(many, pool, ceil_div(m, kPanel), [&](int64_t p) {
    const int64_t first = p * kPanel, last = first + kPanel < m ? first + kPanel : m;
    for (int64_t r = first; r < last; ++r) {
      uint8_t* row = rows + size_t(r) * form.row_bytes();
      form.convert(x + r * k, row);
      groups[r] = form.as_groups(row);
      floats[r] = form.as_floats(row);
    }
    if (first < panel_rows) isa.pack(groups + first, last - first, form.groups(), panel + p * form.groups());
  });
  return {groups, floats, panel, m, panel_rows};
}

// The forms that some matrices want of the same rows.
Activations forms(const Isa& isa, Arithmetic arithmetic, int64_t k, const Matrix* matrices, int count) {
  bool groups = false, floats = false;
  for (int i = 0; i < count; ++i) (wants_floats(arithmetic, matrices[i]) ? floats : groups) = true;
  return Activations(isa, k, groups, floats);
}

// x and, as m rows more, what its quantisation leaves out.
const float* with_rest(const Isa& isa, const float* x, int64_t m, int64_t k) {
  auto* both = static_cast<float*>(scratch(kHidden, size_t(2 * m * k) * sizeof(float)));
  auto* groups = static_cast<Group*>(scratch(kInner, size_t(groups_of(k)) * sizeof(Group)));
  std::memcpy(both, x, size_t(m * k) * sizeof(float));
  for (int64_t r = 0; r < m; ++r) {
    isa.quantise(x + r * k, k, groups);
    float* rest = both + (m + r) * k;
    for (int64_t i = 0; i < k; ++i) {
      const Group& group = groups[i / kGroup];
      const int block = int(i % kGroup / 32);
      rest[i] = __builtin_fmaf(-group.scale[block], group.q[32 * place(block) + i % 32], x[r * k + i]);
    }
  }
  return both;
}

}  // namespace

const Format* find_format(const char* name, size_t length) {
  for (const Format& format : kFormats)
    if (std::strlen(format.name) == length && std::memcmp(format.name, name, length) == 0) return &format;
  return nullptr;
}

const char* isa() { return chosen().load()->name; }

bool set_isa(const char* name) {
  const Isa* found = nullptr;
  if (std::strcmp(name, "portable") == 0) found = &portable;
#if defined(__x86_64__)
  if (std::strcmp(name, "avx2") == 0 && has_avx2()) found = &avx2;
  if (std::strcmp(name, "avx512_vnni") == 0 && has_avx512_vnni()) found = &avx512_vnni;
  if (std::strcmp(name, "amx") == 0 && has_amx()) found = &amx();
#endif
  if (found) chosen().store(found);
  return found != nullptr;
}

void* scratch(Slot slot, size_t bytes) {
  struct Memory {
    void* at = nullptr;
    size_t size = 0;
    ~Memory() { std::free(at); }
  };
  thread_local Memory memory[kSlots];
  Memory& block = memory[slot];
  if (block.size < bytes || !block.at) {
    std::free(block.at);
    block.size = (bytes + bytes / 2 + 4096) / 64 * 64;
    block.at = std::aligned_alloc(64, block.size);
    if (!block.at) throw std::bad_alloc();
    std::memset(block.at, 0, block.size);
  }
  return block.at;
}

void matmuls(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix* matrices, int count,
             float* const* y) {
  if (m == 0 || count == 0) return;
  const Isa& isa = *chosen().load();
  int64_t starts[kMaxMatrices + 1] = {0}, rows[kMaxMatrices], bytes = 0;
  for (int i = 0; i < count; ++i) {
    rows[i] = chunk_rows(matrices[i]);
    starts[i + 1] = starts[i] + ceil_div(matrices[i].n, rows[i]);
    bytes += matrices[i].n * matrices[i].format->row_bytes(k);
  }
  const int64_t total = arithmetic == Arithmetic::int8x2 ? 2 * m : m;
  if (total > m) x = with_rest(isa, x, m, k);
  const bool alone = serial(bytes, total) || pool.threads() < 2;
  const Operand operand = prepare(pool, isa, forms(isa, arithmetic, k, matrices, count), x, total, k, alone);
  maybe_parallel(!alone, pool, starts[count], [&](int64_t chunk) {
    int i = 0;
    while (chunk >= starts[i + 1]) ++i;
    const int64_t first = (chunk - starts[i]) * rows[i], n = matrices[i].n, left = n - first;
    const Rows w = rows_of(matrices[i], first, left < rows[i] ? left : rows[i]);
    const bool floats = wants_floats(arithmetic, matrices[i]);
    if (total == m || floats) {
      Operand own = operand;
      own.m = m;
      return multiply(isa, floats, w, own, {y[i] + first, n});
    }
    auto* part = static_cast<float*>(scratch(kParts, size_t(total * w.count) * sizeof(float)));
    multiply(isa, floats, w, operand, {part, w.count});
    for (int64_t r = 0; r < m; ++r)
      for (int64_t j = 0; j < w.count; ++j) y[i][r * n + first + j] = part[r * w.count + j] + part[(m + r) * w.count + j];
  });
}

namespace {

// Rows first .. first + count - 1 of silu(x gateT) * (x upT).
void gated_rows(const Isa& isa, Arithmetic arithmetic, const Matrix& gate, const Matrix& up, int64_t first, int64_t count,
                const Operand& x, Output y) {
  auto* part = static_cast<float*>(scratch(kParts, size_t(2 * x.m * count) * sizeof(float)));
  float* other = part + x.m * count;
  multiply(isa, wants_floats(arithmetic, gate), rows_of(gate, first, count), x, {part, count});
  multiply(isa, wants_floats(arithmetic, up), rows_of(up, first, count), x, {other, count});
  for (int64_t r = 0; r < x.m; ++r) isa.gated(part + r * count, other + r * count, count, y.at(r) + first);
}

}  // namespace

void swiglu(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix& gate, const Matrix& up,
            float* y) {
  if (m == 0) return;
  const Isa& isa = *chosen().load();
  const Matrix both[] = {gate, up};
  const int64_t rows = chunk_rows(gate), n = gate.n;
  const bool alone = serial(n * (gate.format->row_bytes(k) + up.format->row_bytes(k)), m) || pool.threads() < 2;
  const Operand operand = prepare(pool, isa, forms(isa, arithmetic, k, both, 2), x, m, k, alone);
  maybe_parallel(!alone, pool, ceil_div(n, rows), [&](int64_t chunk) {
    const int64_t first = chunk * rows;
    gated_rows(isa, arithmetic, gate, up, first, n - first < rows ? n - first : rows, operand, {y, n});
  });
}

namespace {

// The assignments of a mixture of experts, brought together: those of active expert e are order[first[e] .. first[e + 1]),
// in ascending order, and assignment a has place[a] among them (-1: nobody's).
struct Routing {
  int64_t active, assignments;
  const int32_t *expert, *order, *place;
  const int64_t* first;
};

Routing route(const int32_t* ids, int64_t count, int64_t num_experts) {
  auto* first = static_cast<int64_t*>(scratch(kLists, size_t(2 * num_experts + 1) * 8 + size_t(num_experts + 2 * count) * 4));
  int64_t* next = first + num_experts + 1;
  auto* expert = reinterpret_cast<int32_t*>(next + num_experts);
  int32_t *order = expert + num_experts, *place = order + count;
  std::memset(next, 0, size_t(num_experts) * sizeof(int64_t));
  for (int64_t a = 0; a < count; ++a)
    if (ids[a] >= 0 && ids[a] < num_experts) ++next[ids[a]];
  int64_t active = 0, total = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    const int64_t size = next[e];
    next[e] = total;
    if (size == 0) continue;
    expert[active] = int32_t(e);
    first[active++] = total;
    total += size;
  }
  first[active] = total;
  for (int64_t a = 0; a < count; ++a) {
    place[a] = -1;
    if (ids[a] < 0 || ids[a] >= num_experts) continue;
    place[a] = int32_t(next[ids[a]]++);
    order[place[a]] = int32_t(a);
  }
  return {active, total, expert, order, place, first};
}

// Rows of activations grouped by expert: pointers to their forms in the order of the routing, panels of each expert.
struct Grouped {
  const Group** groups;
  const float** floats;
  PanelGroup* panels;
  int64_t* first_panel;  // of each active expert
};

Matrix expert_matrix(const Matrix& first, int64_t expert) {
  Matrix matrix = first;
  matrix.blocks += expert * matrix.n * matrix.format->row_bytes(matrix.k);
  return matrix;
}

// Lays out the memory of grouped rows: `own` rows of `form` first (returned in `rows`), then the rest.
Grouped lay_out(Slot slot, const Isa& isa, const Activations& form, const Routing& routing, int64_t own, uint8_t*& rows) {
  int64_t panels = 0;
  for (int64_t e = 0; e < routing.active; ++e)
    panels += ceil_div(rows_in_panels(isa, routing.first[e + 1] - routing.first[e]), kPanel);
  if (!form.groups()) panels = 0;
  const size_t panel_bytes = size_t(panels * form.groups()) * sizeof(PanelGroup), row_bytes = size_t(own) * form.row_bytes();
  auto* memory = static_cast<uint8_t*>(
      scratch(slot, panel_bytes + row_bytes + size_t(2 * routing.assignments + routing.active) * sizeof(void*)));
  Grouped grouped;
  grouped.panels = reinterpret_cast<PanelGroup*>(memory);
  rows = memory + panel_bytes;
  grouped.groups = reinterpret_cast<const Group**>(rows + row_bytes);
  grouped.floats = reinterpret_cast<const float**>(grouped.groups + routing.assignments);
  grouped.first_panel = reinterpret_cast<int64_t*>(grouped.floats + routing.assignments);
  int64_t panel = 0;
  for (int64_t e = 0; e < routing.active; ++e) {
    grouped.first_panel[e] = panel;
    panel += ceil_div(rows_in_panels(isa, routing.first[e + 1] - routing.first[e]), kPanel);
  }
  return grouped;
}

// Expert e's rows as an operand.
Operand operand_of(const Isa& isa, const Activations& form, const Routing& routing, const Grouped& x, int64_t e) {
  const int64_t first = routing.first[e], m = routing.first[e + 1] - first;
  return {x.groups + first, x.floats + first, x.panels + x.first_panel[e] * form.groups(), m,
          form.groups() ? rows_in_panels(isa, m) : 0};
}

void pack_expert(const Isa& isa, const Activations& form, const Routing& routing, const Grouped& x, int64_t e) {
  const Operand rows = operand_of(isa, form, routing, x, e);
  for (int64_t r = 0; r < rows.panel_rows; r += kPanel) {
    const int64_t count = rows.panel_rows - r < kPanel ? rows.panel_rows - r : kPanel;
    isa.pack(rows.groups + r, count, form.groups(), x.panels + (x.first_panel[e] + r / kPanel) * form.groups());
  }
}

}  // namespace

void experts(Pool& pool, Arithmetic arithmetic, const float* x, int64_t tokens, int64_t k, const int32_t* ids,
             const float* weights, int64_t top_k, int64_t num_experts, const Matrix& gate, const Matrix& up,
             const Matrix& down, float* y) {
  if (tokens == 0) return;
  const Isa& isa = *chosen().load();
  const int64_t n = gate.n, bytes = n * (gate.format->row_bytes(k) + up.format->row_bytes(k)) + k * down.format->row_bytes(n);
  const Routing routing = route(ids, tokens * top_k, num_experts);
  const bool alone = pool.threads() < 2 || serial(routing.active * bytes, 1);

  // Activations of every token once; then each expert's rows point at them, and many are packed into panels.
  const Matrix both[] = {gate, up};
  const Activations outer = forms(isa, arithmetic, k, both, 2), inner = forms(isa, arithmetic, n, &down, 1);
  uint8_t *outer_rows, *inner_rows;
  const Grouped from = lay_out(kActivations, isa, outer, routing, tokens, outer_rows);
  const Grouped to = lay_out(kInner, isa, inner, routing, routing.assignments, inner_rows);
  auto* hidden = static_cast<float*>(scratch(kHidden, size_t(routing.assignments * n) * sizeof(float)));
  const bool many = !alone && tokens > 8;
  maybe_parallel(many, pool, tokens, [&](int64_t t) { outer.convert(x + t * k, outer_rows + size_t(t) * outer.row_bytes()); });
  for (int64_t i = 0; i < routing.assignments; ++i) {
    const uint8_t* row = outer_rows + size_t(routing.order[i] / top_k) * outer.row_bytes();
    from.groups[i] = outer.as_groups(row);
    from.floats[i] = outer.as_floats(row);
    row = inner_rows + size_t(i) * inner.row_bytes();
    to.groups[i] = inner.as_groups(row);
    to.floats[i] = inner.as_floats(row);
  }
  maybe_parallel(many, pool, routing.active, [&](int64_t e) { pack_expert(isa, outer, routing, from, e); });

  // silu(gate) * up of each expert's rows, in chunks of the expert's rows of weights.
  const int64_t rows = chunk_rows(gate), chunks = ceil_div(n, rows);
  maybe_parallel(!alone, pool, routing.active * chunks, [&](int64_t task) {
    const int64_t e = task / chunks, first = task % chunks * rows;
    gated_rows(isa, arithmetic, expert_matrix(gate, routing.expert[e]), expert_matrix(up, routing.expert[e]), first,
               n - first < rows ? n - first : rows, operand_of(isa, outer, routing, from, e),
               {hidden + routing.first[e] * n, n});
  });
  maybe_parallel(!alone, pool, routing.active, [&](int64_t e) {
    for (int64_t i = routing.first[e]; i < routing.first[e + 1]; ++i)
      inner.convert(hidden + i * n, inner_rows + size_t(i) * inner.row_bytes());
    pack_expert(isa, inner, routing, to, e);
  });

  // Some columns of the result at a time: every expert's part of them, then each token's slots in order.
  const int64_t columns = 4 * kPanel;
  maybe_parallel(!alone, pool, ceil_div(k, columns), [&](int64_t task) {
    const int64_t first = task * columns, width = k - first < columns ? k - first : columns;
    auto* part = static_cast<float*>(scratch(kParts, size_t(routing.assignments * width) * sizeof(float)));
    for (int64_t e = 0; e < routing.active; ++e)
      multiply(isa, wants_floats(arithmetic, down), rows_of(expert_matrix(down, routing.expert[e]), first, width),
               operand_of(isa, inner, routing, to, e), {part + routing.first[e] * width, width});
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = y + t * k + first;
      std::memset(out, 0, size_t(width) * sizeof(float));
      for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot)
        if (routing.place[slot] >= 0) isa.add_scaled(weights[slot], part + routing.place[slot] * width, width, out);
    }
  });
}

}  // namespace ferrum
