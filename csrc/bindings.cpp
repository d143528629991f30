// The only pybind11 file. Compiled once per library: with LATENTREVISE_CUDA it is the module _cuda, without it _cpu.
// Tensors arrive as addresses, dtypes as lr_dtype codes; shapes and layouts were checked in Python, where errors can name the
// argument, and are checked again, cheaply, behind the C ABI.

#include <pybind11/pybind11.h>

#include <new>
#include <type_traits>

#include "latentrevise/kernels.h"

namespace py = pybind11;

namespace {

void raise(int status) {
  if (status == LR_OK) return;
  const char *message = lr_last_error();
  if (status == LR_OUT_OF_RANGE) throw py::index_error(message);
  if (status == LR_INVALID_ARGUMENT || status == LR_UNSUPPORTED) throw py::value_error(message);
  if (status == LR_OUT_OF_MEMORY) throw std::bad_alloc();
  throw std::runtime_error(message);
}

#include "fields.inc"  // csrc/fields.py: visit(f, args) calls f(name, field) for every field of an argument struct

// Keyword arguments into the fields of an argument struct, by name, and the last one: `where`, the thread count on the CPU
// and the raw cudaStream_t on CUDA. An address, size or dtype that is not named stays zero, which the ABI's checks refuse
// where it means something; a number without its name, or a name that is no field, is an error here.
template <typename Args>
intptr_t read(const py::kwargs &given, Args &args) {
  size_t used = 1;
  visit(
      [&](const char *name, auto &field) {
        using T = std::remove_reference_t<decltype(field)>;
        PyObject *value = PyDict_GetItemString(given.ptr(), name);  // borrowed
        if (value == nullptr) {
          if (std::is_floating_point_v<T>) throw py::key_error(name);
          return;
        }
        ++used;
        if constexpr (std::is_pointer_v<T>)
          field = value == Py_None ? nullptr : reinterpret_cast<T>(py::handle(value).cast<uintptr_t>());
        else
          field = py::handle(value).cast<T>();
      },
      args);
  const auto where = given["where"].cast<intptr_t>();
  if (used != given.size()) throw py::type_error("unexpected keyword arguments");
  args.size = sizeof(Args);
  return where;
}

template <typename Args, typename... More>
void call(int (*function)(const Args *, More...), const Args &args, More... more) {
  int status;
  {
    py::gil_scoped_release release;
    status = function(&args, more...);
  }
  raise(status);
}

#ifdef LATENTREVISE_CUDA
#define LR_DEFINE(name) define(m, #name, lr_cuda_##name)
#define LR_MODULE _cuda
template <typename Args>
void run(int (*function)(const Args *, void *), Args &args, intptr_t where) {
  call(function, args, reinterpret_cast<void *>(where));
}
#else
#define LR_DEFINE(name) define(m, #name, lr_cpu_##name)
#define LR_MODULE _cpu
template <typename Args>
void run(int (*function)(const Args *), Args &args, intptr_t where) {
  args.threads = static_cast<int32_t>(where);
  call(function, args);
}
#endif

// A function of the C ABI as one of the module, and the names of its fields as FIELDS[name].
template <typename Args, typename... Stream>
void define(py::module_ &m, const char *name, int (*function)(const Args *, Stream...)) {
  m.def(name, [function](const py::kwargs &given) {
    Args args{};
    const intptr_t where = read(given, args);
    run(function, args, where);
  });
  Args args{};
  py::set fields;
  visit([&fields](const char *field, auto &) { fields.add(field); }, args);
  m.attr("FIELDS")[name] = fields;
}

}  // namespace

PYBIND11_MODULE(LR_MODULE, m) {
  m.attr("FIELDS") = py::dict();
  LR_DEFINE(mixture_embed);
  LR_DEFINE(mixture_embed_backward);
  LR_DEFINE(vertex_oracle);
  LR_DEFINE(linear_logprob);
#ifdef LATENTREVISE_CUDA
  m.attr("FIELDS")["linear_logprob_workspace"] = m.attr("FIELDS")["linear_logprob"];
  m.def("linear_logprob_workspace", [](const py::kwargs &given) {
    lr_logprob_args args{};
    int64_t bytes = 0;
    read(given, args);
    call(lr_cuda_linear_logprob_workspace, args, &bytes);
    return bytes;
  });
  m.def("device_count", [] {
    int count = 0;
    raise(lr_cuda_device_count(&count));
    return count;
  });
#else
  LR_DEFINE(plausible_vertices);
  LR_DEFINE(softmax_mixture);
  LR_DEFINE(softmax_mixture_backward);
  LR_DEFINE(hull_step);
  LR_DEFINE(entropic_step);
  m.def("isa", [] { return lr_cpu_isa(); });
  m.def("isas", [] { return lr_cpu_isas(); });
  m.def("rescored", [] { return lr_cpu_rescored(); });
#endif
  py::dict dtypes;
  dtypes["float32"] = int(LR_FLOAT32), dtypes["bfloat16"] = int(LR_BFLOAT16), dtypes["float16"] = int(LR_FLOAT16);
  dtypes["int32"] = int(LR_INT32), dtypes["int64"] = int(LR_INT64);
  m.attr("DTYPES") = dtypes;
}
