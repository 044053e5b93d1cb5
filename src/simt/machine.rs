//! Runs a kernel on the CPU, every CUDA thread a coroutine, and checks what it does.

use std::cell::Cell;
use std::collections::{BinaryHeap, HashMap};
use std::ffi::{CStr, c_char, c_void};
use std::ops::Range;

use corosensei::{Coroutine, CoroutineResult, Yielder};

use crate::params::ATKD_WARP;
use crate::plan::LaunchShape;
use stacks::Stacks;

mod bulk;
mod races;
mod stacks;

const WARP: usize = ATKD_WARP as usize;
/// How many times a warp's threads get ready, on average, before its rank changes.
const RANK_LASTS: u32 = 1 << 12;

/// A kernel with its parameter block: the entry that `kernels/simt` compiles.
pub type Kernel<P> = unsafe extern "C" fn(&P);

/// Memory that a kernel may touch, and how much of it it did.
#[derive(Clone, Debug)]
pub struct Buffer {
    pub(super) name: &'static str,
    pub(super) addresses: Range<usize>,
    pub(super) writable: bool,
    /// Bytes read.
    pub read: u64,
    /// Bytes written.
    pub written: u64,
    /// How many reads and writes that took.
    pub accesses: u64,
}

impl Buffer {
    /// Memory that a kernel may read.
    pub fn input<T>(name: &'static str, memory: &[T]) -> Self {
        let addresses = memory.as_ptr_range();
        let addresses = addresses.start as usize..addresses.end as usize;
        Self { name, addresses, writable: false, read: 0, written: 0, accesses: 0 }
    }

    /// Memory that a kernel may read and write.
    pub fn output<T>(name: &'static str, memory: &mut [T]) -> Self {
        Self { writable: true, ..Self::input(name, memory) }
    }

    /// Memory at these addresses that a kernel may read and write.
    pub fn at(name: &'static str, addresses: Range<usize>) -> Self {
        Self { name, addresses, writable: true, read: 0, written: 0, accesses: 0 }
    }

    /// The name that it was given.
    pub fn name(&self) -> &'static str {
        self.name
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum State {
    Ready,
    /// At its block's barrier in this line.
    Block(u32),
    /// At its cluster's barrier in this line.
    Cluster(u32),
    /// At a warp operation.
    Exchange,
    /// At a synchronisation of the warp's lanes.
    Warp,
    /// Waits for the phase of this parity to complete, in this line.
    Phase(*mut bulk::Barrier, u32, u32),
    /// Waits for a change of this word, in this line.
    Change(*const u32, u32),
    Done,
}

/// The blocks that are co-resident, a cluster or all of a launch in teams, with the state that the callbacks from C++
/// work on. Threads are numbered through all of them; a block's number among them is its slot.
struct Machine<'a> {
    kernel: &'static str,
    shape: LaunchShape,
    /// The block in slot 0.
    first_block: u32,
    thread: usize,
    states: Vec<State>,
    /// The ready threads, ordered by their warps' ranks and then at random: the greatest runs next.
    ready: BinaryHeap<(u32, u32, usize)>,
    /// The rank of each warp, below `ranks`.
    rank: Vec<u32>,
    /// With more than one rank, some warps run whenever they can, and others only when all above them wait: a GPU, too,
    /// may leave a warp alone for long.
    ranks: u32,
    random: fastrand::Rng,
    yielders: Vec<*const Yielder<(), ()>>,
    given: Vec<u64>,
    /// The values that the lanes of each warp gave to their last exchange.
    exchanged: Vec<[u64; WARP]>,
    /// Shared memory by block slot and declaration.
    shared: HashMap<(usize, u64), Box<[u64]>>,
    bulk: bulk::Bulk,
    races: races::Races,
    /// The accesses to the elements of `shared`, by address.
    elements: HashMap<usize, races::Element>,
    buffers: &'a mut [Buffer],
    fault: Option<String>,
}

