// The only file that knows Python: pointers and sizes in, nothing allocated on a device.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "plum/code_usage.h"
#include "plum/codebook_sums.h"
#include "plum/cpu_features.h"
#include "plum/forced_tail.h"
#include "plum/residual_quantize.h"
#include "plum/trie_advance.h"
#include "plum/trie_beam_sample.h"
#include "plum/trie_beam_step.h"
#include "plum/trie_build.h"
#include "plum/trie_deny.h"
#include "plum/trie_mask.h"
#include "plum/trie_walk.h"

// The hash of this file, or nothing where the build does not tell.
#ifndef PLUM_BINDINGS
#define PLUM_BINDINGS ""
#endif

namespace py = pybind11;

// Integers that belong together, addresses among them; in Python a tuple.
template <size_t kCount>
using Numbers = std::array<int64_t, kCount>;

// pybind11's own casters take any sequence, number by number through Python's protocols: a quarter
// of what a call over no rows took.
template <size_t kCount>
struct py::detail::type_caster<Numbers<kCount>> {
  PYBIND11_TYPE_CASTER(Numbers<kCount>, const_name("tuple"));

  bool load(handle source, bool) {
    PyObject* tuple = source.ptr();
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != Py_ssize_t{kCount}) return false;
    for (size_t i = 0; i < kCount; ++i) {
      value[i] = PyLong_AsSsize_t(PyTuple_GET_ITEM(tuple, i));
      if (value[i] == -1 && PyErr_Occurred()) {
        PyErr_Clear();
        return false;
      }
    }
    return true;
  }
};

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

// Levels; addresses of table, codes, starts, begins, ranks and masks.
using TrieArgs = Numbers<7>;

plum::TrieArrays trie_arrays(const TrieArgs& args) {
  const auto& [depth, table, codes, starts, begins, ranks, masks] = args;
  const auto* at = pointer<const int64_t>(table);
  return {at,
          depth,
          at[plum::kTrieFields - 1],
          pointer<uint16_t>(codes),
          pointer<uint32_t>(starts),
          pointer<uint64_t>(begins),
          pointer<uint32_t>(ranks),
          pointer<uint64_t>(masks)};
}

// Addresses of bits, ranks and masks; 0 for no filter.
using FilterArgs = Numbers<3>;

plum::TrieFilter trie_filter(const TrieArgs& trie, const FilterArgs& at) {
  return plum::make_filter(trie_arrays(trie), pointer<const uint64_t>(at[0]),
                           pointer<const uint32_t>(at[1]), pointer<const uint64_t>(at[2]));
}

// A level for all rows, or the address of one for each.
using LevelArgs = Numbers<2>;

plum::RowLevels row_levels(const LevelArgs& args) {
  return {args[0], pointer<const int64_t>(args[1])};
}

// Addresses of the logits and of where they go masked, each with the elements from row to row; rows
// and width.
using MaskArgs = Numbers<6>;

template <typename Word>
void trie_mask(const MaskArgs& args, uint32_t fill, uintptr_t states, const TrieArgs& trie,
               const LevelArgs& levels, const std::vector<int64_t>& columns, int threads) {
  const auto& [logits, stride, masked, masked_stride, rows, width] = args;
  plum::cpu::trie_mask(pointer<const Word>(logits), stride, pointer<Word>(masked), masked_stride,
                       static_cast<Word>(fill), rows, width, pointer<const int64_t>(states),
                       plum::make_trie(trie_arrays(trie)), row_levels(levels), columns.data(),
                       threads);
}

void trie_mask_cpu(const MaskArgs& args, bool wide, uint32_t fill, uintptr_t states,
                   const TrieArgs& trie, const LevelArgs& levels,
                   const std::vector<int64_t>& columns, int threads) {
  py::gil_scoped_release release;
  const auto run = wide ? trie_mask<uint32_t> : trie_mask<uint16_t>;
  run(args, fill, states, trie, levels, columns, threads);
}

void trie_advance_cpu(uintptr_t states, uintptr_t tokens, int64_t count, const TrieArgs& trie,
                      const LevelArgs& levels, uintptr_t after, int threads) {
  py::gil_scoped_release release;
  plum::cpu::trie_advance(pointer<const int64_t>(states), pointer<const int64_t>(tokens), count,
                          plum::make_trie(trie_arrays(trie)), row_levels(levels),
                          pointer<int64_t>(after), threads);
}

void trie_walk_cpu(uintptr_t roots, uintptr_t prefixes, int64_t count, int64_t length,
                   const TrieArgs& trie, uintptr_t states, int threads) {
  py::gil_scoped_release release;
  plum::cpu::trie_walk(pointer<const int64_t>(roots), pointer<const int64_t>(prefixes), count,
                       length, plum::make_trie(trie_arrays(trie)), pointer<int64_t>(states),
                       threads);
}

