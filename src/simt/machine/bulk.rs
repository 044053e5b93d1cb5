//! Staged memory, the barriers at which bulk copies are waited for, and the copies, which take turns with the
//! threads: a kernel may count on no more than it waited for.

use super::*;

/// The most bytes that a barrier counts.
const MOST_EXPECTED: i32 = (1 << 20) - 1;

/// As in kernels/simt/simt.h. Zeroed where nobody initialised it.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Barrier {
    name: *const c_char,
    index: u32,
    source: u32,
    /// Of a phase, and still to come in this one.
    arrivals: u32,
    pending: u32,
    /// Phases that have ended.
    phase: u32,
    /// Expected and not yet loaded.
    bytes: i32,
    /// Of bulk loads that have not been done.
    under_way: i32,
}

impl Barrier {
    pub(super) fn name(&self) -> String {
        // SAFETY: a string literal.
        format!("{}[{}]", unsafe { CStr::from_ptr(self.name) }.to_string_lossy(), self.index)
    }
}

/// How many phases of each barrier are known to be over: by waiting for them, or from a thread that was met at a
/// barrier. By the barrier's number.
type Knowledge = Vec<u32>;

/// What must be known before an access.
#[derive(Clone, Copy, Debug, Default)]
struct Over {
    source: u32,
    count: u32,
}

impl Over {
    fn known(self, knowledge: &Knowledge) -> bool {
        knowledge.get(self.source as usize).is_some_and(|&count| count >= self.count)
            || self.count == 0
    }
}

pub(super) fn learn(knowledge: &mut Knowledge, from: &[u32]) {
    knowledge.resize(knowledge.len().max(from.len()), 0);
    knowledge.iter_mut().zip(from).for_each(|(known, &count)| *known = count.max(*known));
}

/// 16 bytes of staged memory.
#[derive(Clone, Debug, Default)]
struct Piece {
    bytes: [u8; 16],
    written: bool,
    /// By a bulk load.
    filled: Over,
    accesses: races::Element,
}

/// A bulk load.
#[derive(Debug)]
struct Copy {
    thread: usize,
    /// What is still to be done.
    offset: u32,
    bytes: u32,
    global: usize,
    barrier: *mut Barrier,
}

#[derive(Debug)]
pub(super) struct Bulk {
    /// By block.
    staged: Vec<Vec<Piece>>,
    /// By thread.
    known: Vec<Knowledge>,
    /// By source: what who arrived at a barrier knew.
    released: Vec<Knowledge>,
    copies: Vec<Copy>,
    /// How many turns threads have before a copy does.
    rest: u32,
}

#[derive(Clone, Copy, PartialEq)]
enum Access {
    Read,
    BulkLoad,
}

impl Bulk {
    pub(super) fn new(blocks: usize, threads: usize, shared: u32) -> Self {
        Self {
            staged: vec![vec![Piece::default(); shared as usize / 16]; blocks],
            known: vec![Knowledge::new(); threads],
            released: Vec::new(),
            copies: Vec::new(),
            rest: 0,
        }
    }

    /// Whether a copy has the next turn; `idle` if no thread can.
    pub(super) fn takes_turn(&mut self, idle: bool) -> bool {
        if self.copies.is_empty() || idle || self.rest == 0 {
            return !self.copies.is_empty();
        }
        self.rest -= 1;
        false
    }

    fn new_source(&mut self) -> u32 {
        self.released.push(Knowledge::new());
        self.released.len() as u32 - 1
    }

    /// Threads met at a barrier.
    pub(super) fn meet(&mut self, met: Range<usize>) {
        if self.released.is_empty() {
            return;
        }
        let mut all = Knowledge::new();
        self.known[met.clone()].iter().for_each(|known| learn(&mut all, known));
        self.known[met].iter_mut().for_each(|known| known.clone_from(&all));
    }
}

