// The sm_90a instructions of the Hopper kernels, one function each: tensor copies that complete on barriers in shared
// memory, wgmma, and the registers of a warpgroup. Code for other architectures never gets here.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

namespace latentrevise::cuda {

// Where the block's shared memory begins that its launch asked for.
__device__ __forceinline__ uint32_t shared_base() {
  extern __shared__ __align__(1024) unsigned char shared[];
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

__device__ __forceinline__ void load16(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 2^x within 2^-22 of itself, 0 below 2^-126; exact for whole x. 1 / x within 2^-23.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ void init_barrier(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals));
}

// Makes the barriers' initial state visible to the copy engine; a block's barrier must follow.
__device__ __forceinline__ void publish_barriers() { asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory"); }

__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}

// At the same barrier of block `rank` of the cluster. A release at the cluster's scope would wait for all that the thread
// has stored, in each stage; what is given back here was only read.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}\n" ::"r"(barrier), "r"(rank) : "memory");
}

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
}

// All threads of the cluster's blocks that have not ended.
__device__ __forceinline__ void synchronise_cluster() {
  asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;\n" ::: "memory");
}

// Arrives and lets the phase wait for so many bytes too.
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of that parity is over.
__device__ __forceinline__ void await_phase(uint32_t barrier, int parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n@done bra over;\n"
      "bra again;\nover:\n}\n" ::"r"(barrier), "r"(parity) : "memory");
}

// The box at (column, row) of a tensor map's matrix, zeros outside, into shared memory; its bytes complete on `barrier`.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap &map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];\n" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier) : "memory");
}

// The smaller one; NaN if either is.
__device__ __forceinline__ float minimum_or_nan(float a, float b) {
  float c;
  asm("min.NaN.f32 %0, %1, %2;\n" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// The same into every block of the cluster that `blocks` has a bit for, at the same place and completing on its barrier.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap &map, int column, int row,
                                            uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%2, %3}], "
      "[%4], %5;\n" ::"r"(to),
      "l"(reinterpret_cast<uint64_t>(&map)), "r"(column), "r"(row), "r"(barrier), "h"(blocks) : "memory");
}

template <int kCount>
__device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(kCount)); }
template <int kCount>
__device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(kCount)); }

// Descriptor of a tile in shared memory: rows of 128 bytes in groups of eight (1024 bytes apart), 128-byte swizzle. 32
// bytes further along the rows is 2 more.
__device__ __forceinline__ uint64_t describe_tile(uint32_t address) {
  return (static_cast<uint64_t>(address) >> 4 & 0x3fff) | 1ull << 16 | 64ull << 32 | 1ull << 62;
}

// The same memory, rows of 128 bytes, as the transpose: 64 columns a tile, `apart` bytes from the next 64. 16 rows further
// down is 128 more.
__device__ __forceinline__ uint64_t describe_columns(uint32_t address, int apart) {
  return (describe_tile(address) & ~(0x3fffull << 16)) | static_cast<uint64_t>(apart >> 4) << 16;
}

__device__ __forceinline__ void open_multiplications() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void commit_multiplications() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }

// Until at most kPending groups are unfinished. The sums are read after `settle` only, when none is: it keeps the compiler
// from moving their uses before the wait, and anything that touched them earlier would make it wait by itself.
template <int kPending>
__device__ __forceinline__ void await_multiplications() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(kPending) : "memory");
}
__device__ __forceinline__ void settle(float (&c)[128]) {
#pragma unroll
  for (int i = 0; i < 128; ++i) asm volatile("" : "+f"(c[i])::"memory");
}

