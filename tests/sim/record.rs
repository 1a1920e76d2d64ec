//! Recording: what is saved is what the ranks passed, of the same calls on all of them, and nothing uninvited.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::sync::Barrier;

use flashcomm_test_support::*;
use flashcomm_wire::Element;
use half::{bf16, f16};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype;

const WORLD: usize = 3;
/// Elements of a sample at most.
const MOST: usize = 128 * 4096;

/// Elements of a call of the jobs here: one is longer than a sample.
fn count(call: u64) -> usize {
    if call == 1 { MOST + 777 } else { 1000 + call as usize }
}

/// A rank's input of a call; bf16 in every third.
fn is_bf16(call: u64) -> bool {
    call.is_multiple_of(3)
}

/// One call, in place, whose input is as [`input`] has it.
fn reduce(comm: usize, stream: &Stream, memory: &Memory, call: u64, rank: usize) {
    let n = count(call);
    let datatype = if is_bf16(call) {
        memory.write(&input::<bf16>(n, call, rank), stream);
        dtype::BF16
    } else {
        memory.write(&input::<f16>(n, call, rank), stream);
        dtype::FP16
    };
    ok!(ncclAllReduce(memory.at, memory.at, n, datatype, SUM, comm, stream.0));
}

/// What a file holds, by the header's names.
struct File {
    about: BTreeMap<String, String>,
    dtype: Dtype,
    bits: Vec<u16>,
}

fn files(dir: &Path) -> Vec<File> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let read = |path: std::path::PathBuf| {
        let bytes = std::fs::read(path).unwrap();
        let (_, header) = SafeTensors::read_metadata(&bytes).unwrap();
        let about = header.metadata().clone().unwrap().into_iter().collect();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let view = tensors.tensor("input").unwrap();
        assert_eq!(tensors.len(), 1);
        let bits = view.data().chunks_exact(2).map(|pair| u16::from_le_bytes([pair[0], pair[1]])).collect();
        File { about, dtype: view.dtype(), bits }
    };
    entries.map(|entry| read(entry.unwrap().path())).collect()
}

fn bits_of<E: Element>(call: u64, rank: usize) -> Vec<u16> {
    input::<E>(count(call), call, rank).iter().take(MOST).map(|x| x.to_bits()).collect()
}

/// Wants the files to be the inputs of these calls, of every rank, of one communicator.
fn are_inputs_of(files: &[File], mut calls: Vec<u64>) {
    let mut found = BTreeMap::<u64, Vec<usize>>::new();
    for file in files {
        let number = |name: &str| file.about[name].parse::<u64>().unwrap();
        let (call, rank) = (number("call"), number("rank") as usize);
        assert_eq!((number("world"), number("count")), (WORLD as u64, count(call) as u64), "call {call}");
        assert_eq!(file.about["communicator"], files[0].about["communicator"]);
        let (dtype, bits) = match is_bf16(call) {
            true => (Dtype::BF16, bits_of::<bf16>(call, rank)),
            false => (Dtype::F16, bits_of::<f16>(call, rank)),
        };
        assert!(file.dtype == dtype && file.bits == bits, "call {call} of rank {rank} is not what was passed");
        found.entry(call).or_default().push(rank);
    }
    calls.sort_unstable();
    assert_eq!(found.keys().copied().collect::<Vec<_>>(), calls);
    for (call, mut ranks) in found {
        ranks.sort_unstable();
        assert_eq!(ranks, (0..WORLD).collect::<Vec<_>>(), "call {call}");
    }
}

/// Which calls of one communicator are saved, of so many: one in each octave.
fn saved(files: &[File], n_calls: u64) -> Vec<u64> {
    let mut calls: Vec<u64> = files.iter().map(|file| file.about["call"].parse().unwrap()).collect();
    calls.sort_unstable();
    calls.dedup();
    let octaves: Vec<u32> = calls.iter().map(|call| call.ilog2()).collect();
    // The last octave may not have come to its call.
    assert!(octaves.iter().enumerate().all(|(i, octave)| i as u32 == *octave), "{calls:?}");
    assert!(octaves.len() as u32 >= n_calls.ilog2(), "{calls:?}");
    calls
}

