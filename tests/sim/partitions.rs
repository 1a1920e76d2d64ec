//! Fewer multiprocessors than the whole GPU: green contexts and MPS (invariant I6).
//!
//! A simulated device has 16, so a rank's kernel has 5 blocks, of 3 channels for these sizes. One multiprocessor holds two
//! such blocks. Ranks of which two lack room hang here (`sim/cuda/src/fused.rs`); with one of them the others' blocks are all
//! there, and it gets through.

use flashcomm_test_support::*;
use flashcomm_wire::TILE_ELEMS;
use half::f16;

const EXCHANGES: [&str; 2] = ["peer", "host"];

/// Runs a test over both exchanges that have a kernel that waits, each in a process.
fn over_each(test: impl Fn()) {
    for exchange in EXCHANGES {
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != exchange) {
            continue;
        }
        let settings = [
            ("FLASHCOMM_EXCHANGE", exchange),
            ("FLASHCOMM_BITS", "4"),
            ("FLASHCOMM_BUFFER_MIB", "64"),
            ("WORLD_PART", exchange),
        ];
        in_process(&settings, &test);
    }
}

/// Tiles for every channel of every block.
fn case(world: usize, seed: u64) -> std::sync::Arc<Case<f16>> {
    Case::new(world * 25 * TILE_ELEMS, seed, world, legs(4, 4))
}

/// What comes of all-reducing the sum again, on every rank.
fn again(case: &Case<f16>) -> Vec<f16> {
    reference(&vec![case.expected.clone(); case.inputs.len()], legs(4, 4))
}

/// Ranks of which `is_green` says who calls from a green context of one multiprocessor: eagerly and from a graph, replayed
/// where it was captured and on a stream that has the whole GPU. Everything is issued at once, so that only streams keep
/// the order.
fn ranks_sum(world: usize, is_green: impl Fn(usize) -> bool + Sync) {
    let (case, id) = (case(world, 5), unique_id());
    let (once, twice) = (&case.expected, &again(&case));
    threads(world, |rank| {
        let (comm, whole, green) = (init(world, id, rank), Stream::new(), Green::new(rank, 1));
        let stream = if is_green(rank) { green.stream() } else { Stream::new() };
        let memory = Memory::new(case.count * 2);
        let sum = || ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
        let about = |how: &str| format!("{how}, rank {rank} of {world}");
        memory.write(&case.inputs[rank], &stream);
        sum();
        sum();
        same_bits(&memory.read(case.count, &stream), twice, &about("eagerly"));
        let graph = stream.capture(|| {
            sum();
            sum();
        });
        for on in [&stream, &whole] {
            memory.write(&case.inputs[rank], on);
            graph.launch(on);
            same_bits(&memory.read(case.count, on), twice, &about("from a graph"));
        }
        memory.write(&case.inputs[rank], &stream);
        sum();
        same_bits(&memory.read(case.count, &stream), once, &about("after the graph"));
        ok!(ncclCommDestroy(comm));
    });
}

#[test]
fn ranks_that_all_call_from_green_contexts_sum() {
    over_each(|| {
        for world in [2, 3, 5] {
            ranks_sum(world, |_| true);
        }
        assert_eq!(n_compressed(), 5 * (2 + 3 + 5), "none was forwarded");
    });
}

#[test]
fn one_rank_in_a_green_context_sums_with_others_that_are_not() {
    over_each(|| {
        for world in [2, 3] {
            ranks_sum(world, |rank| rank == world - 1);
        }
    });
}

/// Null is the default stream of the context that is current, which `ncclAllReduce` leaves as it is.
#[test]
fn the_default_stream_of_a_green_context_keeps_its_order() {
    over_each(|| {
        let (case, ids) = (case(2, 9), [unique_id(), unique_id()]);
        threads(2, |rank| {
            let [comm, other] = ids.map(|id| init(2, id, rank));
            let (stream, green) = (Stream::new(), Green::new(rank, 1));
            let (default, memory) = (std::mem::ManuallyDrop::new(Stream(0)), Memory::new(case.count * 2));
            let held = Memory::of(&case.inputs[rank], &stream);
            // Rank 0's default stream waits for a sum to which rank 1 comes late.
            std::thread::sleep(std::time::Duration::from_millis(200 * rank as u64));
            ok!(ncclAllReduce(held.at, held.at, case.count, dtype::FP16, SUM, other, stream.0));
            green.current(|| {
                order(&stream, &default);
                memory.write(&case.inputs[rank], &default);
                ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, 0));
                same_bits(&memory.read(case.count, &default), &case.expected, "on the default stream");
            });
            same_bits(&held.read(case.count, &stream), &case.expected, "what it waited for");
            for comm in [comm, other] {
                ok!(ncclCommDestroy(comm));
            }
        });
    });
}