#define LR_SUMS_TEXT \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define LR_SUMS(c) \
  "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]), "+f"(c[4]), "+f"(c[5]), "+f"(c[6]), "+f"(c[7]), \
  "+f"(c[8]), "+f"(c[9]), "+f"(c[10]), "+f"(c[11]), "+f"(c[12]), "+f"(c[13]), "+f"(c[14]), "+f"(c[15]), \
  "+f"(c[16]), "+f"(c[17]), "+f"(c[18]), "+f"(c[19]), "+f"(c[20]), "+f"(c[21]), "+f"(c[22]), "+f"(c[23]), \
  "+f"(c[24]), "+f"(c[25]), "+f"(c[26]), "+f"(c[27]), "+f"(c[28]), "+f"(c[29]), "+f"(c[30]), "+f"(c[31]), \
  "+f"(c[32]), "+f"(c[33]), "+f"(c[34]), "+f"(c[35]), "+f"(c[36]), "+f"(c[37]), "+f"(c[38]), "+f"(c[39]), \
  "+f"(c[40]), "+f"(c[41]), "+f"(c[42]), "+f"(c[43]), "+f"(c[44]), "+f"(c[45]), "+f"(c[46]), "+f"(c[47]), \
  "+f"(c[48]), "+f"(c[49]), "+f"(c[50]), "+f"(c[51]), "+f"(c[52]), "+f"(c[53]), "+f"(c[54]), "+f"(c[55]), \
  "+f"(c[56]), "+f"(c[57]), "+f"(c[58]), "+f"(c[59]), "+f"(c[60]), "+f"(c[61]), "+f"(c[62]), "+f"(c[63]), \
  "+f"(c[64]), "+f"(c[65]), "+f"(c[66]), "+f"(c[67]), "+f"(c[68]), "+f"(c[69]), "+f"(c[70]), "+f"(c[71]), \
  "+f"(c[72]), "+f"(c[73]), "+f"(c[74]), "+f"(c[75]), "+f"(c[76]), "+f"(c[77]), "+f"(c[78]), "+f"(c[79]), \
  "+f"(c[80]), "+f"(c[81]), "+f"(c[82]), "+f"(c[83]), "+f"(c[84]), "+f"(c[85]), "+f"(c[86]), "+f"(c[87]), \
  "+f"(c[88]), "+f"(c[89]), "+f"(c[90]), "+f"(c[91]), "+f"(c[92]), "+f"(c[93]), "+f"(c[94]), "+f"(c[95]), \
  "+f"(c[96]), "+f"(c[97]), "+f"(c[98]), "+f"(c[99]), "+f"(c[100]), "+f"(c[101]), "+f"(c[102]), "+f"(c[103]), \
  "+f"(c[104]), "+f"(c[105]), "+f"(c[106]), "+f"(c[107]), "+f"(c[108]), "+f"(c[109]), "+f"(c[110]), "+f"(c[111]), \
  "+f"(c[112]), "+f"(c[113]), "+f"(c[114]), "+f"(c[115]), "+f"(c[116]), "+f"(c[117]), "+f"(c[118]), "+f"(c[119]), \
  "+f"(c[120]), "+f"(c[121]), "+f"(c[122]), "+f"(c[123]), "+f"(c[124]), "+f"(c[125]), "+f"(c[126]), "+f"(c[127])

// c = a b^T, added to c if `more`, for tiles a [64, 16] and b [256, 16] of a warpgroup. Thread t of it holds rows
// t / 32 * 16 + t % 32 / 4 (c[4n], c[4n + 1]) and that + 8 (c[4n + 2], c[4n + 3]), columns 8n + t % 4 * 2 and the next.
__device__ __forceinline__ void multiply_tiles(float (&c)[128], uint64_t a, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LR_SUMS_TEXT "}, %128, %129, more, 1, 1, 0, 0;\n}\n"
      : LR_SUMS(c)
      : "l"(a), "l"(b), "r"(static_cast<int>(more)));
}

// The same for a [64, 16] in registers (a thread's rows as of c; columns t % 4 * 2 and the next in a0 and, of the second
// row, a1; those + 8 in a2, a3), which stay as they are until the group is done, and b [16, 256].
__device__ __forceinline__ void multiply_rows(float (&c)[128], const uint32_t &a0, const uint32_t &a1, const uint32_t &a2,
                                              const uint32_t &a3, uint64_t b, bool more) {
  asm volatile(
      "{\n.reg .pred more;\nsetp.ne.b32 more, %133, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {" LR_SUMS_TEXT "}, {%128, %129, %130, %131}, %132, more, "
      "1, 1, 1;\n}\n"
      : LR_SUMS(c)
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "r"(static_cast<int>(more)));
}

#undef LR_SUMS_TEXT
#undef LR_SUMS

}  // namespace latentrevise::cuda
