//! The simulated devices: contexts, memory, streams with their queues, events, captures.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::Arc;
use std::thread::{self, ThreadId};
use std::time::Instant;

use atkd::cuda::cudarc::driver::sys::cudaError_enum::*;
use atkd::cuda::cudarc::driver::sys::{
    CUdevice, CUdeviceptr, CUevent, CUresult, CUstream, CUstreamCaptureMode,
};
use atkd::plan::LaunchShape;
use atkd::simt::Simulation;
use atkd::simt::machine::Buffer;
use half::{bf16, f16};

use crate::cublas::Product;

/// Threads of a simulated block, at most.
pub const BLOCK: u32 = 64;
/// Blocks of a simulated cluster, at most.
pub const CLUSTER: u32 = 2;
/// The small device, without clusters.
pub const SMALL: CUdevice = 3;

const FRESH_MEMORY: u8 = 0xcd;
/// The handle by which each thread means its own stream, CU_STREAM_PER_THREAD.
const STREAM_OF_THREAD: usize = 2;

pub type Answer<T = ()> = Result<T, CUresult>;

#[derive(Clone)]
pub enum Work {
    Launch {
        kernel: &'static str,
        shape: LaunchShape,
        parameters: Arc<[u64]>,
    },
    Set {
        to: Range<usize>,
        byte: u8,
    },
    Write {
        to: Range<usize>,
        bytes: Arc<[u8]>,
    },
    Copy {
        to: Range<usize>,
        from: usize,
    },
    /// The sums of two tensors' elements, by candle's kernel of that name.
    Add {
        kernel: &'static str,
        to: Range<usize>,
        from: [usize; 2],
    },
    Product(Product),
    Free(usize),
    /// Until that stream has done so much.
    Wait(Done),
    Time(usize),
}

/// A stream that has done so many pieces of work.
#[derive(Clone, Copy)]
pub struct Done {
    pub stream: usize,
    pub works: usize,
}

pub struct Stream {
    pub context: usize,
    pub queue: VecDeque<Work>,
    /// Pieces of work, done and queued.
    pub works: usize,
    pub capture: Option<Capture>,
}

impl Stream {
    pub fn new(context: usize) -> Self {
        Self { context, queue: VecDeque::new(), works: 0, capture: None }
    }
}

pub struct Capture {
    pub id: usize,
    pub mode: CUstreamCaptureMode,
    pub thread: ThreadId,
    pub work: Vec<Work>,
    pub valid: bool,
}

pub enum Recorded {
    Queued(Done),
    Captured(usize),
}

pub struct Event {
    pub context: usize,
    pub timed: bool,
    pub recorded: Option<Recorded>,
    pub time: Option<Instant>,
}

#[derive(Default)]
pub struct Context {
    pub users: usize,
    /// The error of a kernel, after which no call works.
    pub fault: Option<CUresult>,
}

pub struct Allocation {
    pub context: usize,
    pub layout: std::alloc::Layout,
}

pub struct Function {
    pub context: usize,
    pub kernel: &'static str,
    /// Bytes of its parameter block.
    pub bytes: usize,
    /// Bytes of dynamic shared memory that a launch may ask for.
    pub shared: u32,
}

/// Contexts, streams, events, functions and graphs by their handles. A context's handle is also that of
/// its default stream.
#[derive(Default)]
pub struct Driver {
    pub handles: usize,
    pub contexts: BTreeMap<usize, Context>,
    pub memory: BTreeMap<usize, Allocation>,
    pub streams: HashMap<usize, Stream>,
    pub events: HashMap<usize, Event>,
    pub functions: HashMap<usize, Function>,
    pub graphs: HashMap<usize, Vec<Work>>,
    /// The streams that threads have without making them, by context.
    pub streams_of_threads: HashMap<(usize, ThreadId), usize>,
    pub launches: u64,
    /// Bytes that atkd's kernels read from and wrote to allocations of a size.
    pub traffic: HashMap<usize, [u64; 2]>,
}

thread_local! {
    pub static CURRENT_CONTEXT: Cell<usize> = const { Cell::new(0) };
}

/// # Safety
/// So many bytes of elements are at each address.
unsafe fn add<T: Copy>(to: *mut T, from: [*mut u8; 2], bytes: usize, sum: impl Fn(T, T) -> T) {
    for i in 0..bytes / size_of::<T>() {
        // SAFETY: the caller's.
        unsafe {
            let [x, y] = from.map(|from| from.cast::<T>().add(i).read());
            to.add(i).write(sum(x, y));
        }
    }
}

