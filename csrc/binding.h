// Views of tensor arguments, each checked before a launcher gets its pointer, and the call that
// they belong to.
//
// Tensors come through torch's DLPack exchange table (plain C, no torch header): a view without
// ownership costs nanoseconds, and so does the current stream. That compiles in seconds, where
// torch's own headers take 5 to 77, and the same file serves CUDA tensors and, in the emulation,
// CPU ones.
#pragma once

#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "ops.h"

namespace ldit {

namespace py = pybind11;
using Shape = std::vector<std::int64_t>;

#ifdef LDIT_EMULATED
constexpr DLDeviceType kDevice = kDLCPU;
constexpr const char* kDeviceName = "the CPU";
#else
constexpr DLDeviceType kDevice = kDLCUDA;
constexpr const char* kDeviceName = "a CUDA device";
#endif

inline const DLPackExchangeAPI& exchange() {
  static const auto* table = [] {
    py::object capsule =
        py::module_::import("torch").attr("Tensor").attr("__dlpack_c_exchange_api__");
    auto* found =
        static_cast<DLPackExchangeAPI*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
    if (found == nullptr) throw py::error_already_set();
    if (found->header.version.major != DLPACK_MAJOR_VERSION)
      throw std::runtime_error("torch speaks another DLPack");
    return found;
  }();
  return *table;
}

inline py::handle tensor_type() {
  static const auto* type = new py::object(py::module_::import("torch").attr("Tensor"));
  return *type;
}

inline std::string text(const std::int64_t* numbers, int count) {
  std::ostringstream out;
  for (int i = 0; i < count; ++i) out << (i ? ", " : "[") << numbers[i];
  out << (count ? "]" : "[]");
  return out.str();
}

// One call from Python: its tensors are of one device, which is the current one for as long as this
// lives.
class Call {
 public:
  explicit Call(const char* op) : op_(op) {}
  Call(const Call&) = delete;

  ~Call() {
    try {
      if (before_ >= 0) set_device(before_);
    } catch (const LaunchError&) {  // the launch has thrown the same
    }
  }

  [[noreturn]] void refuse(const char* argument, const std::string& what) const {
    throw py::value_error(std::string(op_) + ": " + argument + " " + what);
  }

  void require(bool holds, const char* argument, const std::string& what) const {
    if (!holds) refuse(argument, what);
  }

  void use_device(const char* argument, DLDevice device) {
    require(device.device_type == kDevice, argument, std::string("is not on ") + kDeviceName);
    if (device_ < 0) {
      device_ = device.device_id;
      before_ = set_device(device_);
    }
    require(device.device_id == device_, argument,
            "is on device " + std::to_string(device.device_id) + ", the first tensor on " +
                std::to_string(device_));
  }

  Stream stream() const {
#ifdef LDIT_EMULATED
    return nullptr;
#else
    void* found = nullptr;
    if (exchange().current_work_stream(kDevice, device_, &found) != 0)
      throw py::error_already_set();
    return static_cast<Stream>(found);
#endif
  }

 private:
  const char* op_;
  int device_ = -1;
  int before_ = -1;
};

// One tensor argument. A property that it lacks is a ValueError with the op's and the argument's
// name.
class Tensor {
 public:
  Tensor(Call& call, const char* name, py::handle object) : call_(call), name_(name) {
    int is = PyObject_IsInstance(object.ptr(), tensor_type().ptr());
    if (is < 0) throw py::error_already_set();
    call.require(is, name, "is not a tensor");
    if (exchange().dltensor_from_py_object_no_sync(object.ptr(), &view_) != 0)
      throw py::error_already_set();
    call.use_device(name, view_.device);
  }

  int rank() const { return view_.ndim; }

  std::int64_t size(int dimension) const {
    call_.require(-rank() <= dimension && dimension < rank(), name_,
                  "has the shape " + shape_text());
    return view_.shape[dimension < 0 ? dimension + rank() : dimension];
  }

  std::int64_t elements() const {
    std::int64_t product = 1;
    for (int i = 0; i < rank(); ++i) product *= view_.shape[i];
    return product;
  }

