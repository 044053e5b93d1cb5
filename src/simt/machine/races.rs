//! Races in shared memory: two accesses to the same element, one of them a write, in no order but this schedule's. In
//! order is what a barrier of block or cluster lies between, what lanes of a warp do before and after they synchronise
//! (a shuffle orders no memory), and what is done before an arrival at an mbarrier with what is done after the wait for
//! it.

use super::bulk::learn;
use super::*;

/// A moment grows whenever threads meet.
type Moment = u32;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Access {
    Read,
    Write,
    /// Atomically: in no order with its like, and no race.
    Add,
}

/// Who accessed an element last: one thread that wrote, and those that read or added since.
#[derive(Clone, Debug, Default)]
pub(super) struct Element {
    written: Option<(usize, Moment)>,
    read: Vec<(usize, Moment)>,
    added: Vec<(usize, Moment)>,
}

/// What a thread knows to be over.
#[derive(Clone, Debug, Default)]
struct Known {
    /// What all threads of its block, its cluster, its warp did before these moments.
    block: Moment,
    cluster: Moment,
    warp: Moment,
    /// What others of the block did, by their places in it: from mbarriers.
    others: Vec<Moment>,
}

pub(super) struct Races {
    now: Moment,
    /// Of a block and of a cluster.
    threads: usize,
    cluster: usize,
    known: Vec<Known>,
    /// By the mbarrier's source: what those who arrived knew.
    released: Vec<Vec<Moment>>,
}

impl Races {
    pub(super) fn new(shape: LaunchShape, threads: usize) -> Self {
        let block = shape.block as usize;
        Self {
            now: 1,
            threads: block,
            cluster: block * shape.cluster as usize,
            known: vec![Known::default(); threads],
            released: Vec::new(),
        }
    }

    /// Whether what `other` did at a moment is over when `thread` accesses.
    fn is_over(&self, thread: usize, (other, moment): (usize, Moment)) -> bool {
        let known = &self.known[thread];
        let same = |size| thread / size == other / size;
        thread == other
            || (same(WARP) && moment < known.warp)
            || (same(self.threads)
                && (moment < known.block
                    || known.others.get(other % self.threads).is_some_and(|&over| moment < over)))
            || (same(self.cluster) && moment < known.cluster)
    }

    /// Which thread it races with.
    pub(super) fn access(
        &self,
        thread: usize,
        access: Access,
        element: &mut Element,
    ) -> Result<(), (usize, &'static str)> {
        let over = |&&at: &&(usize, Moment)| !self.is_over(thread, at);
        let (read, write) = (access == Access::Read, access == Access::Write);
        for (past, accesses, matters) in [
            ("written", element.written.as_slice(), true),
            ("added to", &element.added, read || write),
            ("read", &element.read, !read),
        ] {
            if matters && let Some(&(other, _)) = accesses.iter().find(over) {
                return Err((other, past));
            }
        }
        let at = (thread, self.now);
        let accesses = match access {
            Access::Write => {
                *element = Element { written: Some(at), ..Element::default() };
                return Ok(());
            }
            Access::Read => &mut element.read,
            Access::Add => &mut element.added,
        };
        if accesses.last().is_some_and(|last| last.0 == thread) {
            accesses.pop();
        } else if accesses.len() == accesses.capacity() {
            // What the thread knows from a barrier, all others of its block know.
            let Known { block, cluster, .. } = self.known[thread];
            accesses.retain(|past| {
                let here = past.0 / self.threads == thread / self.threads;
                past.1 >= if here { block } else { cluster }
            });
        }
        accesses.push(at);
        Ok(())
    }

    /// At a barrier of block or cluster.
    pub(super) fn meet(&mut self, met: Range<usize>) {
        self.now += 1;
        let all_blocks = met.len() == self.cluster;
        for known in &mut self.known[met] {
            known.block = self.now;
            if all_blocks {
                known.cluster = self.now;
            }
        }
    }

    /// The lanes of a warp synchronise.
    pub(super) fn meet_in_warp(&mut self, lanes: Range<usize>) {
        self.now += 1;
        let mut all = Vec::new();
        self.known[lanes.clone()].iter().for_each(|known| learn(&mut all, &known.others));
        for known in &mut self.known[lanes] {
            known.warp = self.now;
            known.others.clone_from(&all);
        }
    }

    /// At an mbarrier.
    pub(super) fn arrive(&mut self, thread: usize, source: u32) {
        self.now += 1;
        let sources = self.released.len().max(source as usize + 1);
        self.released.resize(sources, Vec::new());
        let released = &mut self.released[source as usize];
        let known = &self.known[thread];
        learn(released, &known.others);
        released.resize(self.threads, 0);
        let place = thread % self.threads;
        let warp = place / WARP * WARP;
        for over in &mut released[warp..warp + WARP] {
            *over = known.warp.max(*over);
        }
        released[place] = self.now;
    }

    pub(super) fn wait(&mut self, thread: usize, source: u32) {
        if let Some(released) = self.released.get(source as usize) {
            learn(&mut self.known[thread].others, released);
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