impl Driver {
    pub fn new_handle(&mut self) -> usize {
        self.handles += 1;
        self.handles << 8
    }

    pub fn context_of_device(&self, device: CUdevice) -> Answer<usize> {
        let contexts = self.contexts.keys().nth(usize::try_from(device).unwrap_or(usize::MAX));
        match self.contexts.is_empty() {
            true => Err(CUDA_ERROR_NOT_INITIALIZED),
            false => contexts.copied().ok_or(CUDA_ERROR_INVALID_DEVICE),
        }
    }

    pub fn is_small(&self, context: usize) -> bool {
        self.context_of_device(SMALL) == Ok(context)
    }

    /// The thread's context, if work can go on in it.
    pub fn context(&self) -> Answer<usize> {
        let current = CURRENT_CONTEXT.get();
        match self.contexts.get(&current) {
            None => Err(CUDA_ERROR_INVALID_CONTEXT),
            Some(Context { users: 0, .. }) => Err(CUDA_ERROR_CONTEXT_IS_DESTROYED),
            Some(Context { fault: Some(fault), .. }) => Err(*fault),
            Some(_) => Ok(current),
        }
    }

    pub fn stream(&mut self, stream: CUstream) -> Answer<usize> {
        let context = self.context()?;
        match stream as usize {
            0 => Ok(context),
            STREAM_OF_THREAD => {
                let key = (context, thread::current().id());
                if !self.streams_of_threads.contains_key(&key) {
                    let id = self.new_handle();
                    self.streams.insert(id, Stream::new(context));
                    self.streams_of_threads.insert(key, id);
                }
                Ok(self.streams_of_threads[&key])
            }
            id if self.streams.contains_key(&id) => Ok(id),
            _ => Err(CUDA_ERROR_INVALID_HANDLE),
        }
    }

