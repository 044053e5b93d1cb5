//! Staged memory, the mbarriers at which bulk copies are waited for, and the copies, which take turns with the threads: a
//! kernel may count on no more than it waited for. The asynchronous copies of a thread come when it waits for them.
//!
//! Each thread has a vector clock with a component per mbarrier: the phases that are known to have completed. A wait joins
//! the barrier's release clock into it, an arrival joins it into that, and a barrier of block, cluster or warp joins those
//! of its threads. A granule remembers the epoch, barrier and phase, of the bulk load that fills it, and may be accessed by
//! threads whose clocks have reached that epoch.

use super::*;

/// The most bytes that an mbarrier counts.
const MOST_EXPECTED: i32 = (1 << 20) - 1;

/// The layout is that of Barrier in kernels/simt/simt.h. It is zeroed where nobody initialised it.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Barrier {
    name: *const c_char,
    index: u32,
    id: u32,
    /// The arrivals of a phase, and those that this phase still lacks.
    arrivals: u32,
    pending: u32,
    /// How many phases have completed.
    phase: u32,
    /// The bytes that are expected and not yet loaded.
    bytes: i32,
    /// The bytes of bulk loads that are in flight.
    under_way: i32,
}

impl Barrier {
    pub(super) fn name(&self) -> String {
        // SAFETY: a string literal.
        format!("{}[{}]", unsafe { CStr::from_ptr(self.name) }.to_string_lossy(), self.index)
    }
}

/// How many phases of each mbarrier happened before now, by the barrier's id.
type VectorClock = Vec<u32>;

/// One component of a vector clock: a phase of an mbarrier, counted from 1; phase 0 precedes everything.
#[derive(Clone, Copy, Debug, Default)]
struct Epoch {
    barrier: u32,
    phase: u32,
}

impl Epoch {
    fn happened_before(self, clock: &VectorClock) -> bool {
        self.phase == 0
            || clock.get(self.barrier as usize).is_some_and(|&phase| phase >= self.phase)
    }
}

/// Makes each component of `clock` the larger of the two clocks'.
pub(super) fn join(clock: &mut Vec<u32>, other: &[u32]) {
    clock.resize(clock.len().max(other.len()), 0);
    clock.iter_mut().zip(other).for_each(|(own, &other)| *own = other.max(*own));
}

/// 16 bytes of staged memory, the unit in which accesses to it are checked.
#[derive(Clone, Debug, Default)]
struct Granule {
    bytes: [u8; 16],
    written: bool,
    /// The phase that the last bulk load to it completes.
    filled: Epoch,
    accesses: races::Element,
}

/// A bulk load.
#[derive(Debug)]
struct Copy {
    thread: usize,
    /// The part that has not been copied.
    offset: u32,
    bytes: u32,
    global: usize,
    barrier: *mut Barrier,
}

#[derive(Debug)]
pub(super) struct Bulk {
    /// By block slot.
    staged: Vec<Vec<Granule>>,
    /// By thread.
    clocks: Vec<VectorClock>,
    /// The release clock of each mbarrier, by its id: the join of the clocks of those that arrived.
    release_clocks: Vec<VectorClock>,
    copies: Vec<Copy>,
    /// By thread, the offsets and sources of the asynchronous copies that it has not waited for.
    async_copies: Vec<Vec<(u32, usize)>>,
    /// How many turns threads have before the next copy's.
    turns_to_copy: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    Read,
    Write,
    /// A write of an element beside those that others write.
    WriteElement,
    BulkLoad,
    AsyncCopy,
}

impl Bulk {
    pub(super) fn new(blocks: usize, threads: usize, shared: u32) -> Self {
        Self {
            staged: vec![vec![Granule::default(); shared as usize / 16]; blocks],
            clocks: vec![VectorClock::new(); threads],
            release_clocks: Vec::new(),
            copies: Vec::new(),
            async_copies: vec![Vec::new(); threads],
            turns_to_copy: 0,
        }
    }

