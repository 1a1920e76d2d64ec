//! Harm to one rank, at every place where it can come to harm: its process is killed, or a call of its fails.
//!
//! Two processes stay. Round by round a third one joins them, is killed at its n-th step, or has its n-th allocation
//! (launch, event, NCCL call, ...) refused, and the two have to get over it. Since they stay, what they do not give
//! back adds up from round to round and is found at the end.
//!
//! Here is what both kinds of harm have in common: a watched all-reduce, how it ended, and that nothing grows.

mod killed;
mod refused;

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::time::{Duration, Instant};

use flashcomm_test_support::*;
use half::f16;

/// Ranks: the two that stay, and the one that comes to harm.
const WORLD: usize = 3;
const HARMED: usize = 2;
const ATTACH_TIMEOUT_S: u64 = 1;
/// `FLASHCOMM_BUFFER_MIB` of the jobs.
const RECEIVE_AREA: usize = 1 << 20;
/// Input and output of the trial of the links: two tiles of a chunk for each rank.
const TRIAL: usize = 2 * WORLD * 2 * 8192;
/// How soon an abort has to free what waits.
const SOON: Duration = Duration::from_secs(5);
/// What a loaded machine may add to a time limit.
const SLACK: Duration = Duration::from_secs(3);

/// Whether the sums of this job are exact ones in one hop.
fn is_exact() -> bool {
    std::env::var_os("WORLD_EXACT").is_some()
}

/// Elements of a sum.
fn count() -> usize {
    if is_exact() { 2000 } else { 9000 }
}

/// How a sum of this job ends where nobody comes to harm.
fn good_end() -> End {
    if is_exact() { End::Exact } else { End::Compressed }
}

/// How an all-reduce ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum End {
    /// With the reference's bits.
    Compressed,
    /// With plain NCCL's sum.
    Exact,
    /// With an error, or it waited until the abort.
    Failed,
}

/// Inputs that compress with an error, so that compressed and plain sums differ.
struct Sums {
    inputs: Vec<Vec<f16>>,
    compressed: Vec<f16>,
    exact: Vec<f16>,
}

impl Sums {
    fn of(world: usize) -> Self {
        let inputs: Vec<_> = (0..world).map(|rank| whole_numbers(count(), 7, rank)).collect();
        let (compressed, exact) = (reference(&inputs, legs(4, 4)), exact_sum(&inputs));
        assert!(compressed != exact);
        Sums { inputs, compressed, exact }
    }

    fn end(&self, got: &[f16], about: &str) -> End {
        if got == self.exact {
            return End::Exact;
        }
        same_bits(got, &self.compressed, about);
        End::Compressed
    }
}

/// Settings of every rank of a job.
fn settings(exchange: &str, is_exact: bool) -> Vec<(&'static str, String)> {
    // Over shared host memory a kernel gives up by itself; over peer memory it takes an abort.
    let timeout_s = if exchange == "host" { "2" } else { "0" };
    let mut settings = vec![
        ("FLASHCOMM_TIMEOUT_S", timeout_s.into()),
        ("FLASHCOMM_BITS", "4".into()),
        ("FLASHCOMM_EXCHANGE", exchange.into()),
        ("FLASHCOMM_ATTACH_TIMEOUT_S", ATTACH_TIMEOUT_S.to_string()),
    ];
    if is_exact {
        let exact = [("WORLD_EXACT", "1"), ("FLASHCOMM_MIN_BYTES", "1G"), ("FLASHCOMM_EXACT_MAX_BYTES", "4000")];
        settings.extend(exact.map(|(name, value)| (name, value.to_string())));
    }
    settings
}

/// Rank, in a round, of one of the two that stay: the harmed one is in each place in turn.
fn place(round: usize, process: usize) -> usize {
    let harmed = round % WORLD;
    match process {
        HARMED => harmed,
        _ if process < harmed => process,
        _ => process + 1,
    }
}

/// What a rank saw of a round.
struct Seen {
    ends: Vec<End>,
    /// What `ncclCommGetAsyncError` told before the abort, if anything.
    async_error: i32,
    /// How long the communicator's creation took.
    creation: Duration,
}

