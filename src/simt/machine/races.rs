//! A happens-before race detector for shared memory, in the manner of FastTrack (Flanagan and Freund, PLDI 2009): two
//! accesses to the same element, one of them a write, race unless one happened before the other. They are ordered by a
//! barrier of block or cluster, by a synchronisation of the warp's lanes (a shuffle orders no memory), and by an arrival
//! at an mbarrier and the wait for it.
//!
//! An access is remembered as an epoch: its thread and the time. Each thread has a vector clock: for every other thread,
//! the time before which that one's accesses happened before now. A barrier raises all components of a block or cluster
//! to the same time, so the clock is kept in parts: one time each for block, cluster and warp, and a vector that only
//! mbarriers need. An mbarrier has a release clock: an arrival joins the thread's clock into it, a wait joins it into the
//! thread's.

use super::bulk::join;
use super::*;

/// The logical time, which advances at every synchronisation.
type Time = u32;

/// An access: its thread and its time.
type Epoch = (usize, Time);

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Access {
    Read,
    Write,
    /// An atomic addition, which does not race with another.
    Add,
}

/// The last accesses to an element: one thread's write, and the reads and additions since.
#[derive(Clone, Debug, Default)]
pub(super) struct Element {
    written: Option<Epoch>,
    read: Vec<Epoch>,
    added: Vec<Epoch>,
}

/// A thread's vector clock, in parts. Accesses before these times happened before now.
#[derive(Clone, Debug, Default)]
struct Clock {
    /// The component of every thread of the block, of the cluster, of the warp.
    block: Time,
    cluster: Time,
    warp: Time,
    /// The components of the block's threads by their index in it, which mbarriers have raised.
    threads: Vec<Time>,
}

pub(super) struct Races {
    now: Time,
    /// The threads of a block and of a cluster.
    block: usize,
    cluster: usize,
    clocks: Vec<Clock>,
    /// The release clocks of the mbarriers, by their ids.
    release_clocks: Vec<Vec<Time>>,
}

impl Races {
    pub(super) fn new(shape: LaunchShape, threads: usize) -> Self {
        let block = shape.block as usize;
        Self {
            now: 1,
            block,
            cluster: block * shape.cluster as usize,
            clocks: vec![Clock::default(); threads],
            release_clocks: Vec::new(),
        }
    }

    /// True if an access happened before what `thread` does now.
    fn happened_before(&self, thread: usize, (other, time): Epoch) -> bool {
        let clock = &self.clocks[thread];
        let same = |size| thread / size == other / size;
        thread == other
            || (same(WARP) && time < clock.warp)
            || (same(self.block)
                && (time < clock.block
                    || clock.threads.get(other % self.block).is_some_and(|&before| time < before)))
            || (same(self.cluster) && time < clock.cluster)
    }

    /// Records an access, or returns the thread that it races with and how that one has accessed the element.
    pub(super) fn access(
        &self,
        thread: usize,
        access: Access,
        element: &mut Element,
    ) -> Result<(), (usize, &'static str)> {
        let concurrent = |&&epoch: &&Epoch| !self.happened_before(thread, epoch);
        let (read, write) = (access == Access::Read, access == Access::Write);
        for (past, accesses, conflicts) in [
            ("written", element.written.as_slice(), true),
            ("added to", &element.added, read || write),
            ("read", &element.read, !read),
        ] {
            if conflicts && let Some(&(other, _)) = accesses.iter().find(concurrent) {
                return Err((other, past));
            }
        }
        let epoch = (thread, self.now);
        let accesses = match access {
            Access::Write => {
                *element = Element { written: Some(epoch), ..Element::default() };
                return Ok(());
            }
            Access::Read => &mut element.read,
            Access::Add => &mut element.added,
        };
        if accesses.last().is_some_and(|last| last.0 == thread) {
            accesses.pop();
        } else if accesses.len() == accesses.capacity() {
            // A barrier raises the same components for all threads of the block: an access that happened before this
            // thread's last barrier needs no epoch any more.
            let Clock { block, cluster, .. } = self.clocks[thread];
            accesses.retain(|past| {
                let same_block = past.0 / self.block == thread / self.block;
                past.1 >= if same_block { block } else { cluster }
            });
        }
        accesses.push(epoch);
        Ok(())
    }

    /// Joins the clocks of the threads at a barrier of block or cluster.
    pub(super) fn join_all(&mut self, threads: Range<usize>) {
        self.now += 1;
        let is_cluster = threads.len() == self.cluster;
        for clock in &mut self.clocks[threads] {
            clock.block = self.now;
            if is_cluster {
                clock.cluster = self.now;
            }
        }
    }

    /// Joins the clocks of a warp's lanes, which synchronise.
    pub(super) fn join_warp(&mut self, lanes: Range<usize>) {
        self.now += 1;
        let mut all = Vec::new();
        self.clocks[lanes.clone()].iter().for_each(|clock| join(&mut all, &clock.threads));
        for clock in &mut self.clocks[lanes] {
            clock.warp = self.now;
            clock.threads.clone_from(&all);
        }
    }

    /// Joins a thread's clock into an mbarrier's release clock.
    pub(super) fn arrive(&mut self, thread: usize, barrier: u32) {
        self.now += 1;
        let barriers = self.release_clocks.len().max(barrier as usize + 1);
        self.release_clocks.resize(barriers, Vec::new());
        let release = &mut self.release_clocks[barrier as usize];
        let clock = &self.clocks[thread];
        join(release, &clock.threads);
        release.resize(self.block, 0);
        let index = thread % self.block;
        let warp = index / WARP * WARP;
        for time in &mut release[warp..warp + WARP] {
            *time = clock.warp.max(*time);
        }
        release[index] = self.now;
    }

    /// Joins an mbarrier's release clock into the clock of a thread that has waited for it.
    pub(super) fn wait(&mut self, thread: usize, barrier: u32) {
        if let Some(release) = self.release_clocks.get(barrier as usize) {
            join(&mut self.clocks[thread].threads, release);
        }
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_touch(at: *const c_void, access: u32, name: *const c_char, index: u32) {
    let (access, what) = match access {
        0 => (Access::Read, "read"),
        1 => (Access::Write, "write"),
        _ => (Access::Add, "addition"),
    };
    // SAFETY: see `machine`.
    let machine = unsafe { machine() };
    let element = machine.elements.entry(at as usize).or_default();
    if let Err((other, past)) = machine.races.access(machine.thread, access, element) {
        // SAFETY: a string literal.
        let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
        let (block, other) = (machine.block_of(other), other as u32 % machine.shape.block);
        fault(format!(
            "{what} of {name}[{index}] races: thread {other} of block {block} has {past} it"
        ));
    }
}