/// Runs `flashcomm codec` on the folder.
fn codec(dir: &Path) -> String {
    let mut codec = Command::new(built("flashcomm"));
    let output = codec.args(["codec", "--bits", "8,4", "--max-elements", "4K"]).arg(dir).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn records(exchange: &str, min_bytes: &str) {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("a/b");
    let settings = |_| {
        vec![
            ("FLASHCOMM_RECORD", "20".into()),
            ("FLASHCOMM_RECORD_DIR", folder.to_str().unwrap().into()),
            ("FLASHCOMM_EXCHANGE", exchange.into()),
            ("FLASHCOMM_MIN_BYTES", min_bytes.into()),
        ]
    };
    let n_calls = 40;
    let ends = processes(WORLD, settings, |process| {
        use_device(process.rank);
        let comm = init(WORLD, process.unique_id(0), process.rank);
        let (stream, memory) = (Stream::new(), Memory::new(2 * count(1)));
        for call in 1..=n_calls {
            reduce(comm, &stream, &memory, call, process.rank);
        }
        stream.wait();
        // The last ones are written when the process ends.
    });
    let Some(ends) = ends else { return };
    assert!(ends.iter().all(|(_, stderr)| stderr.is_empty()), "{ends:?}");
    all_succeed(Some(ends));
    let files = files(&folder);
    let calls = saved(&files, n_calls);
    are_inputs_of(&files, calls.clone());
    let said = codec(&folder);
    for call in calls {
        assert!(said.contains(&format!("call {call}, {WORLD} of {WORLD} ranks: ")), "{said}");
    }
}

#[test]
fn processes_save_what_they_passed_over_shared_memory() {
    records("peer", "0");
}

#[test]
fn processes_save_what_they_passed_over_nccl() {
    records("nccl", "0");
}

#[test]
fn what_is_too_small_to_be_compressed_is_saved_too() {
    records("auto", "1G");
}

#[test]
fn threads_save_by_communicator_alone_and_in_groups_but_not_what_is_captured() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap().to_string();
    in_process(&[("FLASHCOMM_RECORD", "64"), ("FLASHCOMM_RECORD_DIR", &folder)], || {
        let ids = [unique_id(), unique_id()];
        // Ranks that share a real device meet idle before what allocates.
        let gate = Barrier::new(WORLD);
        threads(WORLD, |rank| {
            let (stream, memory) = (Stream::new(), Memory::new(2 * count(1)));
            let meet = || {
                stream.wait();
                gate.wait();
            };
            let mut graphs = Vec::new();
            let comms = ids.map(|id| init(WORLD, id, rank));
            for comm in comms {
                meet();
                reduce(comm, &stream, &memory, 1, rank);
                meet();
                // With 64 asked for, the calls 2 to 7 would all be saved; of these 2 and 3 are captured.
                let graph = stream.capture(|| {
                    for call in 2..=3 {
                        ok!(ncclAllReduce(memory.at, memory.at, count(call), dtype::FP16, SUM, comm, stream.0));
                    }
                });
                meet();
                (0..3).for_each(|_| graph.launch(&stream));
                graphs.push(graph);
                reduce(comm, &stream, &memory, 4, rank);
                ok!(ncclGroupStart());
                reduce(comm, &stream, &memory, 5, rank);
                ok!(ncclGroupEnd());
                for call in 6..=7 {
                    reduce(comm, &stream, &memory, call, rank);
                }
            }
            meet();
            for comm in comms {
                ok!(ncclCommDestroy(comm));
            }
            gate.wait();
        });
    });
    if std::env::var_os("WORLD_INNER").is_none() {
        let mut by_communicator = BTreeMap::<String, Vec<File>>::new();
        for file in files(dir.path()) {
            by_communicator.entry(file.about["communicator"].clone()).or_default().push(file);
        }
        assert_eq!(by_communicator.len(), 2);
        for files in by_communicator.values() {
            are_inputs_of(files, vec![1, 4, 5, 6, 7]);
        }
    }
}