  const Tensor& shaped(const Shape& shape) const {
    bool same = rank() == static_cast<int>(shape.size()) &&
                std::equal(shape.begin(), shape.end(), view_.shape);
    call_.require(same, name_,
                  "has the shape " + shape_text() + ", not " + text(shape.data(), shape.size()));
    return *this;
  }

  const Tensor& ranked(int count) const {
    call_.require(rank() == count && elements() > 0, name_,
                  "has the shape " + shape_text() + ", not " + std::to_string(count) +
                      " dimensions without a 0");
    return *this;
  }

  const Tensor& counted(std::int64_t count) const {
    call_.require(elements() == count, name_,
                  "has the shape " + shape_text() + ", not " + std::to_string(count) + " elements");
    return *this;
  }

  DType dtype() const {
    bool plain = view_.dtype.lanes == 1;
    if (plain && view_.dtype.code == kDLFloat && view_.dtype.bits == 32) return DType::float32;
    if (plain && view_.dtype.code == kDLFloat && view_.dtype.bits == 16) return DType::float16;
    if (plain && view_.dtype.code == kDLBfloat && view_.dtype.bits == 16) return DType::bfloat16;
    call_.refuse(name_, "has a dtype that is none of float32, float16, bfloat16");
  }

  // One number of any kind that a device reads.
  Scalar scalar() const {
    counted(1);
    bool plain = view_.dtype.lanes == 1;
    int code = view_.dtype.code, bits = view_.dtype.bits;
    auto found = [&](ScalarType type) { return Scalar{start(), type}; };
    if (plain && code == kDLFloat && bits == 64) return found(ScalarType::float64);
    if (plain && code == kDLFloat && bits == 32) return found(ScalarType::float32);
    if (plain && code == kDLFloat && bits == 16) return found(ScalarType::float16);
    if (plain && code == kDLBfloat && bits == 16) return found(ScalarType::bfloat16);
    if (plain && code == kDLInt && bits == 64) return found(ScalarType::int64);
    if (plain && code == kDLInt && bits == 32) return found(ScalarType::int32);
    if (plain && code == kDLInt && bits == 16) return found(ScalarType::int16);
    if (plain && code == kDLInt && bits == 8) return found(ScalarType::int8);
    if (plain && (code == kDLUInt || code == kDLBool) && bits == 8) return found(ScalarType::uint8);
    call_.refuse(name_, "has a dtype that is no number of 8 to 64 bits");
  }

  const Tensor& typed(DType wanted) const {
    static constexpr const char* names[] = {"float32", "float16", "bfloat16"};
    DType found = dtype();
    call_.require(
        found == wanted, name_,
        std::string("has the dtype ") + names[int(found)] + ", not " + names[int(wanted)]);
    return *this;
  }

  // The start of contiguous memory.
  void* data() const {
    std::int64_t expected = 1;
    bool contiguous = true;
    for (int i = rank() - 1; i >= 0; --i) {
      contiguous = contiguous && (view_.shape[i] == 1 || view_.strides == nullptr ||
                                  view_.strides[i] == expected);
      expected *= view_.shape[i];
    }
    call_.require(contiguous, name_, "is not contiguous: " + layout_text());
    return start();
  }

  Floats floats() const { return {data(), dtype()}; }

  template <class T>
  T* as(DType wanted) const {
    return static_cast<T*>(typed(wanted).data());
  }

  // A matrix whose rows are contiguous and may lie apart.
  Rows rows() const {
    bool fits =
        rank() == 2 && (view_.shape[1] == 1 || view_.strides == nullptr || view_.strides[1] == 1);
    call_.require(fits, name_, "has no contiguous rows: " + layout_text());
    return {{start(), dtype()}, view_.strides == nullptr ? view_.shape[1] : view_.strides[0]};
  }

 private:
  void* start() const { return static_cast<char*>(view_.data) + view_.byte_offset; }
  std::string shape_text() const { return text(view_.shape, rank()); }
  std::string layout_text() const {
    return "shape " + shape_text() + ", strides " +
           (view_.strides ? text(view_.strides, rank()) : "none");
  }

  Call& call_;
  const char* name_;
  DLTensor view_{};
};

// An argument that may be None.
inline std::optional<Tensor> optional(Call& call, const char* name, py::handle object) {
  if (object.is_none()) return std::nullopt;
  return std::make_optional<Tensor>(call, name, object);
}

}  // namespace ldit
