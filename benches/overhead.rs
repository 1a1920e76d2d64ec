//! What the shim adds to a call that it forwards, over a stub in place of the real NCCL whose functions return at once.
//!
//! Criterion reports each call; then the medians are held against the budget: 5 ns for a forwarded call, 50 ns for a
//! forwarded all-reduce, and of those 20 ns for counting it.

use std::ffi::{CString, c_int, c_void};
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null_mut;
use std::time::Instant;

use criterion::Criterion;
use flashcomm::tooling::nccl::CommPtr;
use flashcomm::tooling::stats::{Reason, this_thread};

type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
type Broadcast =
    unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
type AllReduce = Broadcast; // the same registers: an operation instead of a root

/// Handles as far apart as NCCL's, which are addresses of structures.
const COMMS: [usize; 16] = {
    let mut comms = [0; 16];
    let mut i = 0;
    while i < comms.len() {
        comms[i] = 0x7f12_3456_0040 + i * 0x1_9040;
        i += 1;
    }
    comms
};

/// A library opened for good.
struct Library(*mut c_void);

impl Library {
    fn open(path: &Path) -> Self {
        let path = CString::new(path.to_str().unwrap()).unwrap();
        // SAFETY: a NUL-terminated path.
        let handle = unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "cannot open {path:?}");
        Self(handle)
    }

    /// # Safety
    /// `F` is the type of the function of this name.
    unsafe fn function<F: Copy>(&self, name: &str) -> F {
        let name = CString::new(name).unwrap();
        // SAFETY: an open handle and a NUL-terminated name.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        assert!(!address.is_null(), "{name:?} is missing");
        // SAFETY: as the caller vouches.
        unsafe { std::mem::transmute_copy(&address) }
    }
}

fn shim() -> PathBuf {
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    deps.parent().unwrap().join("libflashcomm.so")
}

fn build_stub(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/c/stub.c");
    let stub = dir.join("libstub.so");
    let built = Command::new("cc").args(["-O2", "-shared", "-fPIC"]).arg(source).arg("-o").arg(&stub).status();
    assert!(built.expect("cc").success());
    stub
}

/// Median nanoseconds of a call, over batches that outlast the clock's resolution.
fn median_ns(mut call: impl FnMut()) -> f64 {
    const BATCH: u32 = 10_000;
    let mut times: Vec<f64> = (0..301)
        .map(|_| {
            let start = Instant::now();
            (0..BATCH).for_each(|_| call());
            start.elapsed().as_nanos() as f64 / f64::from(BATCH)
        })
        .collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let dir = tempfile::tempdir().unwrap();
    let stub_path = build_stub(dir.path());
    // SAFETY: no other thread runs yet.
    unsafe { std::env::set_var("FLASHCOMM_NCCL_LIB", &stub_path) };
    let (stub, shim) = (Library::open(&stub_path), Library::open(&shim()));
    let mut criterion = Criterion::default().configure_from_args();
    let mut over_budget = Vec::new();
    let comm = 64 as *mut c_void;

    let mut compare = |name: &str, budget_ns: f64, call: &dyn Fn(&Library) -> Box<dyn FnMut()>| {
        let (mut direct, mut shimmed) = (call(&stub), call(&shim));
        criterion.bench_function(&format!("{name}/direct"), |bench| bench.iter(&mut direct));
        criterion.bench_function(&format!("{name}/shim"), |bench| bench.iter(&mut shimmed));
        let (direct, shimmed) = (median_ns(direct), median_ns(shimmed));
        println!("{name}: {direct:.1} ns direct, {shimmed:.1} ns through the shim, budget {budget_ns} ns more");
        if shimmed - direct > budget_ns {
            over_budget.push(name.to_string());
        }
    };
    compare("ncclGetVersion", 5.0, &|library| {
        // SAFETY: NCCL's signature.
        let function: GetVersion = unsafe { library.function("ncclGetVersion") };
        let mut version = 0;
        Box::new(move || {
            // SAFETY: a valid place.
            black_box(unsafe { function(&mut version) });
        })
    });
    compare("ncclBroadcast", 5.0, &|library| {
        // SAFETY: NCCL's signature.
        let function: Broadcast = unsafe { library.function("ncclBroadcast") };
        Box::new(move || {
            // SAFETY: the stub touches nothing.
            black_box(unsafe { function(null_mut(), null_mut(), 8, 7, 0, comm, null_mut()) });
        })
    });
    // fp32 is not compressed; the stub's communicator has one rank, so its fp16 all-reduces are looked up and forwarded.
    for (name, datatype) in [("ncclAllReduce of fp32", 7), ("ncclAllReduce of fp16, forwarded", 6)] {
        compare(name, 50.0, &|library| {
            // SAFETY: NCCL's signature.
            let function: AllReduce = unsafe { library.function("ncclAllReduce") };
            Box::new(move || {
                // SAFETY: the stub touches nothing.
                black_box(unsafe { function(null_mut(), null_mut(), 8, datatype, 0, comm, null_mut()) });
            })
        });
    }
    // A thread that drives many communicators in turn.
    compare("ncclBroadcast on 16 communicators in turn", 5.0, &|library| {
        // SAFETY: NCCL's signature.
        let function: Broadcast = unsafe { library.function("ncclBroadcast") };
        let mut turn = 0;
        Box::new(move || {
            turn = (turn + 1) & 15;
            // SAFETY: the stub touches nothing.
            black_box(unsafe { function(null_mut(), null_mut(), 8, 7, 0, COMMS[turn] as *mut c_void, null_mut()) });
        })
    });
    over_budget.extend(counting_over_budget());
    criterion.final_summary();
    assert!(over_budget.is_empty(), "over budget: {over_budget:?}");
}

/// Counting alone, without a call of NCCL: what is over its budget.
fn counting_over_budget() -> Vec<String> {
    let mut over_budget = Vec::new();
    for (name, n_comms) in [("one communicator", 1), ("16 communicators in turn", 16)] {
        let turns = |count: fn(CommPtr)| {
            let mut turn = 0;
            median_ns(move || {
                turn = (turn + 1) & (n_comms - 1);
                count(black_box(COMMS[turn] as CommPtr));
            })
        };
        let nothing = turns(|_| {});
        for (what, count) in [
            (
                "a compressed all-reduce",
                (|comm| this_thread().counters(comm).count_compressed(1 << 20, 1 << 18)) as fn(CommPtr),
            ),
            ("a forwarded all-reduce", |comm| this_thread().counters(comm).count_forwarded(Reason::Small, 8192)),
        ] {
            let counting = turns(count) - nothing;
            println!("counting {what} on {name}: {counting:.1} ns, budget 20 ns");
            if counting > 20.0 {
                over_budget.push(format!("counting {what} on {name}"));
            }
        }
    }
    over_budget
}
