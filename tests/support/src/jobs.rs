//! Jobs: ranks that are threads, or processes that start this very test again.
//!
//! `FLASHCOMM_TEST_LOG` is the `FLASHCOMM_LOG` of jobs that set none.
//!
//! A process finds its part by `WORLD_INNER`, or by `WORLD_RANK` and `WORLD_DIR`, where the ranks of a job meet.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use crate::api::{UniqueId, unique_id};
use crate::device::use_device;
use crate::libraries::{is_real, simulators};

/// Settings, name and value.
pub type Settings<'a> = &'a [(&'a str, &'a str)];

fn again(dir: &Path, settings: Settings<'_>) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        let keep = text.starts_with("FLASHCOMM_TEST_") || text == "FLASHCOMM_SIM_SEED";
        if !keep && (text.starts_with("FLASHCOMM_") || text.starts_with("NCCL_") || text.starts_with("WORLD_")) {
            command.env_remove(&name);
        }
    }
    let test = std::thread::current().name().expect("tests are named").to_string();
    command.args(["--exact", &test, "--nocapture"]).env("NCCL_MULTI_RANK_GPU_ENABLE", "1").env("NCCL_MAX_CTAS", "8");
    // Ranks of one GPU must not wait for each other in a queue of the hardware that their streams happen to share.
    command.env("CUDA_DEVICE_MAX_CONNECTIONS", "32");
    // Nor for the driver to load one's first kernel, or to give it a stack, while another's waits.
    command.env("CUDA_MODULE_LOADING", "EAGER").env("NCCL_SET_STACK_SIZE", "1");
    // Nothing is measured, and nobody's cache is touched, where a test does not say so.
    command.env("FLASHCOMM_MIN_BYTES", "0").env("FLASHCOMM_BUFFER_MIB", "1").env("FLASHCOMM_TUNE", "off");
    match (is_real(), std::env::var_os("FLASHCOMM_TEST_NCCL")) {
        (false, _) => {
            command.env("LD_LIBRARY_PATH", dir);
        }
        (true, Some(nccl)) => {
            command.env("FLASHCOMM_NCCL_LIB", nccl);
        }
        (true, None) => {}
    }
    if is_real() && std::env::var_os("CUDA_VISIBLE_DEVICES").is_none() {
        command.env("CUDA_VISIBLE_DEVICES", "0");
    }
    if let Some(level) = std::env::var_os("FLASHCOMM_TEST_LOG") {
        command.env("FLASHCOMM_LOG", level);
    }
    command.envs(settings.iter().copied());
    command
}

/// Ends with the test.
struct Guard(Child);

impl Drop for Guard {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn wait(children: &mut [Guard], limit: Duration) -> Vec<ExitStatus> {
    let end = Instant::now() + limit;
    let one = |child: &mut Guard| loop {
        if let Some(status) = child.0.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < end, "a rank hangs");
        std::thread::sleep(Duration::from_millis(2));
    };
    children.iter_mut().map(one).collect()
}

/// How long a job may take: 240 s, or `FLASHCOMM_TEST_LIMIT_S`.
fn limit() -> Duration {
    let set = std::env::var("FLASHCOMM_TEST_LIMIT_S").ok();
    Duration::from_secs(set.map_or(240, |text| text.parse().expect("FLASHCOMM_TEST_LIMIT_S is a number of seconds")))
}

/// Runs `body` in one process of its own, with these settings.
pub fn in_process(settings: Settings<'_>, body: impl FnOnce()) {
    if std::env::var_os("WORLD_INNER").is_some() {
        return body();
    }
    let dir = simulators();
    let child = again(dir.path(), settings).env("WORLD_INNER", "1").spawn().unwrap();
    let statuses = wait(&mut [Guard(child)], limit());
    assert!(statuses[0].success(), "{:?}", statuses[0]);
}

/// What a rank that is a process knows.
pub struct Process {
    pub rank: usize,
    pub world: usize,
    /// Where the ranks meet.
    pub dir: PathBuf,
}

