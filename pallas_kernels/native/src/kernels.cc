// The operations: activations are converted once, then rows of the matrices are distributed to the threads in chunks.
#include "kernels.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "products.h"

namespace ferrum {
namespace {

// The instruction sets in this library, the best first: build.py leaves out those that its machine does not have.
constexpr struct {
  const char* name;
  bool (*here)();
  const Isa* (*isa)();
} kSets[] = {
#if defined(__x86_64__)
#ifndef FERRUM_WITHOUT_AMX
    {"amx", has_amx, [] { return &amx(); }},
#endif
#ifndef FERRUM_WITHOUT_AVX512_VNNI
    {"avx512_vnni", has_avx512_vnni, [] { return &avx512_vnni; }},
#endif
#ifndef FERRUM_WITHOUT_AVX2
    {"avx2", has_avx2, [] { return &avx2; }},
#endif
#endif
#if defined(__aarch64__)
#ifndef FERRUM_WITHOUT_NEON_I8MM
    {"neon_i8mm", has_neon_i8mm, [] { return &neon_i8mm(); }},
#endif
#ifndef FERRUM_WITHOUT_NEON_DOTPROD
    {"neon_dotprod", has_neon_dotprod, [] { return &neon_dotprod; }},
#endif
#endif
#ifndef FERRUM_WITHOUT_PORTABLE
    {"portable", [] { return true; }, [] { return &portable; }},
#endif
};

// nullptr if none of them is for this machine.
const Isa* find_set(const char* name) {
  for (const auto& set : kSets)
    if ((!name || std::strcmp(name, set.name) == 0) && set.here()) return set.isa();
  return nullptr;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> isa{find_set(nullptr)};
  return isa;
}

}  // namespace

const Format* find_format(const char* name, size_t length) {
  for (const Format& format : kFormats)
    if (std::strlen(format.name) == length && std::memcmp(format.name, name, length) == 0) return &format;
  return nullptr;
}

#if defined(__x86_64__)
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("f16c");
}

bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") && has_avx2();
}
#endif

const char* isa() {
  const Isa* isa = chosen().load();
  return isa ? isa->name : nullptr;
}

bool set_isa(const char* name) {
  const Isa* found = find_set(name);
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

const Isa& current_isa() { return *chosen().load(); }

void matmuls(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix* matrices, int count,
             float* const* y) {
  if (m == 0 || count == 0) return;
  const Isa& isa = current_isa();
  const bool twice = arithmetic == Arithmetic::int8x2, alone = pool.threads() < 2 || serial(matrices, count, twice ? 2 * m : m);
  const Activations form = forms(isa, arithmetic, k, matrices, count);
  const Operand operand = prepare(pool, isa, form, m, twice, alone, [&](int64_t r) { return x + r * k; });
  products(pool, isa, arithmetic, operand, m, matrices, count, alone, [&](int i, int64_t first, int64_t width, const float* part) {
    for (int64_t r = 0; r < m; ++r)
      std::memcpy(y[i] + r * matrices[i].n + first, part + r * width, size_t(width) * sizeof(float));
  });
}

void swiglu(Pool& pool, Arithmetic arithmetic, const float* x, int64_t m, int64_t k, const Matrix& gate, const Matrix& up,
            float* y) {
  if (m == 0) return;
  const Isa& isa = current_isa();
  const Matrix both[] = {gate, up};
  const bool alone = pool.threads() < 2 || serial(both, 2, m);
  const Activations form = forms(isa, arithmetic, k, both, 2);
  gated(pool, isa, arithmetic, prepare(pool, isa, form, m, false, alone, [&](int64_t r) { return x + r * k; }), gate, up, alone, y);
}

namespace {

// The assignments of a mixture of experts, sorted by expert: those of active expert e are order[first[e] .. first[e + 1]), in
// ascending order, and assignment a is at place[a] (-1: it has no expert).
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

// Rows of activations grouped by expert: pointers to their forms in the order of the routing, and the panels of each expert.
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
             const Matrix& down, const Additions& more, float* y) {
  if (tokens == 0) return;
  const Isa& isa = current_isa();
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
  if (isa.panels) maybe_parallel(many, pool, routing.active, [&](int64_t e) { pack_expert(isa, outer, routing, from, e); });

  // silu(gate) * up of each expert's rows, in chunks of the expert's rows of weights.
  const auto after = [&](int64_t e) { return routing.expert[e + 1 < routing.active ? e + 1 : 0]; };
  const int64_t rows = chunk_rows(gate, 1), chunks = ceil_div(n, rows);
  maybe_parallel(!alone, pool, routing.active * chunks, [&](int64_t task) {
    const int64_t e = task / chunks, first = task % chunks * rows;
    Additions own = more;
    if (more.gate) own.gate += routing.expert[e] * n, own.up += routing.expert[e] * n;
    gated_rows(isa, arithmetic, expert_matrix(gate, routing.expert[e]), expert_matrix(up, routing.expert[e]), first,
               n - first < rows ? n - first : rows, operand_of(isa, outer, routing, from, e),
               {hidden + routing.first[e] * n, n}, own, first + rows < n ? nullptr : expert_matrix(gate, after(e)).blocks);
  });
  maybe_parallel(!alone, pool, routing.active, [&](int64_t e) {
    for (int64_t i = routing.first[e]; i < routing.first[e + 1]; ++i)
      inner.convert(hidden + i * n, inner_rows + size_t(i) * inner.row_bytes());
    pack_expert(isa, inner, routing, to, e);
  });

  // Some columns of the result at a time: every expert's part of them, then each token's ranks in order.
  const int64_t columns = 4 * kPanel;
  maybe_parallel(!alone, pool, ceil_div(k, columns), [&](int64_t task) {
    const int64_t first = task * columns, width = k - first < columns ? k - first : columns;
    auto* part = static_cast<float*>(scratch(kParts, size_t(routing.assignments * width) * sizeof(float)));
    for (int64_t e = 0; e < routing.active; ++e) {
      const int64_t later = e + 1 < routing.active ? first : first + width;
      multiply(isa, wants_floats(arithmetic, down), rows_of(expert_matrix(down, routing.expert[e]), first, width, expert_matrix(down, after(e)).row(later)),
               operand_of(isa, inner, routing, to, e), {part + routing.first[e] * width, width});
      const float* bias = more.down ? more.down + routing.expert[e] * k + first : nullptr;
      for (int64_t r = routing.first[e]; bias && r < routing.first[e + 1]; ++r)
        for (int64_t i = 0; i < width; ++i) part[r * width + i] += bias[i];
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float* out = y + t * k + first;
      std::memset(out, 0, size_t(width) * sizeof(float));
      for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot)
        if (routing.place[slot] >= 0) isa.add_scaled(weights[slot], part + routing.place[slot] * width, width, out);
    }
  });
}

}  // namespace ferrum