impl Machine<'_> {
    fn block_of(&self, thread: usize) -> u32 {
        self.first_block + thread as u32 / self.shape.block
    }

    /// The threads of the block in a slot.
    fn threads_of(&self, slot: usize) -> Range<usize> {
        let block = self.shape.block as usize;
        slot * block..(slot + 1) * block
    }

    /// The slots of a thread's block and of the first block of its cluster.
    fn slots_of(&self, thread: usize) -> (usize, usize) {
        let (slot, cluster) = (thread / self.shape.block as usize, self.shape.cluster as usize);
        (slot, slot / cluster * cluster)
    }

    fn make_ready(&mut self, threads: Range<usize>) {
        for thread in threads {
            let rank = &mut self.rank[thread / WARP];
            if self.random.u32(..RANK_LASTS) == 0 {
                *rank = self.random.u32(..self.ranks);
            }
            self.states[thread] = State::Ready;
            self.ready.push((*rank, self.random.u32(..), thread));
        }
    }

    fn wake(&mut self, waits: impl Fn(State) -> bool) {
        for thread in 0..self.states.len() {
            if waits(self.states[thread]) {
                self.make_ready(thread..thread + 1);
            }
        }
    }

    /// Records the first error.
    fn record_fault(&mut self, thread: usize, what: &str) {
        let (kernel, block) = (self.kernel, self.block_of(thread));
        let thread = thread as u32 % self.shape.block;
        self.fault.get_or_insert(format!("{kernel}, block {block}, thread {thread}: {what}"));
    }
}

thread_local! {
    static MACHINE: Cell<*mut Machine<'static>> = const { Cell::new(std::ptr::null_mut()) };
}

/// The launch that the current coroutine belongs to.
///
/// SAFETY: the C++ side calls back only from within [`run`], which keeps the machine alive and does not
/// touch it while a coroutine runs; references end before the next switch.
unsafe fn machine<'a>() -> &'a mut Machine<'static> {
    unsafe { &mut *MACHINE.get() }
}

/// Hands over to the scheduler; returns when the thread is ready again.
fn wait(state: State) {
    // SAFETY: see `machine`; the yielder lives as long as its coroutine, which is the one running.
    unsafe {
        let machine = machine();
        let thread = machine.thread;
        machine.states[thread] = state;
        (*machine.yielders[thread]).suspend(());
    }
}

/// Lets other threads run, as after every action that they may have waited for: they can be far ahead before this
/// thread goes on.
fn yield_now() {
    // SAFETY: see `machine`.
    let machine = unsafe { machine() };
    machine.make_ready(machine.thread..machine.thread + 1);
    wait(State::Ready);
}

/// Records an error and never returns to the kernel.
fn fault(what: String) -> ! {
    // SAFETY: see `machine`.
    let machine = unsafe { machine() };
    machine.record_fault(machine.thread, &what);
    loop {
        wait(State::Done);
    }
}

#[unsafe(no_mangle)]
extern "C" fn simt_thread_index() -> u32 {
    // SAFETY: see `machine`; so below.
    unsafe { machine().thread as u32 % machine().shape.block }
}

#[unsafe(no_mangle)]
extern "C" fn simt_block_threads() -> u32 {
    unsafe { machine().shape.block }
}

#[unsafe(no_mangle)]
extern "C" fn simt_block_index() -> u32 {
    unsafe { machine().block_of(machine().thread) }
}

#[unsafe(no_mangle)]
extern "C" fn simt_cluster_blocks() -> u32 {
    unsafe { machine().shape.cluster }
}

