// flashcomm's own calls. Everything else that libflashcomm.so exports is NCCL's, as nccl.h declares it.

#ifndef FLASHCOMM_H
#define FLASHCOMM_H

#include <stddef.h>
#include <stdint.h>

// State of a communicator: its ranks have not met yet. They do when it is created through the shim; one that does not block
// meets in the background.
#define FLASHCOMM_UNATTACHED 0

// State of a communicator: its ranks compress, unless the engine has switched it off.
#define FLASHCOMM_ON 1

// State of a communicator: its ranks forward everything, for good: one rank, settings that differ, a rank that could not.
#define FLASHCOMM_OFF 2

// Size classes of flashcommStats_t: class 0 has the all-reduces below 1 KiB, class i those from 512 << i bytes on, and
// the last everything from 4 GiB on.
#define FLASHCOMM_SIZE_CLASSES 24

// Places for reasons in flashcommStats_t; flashcommReasonName tells which are used.
#define FLASHCOMM_REASONS 16

// Ways of a sum.
#define FLASHCOMM_WAYS 6

// To the real NCCL.
#define FLASHCOMM_WAY_FORWARDED 0

// Uncompressed; every rank's whole input to every other.
#define FLASHCOMM_WAY_EXACT_ONE_HOP 1

// Uncompressed; to the owner of a chunk, and from there to all.
#define FLASHCOMM_WAY_EXACT_TWO_HOPS 2

// At the communicator's bits.
#define FLASHCOMM_WAY_COMPRESSED 3

// The same, read from the ranks that have it, not written to those that want it. The same bits.
#define FLASHCOMM_WAY_PULLED 4

// The same through memory of the host, carried by copy engines. The same bits.
#define FLASHCOMM_WAY_COPIED 5

// Result of a flashcomm call, with the values of ncclResult_t.
typedef int flashcommResult_t;

// The all-reduces of one size class.
typedef struct flashcommSizeStats_t {
  // Compressed.
  uint64_t compressed;
  // Bytes of those, as the application sees them.
  uint64_t bytesIn;
  // Bytes that this process put on the wire for them.
  uint64_t bytesOnWire;
  // Gone to the real NCCL as they were.
  uint64_t forwarded;
  // Bytes of those.
  uint64_t bytesForwarded;
} flashcommSizeStats_t;

// What the shim has done so far. Set `size` to sizeof(flashcommStats_t) before the call; later versions add members at
// the end only, and a library takes the sizes of all versions up to its own.
//
// A call that was captured into a graph counts once, when it was captured; replays are not seen.
typedef struct flashcommStats_t {
  // sizeof(flashcommStats_t), set by the caller.
  size_t size;
  // All-reduces that were compressed.
  uint64_t allReducesCompressed;
  // All-reduces that went to the real NCCL as they were.
  uint64_t allReducesForwarded;
  // Other collectives, sends and receives, all of which go to the real NCCL.
  uint64_t othersForwarded;
  // Bytes of the compressed all-reduces, as the application sees them.
  uint64_t bytesIn;
  // Bytes that this process put on the wire for them.
  uint64_t bytesOnWire;
  // Bytes of the all-reduces that went to the real NCCL.
  uint64_t bytesForwarded;
  // The all-reduces that went to the real NCCL, by reason: see flashcommReasonName.
  uint64_t forwardedBecause[FLASHCOMM_REASONS];
  // The all-reduces by size.
  struct flashcommSizeStats_t sizes[FLASHCOMM_SIZE_CLASSES];
  // All-reduces that the shim summed exactly.
  uint64_t allReducesExact;
  // Bytes of those.
  uint64_t bytesExact;
  // The same all-reduces by size class.
  uint64_t exactBySize[FLASHCOMM_SIZE_CLASSES];
} flashcommStats_t;

// What a communicator does. Set `size` to sizeof(flashcommCommInfo_t) before the call; as with flashcommStats_t, later
// versions add members at the end.
typedef struct flashcommCommInfo_t {
  // sizeof(flashcommCommInfo_t), set by the caller.
  size_t size;
  // FLASHCOMM_UNATTACHED, FLASHCOMM_ON or FLASHCOMM_OFF.
  int state;
  // 0 while the engine has it switched off.
  int enabled;
  // Bits per element in hop 1, to the rank that sums; before the ranks have met, those of FLASHCOMM_BITS.
  int reduceBits;
  // Bits per element in hop 2, from the rank that sums.
  int gatherBits;
  // This rank; -1 where the state is not FLASHCOMM_ON.
  int rank;
  // Ranks of the communicator; 0 where the state is not FLASHCOMM_ON.
  int nRanks;
  // All-reduces of this many bytes and more are compressed; UINT64_MAX: none is.
  uint64_t minBytes;
  // What carries the payloads: "peer", "host", "nccl"; empty where the state is not FLASHCOMM_ON.
  const char *exchange;
  // What the bits say: "plain" or "blocks"; before the ranks have met, that of FLASHCOMM_CODE.
  const char *code;
  // Other all-reduces of this many bytes and less are summed exactly by the shim, those of float, too; 0: none is.
  uint64_t exactMaxBytes;
} flashcommCommInfo_t;

