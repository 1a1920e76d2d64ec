// An engine that chooses the width itself: ranks change it, switch compression off and on, and read what was sent.
//
//   make -C examples/cpp                         (its Makefile says what can be set)
//   LD_LIBRARY_PATH=target/release ./control 2   (or as many ranks as you like; they are threads)
//
// libflashcomm.so has NCCL's functions, so a program that links it needs no libnccl at link time; at run time the shim finds
// the real one. The program uses the CUDA driver's own interface, and so also runs on the simulator.
#include <cuda.h>
#include <cuda_fp16.h>
#include <flashcomm.h>
#include <nccl.h>

#include <barrier>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

// 8 MiB of fp16: more than the default threshold.
constexpr size_t kCount = size_t(4) << 20;

[[noreturn]] void die(const char* what, const char* why) {
  std::fprintf(stderr, "%s: %s\n", what, why);
  std::exit(1);
}
void check(CUresult result, const char* what) {
  const char* why = "unknown";
  if (result != CUDA_SUCCESS) {
    cuGetErrorString(result, &why);
    die(what, why);
  }
}
void check(ncclResult_t result, const char* what) {
  if (result != ncclSuccess) die(what, ncclGetErrorString(result));
}
// flashcomm's results have the values of ncclResult_t, and flashcommGetLastError has the words.
void check(flashcommResult_t result, const char* what) {
  if (result != FLASHCOMM_SUCCESS) die(what, flashcommGetLastError(nullptr));
}
#define CHECK(call) check(call, #call)

struct Engine {
  explicit Engine(int n) : n_ranks(n), everyone(n), results(n) {}
  int n_ranks;
  std::barrier<> everyone;
  std::vector<std::vector<__half>> results;  // of the last step, by rank
};

// Small whole numbers, whose sum is exact in fp16: every difference is the compression's.
float value(size_t i, int rank) { return float((i * 7 + i / 1000 + rank * 5) % 17) - 8; }

struct Rank {
  Engine& engine;
  int rank;
  ncclComm_t comm = nullptr;
  CUstream stream = nullptr;
  CUdeviceptr input = 0, output = 0;