void forced_tail_cpu(uintptr_t states, int64_t count, const TrieArgs& trie, int64_t level,
                     uintptr_t tail, uintptr_t forced, int threads) {
  py::gil_scoped_release release;
  plum::cpu::forced_tail(pointer<const int64_t>(states), count, plum::make_trie(trie_arrays(trie)),
                         level, pointer<int64_t>(tail), pointer<bool>(forced), threads);
}

// Address and type of the logits; requests, beams, width, and elements from request to request and
// from beam to beam; addresses of scores and states; the address and width of the dead children.
using BeamArgs = Numbers<11>;
// Addresses of tokens, parents, scores and states.
using BeamOut = Numbers<4>;

plum::cpu::BeamStepInput beam_input(const BeamArgs& args, const LevelArgs& levels,
                                    const std::vector<int64_t>& columns, bool valid) {
  const auto& [logits, type, batch, beams, width, batch_stride, beam_stride, scores, states, dead,
               denied] = args;
  plum::cpu::BeamStepInput input{};
  input.logits = pointer<const void>(logits);
  input.type = static_cast<plum::cpu::RowType>(type);
  input.batch = batch;
  input.beams = beams;
  input.width = width;
  input.batch_stride = batch_stride;
  input.beam_stride = beam_stride;
  input.scores = pointer<const float>(scores);
  input.states = pointer<const int64_t>(states);
  input.levels = row_levels(levels);
  input.columns = columns.data();
  input.valid = valid;
  input.dead = pointer<const int64_t>(dead);
  input.denied = denied;
  return input;
}

plum::cpu::BeamStepOutput beam_output(const BeamOut& out) {
  return {pointer<int64_t>(out[0]), pointer<int64_t>(out[1]), pointer<float>(out[2]),
          pointer<int64_t>(out[3])};
}

void trie_beam_step_cpu(const BeamArgs& beams, const TrieArgs& trie, const LevelArgs& levels,
                        const std::vector<int64_t>& columns, int64_t k, bool valid,
                        const FilterArgs& filter, const BeamOut& out, int threads) {
  py::gil_scoped_release release;
  plum::cpu::trie_beam_step(beam_input(beams, levels, columns, valid),
                            plum::make_trie(trie_arrays(trie)), trie_filter(trie, filter), k,
                            beam_output(out), threads);
}

void trie_beam_sample_cpu(const BeamArgs& beams, const TrieArgs& trie, const LevelArgs& levels,
                          const std::vector<int64_t>& columns, int64_t k, uintptr_t keys,
                          uintptr_t seeds, double temperature, const FilterArgs& filter,
                          const BeamOut& out, uintptr_t out_keys, int threads) {
  py::gil_scoped_release release;
  const plum::cpu::BeamSampleInput input{beam_input(beams, levels, columns, true),
                                         pointer<const double>(keys), pointer<const int64_t>(seeds),
                                         temperature};
  plum::cpu::trie_beam_sample(input, plum::make_trie(trie_arrays(trie)), trie_filter(trie, filter),
                              k, {beam_output(out), pointer<double>(out_keys)}, threads);
}

// `shape`: requests, denied rows of each, joined tries.
void trie_deny_cpu(uintptr_t rows, uintptr_t roots, const Numbers<3>& shape, const TrieArgs& trie,
                   const FilterArgs& filter, uintptr_t dead, int threads) {
  py::gil_scoped_release release;
  plum::cpu::trie_deny({pointer<const int64_t>(rows), shape[0], shape[1]},
                       plum::make_trie(trie_arrays(trie)),
                       {pointer<const int64_t>(roots), shape[2]}, trie_filter(trie, filter),
                       pointer<int64_t>(dead), threads);
}

int64_t sort_sids(uintptr_t codes, int type, int64_t items, const std::vector<int64_t>& sizes,
                  uintptr_t columns, uintptr_t order, uintptr_t item_starts) {
  py::gil_scoped_release release;
  const plum::cpu::Catalog catalog{pointer<const void>(codes),
                                   static_cast<plum::cpu::CodeType>(type), items,
                                   static_cast<int64_t>(sizes.size()), sizes.data()};
  return plum::cpu::sort_sids(catalog, pointer<uint16_t>(columns), pointer<int64_t>(order),
                              pointer<int64_t>(item_starts));
}

// Address of the columns; rows, levels, codes from column to column; first rows of the tries.
using ColumnArgs = std::tuple<uintptr_t, int64_t, int64_t, int64_t, std::vector<int64_t>>;

plum::cpu::SidColumns sid_columns(const ColumnArgs& args) {
  const auto& [codes, rows, depth, stride, roots] = args;
  return {pointer<const uint16_t>(codes),        rows, depth, stride, roots.data(),
          static_cast<int64_t>(roots.size()) - 1};
}