    /// True if a copy has the next turn. `idle`: no thread is ready.
    pub(super) fn takes_turn(&mut self, idle: bool) -> bool {
        if self.copies.is_empty() || idle || self.turns_to_copy == 0 {
            return !self.copies.is_empty();
        }
        self.turns_to_copy -= 1;
        false
    }

    fn new_barrier(&mut self) -> u32 {
        self.release_clocks.push(VectorClock::new());
        self.release_clocks.len() as u32 - 1
    }

    /// Joins the clocks of threads at a barrier.
    pub(super) fn join_all(&mut self, threads: Range<usize>) {
        if self.release_clocks.is_empty() {
            return;
        }
        let mut all = VectorClock::new();
        self.clocks[threads.clone()].iter().for_each(|clock| join(&mut all, clock));
        self.clocks[threads].iter_mut().for_each(|clock| clock.clone_from(&all));
    }
}

impl Machine<'_> {
    /// The granules of an access of the running thread to staged memory, or why it is not allowed.
    fn access(
        &mut self,
        access: Access,
        offset: u32,
        bytes: u32,
    ) -> Result<&mut [Granule], String> {
        let what = match access {
            Access::Read => "read",
            Access::Write | Access::WriteElement => "write",
            Access::BulkLoad => "bulk load",
            Access::AsyncCopy => "asynchronous copy",
        };
        let (slot, _) = self.slots_of(self.thread);
        let (thread, races) = (self.thread, &self.races);
        let Bulk { staged, clocks, .. } = &mut self.bulk;
        if !(offset | bytes).is_multiple_of(16) || bytes == 0 {
            return Err(format!("{what} of {bytes} bytes at byte {offset} of staged memory"));
        }
        let (start, end) = (offset as usize / 16, (offset as usize + bytes as usize) / 16);
        let Some(granules) = staged[slot].get_mut(start..end) else {
            let shared = self.shape.shared;
            return Err(format!(
                "{what} of {bytes} bytes outside staged memory: byte {offset} of {shared}"
            ));
        };
        let clock = &clocks[thread];
        let kind = match access {
            Access::Read => races::Access::Read,
            Access::WriteElement => races::Access::Add,
            Access::Write | Access::BulkLoad | Access::AsyncCopy => races::Access::Write,
        };
        for (i, granule) in granules.iter_mut().enumerate() {
            let mistake = if !granule.filled.happened_before(clock) {
                "before a wait for the bulk load that fills it"
            } else if access == Access::Read && !granule.written {
                "that nobody has written"
            } else if races.access(thread, kind, &mut granule.accesses).is_err() {
                "that another thread may still access"
            } else {
                continue;
            };
            return Err(format!(
                "{what} of staged memory {mistake}: byte {}",
                offset as usize + 16 * i
            ));
        }
        Ok(granules)
    }

    /// Completes the barrier's phase if no arrival and no byte is missing.
    fn complete_phase(&mut self, barrier: *mut Barrier) -> Result<(), String> {
        // SAFETY: in shared memory, which lives as long as the machine.
        let this = unsafe { &mut *barrier };
        if this.pending > 0 || this.bytes > 0 {
            return Ok(());
        }
        let more = this.under_way - this.bytes;
        if more > 0 {
            return Err(format!("{more} bytes more come than {} expects", this.name()));
        }
        this.phase += 1;
        this.pending = this.arrivals;
        self.wake(|state| matches!(state, State::Phase(at, ..) if at == barrier));
        Ok(())
    }

    /// One step of some bulk copy.
    pub(super) fn copy(&mut self) {
        // The next copy comes at once, or when threads have been through many barriers, or between.
        self.bulk.turns_to_copy = (1 << self.random.u32(..10)) - 1;
        let index = self.random.usize(..self.bulk.copies.len());
        let thread = self.bulk.copies[index].thread;
        let (slot, _) = self.slots_of(thread);
        let copy = &mut self.bulk.copies[index];
        let barrier = copy.barrier;
        let count = self.random.u32(1..=copy.bytes / 16);
        let granules = &mut self.bulk.staged[slot][copy.offset as usize / 16..];
        for granule in &mut granules[..count as usize] {
            // SAFETY: so much was checked when the copy began. The barrier: see `complete_phase`.
            granule.bytes = unsafe { *(copy.global as *const [u8; 16]) };
            copy.global += 16;
        }
        copy.offset += 16 * count;
        copy.bytes -= 16 * count;
        unsafe {
            (*barrier).bytes -= 16 * count as i32;
            (*barrier).under_way -= 16 * count as i32;
        }
        if copy.bytes == 0 {
            self.bulk.copies.swap_remove(index);
        }
        if let Err(what) = self.complete_phase(barrier) {
            self.record_fault(thread, &what);
        }
    }

    /// Checks, when the last thread of a block has ended, that all bulk loads were waited for.
    pub(super) fn check_end(&mut self, thread: usize) {
        let (slot, _) = self.slots_of(thread);
        let block = self.threads_of(slot);
        if self.states[block.clone()].iter().any(|&state| state != State::Done) {
            return;
        }
        if self.shape.shared == 0 {
            return;
        }
        if self.bulk.async_copies[block.clone()].iter().any(|copies| !copies.is_empty()) {
            self.record_fault(thread, "its block ended without a wait for an asynchronous copy");
            return;
        }
        self.bulk.join_all(block);
        let clock = &self.bulk.clocks[thread];
        let waited = |granule: &Granule| granule.filled.happened_before(clock);
        if let Some(i) = self.bulk.staged[slot].iter().position(|granule| !waited(granule)) {
            let what = format!("its block ended without a wait for a bulk load: byte {}", 16 * i);
            self.record_fault(thread, &what);
        }
    }
}

