// flashcomm's own calls. Everything else that libflashcomm.so exports is NCCL's, as nccl.h declares it.

#ifndef FLASHCOMM_H
#define FLASHCOMM_H

#include <stddef.h>
#include <stdint.h>

// Size classes of flashcommStats_t: class 0 has the all-reduces below 1 KiB, class i those from 512 << i bytes on, and
// the last everything from 4 GiB on.
#define FLASHCOMM_SIZE_CLASSES 24

// Places for reasons in flashcommStats_t; flashcommReasonName tells which are used.
#define FLASHCOMM_REASONS 16

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
} flashcommStats_t;

// The call did what it says.
#define FLASHCOMM_SUCCESS 0

// A bug in flashcomm.
#define FLASHCOMM_INTERNAL_ERROR 3

// A pointer was null, or a structure's size is not one that this version knows.
#define FLASHCOMM_INVALID_ARGUMENT 4

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

// What went wrong last, in words: for `comm`, an ncclComm_t, if it is not null and something did, else in this process.
// An empty string where nothing has gone wrong. Names the rank that was waited for where a wait was given up.
//
// The string is good until the calling thread calls this again.
//
// # Safety
// `comm` is null or a communicator that has not been destroyed.
const char *flashcommGetLastError(const void *comm);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* FLASHCOMM_H */