std::vector<int64_t> count_runs(const ColumnArgs& table, uintptr_t changes) {
  py::gil_scoped_release release;
  return plum::cpu::count_runs(sid_columns(table), pointer<uint8_t>(changes));
}

void fill_trie(const ColumnArgs& table, uintptr_t changes, const TrieArgs& trie) {
  py::gil_scoped_release release;
  plum::cpu::fill_trie(sid_columns(table), pointer<const uint8_t>(changes), trie_arrays(trie));
}

void fill_filter(const TrieArgs& trie, const FilterArgs& filter) {
  py::gil_scoped_release release;
  const auto arrays = trie_arrays(trie);
  plum::cpu::count_ranks(pointer<const uint64_t>(filter[0]), arrays.rows,
                         pointer<uint32_t>(filter[1]));
  plum::cpu::fill_filter(plum::make_trie(arrays), trie_filter(trie, filter), arrays,
                         pointer<uint64_t>(filter[2]));
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

using WorkspaceOfSearch = decltype(plum::cuda::residual_quantize_workspace);
using SearchOnGpu = decltype(plum::cuda::residual_quantize);

template <WorkspaceOfSearch kWorkspace>
int64_t residual_quantize_workspace_cuda(int64_t width, const std::vector<int64_t>& sizes) {
  return kWorkspace(width, sizes.data(), static_cast<int64_t>(sizes.size()));
}

template <SearchOnGpu kSearch>
void residual_quantize_cuda(uintptr_t x, int type, int64_t rows, int64_t width, uintptr_t codebooks,
                            const std::vector<int64_t>& sizes, uintptr_t workspace, uintptr_t codes,
                            uintptr_t norms, uintptr_t residual, uintptr_t first_bad,
                            uintptr_t stream) {
  py::gil_scoped_release release;
  kSearch(pointer<const void>(x), static_cast<plum::cpu::RowType>(type), rows, width,
          pointer<const float>(codebooks), sizes.data(), static_cast<int64_t>(sizes.size()),
          pointer<void>(workspace), pointer<int32_t>(codes), pointer<float>(norms),
          pointer<float>(residual), pointer<int64_t>(first_bad), pointer<void>(stream));
}
#endif

// The name of an instruction set, most often PLUM_CPU_ISA, is what a user can get wrong here.
void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::invalid_argument& wrong) {
    py::set_error(py::module_::import("plum.errors").attr("InvalidConfig"), wrong.what());
  }
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  py::register_local_exception_translator(&translate);
  module.attr("bindings") = PLUM_BINDINGS;
  module.def("build_info", &build_info);
  module.def("set_cpu_isa", &plum::cpu::set_isa);
  module.def("code_usage_cpu", &code_usage_cpu);
  module.def("codebook_sums_cpu", &codebook_sums_cpu);
  py::class_<PackedCodebooks>(module, "PackedCodebooks")
      .def(py::init(&pack_codebooks))
      .def("matches", &matches)
      .def_property_readonly("first_bad", &PackedCodebooks::first_bad)
      .def_property_readonly("size", &PackedCodebooks::size)
      .def_property_readonly("width", &PackedCodebooks::width)
      .def_property_readonly("levels", &PackedCodebooks::levels)
      .def_property_readonly("bytes", &PackedCodebooks::bytes);
  module.def("residual_quantize_cpu", &residual_quantize_cpu);
  module.def("trie_mask_cpu", &trie_mask_cpu);
  module.def("trie_advance_cpu", &trie_advance_cpu);
  module.def("trie_walk_cpu", &trie_walk_cpu);
  module.def("forced_tail_cpu", &forced_tail_cpu);
  module.def("trie_beam_step_cpu", &trie_beam_step_cpu);
  module.def("trie_beam_sample_cpu", &trie_beam_sample_cpu);
  module.def("trie_deny_cpu", &trie_deny_cpu);
  module.def("sort_sids", &sort_sids);
  module.def("count_runs", &count_runs);
  module.def("fill_trie", &fill_trie);
  module.def("fill_filter", &fill_filter);
#ifdef PLUM_WITH_CUDA
  module.def("code_usage_cuda", &code_usage_cuda);
  module.attr("residual_quantize_max_width_cuda") = plum::cuda::kMaxSearchWidth;
  module.def("residual_quantize_workspace_cuda",
             &residual_quantize_workspace_cuda<plum::cuda::residual_quantize_workspace>);
  module.def("residual_quantize_cuda", &residual_quantize_cuda<plum::cuda::residual_quantize>);
#endif
#ifdef PLUM_WITH_WGMMA
  module.def("residual_quantize_workspace_wgmma",
             &residual_quantize_workspace_cuda<plum::cuda::residual_quantize_wgmma_workspace>);
  module.def("residual_quantize_wgmma",
             &residual_quantize_cuda<plum::cuda::residual_quantize_wgmma>);
#endif
}
