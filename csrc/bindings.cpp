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

// Keyword arguments into the fields of an argument struct, by name; a field that is missing or one too many is an error.
class Fields {
 public:
  explicit Fields(const py::kwargs &given) : given_(given) {}
  template <typename T>
  Fields &operator()(const char *name, T &field) {
    const py::object value = given_[name];
    if constexpr (std::is_pointer_v<T>)
      field = value.is_none() ? nullptr : reinterpret_cast<T>(value.cast<uintptr_t>());
    else
      field = value.cast<T>();
    ++used_;
    return *this;
  }
  intptr_t where() {  // the last one
    intptr_t value;
    (*this)("where", value);
    if (used_ != given_.size()) throw py::type_error("unexpected keyword arguments");
    return value;
  }

 private:
  const py::kwargs &given_;
  size_t used_ = 0;
};

#ifdef LATENTREVISE_CUDA
#define LR_FUNCTION(name) lr_cuda_##name
#define LR_MODULE _cuda
#else
#define LR_FUNCTION(name) lr_cpu_##name
#define LR_MODULE _cpu
#endif

}  // namespace

PYBIND11_MODULE(LR_MODULE, m) {
  const auto mixture_fields = [](Fields &f, lr_mixture_args &a) {
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride)("vocab", a.vocab)("dim", a.dim);
    f("ids", a.ids)("ids_dtype", a.ids_dtype)("rows", a.rows)("atoms", a.atoms);
  };
  m.def("mixture_embed", [mixture_fields](const py::kwargs &kw) {
    lr_mixture_args a{};
    Fields f(kw);
    mixture_fields(f, a);
    f("weights", a.weights)("z", a.z);
    call(LR_FUNCTION(mixture_embed), a, f.where());
  });
  m.def("mixture_embed_backward", [mixture_fields](const py::kwargs &kw) {
    lr_mixture_args a{};
    Fields f(kw);
    mixture_fields(f, a);
    f("grad_z", a.z)("grad_weights", a.grad_weights);
    call(LR_FUNCTION(mixture_embed_backward), a, f.where());
  });
  m.def("vertex_oracle", [](const py::kwargs &kw) {
    lr_oracle_args a{};
    Fields f(kw);
    f("queries", a.queries)("queries_dtype", a.queries_dtype)("queries_stride", a.queries_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride);
    f("queries2", a.queries2)("queries2_dtype", a.queries2_dtype)("queries2_stride", a.queries2_stride);
    f("table2", a.table2)("table2_dtype", a.table2_dtype)("table2_stride", a.table2_stride);
    f("allowed", a.allowed)("candidates", a.candidates)("candidates_dtype", a.candidates_dtype);
    f("candidate_count", a.candidate_count)("rows", a.rows)("vocab", a.vocab)("dim", a.dim)("dim2", a.dim2);
    f("ids", a.ids)("values", a.values)("splits", a.splits)("workspace", a.workspace);
#ifdef LATENTREVISE_CUDA
    f("hopper", a.hopper);
#endif
    call(LR_FUNCTION(vertex_oracle), a, f.where());
  });
  const auto logprob_fields = [](Fields &f, lr_logprob_args &a) {
    f("queries", a.queries)("queries_dtype", a.queries_dtype)("queries_stride", a.queries_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride)("bias", a.bias);
    f("targets", a.targets)("logp", a.logp)("entropy", a.entropy)("gradient", a.gradient);
    f("rows", a.rows)("vocab", a.vocab)("dim", a.dim);
    f("scale", a.scale)("softcap", a.softcap)("temperature", a.temperature);
#ifdef LATENTREVISE_CUDA
    f("blocks", a.blocks)("workspace", a.workspace)("workspace_bytes", a.workspace_bytes);
#endif
  };
  m.def("linear_logprob", [logprob_fields](const py::kwargs &kw) {
    lr_logprob_args a{};
    Fields f(kw);
    logprob_fields(f, a);
    call(LR_FUNCTION(linear_logprob), a, f.where());
  });
#ifdef LATENTREVISE_CUDA
  m.def("linear_logprob_workspace", [logprob_fields](const py::kwargs &kw) {
    lr_logprob_args a{};
    Fields f(kw);
    logprob_fields(f, a);
    int64_t bytes = 0;
    call([&](const lr_logprob_args *args, void *) { return lr_cuda_linear_logprob_workspace(args, &bytes); }, a, f.where());
    return bytes;
  });