  Rank(Engine& e, int r, ncclUniqueId id) : engine(e), rank(r) {
    int n_devices = 0;
    CUcontext context;
    CHECK(cuDeviceGetCount(&n_devices));
    CHECK(cuDevicePrimaryCtxRetain(&context, rank % n_devices));
    CHECK(cuCtxSetCurrent(context));
    CHECK(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING));
    CHECK(cuMemAlloc(&input, kCount * 2));
    CHECK(cuMemAlloc(&output, kCount * 2));
    std::vector<__half> mine(kCount);
    for (size_t i = 0; i < kCount; ++i) mine[i] = __float2half(value(i, rank));
    CHECK(cuMemcpyHtoDAsync(input, mine.data(), kCount * 2, stream));
    CHECK(cuStreamSynchronize(stream));
    engine.everyone.arrive_and_wait();
    CHECK(ncclCommInitRank(&comm, engine.n_ranks, id, rank));
  }

  void all_reduce() {
    CHECK(ncclAllReduce((void*)input, (void*)output, kCount, ncclHalf, ncclSum, comm, (cudaStream_t)stream));
  }

  // Runs a step on all ranks and says how far the sum is from the exact one; every rank must hold the same bits.
  double step(const char* name, const std::function<void()>& issue) {
    auto& mine = engine.results[rank];
    mine.assign(kCount, __half{});
    issue();
    CHECK(cuMemcpyDtoHAsync(mine.data(), output, kCount * 2, stream));
    CHECK(cuStreamSynchronize(stream));
    engine.everyone.arrive_and_wait();
    if (std::memcmp(mine.data(), engine.results[0].data(), kCount * 2) != 0) die(name, "the ranks hold different sums");
    double error = 0, norm = 0;
    for (size_t i = 0; i < kCount; ++i) {
      double exact = 0;
      for (int r = 0; r < engine.n_ranks; ++r) exact += value(i, r);
      const double difference = __half2float(mine[i]) - exact;
      error += difference * difference, norm += exact * exact;
    }
    const double relative = std::sqrt(error / norm);
    if (rank == 0) std::printf("%-34s relative error %.5f\n", name, relative);
    engine.everyone.arrive_and_wait();
    return relative;
  }

  // What an engine does. Every rank does the same, in the same order: to change a communicator is a collective.
  void run() {
    const auto issue = [this] { all_reduce(); };
    CHECK(flashcommSetCommBits(comm, 8, 8));  // before the first all-reduce: the communicator starts with it
    const double eight = step("8 bits", issue);

    CHECK(flashcommSetCommBits(comm, 4, 4));
    const double four = step("4 bits", issue);
    // A graph keeps the width that it was captured with.
    CUgraph graph;
    CUgraphExec executable;
    CHECK(cuStreamBeginCapture(stream, CU_STREAM_CAPTURE_MODE_THREAD_LOCAL));
    all_reduce();
    CHECK(cuStreamEndCapture(stream, &graph));
    CHECK(cuGraphInstantiate(&executable, graph, 0));

    CHECK(flashcommSetCommEnabled(comm, 0));  // say, for a step that must be exact
    const double off = step("switched off", issue);
    engine.everyone.arrive_and_wait();
    const double replayed = step("the graph of 4 bits, meanwhile", [&] { CHECK(cuGraphLaunch(executable, stream)); });

    CHECK(flashcommSetCommEnabled(comm, 1));
    CHECK(flashcommSetCommBits(comm, 4, 8));  // 4 bits to the rank that sums, 8 from it
    const double mixed = step("4 bits to the sum, 8 from it", issue);

    flashcommCommInfo_t info = {};
    info.size = sizeof info;
    CHECK(flashcommGetCommInfo(comm, &info));
    flashcommStats_t stats = {};
    stats.size = sizeof stats;
    CHECK(flashcommGetCommStats(comm, &stats));
    if (rank == 0) {
      std::printf("rank %d of %d: %d:%d bits (%s) over %s, from %llu bytes up\n", info.rank, info.nRanks, info.reduceBits,
                  info.gatherBits, info.code, info.exchange, (unsigned long long)info.minBytes);
      std::printf("%llu all-reduces compressed, %.1f MiB as %.1f MiB on the wire; forwarded:",
                  (unsigned long long)stats.allReducesCompressed, stats.bytesIn / 1048576.0,
                  stats.bytesOnWire / 1048576.0);
      for (int reason = 0; flashcommReasonName(reason) != nullptr; ++reason) {
        const unsigned long long n = stats.forwardedBecause[reason];
        if (n != 0) std::printf(" %s %llu", flashcommReasonName(reason), n);
      }
      std::printf("\n");
    }
    if (info.minBytes > kCount * 2) die("nothing was compressed", "set FLASHCOMM_MIN_BYTES=0 to see something here");
    const bool as_expected = off == 0 && 0 < eight && eight < mixed && mixed < four && replayed == four &&
                             stats.allReducesCompressed == 4 && stats.allReducesForwarded == 1;
    if (!as_expected) die("the sums or the counts", "are not what they must be");

    engine.everyone.arrive_and_wait();
    CHECK(cuGraphExecDestroy(executable));
    CHECK(cuGraphDestroy(graph));
    CHECK(ncclCommDestroy(comm));
  }
};

int main(int argc, char** argv) {
  const int n_ranks = argc > 1 ? std::atoi(argv[1]) : 2;
  if (n_ranks < 2 || n_ranks > 16) die("usage", "control [RANKS], 2 to 16");
  CHECK(cuInit(0));
  ncclUniqueId id;
  CHECK(ncclGetUniqueId(&id));
  Engine engine(n_ranks);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < n_ranks; ++rank) {
    threads.emplace_back([&engine, rank, id] { Rank(engine, rank, id).run(); });
  }
  for (auto& thread : threads) thread.join();
  std::puts("as expected");
}