// How a sum goes. Set `size` to sizeof(flashcommWay_t) before the call.
typedef struct flashcommWay_t {
  // sizeof(flashcommWay_t), set by the caller.
  size_t size;
  // A FLASHCOMM_WAY_ number.
  int way;
  // What it takes on this machine each way, in nanoseconds, as the ranks have measured it (FLASHCOMM_TUNE): between
  // the sizes that were measured on a straight line. 0: not known.
  uint64_t nanoseconds[FLASHCOMM_WAYS];
} flashcommWay_t;

// The call did what it says.
#define FLASHCOMM_SUCCESS 0

// A bug in flashcomm.
#define FLASHCOMM_INTERNAL_ERROR 3

// A pointer was null, a number is out of its range, or a structure's size is not one that this version knows.
#define FLASHCOMM_INVALID_ARGUMENT 4

// The communicator cannot do what is asked; flashcommGetLastError says why. The same on all ranks.
#define FLASHCOMM_INVALID_USAGE 5

// Another rank did not answer.
#define FLASHCOMM_REMOTE_ERROR 6

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// Writes the version of flashcomm, major * 10000 + minor * 100 + patch, to `*version`.
//
// # Safety
// `version` is null or points to an int.
flashcommResult_t flashcommGetVersion(int *version);

// Writes the counts of this process to `*stats`: of all communicators, those that have ended included. May be called at
// any time, from any thread.
//
// # Safety
// `stats` is null or points to a flashcommStats_t whose `size` is set.
flashcommResult_t flashcommGetStats(struct flashcommStats_t *stats);

// As flashcommGetStats, for `comm`, an ncclComm_t, alone: since its first call, zeros if there was none.
//
// # Safety
// `comm` is a communicator of this process; `stats` is null or points to a flashcommStats_t whose `size` is set.
flashcommResult_t flashcommGetCommStats(const void *comm, struct flashcommStats_t *stats);

// The name of a reason, an index of forwardedBecause, as in the file of FLASHCOMM_STATS_FILE; null for one that there is not.
const char *flashcommReasonName(int reason);

// Writes what `comm`, an ncclComm_t, does to `*info`. Asks no other rank; may be called at any time.
//
// # Safety
// `comm` is a communicator of this process; `info` is null or points to a flashcommCommInfo_t whose `size` is set.
flashcommResult_t flashcommGetCommInfo(const void *comm, struct flashcommCommInfo_t *info);

// Sets the bits per element of `comm`, an ncclComm_t: 2 to 8, or 16 for elements as they are, in hop 1, to the rank that
// sums, and in hop 2, from it, where they are no fewer.
//
// A collective: every rank of the communicator calls alike, at the same place in the order of its calls on that
// communicator. It returns when all ranks have changed, or none has, within FLASHCOMM_ATTACH_TIMEOUT_S; a rank that does not
// call makes the others wait that long, and the communicator is of no more use to them.
//
// - All-reduces issued before keep the old width, those issued after have the new one. The host waits until those before have
//   run on the GPU, loads the kernels of the new width and makes receive areas for it; nothing of that is left for the next
//   all-reduce, which may be in a graph capture.
// - A graph that was captured before keeps the width that it was captured with, whenever it is replayed. Therefore each
//   pair of widths keeps its memory (FLASHCOMM_BUFFER_MIB at most) until the communicator ends. There may be 8 in its
//   life; to go back to one costs no memory.
// - Between ncclGroupStart and ncclGroupEnd it takes effect at the outermost end, for which a thread that drives several
//   ranks calls it there; what it answers is answered by ncclGroupEnd. Do not mix it with all-reduces of the communicator in
//   one group.
// - Not while a stream that has all-reduces of the communicator is captured, nor while another thread uses it.
// - A communicator whose ranks have not met (FLASHCOMM_UNATTACHED) meets here, with these bits.
//
// FLASHCOMM_INVALID_USAGE on all ranks, and nothing changes (but one that was FLASHCOMM_UNATTACHED is FLASHCOMM_OFF): where ranks ask for different bits, the communicator is
// FLASHCOMM_OFF, FLASHCOMM_ENABLE is 0, or a rank has no memory for the new width. flashcommGetLastError says which.
//
// # Safety
// `comm` is a communicator of this process that has not been destroyed or aborted.
flashcommResult_t flashcommSetCommBits(const void *comm,
                                       int reduceBits,
                                       int gatherBits);

// Switches `comm`, an ncclComm_t, off (0: all-reduces go to the real NCCL, and are exact) or on again (1).
//
// A collective, for which everything holds that flashcommSetCommBits says. A graph that was captured while it was on
// stays compressed, and one that was captured while it was off stays plain.
//
// # Safety
// As for flashcommSetCommBits.
flashcommResult_t flashcommSetCommEnabled(const void *comm, int enabled);

// What went wrong last, in words: for `comm`, an ncclComm_t, if it is not null and something did, else in this process.
// An empty string where nothing has gone wrong. Names the rank that was waited for where a wait was given up.
//
// The string stays as it is as long as the process.
//
// # Safety
// `comm` is null or a communicator that has not been destroyed.
const char *flashcommGetLastError(const void *comm);

// Writes to `*way` how ncclAllReduce of `comm`, an ncclComm_t, takes a sum of `nBytes` bytes of `datatype`, an
// ncclDataType_t: the same on all ranks. Asks no other rank; may be called at any time.
//
// # Safety
// `comm` is a communicator of this process; `way` is null or points to a flashcommWay_t whose `size` is set.
flashcommResult_t flashcommGetCommWay(const void *comm, int datatype, uint64_t nBytes, struct flashcommWay_t *way);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLASHCOMM_H */
