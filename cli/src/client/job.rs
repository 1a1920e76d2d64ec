//! The command's side of a job: its child processes.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use parking_lot::Mutex;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::machine::Machine;
use super::party::{Assignment, Order, Role, Word};

/// What a job is.
#[derive(Clone)]
pub struct Start {
    /// What its children do.
    pub role: Role,
    /// Its ranks.
    pub world: usize,
    /// Whether each rank is a process; otherwise all are threads of one.
    pub processes: bool,
    /// Whether they call the shim; otherwise the real NCCL.
    pub shim: bool,
    /// Environment of the children.
    pub settings: Vec<(String, String)>,
    /// How long a task may take.
    pub limit: Duration,
}

impl Default for Start {
    fn default() -> Self {
        let limit = Duration::from_secs(60);
        Start { role: Role::Probe, world: 1, processes: false, shim: false, settings: vec![], limit }
    }
}

/// A job under way. It ends with this.
pub struct Job {
    children: Vec<Running>,
    inbox: Receiver<(usize, Option<Word>)>,
    stderr: Arc<Mutex<Vec<String>>>,
    listeners: Vec<JoinHandle<()>>,
}

struct Running {
    child: Child,
    orders: Option<ChildStdin>,
}

impl Job {
    /// Starts the children; they are not waited for.
    pub fn start(machine: &Machine, start: &Start) -> Result<Self> {
        let (sender, inbox) = channel();
        let stderr = Arc::default();
        let mut job = Job { children: vec![], inbox, stderr, listeners: vec![] };
        let local = if start.processes { 1 } else { start.world };
        for first in (0..start.world).step_by(local) {
            let told = Assignment {
                role: start.role,
                world: start.world,
                first,
                local,
                nccl: if start.shim { machine.shim.clone() } else { machine.nccl.clone() },
                simulated: machine.is_simulated(),
                limit_s: start.limit.as_secs() + 5, // the command is there first, if it is there
            };
            let mut command = machine.again()?;
            command.arg("rank").arg(serde_json::to_string(&told)?);
            command.envs(machine.sharing(start.world, first)).envs(start.settings.iter().cloned());
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
            let mut child = command.spawn().context("cannot start a child process")?;
            let number = job.children.len();
            job.listeners.extend(listen(&mut child, number, sender.clone(), Arc::clone(&job.stderr)));
            let orders = child.stdin.take();
            job.children.push(Running { child, orders });
        }
        Ok(job)
    }

    /// Gives everyone a task and waits for the answers of all ranks, in rank order.
    pub fn ask<A: DeserializeOwned>(&mut self, task: &impl Serialize, limit: Duration) -> Result<Vec<A>> {
        self.order(&Order::Task(serde_json::to_value(task)?))?;
        self.answers(limit)
    }

    /// The next answers of all ranks, in rank order.
    pub fn answers<A: DeserializeOwned>(&mut self, limit: Duration) -> Result<Vec<A>> {
        let end = Instant::now() + limit;
        let mut done: Vec<Option<Vec<Value>>> = self.children.iter().map(|_| None).collect();
        let mut brought = done.clone();
        while done.iter().any(Option::is_none) {
            match self.inbox.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok((child, Some(Word::Done(answers)))) => done[child] = Some(answers),
                Ok((child, Some(Word::Meet(values)))) => {
                    brought[child] = Some(values);
                    if brought.iter().all(Option::is_some) {
                        self.order(&Order::Met(brought.iter_mut().filter_map(Option::take).flatten().collect()))?;
                    }
                }
                Ok((_, Some(Word::Failed(why)))) => return self.give_up(&why),
                Ok((child, None)) => {
                    let status = self.children[child].child.wait()?;
                    return self.give_up(&format!("a child process ended: {status}"));
                }
                Err(RecvTimeoutError::Timeout) => {
                    return self.give_up(&format!("no answer within {} s; stopped", limit.as_secs()));
                }
                Err(RecvTimeoutError::Disconnected) => return self.give_up("all child processes are gone"),
            }
        }
        let answers = done.into_iter().flatten().flatten();
        answers.map(|answer| Ok(serde_json::from_value(answer)?)).collect()
    }

    /// Lets the children end by themselves, and tells what they wrote to standard error, each line once.
    pub fn end(mut self, limit: Duration) -> Result<Vec<String>> {
        let end = Instant::now() + limit;
        self.children.iter_mut().for_each(|running| drop(running.orders.take()));
        for running in &mut self.children {
            while running.child.try_wait()?.is_none() {
                ensure!(Instant::now() < end, "a child process did its work but does not end; stopped");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        Ok(self.stderr())
    }

    /// What the children wrote to standard error, each line once. They have ended.
    fn stderr(&mut self) -> Vec<String> {
        for listener in self.listeners.drain(..) {
            listener.join().expect("reads lines");
        }
        let mut seen = BTreeSet::new();
        let lines = self.stderr.lock();
        lines.iter().filter(|line| seen.insert(line.as_str())).cloned().collect()
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        let line = serde_json::to_string(order)? + "\n";
        for running in &mut self.children {
            // One that is gone is noticed by its silence, with its reason.
            let _ = running.orders.as_mut().context("open until the end")?.write_all(line.as_bytes());
        }
        Ok(())
    }

    /// Ends the job; its last words are part of the reason.
    fn give_up<T>(&mut self, why: &str) -> Result<T> {
        self.kill();
        let stderr = self.stderr();
        let last = &stderr[stderr.len().saturating_sub(12)..];
        match last {
            [] => bail!("{why}"),
            _ => bail!("{why}\n  {}", last.join("\n  ")),
        }
    }

    fn kill(&mut self) {
        for running in &mut self.children {
            // Both fail only where the child is gone.
            let _ = running.child.kill();
            let _ = running.child.wait();
        }
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Threads that read what the child says; they end with it.
fn listen(
    child: &mut Child,
    number: usize,
    sender: Sender<(usize, Option<Word>)>,
    to: Arc<Mutex<Vec<String>>>,
) -> [JoinHandle<()>; 2] {
    let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let words = std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            let word = serde_json::from_str(&line).unwrap_or_else(|_| Word::Failed(format!("it says {line:?}")));
            if sender.send((number, Some(word))).is_err() {
                return;
            }
        }
        let _ = sender.send((number, None)); // unless nobody listens any more
    });
    let noise = std::thread::spawn(move || {
        for line in BufReader::new(stderr).lines().map_while(Result::ok) {
            to.lock().push(line);
        }
    });
    [words, noise]
}