/// A stream of ours that a capture has drawn in is of no use for anything else until the capture ends.
#[test]
fn captures_and_eager_calls_of_a_communicator_go_on_beside_each_other() {
    const RELAXED: i32 = 2;
    over_each(|| {
        let (case, id) = (case(2, 11), unique_id());
        threads(2, |rank| {
            let (comm, green) = (init(2, id, rank), Green::new(rank, 1));
            let streams = [(); 3].map(|()| green.stream());
            let memories = [0, 1, 2].map(|i| Memory::of(&case.inputs[rank], &streams[i]));
            let sum = |i: usize| {
                ok!(ncclAllReduce(memories[i].at, memories[i].at, case.count, dtype::FP16, SUM, comm, streams[i].0));
            };
            let is_right =
                |i: usize, how: &str| same_bits(&memories[i].read(case.count, &streams[i]), &case.expected, how);
            for captured in [0, 1] {
                streams[captured].wait();
                ok!(cuStreamBeginCapture_v2(streams[captured].0, RELAXED));
                sum(captured);
            }
            sum(2);
            is_right(2, "eagerly, beside captures");
            for captured in [1, 0] {
                let (mut graph, mut executable) = (0, 0);
                ok!(cuStreamEndCapture(streams[captured].0, &mut graph));
                ok!(cuGraphInstantiateWithFlags(&mut executable, graph, 0));
                ok!(cuGraphLaunch(executable, streams[captured].0));
                is_right(captured, "from a graph");
                ok!(cuGraphExecDestroy(executable));
                ok!(cuGraphDestroy(graph));
            }
            ok!(ncclCommDestroy(comm));
        });
    });
}

/// As MPS does with CUDA_MPS_ACTIVE_THREAD_PERCENTAGE, for each process.
#[test]
fn ranks_that_mps_leaves_different_shares_sum() {
    for exchange in EXCHANGES {
        if std::env::var("WORLD_PART").is_ok_and(|mine| mine != exchange) {
            continue;
        }
        let percentages = ["7", "12", "25"]; // one multiprocessor, one, and four
        let settings = |rank: usize| {
            vec![
                ("FLASHCOMM_SIM_THREAD_PERCENTAGE", percentages[rank].to_string()),
                ("FLASHCOMM_EXCHANGE", exchange.into()),
                ("FLASHCOMM_BITS", "4".into()),
                ("FLASHCOMM_BUFFER_MIB", "64".into()),
                ("FLASHCOMM_LOG", "info".into()),
                ("WORLD_PART", exchange.into()),
            ]
        };
        let ends = processes(3, settings, |process| {
            use_device(process.rank);
            let (comm, stream) = (init(3, process.unique_id(0), process.rank), Stream::new());
            let case = case(3, 13);
            let memory = Memory::of(&case.inputs[process.rank], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
            same_bits(&memory.read(case.count, &stream), &case.expected, "the sum");
            ok!(ncclCommDestroy(comm));
        });
        for (_, log) in ends.iter().flatten() {
            assert!(log.contains(" 1 blocks,"), "{log}");
        }
        all_succeed(ends);
    }
}

/// Drivers before CUDA 12.4 have no green contexts, and older ones tell of no share.
#[test]
fn a_driver_that_lacks_the_functions_is_not_asked() {
    const LACKING: [&str; 2] = ["cuStreamGetGreenCtx", "cuCtxGetExecAffinity"];
    let dir = tempfile::tempdir().unwrap();
    let mut driver = std::fs::read(built("libflashcomm_sim_cuda.so")).unwrap();
    for name in LACKING {
        for at in 0..driver.len() - name.len() {
            if driver[at..].starts_with(name.as_bytes()) {
                driver[at] = b'x';
            }
        }
    }
    std::fs::write(dir.path().join("libcuda.so.1"), &driver).unwrap();
    std::os::unix::fs::symlink("libcuda.so.1", dir.path().join("libcuda.so")).unwrap();
    std::os::unix::fs::symlink(built("libflashcomm_sim_nccl.so"), dir.path().join("libnccl.so.2")).unwrap();
    let settings = [("FLASHCOMM_BITS", "4"), ("LD_LIBRARY_PATH", dir.path().to_str().unwrap())];
    in_process(&settings, || {
        for name in LACKING {
            let name = std::ffi::CString::new(name).unwrap();
            // SAFETY: a NUL-terminated name, and a driver that is open.
            let found = unsafe { libc::dlsym(libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW), name.as_ptr()) };
            assert!(found.is_null(), "{name:?} is there after all");
        }
        let (case, id) = (case(2, 17), unique_id());
        threads(2, |rank| {
            let (comm, stream) = (init(2, id, rank), Stream::new());
            let memory = Memory::of(&case.inputs[rank], &stream);
            ok!(ncclAllReduce(memory.at, memory.at, case.count, dtype::FP16, SUM, comm, stream.0));
            same_bits(&memory.read(case.count, &stream), &case.expected, "the sum");
            ok!(ncclCommDestroy(comm));
        });
        assert_eq!(n_compressed(), 2);
    });
}
