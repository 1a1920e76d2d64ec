//! One communicator: its verdict, and what it holds to compress.
//!
//! Its verdict is settled once, by [`super::attach`]; what it then holds is freed with it, as soon as the last operation that
//! uses it has run.
//!
//! An engine may change the widths later, at points that all ranks agree on. Each pair of widths has a *setup* of its own,
//! as if it were another communicator's: kernels, receive areas, counters. The setups of earlier widths stay as long as the
//! communicator, since graphs that were captured with them may be replayed whenever the application likes.

use std::collections::HashMap;
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use flashcomm_wire::Legs;
use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use super::order::Order;
use super::share::Share;
use super::watch::Watched;
use crate::cuda::{Context, RelaxedCapture};
use crate::error::{Error, Result};
use crate::exchange::Exchange;
use crate::kernels::Kernels;
use crate::nccl::{CommPtr, NcclResult};
use crate::negotiation::disagreement::MAX_SETUPS;
use crate::negotiation::key::{Birth, Key};
use crate::negotiation::over_nccl::Life;
use crate::negotiation::page::Page;
use crate::negotiation::tuning::figures::Figures;
use crate::record::Recording;
use crate::verdict::{Verdict, Ways};

/// One communicator of this process, one rank of it.
pub(crate) struct Comm {
    handle: CommHandle,
    /// Of the handle.
    pub life: Life,
    /// [`OPEN`], [`OFF`], or the number of the setup in use.
    state: AtomicUsize,
    /// An engine has switched it off, on all ranks.
    switched_off: AtomicBool,
    /// Its ranks are meeting while the application goes on.
    is_meeting: AtomicBool,
    /// Whether captured calls keep their order with others.
    mixes_graphs: AtomicBool,
    /// By which its ranks find each other, where they can.
    key: OnceCell<Key>,
    /// How often communicators were made of it.
    births: Mutex<HashMap<Birth, u32>>,
    /// Where its ranks meet; `None`: over the real NCCL.
    page: OnceCell<Option<Arc<Page>>>,
    /// Why its ranks could not meet.
    failed: OnceCell<(NcclResult, String)>,
    setups: [OnceCell<Box<Attached>>; MAX_SETUPS],
    /// Its inputs that are to be saved.
    pub recording: Recording,
}

/// The ranks have not met yet.
const OPEN: usize = usize::MAX;
/// All ranks forward, for good.
const OFF: usize = usize::MAX - 1;

/// Whether a communicator of this process has ever failed to attach: nearly always not, and then no call has to ask for its
/// own.
static HAS_ANY_FAILED: AtomicBool = AtomicBool::new(false);

/// As [`HAS_ANY_FAILED`] says.
#[inline]
pub(crate) fn has_any_failed() -> bool {
    HAS_ANY_FAILED.load(Ordering::Relaxed)
}

/// What an attached communicator holds for a pair of widths.
pub(crate) struct Attached {
    /// This rank.
    pub rank: usize,
    /// Ranks of the communicator.
    pub world: usize,
    /// The agreed codecs.
    pub legs: Legs,
    /// How sums go.
    pub ways: Ways,
    /// By what was measured, where it was.
    pub figures: Option<Figures>,
    /// The context of the communicator's device.
    pub context: Context,
    /// Kernels of the agreed codecs, in that context.
    pub kernels: Kernels,
    /// Looks at the exchange.
    pub(super) watched: Option<Watched>,
    /// What carries the payloads.
    pub exchange: ManuallyDrop<Exchange>,
    /// Shared by the communicator's setups.
    pub order: Arc<Order>,
    /// With a fused exchange: of the communicator's setups, which never run at once.
    pub share: Option<Arc<Share>>,
}

/// The application's `ncclComm_t`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct CommHandle(pub CommPtr);

// SAFETY: NCCL's handles may be passed between threads; that they are used by one at a time is the application's duty.
unsafe impl Send for CommHandle {}
// SAFETY: as above.
unsafe impl Sync for CommHandle {}

