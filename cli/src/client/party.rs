//! A child process's side of a job: its ranks, each a thread, and its link to the command.

use std::io::{BufRead, BufReader, Stdin, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::rank::Rank;

/// What a child is told on its command line.
#[derive(Clone, Serialize, Deserialize)]
pub struct Assignment {
    /// What it does.
    pub role: Role,
    /// Ranks of the job.
    pub world: usize,
    /// The first of this child's.
    pub first: usize,
    /// How many are this child's.
    pub local: usize,
    /// What it calls as NCCL: the shim or the real one.
    pub nccl: PathBuf,
    /// Whether the libraries are the simulators.
    pub simulated: bool,
    /// Seconds that a task may take; then the child ends, in case nobody is left to kill it.
    pub limit_s: u64,
}

/// The jobs there are.
#[derive(Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Role {
    /// Says what the machine has.
    Probe,
    /// Opens the real NCCL as the shim does.
    Nccl,
    /// `flashcomm doctor`.
    Doctor,
    /// `flashcomm demo`.
    Demo,
    /// `flashcomm bench`.
    Bench,
    /// `flashcomm bench --kernels`.
    Kernels,
    /// `flashcomm tune`.
    Tune,
}

/// From a child to the command; lists are in the order of the child's ranks.
#[derive(Serialize, Deserialize)]
pub enum Word {
    /// These go to everyone.
    Meet(Vec<Value>),
    /// The answers to the task.
    Done(Vec<Value>),
    /// The child ends.
    Failed(String),
}

/// From the command to a child.
#[derive(Serialize, Deserialize)]
pub enum Order {
    /// Something to do.
    Task(Value),
    /// What everyone gave, in rank order.
    Met(Vec<Value>),
}

/// The pipes to the command.
struct Link {
    orders: BufReader<Stdin>,
    words: std::fs::File,
}

impl Link {
    /// Takes standard output for itself: what libraries print goes to standard error instead.
    fn take() -> Result<Self> {
        let words = std::io::stdout().as_fd().try_clone_to_owned()?;
        // SAFETY: both are open for as long as the process runs.
        unsafe { libc::dup2(std::io::stderr().as_raw_fd(), std::io::stdout().as_raw_fd()) };
        Ok(Link { orders: BufReader::new(std::io::stdin()), words: words.into() })
    }

    fn say(&mut self, word: &Word) -> Result<()> {
        let line = serde_json::to_string(word)? + "\n";
        self.words.write_all(line.as_bytes()).context("the command is gone")
    }

    /// `None` at the end.
    fn hear(&mut self) -> Result<Option<Order>> {
        let mut line = String::new();
        let n_bytes = self.orders.read_line(&mut line)?;
        if n_bytes == 0 { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
    }
}

/// A child process.
pub struct Party {
    /// What it was told.
    pub told: Assignment,
    link: Mutex<Link>,
    barrier: Barrier,
    /// What each of the ranks here brings to the next meeting.
    brought: Mutex<Vec<Value>>,
    /// What the last meeting or order came to, for all the ranks here.
    common: Mutex<Option<Vec<Value>>>,
    /// Milliseconds since `born` at which the process ends itself; 0: it waits for orders.
    deadline_ms: AtomicU64,
    born: Instant,
}

impl Party {
    /// The party of this process.
    pub fn new(told: Assignment) -> Result<Self> {
        Ok(Party {
            link: Mutex::new(Link::take()?),
            barrier: Barrier::new(told.local),
            brought: Mutex::new(vec![Value::Null; told.local]),
            common: Mutex::new(None),
            deadline_ms: AtomicU64::new(told.limit_s * 1000),
            born: Instant::now(),
            told,
        })
    }

