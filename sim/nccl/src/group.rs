//! Groups: calls are queued on their thread and go out together at the outermost end, one launch per communicator.

use std::cell::RefCell;
use std::sync::Arc;

use flashcomm_sim_schedule as schedule;

use crate::comm::Comm;
use crate::driver::driver;
use crate::engine;
use crate::types::{Code, Op, Result};

/// Work that makes a communicator.
type Making = Box<dyn FnOnce() -> Result<()> + Send>;

/// Calls, each with its communicator and its stream.
type Calls = Vec<(Arc<Comm>, usize, Op)>;

#[derive(Default)]
struct Group {
    depth: u32,
    error: Option<Code>,
    calls: Calls,
    makings: Vec<(Arc<Comm>, Making)>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

/// ncclGroupStart.
pub fn start() {
    GROUP.with_borrow_mut(|group| group.depth += 1);
}

/// ncclGroupEnd.
pub fn end() -> Result<()> {
    match leave()? {
        Some(group) => run(group),
        None => Ok(()),
    }
}

/// ncclGroupSimulateEnd: what was queued is dropped.
pub fn simulate_end() -> Result<()> {
    leave().map(drop)
}

/// The group's contents, at the outermost end.
fn leave() -> Result<Option<Group>> {
    GROUP.with_borrow_mut(|group| {
        group.depth = group.depth.checked_sub(1).ok_or(Code::INVALID_USAGE)?;
        Ok((group.depth == 0).then(|| std::mem::take(group)))
    })
}

/// Queues a call, or runs it where there is no group. An error of it is one of the group.
pub fn call(prepare: impl FnOnce() -> Result<Option<(Arc<Comm>, usize, Op)>>) -> Result<()> {
    within(|| {
        if schedule::fails("nccl") {
            return Err(Code::SYSTEM_ERROR);
        }
        schedule::step();
        let call = prepare()?;
        GROUP.with_borrow_mut(|group| group.calls.extend(call));
        Ok(())
    })
}

/// Queues the making of a communicator, or makes it where there is no group.
pub fn make(comm: Arc<Comm>, making: Making) -> Result<()> {
    within(|| {
        GROUP.with_borrow_mut(|group| group.makings.push((comm, making)));
        Ok(())
    })
}

fn within(body: impl FnOnce() -> Result<()>) -> Result<()> {
    start();
    let result = body();
    if let Err(code) = result {
        GROUP.with_borrow_mut(|group| group.error = group.error.or(Some(code)));
    }
    let ended = end();
    result.and(ended)
}

fn run(group: Group) -> Result<()> {
    if let Some(code) = group.error {
        return Err(code);
    }
    let mut outcome = run_makings(group.makings);
    let mut background = Vec::new();
    let mut rest = group.calls;
    while let Some((comm, ..)) = rest.first() {
        let comm = comm.clone();
        let (mine, others) = rest.into_iter().partition(|(other, ..)| Arc::ptr_eq(other, &comm));
        rest = others;
        match comm.is_blocking {
            true => outcome = worse(outcome, issue(&comm, mine)),
            false => background.push((comm, mine)),
        }
    }
    if background.is_empty() { outcome } else { worse(outcome, launch_in_background(background)) }
}

/// An error is worse than what is in progress, and that than success.
fn worse(a: Result<()>, b: Result<()>) -> Result<()> {
    match (a, b) {
        (Ok(()), other) => other,
        (Err(Code::IN_PROGRESS), Err(code)) => Err(code),
        (error, _) => error,
    }
}

fn run_makings(makings: Vec<(Arc<Comm>, Making)>) -> Result<()> {
    let mut outcome = Ok(());
    let mut threads = Vec::new();
    for (comm, making) in makings {
        let is_blocking = comm.is_blocking;
        let work = move || {
            let result = making();
            comm.settle(result);
            result
        };
        let thread = std::thread::spawn(work);
        if is_blocking {
            threads.push(thread);
        } else {
            outcome = Err(Code::IN_PROGRESS);
        }
    }
    for thread in threads {
        outcome = worse(outcome, thread.join().unwrap_or(Err(Code::INTERNAL_ERROR)));
    }
    outcome
}

/// Issues the calls of communicators that do not block: one communicator after the other, as NCCL's
/// one thread of a group does.
fn launch_in_background(launches: Vec<(Arc<Comm>, Calls)>) -> Result<()> {
    launches.iter().for_each(|(comm, _)| comm.begin());
    std::thread::spawn(move || {
        schedule::point();
        for (comm, calls) in launches {
            comm.settle(issue(&comm, calls));
        }
    });
    Err(Code::IN_PROGRESS)
}

/// Issues the calls of one communicator.
fn issue(comm: &Arc<Comm>, calls: Calls) -> Result<()> {
    let driver = driver()?;
    let _entered = driver.enter(comm.device)?;
    let mut streams: Vec<usize> = Vec::new();
    for (_, stream, _) in &calls {
        if !streams.contains(stream) {
            streams.push(*stream);
        }
    }
    let (stream, others) = streams.split_first().ok_or(Code::INTERNAL_ERROR)?;
    let capture = driver.capture(*stream)?;
    let ops: Vec<Op> = calls.into_iter().map(|(.., op)| op).collect();

    let mut order = comm.order.lock();
    let last = order.last.ok_or(Code::INTERNAL_ERROR)?;
    for other in others {
        bridge(*other, *stream)?;
    }
    match (capture, order.captured) {
        (None, _) => driver.wait(*stream, last, false)?,
        (Some(id), Some((captured, event))) if id == captured => driver.wait(*stream, event, false)?,
        (Some(_), _) => driver.wait(*stream, last, true)?,
    }
    let task = {
        let comm = comm.clone();
        Box::new(move || engine::run(&comm, &ops))
    };
    driver.issue(*stream, task)?;
    driver.record(last, *stream, capture.is_some())?;
    if let Some(id) = capture {
        let event = match order.captured {
            Some((_, event)) => event,
            None => driver.event()?,
        };
        order.captured = Some((id, event));
        driver.record(event, *stream, false)?;
    }
    for other in others {
        bridge(*stream, *other)?;
    }
    Ok(())
}

/// Makes one stream wait for what another has now.
fn bridge(from: usize, to: usize) -> Result<()> {
    let driver = driver()?;
    let event = driver.event()?;
    let done = driver.record(event, from, false).and_then(|()| driver.wait(to, event, false));
    driver.destroy_event(event);
    done
}