impl Comm {
    /// Of a live handle; its ranks have not met yet.
    pub(crate) fn new(handle: CommPtr) -> Self {
        Comm {
            handle: CommHandle(handle),
            life: Life::default(),
            state: AtomicUsize::new(OPEN),
            switched_off: AtomicBool::new(false),
            is_meeting: AtomicBool::new(false),
            mixes_graphs: AtomicBool::new(true),
            key: OnceCell::new(),
            births: Default::default(),
            page: OnceCell::new(),
            failed: OnceCell::new(),
            setups: Default::default(),
            recording: Recording::default(),
        }
    }

    /// The real handle.
    pub(crate) fn handle(&self) -> CommPtr {
        self.handle.0
    }

    /// What the ranks agreed on.
    pub(crate) fn verdict(&self) -> Verdict<'_> {
        match self.state.load(Ordering::Acquire) {
            OPEN => Verdict::Open,
            OFF => Verdict::Off,
            _ if self.switched_off.load(Ordering::Relaxed) => Verdict::SwitchedOff,
            setup => self.setups[setup].get().map_or(Verdict::Off, |on| Verdict::On(&on.ways)),
        }
    }

    /// The setup in use, when the verdict is on (or was, before it was switched off).
    pub(crate) fn attached(&self) -> Option<&Attached> {
        self.setups.get(self.state.load(Ordering::Acquire))?.get().map(|attached| &**attached)
    }

    /// The setup of a pair of widths, if it has ever been in use.
    pub(crate) fn attached_with(&self, legs: Legs) -> Option<&Attached> {
        self.setups().find(|attached| attached.legs == legs)
    }

    /// Every setup, the oldest first.
    pub(crate) fn setups(&self) -> impl Iterator<Item = &Attached> {
        self.setups.iter().map_while(|setup| setup.get().map(|attached| &**attached))
    }

    /// Whether the application has aborted or destroyed the communicator. Its handle must not be used any more.
    pub(crate) fn is_aborted(&self) -> bool {
        self.life.has_ended()
    }

    /// The application destroys the communicator.
    pub(crate) fn retire(&self) {
        self.life.end();
        if self.is_meeting() {
            self.life.wait_for_calls();
        }
    }

    /// Frees the kernels that wait for other ranks (invariant I5).
    pub(crate) fn abort(&self) {
        self.life.end();
        self.leave_page();
        for attached in self.setups() {
            if let Exchange::Fused(fused) = &*attached.exchange {
                fused.abort();
            }
        }
    }

    /// Its device, where it was ever attached.
    pub(crate) fn device(&self) -> Option<i32> {
        self.setups().next().map(|attached| attached.context.device())
    }

    /// What went wrong in attach or on the GPU, if anything.
    pub(crate) fn failure(&self) -> Option<Error> {
        self.failed_attach().or_else(|| self.setups().find_map(Attached::failure))
    }

    /// Why its ranks could not meet, where they could not.
    pub(crate) fn failed_attach(&self) -> Option<Error> {
        self.failed.get().map(|(result, why)| Error::Failed { result: *result, why: why.clone() })
    }

    /// Its ranks could not meet, midway: it refuses every call from now on. A thread of ours that nobody waits for any more
    /// stops and frees what it holds.
    pub(crate) fn fail(&self, error: &Error) {
        let _ = self.failed.set((NcclResult::from(error), error.to_string()));
        self.life.end();
        self.leave_page();
        self.settle_off();
        HAS_ANY_FAILED.store(true, Ordering::Release);
    }

    /// Whether captured calls keep their order with others, those of other graphs and those that are not captured.
    pub(crate) fn mixes_graphs(&self) -> bool {
        self.mixes_graphs.load(Ordering::Relaxed)
    }

    /// Says whether they do, before the ranks meet.
    pub(crate) fn set_mixes_graphs(&self, mixes_graphs: bool) {
        self.mixes_graphs.store(mixes_graphs, Ordering::Relaxed);
    }

    /// Says by what its ranks find each other, before they meet.
    pub(crate) fn set_key(&self, key: Option<Key>) {
        if let Some(key) = key {
            let _ = self.key.set(key); // who takes part in making a communicator twice is told by the real NCCL
        }
    }

    /// That of a communicator which all its ranks are about to make of this one.
    pub(crate) fn child_key(&self, birth: Birth, color: i32) -> Option<Key> {
        let mut births = self.births.lock();
        let n = births.entry(birth.clone()).or_default();
        let key = self.key.get().map(|key| key.child(&birth, *n, color));
        *n += 1;
        key
    }

    /// The page at which its ranks meet; waits for them where this is the first time. `None`: there is none.
    ///
    /// # Errors
    /// [`Error::Aborted`].
    pub(crate) fn page(&self, rank: usize, world: usize) -> Result<Option<&Arc<Page>>> {
        let check = || if self.is_aborted() { Err(Error::Aborted) } else { Ok(()) };
        let come = || match self.key.get() {
            Some(key) => Ok(Page::come(*key, rank, world, check)?.map(Arc::new)),
            None => Ok(None),
        };
        self.page.get_or_try_init(come).map(Option::as_ref)
    }

    /// The ranks for which this one waits in a meeting, as far as it can tell.
    pub(crate) fn missing(&self) -> Vec<usize> {
        self.page.get().and_then(Option::as_ref).map_or(Vec::new(), |page| page.missing().collect())
    }

    /// Its ranks need not wait for this one any more.
    fn leave_page(&self) {
        if let Some(Some(page)) = self.page.get() {
            page.leave();
        }
    }

    /// Whether its ranks are meeting while the application goes on.
    pub(crate) fn is_meeting(&self) -> bool {
        self.is_meeting.load(Ordering::Acquire)
    }

    /// Says whether they are.
    pub(crate) fn set_meeting(&self, is_meeting: bool) {
        self.is_meeting.store(is_meeting, Ordering::Release);
    }

    /// Whether all of its operations have run.
    pub(crate) fn is_idle(&self) -> bool {
        self.setups().next().is_none_or(|first| first.order.is_idle())
    }

    /// All ranks forward from now on. Does nothing once the verdict is settled: a settlement that comes late is that of a
    /// thread that nobody waited for.
    pub(crate) fn settle_off(&self) {
        let _ = self.state.compare_exchange(OPEN, OFF, Ordering::AcqRel, Ordering::Acquire);
    }

    /// Takes a setup into use, at a point that all ranks agree on.
    pub(crate) fn settle(&self, attached: Box<Attached>, switched_off: bool) {
        if self.state.load(Ordering::Acquire) == OFF {
            return; // too late, as above
        }
        let legs = attached.legs;
        let mut place = Some(attached);
        for setup in &self.setups {
            if let Some(attached) = place.take()
                && let Err(attached) = setup.set(attached)
            {
                place = Some(attached);
            }
        }
        self.use_setup(legs, switched_off);
    }

    /// As [`Comm::settle`], for widths that have been in use before.
    pub(crate) fn use_setup(&self, legs: Legs, switched_off: bool) {
        if let Some(setup) = self.setups().position(|attached| attached.legs == legs) {
            self.switched_off.store(switched_off, Ordering::Relaxed);
            self.state.store(setup, Ordering::Release);
        }
    }
}

impl Attached {
    /// The error of a kernel that gave up waiting for another rank.
    pub(crate) fn failure(&self) -> Option<Error> {
        match &*self.exchange {
            Exchange::Fused(fused) => fused.failure(),
            Exchange::Nccl(_) => None,
        }
    }
}

impl Drop for Attached {
    /// Whoever lets go of it last may have another context or none: a thread that attached, or one that aborts.
    fn drop(&mut self) {
        let _relaxed = RelaxedCapture::enter();
        let _entered = self.context.enter();
        if let (Exchange::Fused(fused), Some(share)) = (&*self.exchange, &self.share)
            && fused.is_lost()
        {
            share.lose();
        }
        drop(self.watched.take());
        // SAFETY: not used any more; dropped here only.
        unsafe { ManuallyDrop::drop(&mut self.exchange) };
    }
}
