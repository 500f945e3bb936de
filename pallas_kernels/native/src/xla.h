// The part of XLA's C interface for custom calls that the handlers need. XLA's C++ interface does the same with templates that
// take longer to compile than most of the kernels.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "xla/ffi/api/c_api.h"

namespace ferrum {

// An array of an operand or result. A missing one has no axes.
class Array {
 public:
  Array() = default;
  explicit Array(const void* buffer) : at_(static_cast<const XLA_FFI_Buffer*>(buffer)) {}
  size_t axes() const { return at_ ? size_t(at_->rank) : 0; }
  int64_t dim(size_t i) const { return at_->dims[i]; }
  int64_t from_end(size_t i) const { return at_->dims[axes() - i]; }  // 1: the last
  void* data() const { return at_ ? at_->data : nullptr; }
  float* floats() const { return static_cast<float*>(data()); }
  int32_t* ints() const { return static_cast<int32_t*>(data()); }
  bool is(XLA_FFI_DataType type, size_t axes) const { return at_ && at_->dtype == type && this->axes() == axes; }
  bool is_one_int() const {
    for (size_t i = 0; i < axes(); ++i)
      if (dim(i) != 1) return false;
    return at_ && at_->dtype == XLA_FFI_DataType_S32;
  }
  bool same_shape(const Array& other) const {
    return axes() == other.axes() && std::memcmp(at_->dims, other.at_->dims, axes() * sizeof(int64_t)) == 0;
  }

  // 0 for types that are not used here.
  int64_t item_bytes() const {
    switch (at_ ? at_->dtype : XLA_FFI_DataType_INVALID) {
      case XLA_FFI_DataType_S8: case XLA_FFI_DataType_U8: case XLA_FFI_DataType_F8E4M3FN: return 1;
      case XLA_FFI_DataType_S16: case XLA_FFI_DataType_U16: case XLA_FFI_DataType_F16: case XLA_FFI_DataType_BF16: return 2;
      case XLA_FFI_DataType_S32: case XLA_FFI_DataType_U32: case XLA_FFI_DataType_F32: return 4;
      default: return 0;
    }
  }

 private:
  const XLA_FFI_Buffer* at_ = nullptr;
};

constexpr XLA_FFI_DataType kF32 = XLA_FFI_DataType_F32, kS32 = XLA_FFI_DataType_S32;

// A call of a handler: its operands, results and attributes, and XLA's threads.
class Call {
 public:
  explicit Call(XLA_FFI_CallFrame* frame) : frame_(frame) {}

  size_t operands() const { return size_t(frame_->args.size); }
  size_t results() const { return size_t(frame_->rets.size); }
  Array operand(size_t i) const { return i < operands() ? Array(frame_->args.args[i]) : Array(); }
  Array result(size_t i) const { return i < results() ? Array(frame_->rets.rets[i]) : Array(); }

  // Attributes; false if there is none with this name and type.
  bool get(std::string_view name, std::string_view& value) const {
    const auto* text = static_cast<const XLA_FFI_ByteSpan*>(find(name, XLA_FFI_AttrType_STRING));
    if (text) value = {text->ptr, text->len};
    return text;
  }
  bool get(std::string_view name, std::pair<const int64_t*, size_t>& value) const {
    const auto* array = static_cast<const XLA_FFI_Array*>(find(name, XLA_FFI_AttrType_ARRAY));
    if (!array || array->dtype != XLA_FFI_DataType_S64) return false;
    value = {static_cast<const int64_t*>(array->data), array->size};
    return true;
  }
  bool get(std::string_view name, int64_t& value) const { return scalar(name, XLA_FFI_DataType_S64, value); }
  bool get(std::string_view name, float& value) const { return scalar(name, XLA_FFI_DataType_F32, value); }
  bool get(std::string_view name, bool& value) const { return scalar(name, XLA_FFI_DataType_PRED, value); }

  int threads() const {
    int64_t count = 0;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame_->ctx, &count};
    dropped(frame_->api->XLA_FFI_ThreadPool_NumThreads(&args));
    return int(count);
  }

  // Runs a task on one of XLA's threads, or here if there is none. XLA's threads may outlive this call, but not the task.
  template <typename F>
  void schedule(F task) const {
    auto* data = new F(std::move(task));
    XLA_FFI_Task* run = +[](void* data) {
      (*static_cast<F*>(data))();
      delete static_cast<F*>(data);
    };
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame_->ctx, run, data};
    if (dropped(frame_->api->XLA_FFI_ThreadPool_Schedule(&args))) run(data);
  }

  XLA_FFI_Error* error(XLA_FFI_Error_Code code, const std::string& words) const {
    XLA_FFI_Error_Create_Args args{XLA_FFI_Error_Create_Args_STRUCT_SIZE, nullptr, words.c_str(), code};
    return frame_->api->XLA_FFI_Error_Create(&args);
  }

 private:
  void* find(std::string_view name, XLA_FFI_AttrType type) const {
    const XLA_FFI_Attrs& attrs = frame_->attrs;
    for (int64_t i = 0; i < attrs.size; ++i)
      if (attrs.types[i] == type && name == std::string_view(attrs.names[i]->ptr, attrs.names[i]->len)) return attrs.attrs[i];
    return nullptr;
  }
  template <typename T>
  bool scalar(std::string_view name, XLA_FFI_DataType type, T& value) const {
    const auto* scalar = static_cast<const XLA_FFI_Scalar*>(find(name, XLA_FFI_AttrType_SCALAR));
    if (!scalar || scalar->dtype != type) return false;
    value = *static_cast<const T*>(scalar->value);
    return true;
  }
  bool dropped(XLA_FFI_Error* error) const {
    if (!error) return false;
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    frame_->api->XLA_FFI_Error_Destroy(&args);
    return true;
  }

  XLA_FFI_CallFrame* frame_;
};

// With a call without operands, XLA asks a handler which version it was built for.
inline bool answered(XLA_FFI_CallFrame* frame) {
  auto* asked = frame->extension_start;  // its type has another name from jaxlib 0.12 on
  if (!asked || asked->type != XLA_FFI_Extension_Metadata) return false;
  XLA_FFI_Metadata* metadata = reinterpret_cast<XLA_FFI_Metadata_Extension*>(asked)->metadata;
  metadata->api_version.major_version = XLA_FFI_API_MAJOR;
  metadata->api_version.minor_version = XLA_FFI_API_MINOR;
  metadata->traits = 0;
  return true;
}

}  // namespace ferrum