#else
  m.def("plausible_vertices", [](const py::kwargs &kw) {
    lr_plausible_args a{};
    Fields f(kw);
    f("queries", a.queries)("queries_dtype", a.queries_dtype)("queries_stride", a.queries_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride)("bias", a.bias);
    f("allowed", a.allowed)("ids", a.ids)("logps", a.logps)("counts", a.counts);
    f("rows", a.rows)("vocab", a.vocab)("dim", a.dim)("max_candidates", a.max_candidates);
    f("scale", a.scale)("softcap", a.softcap)("temperature", a.temperature)("log_p_min", a.log_p_min);
    call(lr_cpu_plausible_vertices, a, f.where());
  });
  const auto softmax_fields = [](Fields &f, lr_softmax_args &a) {
    f("theta", a.theta)("theta_dtype", a.theta_dtype)("theta_stride", a.theta_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride);
    f("rows", a.rows)("vocab", a.vocab)("dim", a.dim)("tau", a.tau)("lse", a.lse);
  };
  m.def("softmax_mixture", [softmax_fields](const py::kwargs &kw) {
    lr_softmax_args a{};
    Fields f(kw);
    softmax_fields(f, a);
    f("z", a.z);
    call(lr_cpu_softmax_mixture, a, f.where());
  });
  m.def("softmax_mixture_backward", [softmax_fields](const py::kwargs &kw) {
    lr_softmax_args a{};
    Fields f(kw);
    softmax_fields(f, a);
    f("grad_z", a.grad_z)("dots", a.dots)("grad_theta", a.grad_theta);
    call(lr_cpu_softmax_mixture_backward, a, f.where());
  });
  m.def("hull_step", [](const py::kwargs &kw) {
    lr_hull_args a{};
    Fields f(kw);
    f("gold", a.gold)("gold_dtype", a.gold_dtype)("gold_stride", a.gold_stride);
    f("away", a.away)("away_dtype", a.away_dtype)("away_stride", a.away_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride);
    f("ids", a.ids)("ids_dtype", a.ids_dtype)("weights", a.weights)("gamma", a.gamma)("allowed", a.allowed);
    f("candidates", a.candidates)("candidates_dtype", a.candidates_dtype)("candidate_count", a.candidate_count);
    f("new_ids", a.new_ids)("new_weights", a.new_weights)("z", a.z)("vertex", a.vertex)("gap", a.gap);
    f("rows", a.rows)("vocab", a.vocab)("dim", a.dim)("atoms", a.atoms)("slot", a.slot);
    f("alpha", a.alpha)("beta", a.beta)("normalized", a.normalized);
    call(lr_cpu_hull_step, a, f.where());
  });
  m.def("entropic_step", [](const py::kwargs &kw) {
    lr_entropic_args a{};
    Fields f(kw);
    f("gold", a.gold)("gold_dtype", a.gold_dtype)("gold_stride", a.gold_stride);
    f("away", a.away)("away_dtype", a.away_dtype)("away_stride", a.away_stride);
    f("table", a.table)("table_dtype", a.table_dtype)("table_stride", a.table_stride);
    f("ids", a.ids)("ids_dtype", a.ids_dtype)("weights", a.weights)("segment", a.segment)("segments", a.segments);
    f("new_weights", a.new_weights)("z", a.z)("gap", a.gap)("rows", a.rows)("vocab", a.vocab)("dim", a.dim);
    f("atoms", a.atoms)("alpha", a.alpha)("beta", a.beta)("eta", a.eta)("normalized", a.normalized);
    call(lr_cpu_entropic_step, a, f.where());
  });
#endif
#ifdef LATENTREVISE_CUDA
  m.def("device_count", [] {
    int count = 0;
    raise(lr_cuda_device_count(&count));
    return count;
  });
#else
  m.def("isa", [] { return lr_cpu_isa(); });
  m.def("isas", [] { return lr_cpu_isas(); });
  m.def("rescored", [] { return lr_cpu_rescored(); });
#endif
  py::dict dtypes;
  dtypes["float32"] = int(LR_FLOAT32), dtypes["bfloat16"] = int(LR_BFLOAT16), dtypes["float16"] = int(LR_FLOAT16);
  dtypes["int32"] = int(LR_INT32), dtypes["int64"] = int(LR_INT64);
  m.attr("DTYPES") = dtypes;
}