/// Two all-reduces on a new communicator, with a second thread that watches over them as engines do: `must_abort` is asked
/// now and then, with what `ncclCommGetAsyncError` tells, whether to abort.
///
/// `own`: what the test has made of its own, where that is to come first.
fn watched(
    id: UniqueId,
    rank: usize,
    sums: &Sums,
    own: Option<(Stream, Memory)>,
    must_abort: impl Fn(i32) -> bool + Sync,
) -> Seen {
    let start = Instant::now();
    let (comm, created) = try_init(sums.inputs.len(), id, rank);
    let mut seen = Seen { ends: Vec::new(), async_error: 0, creation: start.elapsed() };
    let (stream, memory) = own.unwrap_or_else(|| own_of(rank, sums));
    let (is_over, is_aborted) = (AtomicBool::new(false), Mutex::new(false));
    let async_error = AtomicI32::new(0);
    let ask = || {
        let mut told = 0;
        ok!(ncclCommGetAsyncError(comm, &mut told));
        if told != 0 {
            async_error.store(told, Ordering::Release);
        }
        told
    };
    if created != 0 {
        seen.ends.push(End::Failed);
        seen.async_error = ask();
        let refused = call!(ncclAllReduce(memory.at, memory.at, count(), dtype::FP16, SUM, comm, stream.0));
        assert_eq!((refused, seen.async_error), (created, created), "every call says what creation said");
        ok!(ncclCommAbort(comm));
        return seen;
    }
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            use_device(rank);
            while !is_over.load(Ordering::Acquire) {
                let told = ask();
                if must_abort(told) {
                    *is_aborted.lock().unwrap() = true;
                    ok!(ncclCommAbort(comm));
                    return;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
        });
        for i in 0..2 {
            memory.write(&sums.inputs[rank], &stream);
            let result = call!(ncclAllReduce(memory.at, memory.at, count(), dtype::FP16, SUM, comm, stream.0));
            // However it ends: the stream has to become idle, if only by the watcher's abort.
            assert!(stream.becomes_idle(SOON + SLACK), "the stream hangs, call {i}, result {result}");
            // A kernel that gave up waiting has ended, too: what it left is no result, and NCCL's state says so.
            let is_aborted = is_aborted.lock().unwrap();
            if result != 0 || *is_aborted || ask() != 0 {
                seen.ends.push(End::Failed);
                break;
            }
            seen.ends.push(sums.end(&read(&memory, &stream), &format!("call {i}, rank {rank}")));
        }
        is_over.store(true, Ordering::Release);
        watcher.join().unwrap();
    });
    seen.async_error = async_error.load(Ordering::Acquire);
    if *is_aborted.lock().unwrap() {
        return seen;
    }
    match seen.ends.contains(&End::Failed) {
        true => ok!(ncclCommAbort(comm)),
        false => ok!(ncclCommDestroy(comm)),
    }
    seen
}

/// A stream and a rank's input.
fn own_of(rank: usize, sums: &Sums) -> (Stream, Memory) {
    let stream = Stream::new();
    let memory = Memory::of(&sums.inputs[rank], &stream);
    stream.wait();
    (stream, memory)
}

/// Reads the result; once more where that very copy was the call that failed.
fn read(memory: &Memory, stream: &Stream) -> Vec<f16> {
    let mut bytes = vec![0; count() * 2];
    let mut copy = || call!(cuMemcpyDtoHAsync_v2(bytes.as_mut_ptr(), memory.at, count() * 2, stream.0));
    if copy() != 0 {
        assert_eq!(copy(), 0);
    }
    stream.wait();
    bytes.chunks_exact(2).map(|pair| f16::from_bits(u16::from_le_bytes([pair[0], pair[1]]))).collect()
}

/// A communicator of the given ranks works.
fn works(process: &Process, n: usize, world: usize, rank: usize) {
    let sums = Sums::of(world);
    let seen = watched(process.unique_id(n), rank, &sums, None, |_| false);
    assert_eq!(seen.ends, [good_end(); 2], "a new communicator, {world} ranks");
}

/// What may be held after `n` aborts, if so much was held before.
fn with_lost(mut held: Held, exchange: &str, n: usize) -> Held {
    // Scratch memory of attach, kept for the next one, the larger the more ranks.
    held.device_bytes += 4096 + TRIAL;
    if exchange == "peer" {
        // What a peer's kernel may still write to is not used again: a receive area each time.
        held.device_bytes += n * RECEIVE_AREA;
    }
    held
}

/// Wants nothing to have grown since `first`, but for threads that are just ending.
fn nothing_has_grown(first: Held) {
    let end = Instant::now() + SOON;
    loop {
        let last = Held::now();
        let is_flat = last.files <= first.files && last.threads <= first.threads;
        if is_flat && last.device_bytes <= first.device_bytes {
            return;
        }
        assert!(Instant::now() < end, "it grows: {first:?} {last:?} {:?}", open_files());
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Shared memory that is named now has no name soon, but what had one before.
fn no_name_stays(before: &[String]) {
    let mut named: Vec<_> = shared_memory_names().into_iter().filter(|name| !before.contains(name)).collect();
    let end = Instant::now() + Duration::from_secs(20);
    while !named.is_empty() {
        assert!(Instant::now() < end, "left in /dev/shm: {named:?}");
        std::thread::sleep(Duration::from_millis(50));
        let still = shared_memory_names();
        named.retain(|name| still.contains(name));
    }
}