    pub fn event(&mut self, event: CUevent) -> Answer<&mut Event> {
        self.events.get_mut(&(event as usize)).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    /// For later, or into the stream's capture.
    pub fn enqueue(&mut self, stream: usize, work: Work) -> Answer {
        let stream = self.streams.get_mut(&stream).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        match &mut stream.capture {
            None => {
                stream.queue.push_back(work);
                stream.works += 1;
            }
            Some(Capture { valid: false, .. }) => {
                return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            }
            Some(capture) => capture.work.push(work),
        }
        Ok(())
    }

    /// Refuses what has no place in a capture.
    pub fn not_captured(&mut self, stream: usize) -> Answer {
        match self.streams.get_mut(&stream).and_then(|stream| stream.capture.as_mut()) {
            None => Ok(()),
            Some(capture) => {
                capture.valid = false;
                Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            }
        }
    }

    /// Refuses what may wait for a stream that is being captured, wherever it is.
    pub fn nothing_captured(&mut self) -> Answer {
        let mut answer = Ok(());
        for capture in self.streams.values_mut().filter_map(|stream| stream.capture.as_mut()) {
            let affected = match capture.mode {
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_GLOBAL => true,
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL => {
                    capture.thread == thread::current().id()
                }
                CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED => false,
            };
            if affected {
                capture.valid = false;
                answer = Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
            }
        }
        answer
    }

    pub fn allocate(&mut self, bytes: usize) -> Answer<CUdeviceptr> {
        let context = self.context()?;
        let layout = std::alloc::Layout::from_size_align(bytes, 256)
            .map_err(|_| CUDA_ERROR_OUT_OF_MEMORY)?;
        if bytes == 0 {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        // SAFETY: the size is not 0; so many bytes are written as were allocated.
        let address = unsafe {
            let memory = std::alloc::alloc(layout);
            if memory.is_null() {
                return Err(CUDA_ERROR_OUT_OF_MEMORY);
            }
            memory.write_bytes(FRESH_MEMORY, bytes);
            memory as usize
        };
        self.memory.insert(address, Allocation { context, layout });
        Ok(address as CUdeviceptr)
    }

    /// The addresses, if they are of one allocation.
    pub fn range(&self, start: CUdeviceptr, bytes: usize) -> Answer<Range<usize>> {
        let start = start as usize;
        let end = start.checked_add(bytes).ok_or(CUDA_ERROR_INVALID_VALUE)?;
        match self.memory.range(..=start).next_back() {
            Some((at, allocation)) if end <= at + allocation.layout.size() => Ok(start..end),
            _ => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    /// Does what was queued on a stream, in order, and what it waits for.
    pub fn run(&mut self, until: Done) -> Answer {
        while let Some(stream) = self.streams.get_mut(&until.stream)
            && stream.works - stream.queue.len() < until.works
            && let Some(work) = stream.queue.pop_front()
        {
            let context = stream.context;
            let done = match work {
                Work::Wait(other) => self.run(other),
                work => self.execute(context, work).map_err(|message| {
                    eprintln!("the simulated CUDA driver: {message}");
                    CUDA_ERROR_ILLEGAL_ADDRESS
                }),
            };
            if let Err(fault) = done {
                self.contexts.entry(context).or_default().fault = Some(fault);
                return Err(fault);
            }
        }
        Ok(())
    }

    pub fn execute(&mut self, context: usize, work: Work) -> Result<(), String> {
        let gone = |_| "memory is freed before the work on it is done".to_owned();
        let still = |range: &Range<usize>| {
            self.range(range.start as CUdeviceptr, range.len()).map(|_| range.start as *mut u8)
        };
        match work {
            Work::Launch { kernel, shape, parameters } => {
                self.launches += 1;
                let mut buffers: Vec<Buffer> = self
                    .memory
                    .iter()
                    .filter(|(_, allocation)| allocation.context == context)
                    .map(|(&at, allocation)| {
                        Buffer::at("an allocation", at..at + allocation.layout.size())
                    })
                    .collect();
                let seed = self.launches;
                let simulation =
                    Simulation { block: BLOCK, cluster: CLUSTER, seed, ..Simulation::default() };
                let parameters = parameters.as_ptr().cast();
                // SAFETY: cuLaunchKernelEx copied the kernel's block.
                unsafe { simulation.simulate(kernel, shape, parameters, &mut buffers)? };
                let of_context = self.memory.values().filter(|memory| memory.context == context);
                for (allocation, buffer) in of_context.zip(&buffers) {
                    let [read, written] = self.traffic.entry(allocation.layout.size()).or_default();
                    *read += buffer.read;
                    *written += buffer.written;
                }
            }
            Work::Set { to, byte } => {
                // SAFETY: the range is of an allocation.
                unsafe { still(&to).map_err(gone)?.write_bytes(byte, to.len()) };
            }
            Work::Write { to, bytes } => {
                let to = still(&to).map_err(gone)?;
                // SAFETY: the range is of an allocation and as long as the bytes.
                unsafe { to.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
            }
            Work::Copy { to, from } => {
                let from = still(&(from..from + to.len())).map_err(gone)?;
                // SAFETY: both ranges are of allocations.
                unsafe { still(&to).map_err(gone)?.copy_from(from, to.len()) };
            }
            Work::Add { kernel, to, from } => {
                let bytes = to.len();
                let at = |from: usize| still(&(from..from + bytes)).map_err(gone);
                let (to, from) = (at(to.start)?, [at(from[0])?, at(from[1])?]);
                // SAFETY: the ranges are of allocations, in which candle's elements are aligned.
                unsafe {
                    match kernel {
                        "badd_f32" => add(to.cast::<f32>(), from, bytes, |x, y| x + y),
                        "badd_f16" => add(to.cast::<f16>(), from, bytes, |x, y| x + y),
                        _ => add(to.cast::<bf16>(), from, bytes, |x, y| x + y),
                    }
                }
            }
            Work::Product(product) => {
                for range in &product.ranges() {
                    still(range).map_err(gone)?;
                }
                // SAFETY: the ranges are of allocations.
                unsafe { product.run() };
            }
            Work::Free(address) => {
                let allocation = self.memory.remove(&address).ok_or("memory is freed twice")?;
                // SAFETY: it was allocated so, and is no longer in the registry.
                unsafe { std::alloc::dealloc(address as *mut u8, allocation.layout) };
            }
            Work::Time(event) => {
                if let Some(event) = self.events.get_mut(&event) {
                    event.time = Some(Instant::now());
                }
            }
            Work::Wait(_) => unreachable!("waits are the caller's"),
        }
        Ok(())
    }

    pub fn synchronize(&mut self, stream: usize) -> Answer {
        let works = self.streams[&stream].works;
        self.run(Done { stream, works })
    }

    pub fn synchronize_context(&mut self) -> Answer {
        self.nothing_captured()?;
        let context = self.context()?;
        let streams: Vec<usize> = self
            .streams
            .iter()
            .filter(|(_, stream)| stream.context == context)
            .map(|(&id, _)| id)
            .collect();
        streams.into_iter().try_for_each(|stream| self.synchronize(stream))
    }
}
