//! Threads of the library's own, which go on while the application does something else.

use std::io;
use std::thread::Builder;

use crate::nccl::load;

/// Starts one. The library stays loaded from then on, whoever closes it.
///
/// # Errors
/// When the system has no thread.
pub(crate) fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<()> {
    load::stay_loaded();
    without_signals(|| Builder::new().name(name.into()).spawn(work)).map(drop)
}

/// Runs `start` such that threads which it starts get no signals: those are for the application's.
fn without_signals<T>(start: impl FnOnce() -> T) -> T {
    // SAFETY: sets of signals, valid places, both filled in before they are read.
    unsafe {
        let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &all, &mut before);
        let result = start();
        libc::pthread_sigmask(libc::SIG_SETMASK, &before, std::ptr::null_mut());
        result
    }
}

/// Whether the process waits for this thread alone: its first thread has ended by `pthread_exit`, and so have the others.
pub(crate) fn is_last_thread() -> bool {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    (fields.first(), fields.get(17)) == (Some(&"Z"), Some(&"2"))
}