#[test]
fn off_writes_nothing_and_no_more_than_is_asked_for_is_written() {
    for (wanted, expected) in [(None, 0), (Some("0"), 0), (Some("2"), 2 * WORLD)] {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().to_str().unwrap().to_string();
        let mut settings = vec![("FLASHCOMM_RECORD_DIR", folder.as_str())];
        settings.extend(wanted.map(|wanted| ("FLASHCOMM_RECORD", wanted)));
        in_process(&settings, || {
            let id = unique_id();
            threads(WORLD, |rank| {
                let (comm, stream, memory) = (init(WORLD, id, rank), Stream::new(), Memory::new(2 * count(1)));
                (1..=8).for_each(|call| reduce(comm, &stream, &memory, call, rank));
                stream.wait();
                ok!(ncclCommDestroy(comm));
            });
        });
        if std::env::var_os("WORLD_INNER").is_some() {
            return;
        }
        assert_eq!(files(dir.path()).len(), expected, "{wanted:?}");
    }
}

#[test]
fn a_folder_that_cannot_be_written_and_memory_that_is_not_there_give_one_warning_and_no_error() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "in the way").unwrap();
    let folder = file.join("below");
    let settings = |rank: usize| {
        let mut settings =
            vec![("FLASHCOMM_RECORD", "8".into()), ("FLASHCOMM_RECORD_DIR", folder.to_str().unwrap().into())];
        if rank == 1 {
            settings.push(("FLASHCOMM_SIM_FAIL", "hostalloc:1".into()));
        }
        settings
    };
    let ends = processes(WORLD, settings, |process| {
        use_device(process.rank);
        let comm = init(WORLD, process.unique_id(0), process.rank);
        let (stream, memory) = (Stream::new(), Memory::new(2 * count(1)));
        for call in 1..=20 {
            reduce(comm, &stream, &memory, call, process.rank);
            stream.wait();
        }
        assert_eq!(n_compressed(), 20);
        ok!(ncclCommDestroy(comm));
    });
    let Some(ends) = ends else { return };
    for (rank, (_, stderr)) in ends.iter().enumerate() {
        let said = if rank == 1 { "no memory for the inputs" } else { "nothing more is saved" };
        assert!(stderr.contains(said) && stderr.matches("WARN").count() == 1, "rank {rank}: {stderr}");
    }
    all_succeed(Some(ends));
}

#[test]
fn what_a_refused_call_passes_is_not_read() {
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().to_str().unwrap().to_string();
    let settings = [
        ("FLASHCOMM_RECORD", "64"),
        ("FLASHCOMM_RECORD_DIR", &folder),
        ("FLASHCOMM_EXCHANGE", "peer"),
        ("FLASHCOMM_TIMEOUT_S", "1"),
    ];
    in_process(&settings, || {
        let (id, gate) = (unique_id(), Barrier::new(2));
        threads(2, |rank| {
            let (comm, stream, memory) = (init(2, id, rank), Stream::new(), Memory::new(2 * count(1)));
            reduce(comm, &stream, &memory, 1, rank);
            stream.wait();
            gate.wait();
            if rank == 0 {
                reduce(comm, &stream, &memory, 2, rank); // alone
                stream.wait();
                let freed = Memory::new(5000);
                // A stream that is busy for a while, so that what comes now is run after the memory is gone.
                (0..200).for_each(|_| ok!(cuMemsetD8Async(memory.at, 0, memory.n_bytes, stream.0)));
                let refused = call!(ncclAllReduce(freed.at, freed.at, 2500, dtype::FP16, SUM, comm, stream.0));
                assert_eq!(refused, 6, "ncclRemoteError");
                drop(freed);
                stream.wait();
                ok!(cuCtxSynchronize());
            }
            ok!(ncclCommAbort(comm));
        });
    });
}
