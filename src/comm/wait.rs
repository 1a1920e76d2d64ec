//! What ranks do together runs on a thread of its own, so that the wait for it can be bounded.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::communicator::Comm;
use crate::config::Config;
use crate::error::{Error, Result};

/// How often a rank that waits says so.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// A thread at work for a communicator, and who waits for it.
pub(super) struct Wait<T> {
    /// The communicator.
    pub comm: Arc<Comm>,
    answer: Arc<Answer<T>>,
}

/// What the thread comes to. (A channel of the standard library would do, but ThreadSanitizer does not see into it.)
struct Answer<T> {
    outcome: Mutex<Option<Result<T>>>,
    has_come: Condvar,
}

impl<T: Send + 'static> Wait<T> {
    /// Starts `work`.
    pub(super) fn start(comm: &Arc<Comm>, work: impl FnOnce(&Comm) -> Result<T> + Send + 'static) -> Self {
        let answer = Arc::new(Answer { outcome: Mutex::new(None), has_come: Condvar::new() });
        let (there, to) = (comm.clone(), answer.clone());
        thread::spawn(move || {
            // After a panic its message is out.
            let outcome = catch_unwind(AssertUnwindSafe(|| work(&there)));
            // Before anybody goes on: whoever destroys the communicator next is to be the last that holds it, so that
            // what it has is free for the communicator after it.
            drop(there);
            // Nobody waits any more after a timeout; then the last one drops the result.
            *to.outcome.lock() = Some(outcome.unwrap_or(Err(Error::Aborted)));
            to.has_come.notify_one();
        });
        Wait { comm: comm.clone(), answer }
    }

    /// What it came to, at `deadline` at the latest; `None` where it has not. Says now and then for whom it waits.
    pub(super) fn until(&self, deadline: Instant) -> Option<Result<T>> {
        let begin = Instant::now();
        let mut outcome = self.answer.outcome.lock();
        while outcome.is_none() && Instant::now() < deadline {
            let next = deadline.min(Instant::now() + TELL_EVERY);
            if self.answer.has_come.wait_until(&mut outcome, next).timed_out() && next < deadline {
                let whom = match self.comm.missing()[..] {
                    [] => "the other ranks".to_string(), // they are not known before they have met
                    ref missing => format!("ranks {missing:?}"),
                };
                log::warn!(
                    "waiting for {} s for {whom} of a communicator to meet. A rank that runs without the shim or with \
                     FLASHCOMM_ENABLE=0 never comes; after FLASHCOMM_ATTACH_TIMEOUT_S={} this rank gives up",
                    begin.elapsed().as_secs(),
                    Config::global().attach_timeout.as_secs()
                );
            }
        }
        outcome.take()
    }
}