impl Machine<'_> {
    /// The running thread's pieces of staged memory, if it may touch them so.
    fn access(&mut self, access: Access, offset: u32, bytes: u32) -> Result<&mut [Piece], String> {
        let what = match access {
            Access::Read => "read",
            Access::BulkLoad => "bulk load",
        };
        let (place, _) = self.places_of(self.thread);
        let (thread, races) = (self.thread, &self.races);
        let Bulk { staged, known, .. } = &mut self.bulk;
        if !(offset | bytes).is_multiple_of(16) || bytes == 0 {
            return Err(format!("{what} of {bytes} bytes at byte {offset} of staged memory"));
        }
        let (start, end) = (offset as usize / 16, (offset as usize + bytes as usize) / 16);
        let Some(pieces) = staged[place].get_mut(start..end) else {
            let shared = self.shape.shared;
            return Err(format!(
                "{what} of {bytes} bytes outside staged memory: byte {offset} of {shared}"
            ));
        };
        let known = &known[thread];
        let kind = if access == Access::Read { races::Access::Read } else { races::Access::Write };
        for (i, piece) in pieces.iter_mut().enumerate() {
            let mistake = if !piece.filled.known(known) {
                "before a wait for the bulk load that fills it"
            } else if access == Access::Read && !piece.written {
                "that nobody has written"
            } else if races.access(thread, kind, &mut piece.accesses).is_err() {
                "that another thread may still read"
            } else {
                continue;
            };
            return Err(format!(
                "{what} of staged memory {mistake}: byte {}",
                offset as usize + 16 * i
            ));
        }
        Ok(pieces)
    }

    /// Ends the barrier's phase if nothing is missing.
    fn settle(&mut self, barrier: *mut Barrier) -> Result<(), String> {
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
        // At once, or when threads have been through many barriers, or between.
        self.bulk.rest = (1 << self.random.u32(..10)) - 1;
        let index = self.random.usize(..self.bulk.copies.len());
        let thread = self.bulk.copies[index].thread;
        let (place, _) = self.places_of(thread);
        let copy = &mut self.bulk.copies[index];
        let barrier = copy.barrier;
        let count = self.random.u32(1..=copy.bytes / 16);
        let pieces = &mut self.bulk.staged[place][copy.offset as usize / 16..];
        for piece in &mut pieces[..count as usize] {
            // SAFETY: so much was checked when the copy began. The barrier: see `settle`.
            piece.bytes = unsafe { *(copy.global as *const [u8; 16]) };
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
        if let Err(what) = self.settle(barrier) {
            self.blame(thread, &what);
        }
    }

    /// When a thread has ended.
    pub(super) fn check_end(&mut self, thread: usize) {
        let (place, _) = self.places_of(thread);
        let block = self.threads_of(place);
        if self.states[block.clone()].iter().any(|&state| state != State::Done) {
            return;
        }
        if self.shape.shared == 0 {
            return;
        }
        self.bulk.meet(block);
        let known = &self.bulk.known[thread];
        let waited = |piece: &Piece| piece.filled.known(known);
        if let Some(i) = self.bulk.staged[place].iter().position(|piece| !waited(piece)) {
            let what = format!("its block ended without a wait for a bulk load: byte {}", 16 * i);
            self.blame(thread, &what);
        }
    }
}

/// As `machine`, with what the running thread does here.
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
        let piece = machine().access(Access::Read, offset, 16).unwrap_or_else(|e| fault(e));
        *to = piece[0].bytes;
    }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_init_barrier(barrier: *mut Barrier, arrivals: u32) {
    let barrier = unsafe { &mut *barrier };
    if barrier.arrivals > 0 || arrivals == 0 {
        fault(format!("{} is initialised twice, or for no arrivals", barrier.name()));
    }
    barrier.source = unsafe { machine() }.bulk.new_source();
    (barrier.arrivals, barrier.pending) = (arrivals, arrivals);
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_arrive(barrier: *mut Barrier, bytes: u32) {
    let (machine, thread) = unsafe { current() };
    let this = unsafe { initialised(barrier) };
    let bulk = &mut machine.bulk;
    learn(&mut bulk.released[this.source as usize], &bulk.known[thread]);
    machine.races.arrive(thread, this.source);
    if this.pending == 0 {
        fault(format!("more than {} arrivals in a phase of {}", this.arrivals, this.name()));
    }
    this.pending -= 1;
    this.bytes = this.bytes.saturating_add_unsigned(bytes);
    if this.bytes > MOST_EXPECTED {
        fault(format!("{} expects {} bytes, more than {MOST_EXPECTED}", this.name(), this.bytes));
    }
    machine.settle(barrier).unwrap_or_else(|e| fault(e));
    pause();
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
    let released = &mut bulk.released[this.source as usize];
    released.resize(released.len().max(this.source as usize + 1), 0);
    released[this.source as usize] = this.phase;
    learn(&mut bulk.known[thread], released);
    machine.races.wait(thread, this.source);
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
    let pieces = machine.access(Access::BulkLoad, offset, bytes).unwrap_or_else(|e| fault(e));
    let filled = Over { source: this.source, count: this.phase + 1 };
    for piece in pieces {
        (piece.written, piece.filled) = (true, filled);
        // What reads it waits for the barrier, not for this thread.
        piece.accesses = races::Element::default();
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
