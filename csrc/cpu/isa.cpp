#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(LATENTREVISE_X86) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace latentrevise::cpu {
namespace {

#ifdef LATENTREVISE_X86
// Linux saves the tile registers of a process only after it asked for that (arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA).
bool tiles_granted() {
#ifdef __linux__
  return syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}
#endif

const Isa *select() {
  const Isa *runnable[6] = {&scalar_isa};
  int count = 1;
#ifdef LATENTREVISE_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) runnable[count++] = &avx2_isa;
  if (count == 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    runnable[count++] = &avx512_isa;
  if (count == 3 && __builtin_cpu_supports("avx512vnni")) runnable[count++] = &avx512vnni_isa;
  if (count == 4 && __builtin_cpu_supports("avx512bf16")) runnable[count++] = &avx512bf16_isa;
  if (count == 5 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") && tiles_granted())
    runnable[count++] = &amx_isa;
#endif
  // An unknown or unrunnable name must not crash the process later with SIGILL: it is answered by the best runnable set,
  // lr_cpu_isa() shows which, and the Python side raises.
  if (const char *wanted = std::getenv("LATENTREVISE_ISA"))
    for (int i = 0; i < count; ++i)
      if (std::strcmp(runnable[i]->name, wanted) == 0) return runnable[i];
  return runnable[count - 1];
}

}  // namespace

void out_of_memory() { throw std::bad_alloc(); }

const Isa &active() {
  static const Isa *const chosen = select();
  return *chosen;
}

}  // namespace latentrevise::cpu