#[unsafe(no_mangle)]
extern "C" fn simt_begin_kernel(max_threads: u32) {
    let block = unsafe { machine().shape.block };
    if block > max_threads {
        fault(format!("a block of {block} threads, but the launch bounds allow {max_threads}"));
    }
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_block(line: u32) {
    wait(State::Block(line));
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_cluster(line: u32) {
    wait(State::Cluster(line));
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_exchange(value: u64, lanes: *mut [u64; WARP]) {
    let thread = unsafe { machine() }.thread;
    unsafe { machine() }.given[thread] = value;
    wait(State::Exchange);
    // SAFETY: the caller has room for a warp.
    unsafe { *lanes = machine().exchanged[thread / WARP] };
}

#[unsafe(no_mangle)]
extern "C" fn simt_sync_warp() {
    wait(State::Warp);
}

#[unsafe(no_mangle)]
extern "C" fn simt_access(at: *const c_void, bytes: u64, alignment: u64, write: bool) {
    let buffer = accessed(at, bytes, alignment, write);
    let buffer = unsafe { &mut machine().buffers[buffer] };
    *(if write { &mut buffer.written } else { &mut buffer.read }) += bytes;
    buffer.accesses += 1;
}

/// The buffer of an access. Ends the launch with an error if the access is not allowed.
fn accessed(at: *const c_void, bytes: u64, alignment: u64, write: bool) -> usize {
    let (start, what) = (at as usize, if write { "write" } else { "read" });
    let end = start.wrapping_add(bytes as usize);
    let machine = unsafe { machine() };
    let inside = |buffer: &Buffer| {
        (!write || buffer.writable)
            && buffer.addresses.start <= start
            && end <= buffer.addresses.end
    };
    let message = match machine.buffers.iter().position(inside) {
        _ if !start.is_multiple_of(alignment as usize) => {
            format!("{what} of {bytes} bytes at {start:#x}, which is no multiple of {alignment}")
        }
        Some(buffer) => return buffer,
        None => {
            let nearest = machine.buffers.iter().min_by_key(|b| {
                start.abs_diff(b.addresses.start).min(start.abs_diff(b.addresses.end))
            });
            let where_to = nearest.map_or("no buffer".into(), |b| {
                let offset = start as i128 - b.addresses.start as i128;
                let writable = if b.writable { "" } else { ", read-only" };
                format!("byte {offset} of {} ({} bytes{writable})", b.name, b.addresses.len())
            });
            format!("{what} of {bytes} bytes outside the buffers: {where_to}")
        }
    };
    fault(message)
}

#[unsafe(no_mangle)]
extern "C" fn simt_changed(at: *const u32) {
    unsafe { machine() }.wake(|state| matches!(state, State::Change(word, _) if word == at));
    yield_now();
}

#[unsafe(no_mangle)]
extern "C" fn simt_wait_for_change(at: *const u32, line: u32) {
    wait(State::Change(at, line));
}

#[unsafe(no_mangle)]
extern "C" fn simt_shared(slot: u64, bytes: u64, rank: u32) -> *mut c_void {
    let machine = unsafe { machine() };
    if rank >= machine.shape.cluster {
        fault(format!("shared memory of block {rank} in a cluster of {}", machine.shape.cluster));
    }
    let block_slot = machine.slots_of(machine.thread).1 + rank as usize;
    if machine.states[machine.threads_of(block_slot)].iter().all(|&state| state == State::Done) {
        fault(format!("shared memory of block {rank} of the cluster, which has ended"));
    }
    let words = (bytes as usize).div_ceil(8);
    machine
        .shared
        .entry((block_slot, slot))
        .or_insert_with(|| vec![0; words].into())
        .as_mut_ptr()
        .cast()
}

#[unsafe(no_mangle)]
unsafe extern "C" fn simt_fault(what: *const c_char, name: *const c_char, index: u64) -> ! {
    // SAFETY: both are string literals.
    let (what, name) = unsafe { (CStr::from_ptr(what), CStr::from_ptr(name)) };
    fault(format!("{}: {}[{index}]", what.to_string_lossy(), name.to_string_lossy()));
}

/// Runs every block of a launch. `buffers` is all the global memory that the kernel may touch; the traffic is added to
/// their counters. `seed` determines the order in which blocks and threads take turns.
///
/// # Errors
/// The first fault of the kernel, with block and thread.
///
/// # Safety
/// The kernel takes a `P`, and the buffers are as large as they say.
pub unsafe fn run<P: 'static>(
    kernel: &'static str,
    shape: LaunchShape,
    seed: u64,
    entry: Kernel<P>,
    parameters: &P,
    buffers: &mut [Buffer],
) -> Result<(), String> {
    let LaunchShape { grid, block, cluster, team, shared } = shape;
    assert!(block > 0 && block.is_multiple_of(WARP as u32), "{block} threads are no whole warps");
    assert!(shared.is_multiple_of(16), "{shared} bytes of shared memory are no multiple of 16");
    assert!(grid.is_multiple_of(cluster), "{grid} blocks are no whole clusters of {cluster}");
    let co_resident = if team > 1 { grid } else { cluster };
    let threads = (block * co_resident) as usize;
    let mut random = fastrand::Rng::with_seed(seed);
    let stacks = Stacks::new(threads).map_err(|error| format!("{kernel}: {error}"))?;
    let mut firsts: Vec<u32> = (0..grid).step_by(co_resident as usize).collect();
    random.shuffle(&mut firsts);
    for first_block in firsts {
        let ranks = 1 << random.u32(..5);
        let mut machine = Machine {
            kernel,
            shape,
            first_block,
            thread: 0,
            states: vec![State::Ready; threads],
            ready: BinaryHeap::new(),
            rank: (0..threads / WARP).map(|_| random.u32(..ranks)).collect(),
            ranks,
            random: random.fork(),
            yielders: vec![std::ptr::null(); threads],
            given: vec![0; threads],
            exchanged: vec![[0; WARP]; threads / WARP],
            shared: HashMap::new(),
            bulk: bulk::Bulk::new(co_resident as usize, threads, shared),
            races: races::Races::new(shape, threads),
            elements: HashMap::new(),
            buffers: &mut *buffers,
            fault: None,
        };
        machine.make_ready(0..threads);
        let machine_pointer: *mut Machine = &mut machine;
        let before = MACHINE.replace(machine_pointer.cast());
        // A coroutine may outlive its caller for all that its type says; these do not.
        let parameters = std::ptr::from_ref(parameters);
        // SAFETY: the coroutines are dropped before the next are made, and before the stacks.
        let mut coroutines: Vec<_> = unsafe { stacks.iter() }
            .enumerate()
            .map(|(thread, stack)| {
                Coroutine::with_stack(stack, move |yielder: &Yielder<(), ()>, ()| {
                    // SAFETY: see `machine`. The caller vouches for the kernel.
                    unsafe {
                        self::machine().yielders[thread] = yielder;
                        entry(&*parameters);
                    }
                })
            })
            .collect();
        let mut result = schedule(machine_pointer, |thread| {
            matches!(coroutines[thread].resume(()), CoroutineResult::Return(()))
        });
        for coroutine in &mut coroutines {
            // SAFETY: a stack that stopped halfway holds nothing but plain numbers.
            unsafe { coroutine.force_reset() };
        }
        MACHINE.set(before);
        if let Some(thread) = stacks.overflowed() {
            machine.record_fault(thread, "its stack is too small for it");
            result = machine.fault.take().map_or(result, Err);
        }
        result?;
    }
    Ok(())
}

/// Lets threads and bulk copies take turns until all are done. `resume` returns whether its thread ended.
fn schedule(machine: *mut Machine, mut resume: impl FnMut(usize) -> bool) -> Result<(), String> {
    // SAFETY of each `(*machine)`: it outlives this call, and no coroutine runs meanwhile.
    let threads = unsafe { &*machine }.states.len();
    // How many threads wait at a barrier: per block slot and, by its first block's slot, per cluster.
    let mut waiting = vec![0; threads];
    let mut waiting_for_cluster = waiting.clone();
    loop {
        let stopped = unsafe { &mut *machine };
        let copy = stopped.bulk.takes_turn(stopped.ready.is_empty());
        let thread = if copy { None } else { stopped.ready.pop().map(|(_, _, thread)| thread) };
        if !copy && thread.is_none() {
            break;
        }
        let ended = match thread {
            Some(thread) => {
                stopped.thread = thread;
                resume(thread)
            }
            None => {
                stopped.copy();
                false
            }
        };
        let machine = unsafe { &mut *machine };
        if let Some(thread) = thread
            && ended
        {
            machine.states[thread] = State::Done;
            machine.check_end(thread);
        }
        if let Some(fault) = machine.fault.take() {
            return Err(fault);
        }
        let Some(thread) = thread else { continue };
        // Threads at a barrier go on as soon as the last of them has arrived.
        let (slot, first) = machine.slots_of(thread);
        let (met, count) = match machine.states[thread] {
            state @ (State::Exchange | State::Warp) => {
                let warp = thread / WARP;
                let lanes = warp * WARP..(warp + 1) * WARP;
                if machine.states[lanes.clone()].iter().any(|&other| other != state) {
                    continue;
                }
                if state == State::Exchange {
                    machine.exchanged[warp].copy_from_slice(&machine.given[lanes.clone()]);
                } else {
                    machine.bulk.join_all(lanes.clone());
                    machine.races.join_warp(lanes.clone());
                }
                machine.make_ready(lanes);
                continue;
            }
            State::Block(_) => (machine.threads_of(slot), &mut waiting[slot]),
            State::Cluster(_) => {
                let last = first + machine.shape.cluster as usize - 1;
                let met = machine.threads_of(first).start..machine.threads_of(last).end;
                (met, &mut waiting_for_cluster[first])
            }
            State::Phase(..) | State::Change(..) | State::Done | State::Ready => continue,
        };
        *count += 1;
        if *count == met.len() {
            let state = machine.states[thread];
            if machine.states[met.clone()].iter().any(|&other| other != state) {
                break;
            }
            *count = 0;
            machine.make_ready(met.clone());
            machine.races.join_all(met.clone());
            machine.bulk.join_all(met);
        }
    }
    let machine = unsafe { &*machine };
    if machine.states.iter().all(|&state| state == State::Done) {
        Ok(())
    } else {
        Err(deadlock(machine))
    }
}

fn deadlock(machine: &Machine) -> String {
    let mut groups: Vec<(u32, State, Vec<u32>)> = Vec::new();
    for (thread, &state) in machine.states.iter().enumerate() {
        let (block, thread) = (machine.block_of(thread), thread as u32 % machine.shape.block);
        match groups.iter_mut().find(|(b, other, _)| *b == block && *other == state) {
            Some((_, _, threads)) => threads.push(thread),
            None => groups.push((block, state, vec![thread])),
        }
    }
    let groups: Vec<String> = groups
        .iter()
        .map(|(block, state, threads)| {
            let what = match state {
                State::Block(line) => format!("wait at the barrier in line {line}"),
                State::Cluster(line) => format!("wait at the cluster's barrier in line {line}"),
                State::Exchange | State::Warp => "wait for the rest of their warp".into(),
                State::Phase(barrier, parity, line) => {
                    // SAFETY: in the machine's shared memory.
                    let barrier = unsafe { &**barrier };
                    format!("wait for phase {parity} of {} in line {line}", barrier.name())
                }
                State::Change(_, line) => format!("wait for their team in line {line}"),
                State::Done => "have ended".into(),
                State::Ready => "are ready".into(),
            };
            format!("{} threads (first {}) of block {block} {what}", threads.len(), threads[0])
        })
        .collect();
    format!("{}: deadlock: {}", machine.kernel, groups.join(", "))
}
