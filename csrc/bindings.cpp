// The only pybind11 file. Compiled once per library: with LATENTREVISE_CUDA it is the module _cuda, without it _cpu.
// Tensors arrive as addresses, dtypes as lr_dtype codes; shapes and layouts were checked in Python, where errors can name the
// argument, and are checked again, cheaply, behind the C ABI.

#include <pybind11/pybind11.h>

#include "latentrevise/kernels.h"

namespace py = pybind11;

namespace {

void raise(int status) {
  if (status == LR_OK) return;
  const char *message = lr_last_error();
  if (status == LR_OUT_OF_RANGE) throw py::index_error(message);
  if (status == LR_INVALID_ARGUMENT || status == LR_UNSUPPORTED) throw py::value_error(message);
  throw std::runtime_error(message);
}

// `where` is the thread count on the CPU and the raw cudaStream_t on CUDA.
template <typename Args, typename Function>
void call(Function function, Args &args, intptr_t where) {
  args.size = sizeof(Args);
  int status;
  {
    py::gil_scoped_release release;
#ifdef LATENTREVISE_CUDA
    status = function(&args, reinterpret_cast<void *>(where));
#else
    args.threads = static_cast<int32_t>(where);
    status = function(&args);
#endif
  }
  raise(status);
}

template <typename T>
T *pointer(uintptr_t address) {
  return reinterpret_cast<T *>(address);
}

#ifdef LATENTREVISE_CUDA
#define LR_FUNCTION(name) lr_cuda_##name
#define LR_MODULE _cuda
#else
#define LR_FUNCTION(name) lr_cpu_##name
#define LR_MODULE _cpu
#endif

}  // namespace

PYBIND11_MODULE(LR_MODULE, m) {
  m.def(
      "mixture_embed",
      [](uintptr_t table, int32_t table_dtype, int64_t table_stride, int64_t vocab, int64_t dim, uintptr_t ids,
         int32_t ids_dtype, int64_t rows, int64_t atoms, uintptr_t weights, uintptr_t z, intptr_t where) {
        lr_mixture_args a{};
        a.table = pointer<void>(table), a.table_dtype = table_dtype, a.table_stride = table_stride;
        a.vocab = vocab, a.dim = dim, a.ids = pointer<void>(ids), a.ids_dtype = ids_dtype;
        a.rows = rows, a.atoms = atoms, a.weights = pointer<float>(weights), a.z = pointer<void>(z);
        call(LR_FUNCTION(mixture_embed), a, where);
      },
      py::kw_only(), py::arg("table"), py::arg("table_dtype"), py::arg("table_stride"), py::arg("vocab"), py::arg("dim"),
      py::arg("ids"), py::arg("ids_dtype"), py::arg("rows"), py::arg("atoms"), py::arg("weights"), py::arg("z"),
      py::arg("where"));
  m.def(
      "mixture_embed_backward",
      [](uintptr_t table, int32_t table_dtype, int64_t table_stride, int64_t vocab, int64_t dim, uintptr_t ids,
         int32_t ids_dtype, int64_t rows, int64_t atoms, uintptr_t grad_z, uintptr_t grad_weights, intptr_t where) {
        lr_mixture_args a{};
        a.table = pointer<void>(table), a.table_dtype = table_dtype, a.table_stride = table_stride;
        a.vocab = vocab, a.dim = dim, a.ids = pointer<void>(ids), a.ids_dtype = ids_dtype;
        a.rows = rows, a.atoms = atoms, a.z = pointer<void>(grad_z), a.grad_weights = pointer<float>(grad_weights);
        call(LR_FUNCTION(mixture_embed_backward), a, where);
      },
      py::kw_only(), py::arg("table"), py::arg("table_dtype"), py::arg("table_stride"), py::arg("vocab"), py::arg("dim"),
      py::arg("ids"), py::arg("ids_dtype"), py::arg("rows"), py::arg("atoms"), py::arg("grad_z"),
      py::arg("grad_weights"), py::arg("where"));
#ifdef LATENTREVISE_CUDA
  m.def("device_count", [] {
    int count = 0;
    raise(lr_cuda_device_count(&count));
    return count;
  });
#else
  m.def("isa", [] { return lr_cpu_isa(); });
#endif
  py::dict dtypes;
  dtypes["float32"] = int(LR_FLOAT32), dtypes["bfloat16"] = int(LR_BFLOAT16), dtypes["float16"] = int(LR_FLOAT16);
  dtypes["int32"] = int(LR_INT32), dtypes["int64"] = int(LR_INT64);
  m.attr("DTYPES") = dtypes;
}