impl Process {
    /// The same id on all ranks; `n` tells one from the next.
    pub fn unique_id(&self, n: usize) -> UniqueId {
        self.unique_id_by(n, 0)
    }

    /// An id made by rank `root`.
    pub fn unique_id_by(&self, n: usize, root: usize) -> UniqueId {
        let name = format!("id{n}");
        if self.rank == root {
            let id = unique_id();
            self.tell(&name, &id.0);
            return id;
        }
        UniqueId(self.hear(&name).try_into().unwrap())
    }

    /// Tells the other ranks something, by name.
    pub fn tell(&self, name: &str, what: &[u8]) {
        let part = self.dir.join(format!("{name}.part{}", self.rank));
        std::fs::write(&part, what).unwrap();
        std::fs::rename(&part, self.dir.join(name)).unwrap();
    }

    /// What has been told by that name so far.
    pub fn heard(&self, name: &str) -> Option<Vec<u8>> {
        std::fs::read(self.dir.join(name)).ok()
    }

    /// Waits for what is told by that name.
    pub fn hear(&self, name: &str) -> Vec<u8> {
        let end = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(what) = self.heard(name) {
                return what;
            }
            assert!(Instant::now() < end, "nobody tells {name}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Starts a further rank of this job, with settings of its own; its stderr goes to `log`.
    pub fn start_rank(&self, rank: usize, settings: &[(&str, String)], log: &Path) -> Child {
        let simulators = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
        let mut command = again(Path::new(&simulators), &[]);
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        command.env("WORLD_RANK", rank.to_string()).env("WORLD_DIR", &self.dir);
        command.stderr(std::fs::File::create(log).unwrap()).stdout(Stdio::null()).spawn().unwrap()
    }
}

/// A job of processes: `body` in each. `settings(rank)` are its own. Answers how each ended and what it wrote to stderr.
pub fn processes(
    world: usize,
    settings: impl Fn(usize) -> Vec<(&'static str, String)>,
    body: impl FnOnce(Process),
) -> Option<Vec<(ExitStatus, String)>> {
    if let Ok(rank) = std::env::var("WORLD_RANK") {
        let dir = PathBuf::from(std::env::var_os("WORLD_DIR").unwrap());
        body(Process { rank: rank.parse().unwrap(), world, dir });
        return None;
    }
    let (dir, meeting) = (simulators(), tempfile::tempdir().unwrap());
    let mut children: Vec<Guard> = (0..world)
        .map(|rank| {
            let stderr = std::fs::File::create(meeting.path().join(format!("stderr{rank}"))).unwrap();
            let mut command = again(dir.path(), &[]);
            command.envs(settings(rank)).env("WORLD_RANK", rank.to_string()).env("WORLD_DIR", meeting.path());
            Guard(command.stderr(stderr).stdout(Stdio::null()).spawn().unwrap())
        })
        .collect();
    let statuses = wait(&mut children, limit());
    let stderr = |rank: usize| std::fs::read_to_string(meeting.path().join(format!("stderr{rank}"))).unwrap();
    Some(statuses.into_iter().enumerate().map(|(rank, status)| (status, stderr(rank))).collect())
}

/// Wants every process to have succeeded.
pub fn all_succeed(ends: Option<Vec<(ExitStatus, String)>>) {
    for (rank, (status, stderr)) in ends.into_iter().flatten().enumerate() {
        assert!(status.success(), "rank {rank}: {status:?}\n{stderr}");
    }
}

/// A job of threads: `body(rank)` in each, each with its device current.
pub fn threads<T: Send>(world: usize, body: impl Fn(usize) -> T + Sync) -> Vec<T> {
    std::thread::scope(|scope| {
        let body = &body;
        let run = move |rank| {
            use_device(rank);
            body(rank)
        };
        let threads: Vec<_> = (0..world).map(|rank| scope.spawn(move || run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}
