// The only file that knows Python: pointers and sizes in, nothing allocated on a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "plum/code_usage.h"
#include "plum/codebook_sums.h"
#include "plum/cpu_features.h"
#include "plum/residual_quantize.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = PLUM_COMPILER;
  info["cuda"] = PLUM_CUDA_VERSION;
  info["cuda_architectures"] = PLUM_CUDA_ARCHITECTURES;
  info["isas"] = plum::cpu::available_isas();
  info["isa"] = plum::cpu::active_isa_name();
  return info;
}

int64_t code_usage_cpu(uintptr_t codes, bool wide, int64_t rows, const std::vector<int64_t>& sizes,
                       uintptr_t usage, int threads) {
  py::gil_scoped_release release;
  const auto levels = static_cast<int64_t>(sizes.size());
  return wide ? plum::cpu::code_usage(pointer<const int64_t>(codes), rows, levels, sizes.data(),
                                      pointer<int64_t>(usage), threads)
              : plum::cpu::code_usage(pointer<const int32_t>(codes), rows, levels, sizes.data(),
                                      pointer<int64_t>(usage), threads);
}

int64_t codebook_sums_cpu(uintptr_t x, int type, int64_t rows, int64_t width, uintptr_t codes,
                          bool wide, const std::vector<int64_t>& sizes, uintptr_t codebooks,
                          uintptr_t sums, int threads) {
  py::gil_scoped_release release;
  const auto row_type = static_cast<plum::cpu::RowType>(type);
  const auto levels = static_cast<int64_t>(sizes.size());
  const auto* rows_of_x = pointer<const void>(x);
  const auto* books = pointer<const float>(codebooks);
  auto* out = pointer<double>(sums);
  return wide ? plum::cpu::codebook_sums(rows_of_x, row_type, rows, width,
                                         pointer<const int64_t>(codes), levels, sizes.data(), books,
                                         out, threads)
              : plum::cpu::codebook_sums(rows_of_x, row_type, rows, width,
                                         pointer<const int32_t>(codes), levels, sizes.data(), books,
                                         out, threads);
}

using plum::cpu::PackedCodebooks;

PackedCodebooks pack_codebooks(uintptr_t codebooks, const std::vector<int64_t>& sizes,
                               int64_t width) {
  py::gil_scoped_release release;
  return PackedCodebooks(pointer<const float>(codebooks), sizes, width);
}

bool matches(const PackedCodebooks& packed, uintptr_t codebooks, const std::vector<int64_t>& sizes,
             int64_t width) {
  py::gil_scoped_release release;
  return packed.matches(pointer<const float>(codebooks), sizes, width);
}

int64_t residual_quantize_cpu(uintptr_t x, int type, int64_t rows, const PackedCodebooks& codebooks,
                              uintptr_t codes, uintptr_t norms, uintptr_t residual, uintptr_t usage,
                              int threads) {
  py::gil_scoped_release release;
  return plum::cpu::residual_quantize(pointer<const void>(x), static_cast<plum::cpu::RowType>(type),
                                      rows, codebooks, pointer<int32_t>(codes),
                                      pointer<float>(norms), pointer<float>(residual),
                                      pointer<int64_t>(usage), threads);
}

#ifdef PLUM_WITH_CUDA
void code_usage_cuda(uintptr_t codes, bool wide, int64_t rows, const std::vector<int64_t>& sizes,
                     uintptr_t counts, uintptr_t stream) {
  py::gil_scoped_release release;
  const auto levels = static_cast<int64_t>(sizes.size());
  if (wide) {
    plum::cuda::code_usage(pointer<const int64_t>(codes), rows, levels, sizes.data(),
                           pointer<int64_t>(counts), pointer<void>(stream));
  } else {
    plum::cuda::code_usage(pointer<const int32_t>(codes), rows, levels, sizes.data(),
                           pointer<int64_t>(counts), pointer<void>(stream));
  }
}
#endif

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.def("build_info", &build_info);
  module.def("set_cpu_isa", &plum::cpu::set_isa);
  module.def("code_usage_cpu", &code_usage_cpu);
  module.def("codebook_sums_cpu", &codebook_sums_cpu);
  py::class_<PackedCodebooks>(module, "PackedCodebooks")
      .def(py::init(&pack_codebooks))
      .def("matches", &matches)
      .def_property_readonly("first_bad", &PackedCodebooks::first_bad)
      .def_property_readonly("size", &PackedCodebooks::size)
      .def_property_readonly("bytes", &PackedCodebooks::bytes);
  module.def("residual_quantize_cpu", &residual_quantize_cpu);
#ifdef PLUM_WITH_CUDA
  module.def("code_usage_cuda", &code_usage_cuda);
#endif
}
