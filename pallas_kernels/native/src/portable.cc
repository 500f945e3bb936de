// The kernels for any machine.
#define FERRUM_LANES 0
#include "attention.h"
#include "floats.h"

namespace ferrum {
namespace {

void dots(const Rows& w, const Group* const* x, int64_t m, Output y) {
  switch (w.format->type) {
    FERRUM_QUANTIZED(dots_of, w, x, m, y)
    default: break;
  }
}

}  // namespace

const Isa portable = {"portable", quantize_row, rest_of_row, pack_panel, dots, nullptr, float_dots, FERRUM_BESIDE};

}  // namespace ferrum