/// The machine as by `machine`, and the running thread.
///
/// SAFETY: see `machine`.
unsafe fn current<'a>() -> (&'a mut Machine<'static>, usize) {
    let machine = unsafe { machine() };
    let thread = machine.thread;
    (machine, thread)
}

/// SAFETY: in the shared memory of a machine that lives; the reference ends before the next switch.
unsafe fn initialised<'a>(barrier: *mut Barrier) -> &'a mut Barrier {
    let barrier = unsafe { &mut *barrier };
    if barrier.arrivals == 0 {
        fault(format!("use of a barrier that nobody has initialised: {}", barrier.name()));
    }
    barrier
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_load_staged(offset: u32, to: *mut [u8; 16]) {
    // SAFETY: see `machine`; the caller has room for the bytes. So below.
    unsafe {
        let granules = machine().access(Access::Read, offset, 16).unwrap_or_else(|e| fault(e));
        *to = granules[0].bytes;
    }
}

/// The granule of an element, and the element's bytes in it.
unsafe fn element<'a>(access: Access, offset: u32, bytes: u32) -> (&'a mut Granule, Range<usize>) {
    if !(bytes == 2 || bytes == 4) || !offset.is_multiple_of(bytes) {
        fault(format!("an element of {bytes} bytes at byte {offset} of staged memory"));
    }
    let inside = offset as usize % 16;
    let granules = unsafe { machine() }.access(access, offset / 16 * 16, 16);
    (&mut granules.unwrap_or_else(|e| fault(e))[0], inside..inside + bytes as usize)
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_load_staged_element(offset: u32, bytes: u32, to: *mut u8) {
    unsafe {
        let (granule, range) = element(Access::Read, offset, bytes);
        to.copy_from_nonoverlapping(granule.bytes[range].as_ptr(), bytes as usize);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_store_staged_element(offset: u32, bytes: u32, from: *const u8) {
    unsafe {
        let (granule, range) = element(Access::WriteElement, offset, bytes);
        granule.written = true;
        granule.bytes[range].as_mut_ptr().copy_from_nonoverlapping(from, bytes as usize);
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_copy_async(offset: u32, from: *const c_void) {
    simt_access(from, 16, 16, false);
    let (machine, thread) = unsafe { current() };
    let granules = machine.access(Access::AsyncCopy, offset, 16).unwrap_or_else(|e| fault(e));
    granules[0].written = false;
    machine.bulk.async_copies[thread].push((offset, from as usize));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_wait_for_copies() {
    let (machine, thread) = unsafe { current() };
    for (offset, from) in std::mem::take(&mut machine.bulk.async_copies[thread]) {
        let granules = machine.access(Access::Write, offset, 16).unwrap_or_else(|e| fault(e));
        // SAFETY: so much was checked when the copy began.
        granules[0].bytes = unsafe { *(from as *const [u8; 16]) };
        granules[0].written = true;
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_init_barrier(barrier: *mut Barrier, arrivals: u32) {
    let barrier = unsafe { &mut *barrier };
    if barrier.arrivals > 0 || arrivals == 0 {
        fault(format!("{} is initialised twice, or for no arrivals", barrier.name()));
    }
    barrier.id = unsafe { machine() }.bulk.new_barrier();
    (barrier.arrivals, barrier.pending) = (arrivals, arrivals);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_arrive(barrier: *mut Barrier, bytes: u32) {
    let (machine, thread) = unsafe { current() };
    let this = unsafe { initialised(barrier) };
    let bulk = &mut machine.bulk;
    join(&mut bulk.release_clocks[this.id as usize], &bulk.clocks[thread]);
    machine.races.arrive(thread, this.id);
    if this.pending == 0 {
        fault(format!("more than {} arrivals in a phase of {}", this.arrivals, this.name()));
    }
    this.pending -= 1;
    this.bytes = this.bytes.saturating_add_unsigned(bytes);
    if this.bytes > MOST_EXPECTED {
        fault(format!("{} expects {} bytes, more than {MOST_EXPECTED}", this.name(), this.bytes));
    }
    machine.complete_phase(barrier).unwrap_or_else(|e| fault(e));
    yield_now();
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_wait_for(barrier: *mut Barrier, parity: u32, line: u32) {
    if parity > 1 {
        fault(format!("wait for parity {parity}"));
    }
    while unsafe { initialised(barrier) }.phase % 2 == parity {
        wait(State::Phase(barrier, parity, line));
    }
    let (machine, thread) = unsafe { current() };
    let this = unsafe { initialised(barrier) };
    let bulk = &mut machine.bulk;
    let release = &mut bulk.release_clocks[this.id as usize];
    release.resize(release.len().max(this.id as usize + 1), 0);
    release[this.id as usize] = this.phase;
    join(&mut bulk.clocks[thread], release);
    machine.races.wait(thread, this.id);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_bulk_load(
    offset: u32,
    from: *const c_void,
    bytes: u32,
    barrier: *mut Barrier,
) {
    simt_access(from, bytes.into(), 16, false);
    let (machine, thread) = unsafe { current() };
    let this = unsafe { initialised(barrier) };
    let granules = machine.access(Access::BulkLoad, offset, bytes).unwrap_or_else(|e| fault(e));
    let filled = Epoch { barrier: this.id, phase: this.phase + 1 };
    for granule in granules {
        (granule.written, granule.filled) = (true, filled);
        // Later accesses are ordered by the barrier, not by this thread.
        granule.accesses = races::Element::default();
    }
    this.under_way += bytes as i32;
    machine.bulk.copies.push(Copy { thread, offset, bytes, global: from as usize, barrier });
}

#[unsafe(no_mangle)]
extern "C" fn simt_bulk_prefetch(from: *const c_void, bytes: u32) {
    if !bytes.is_multiple_of(16) {
        fault(format!("prefetch of {bytes} bytes, which is no multiple of 16"));
    }
    accessed(from, bytes.into(), 16, false);
}