    /// Runs the ranks of this process, each a thread: `start` makes a rank's state, whose answer is the first that
    /// the command gets, `perform` does a task. When one fails the process ends at once, since the others would wait for it.
    pub fn run<S, T, A>(
        &self,
        start: impl Fn(&Rank) -> Result<(S, A)> + Sync,
        perform: impl Fn(&Rank, &mut S, T) -> Result<A> + Sync,
    ) where
        T: DeserializeOwned,
        A: Serialize,
    {
        let one = |index: usize| -> Result<()> {
            let rank = Rank::join(self, index)?;
            let (mut state, answer) = start(&rank)?;
            self.answer(index, &answer)?;
            while let Some(task) = self.next_task(index)? {
                let answer = perform(&rank, &mut state, task)?;
                self.answer(index, &answer)?;
            }
            rank.leave()
        };
        std::thread::scope(|scope| {
            scope.spawn(|| self.watch());
            let ranks: Vec<_> = (0..self.told.local)
                .map(|index| {
                    let one = &one;
                    scope.spawn(move || match catch_unwind(AssertUnwindSafe(|| one(index))) {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => {
                            self.fail(&error.context(format!("rank {}", self.told.first + index)));
                        }
                        Err(_) => self.fail(&anyhow!("rank {} panicked", self.told.first + index)),
                    })
                })
                .collect();
            ranks.into_iter().for_each(|rank| rank.join().expect("panics are caught"));
            // Not the ordinary way: the watch still runs. Exit handlers run (the shim writes its statistics there).
            std::process::exit(0);
        });
    }

    /// Says the one answer of a child without ranks, and stays until nobody waits for others of its job.
    pub fn answer_alone(&self, answer: &impl Serialize) -> Result<()> {
        let mut link = self.link.lock();
        link.say(&Word::Done(vec![serde_json::to_value(answer)?]))?;
        while link.hear()?.is_some() {}
        Ok(())
    }

    /// What every rank of the job brings, in rank order. All ranks call this; it is also a barrier.
    pub fn meet<T: Serialize + DeserializeOwned>(&self, index: usize, value: &T) -> Result<Vec<T>> {
        self.brought.lock()[index] = serde_json::to_value(value)?;
        let all = self.lead(index, || {
            let brought = self.brought.lock().clone();
            if self.told.local == self.told.world {
                return Ok(Some(brought));
            }
            let mut link = self.link.lock();
            link.say(&Word::Meet(brought))?;
            match link.hear()? {
                Some(Order::Met(all)) => Ok(Some(all)),
                _ => Err(anyhow!("the command is gone")),
            }
        })?;
        let all = all.into_iter().flatten();
        all.map(|value| Ok(serde_json::from_value(value)?)).collect()
    }

    fn next_task<T: DeserializeOwned>(&self, index: usize) -> Result<Option<T>> {
        let task = self.lead(index, || {
            self.deadline_ms.store(0, Ordering::Relaxed);
            let order = self.link.lock().hear()?;
            let now_ms = self.born.elapsed().as_millis() as u64;
            self.deadline_ms.store(now_ms + self.told.limit_s * 1000, Ordering::Relaxed);
            match order {
                None => Ok(None),
                Some(Order::Task(task)) => Ok(Some(vec![task])),
                Some(Order::Met(_)) => Err(anyhow!("nobody asked for a meeting")),
            }
        })?;
        let task = task.and_then(|mut task| task.pop());
        task.map(|task| Ok(serde_json::from_value(task)?)).transpose()
    }

    fn answer(&self, index: usize, answer: &impl Serialize) -> Result<()> {
        self.brought.lock()[index] = serde_json::to_value(answer)?;
        self.lead(index, || self.link.lock().say(&Word::Done(self.brought.lock().clone())).map(|()| None))?;
        Ok(())
    }

    /// The first rank here acts when all have come; all get what it got.
    fn lead(&self, index: usize, act: impl FnOnce() -> Result<Option<Vec<Value>>>) -> Result<Option<Vec<Value>>> {
        self.barrier.wait();
        if index == 0 {
            *self.common.lock() = act()?;
        }
        self.barrier.wait();
        Ok(self.common.lock().clone())
    }

    /// Reports and ends the process, without exit handlers: a driver's would wait for kernels that wait for a rank.
    pub fn fail(&self, error: &anyhow::Error) -> ! {
        // The command sees the end even where it does not get the reason.
        let _ = self.link.lock().say(&Word::Failed(format!("{error:#}")));
        // SAFETY: ends the process.
        unsafe { libc::_exit(1) }
    }

    /// Ends the process when a task takes too long.
    fn watch(&self) {
        loop {
            std::thread::sleep(Duration::from_millis(200));
            let deadline_ms = self.deadline_ms.load(Ordering::Relaxed);
            if deadline_ms != 0 && self.born.elapsed().as_millis() as u64 > deadline_ms {
                eprintln!("no end after {} s", self.told.limit_s);
                // SAFETY: ends the process. Not by `fail`: whoever hangs may hold the link.
                unsafe { libc::_exit(124) };
            }
        }
    }
}
