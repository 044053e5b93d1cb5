//! A CUDA driver for machines without a GPU: the functions of `libcuda` that cudarc calls for atkd, over the
//! simulator of atkd's kernels. With it the whole host side of `atkd::cuda` runs under `cargo test`.
//!
//! It is as unforgiving as a device can be:
//! - Work is queued, each stream on its own, and runs only when something waits for it: what the host reads
//!   too early, or one stream reads without waiting for another, is not there yet.
//! - Memory starts poisoned, and is gone once its stream comes to where it is freed. A kernel that reaches
//!   outside memory, or does anything else that the simulator forbids, ends the context with
//!   `CUDA_ERROR_ILLEGAL_ADDRESS`; standard error says which kernel, block and thread it was.
//! - Within a capture, what a driver refuses is refused with its error, and invalidates the capture.
//!
//! It does not simulate kernels other than atkd's, and the two of candle's that a step of training runs for its
//! loss; more than [`BLOCK`] threads a block and [`CLUSTER`] blocks a cluster, where a kernel takes any number;
//! registers, launch bounds and other limits of occupancy, but for cooperative launches, of two blocks a
//! multiprocessor at most; kernels that start before those ahead of them end; the time that anything takes; the
//! default stream's waiting for blocking streams, of which there are threads' own alone; captures that fork to other
//! streams or allocate; pinned and managed memory; copies between devices. Calls for those return
//! `CUDA_ERROR_NOT_SUPPORTED` or are missing.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::{LazyLock, Mutex, PoisonError};
use std::thread;

use atkd::cuda::cudarc::driver::sys::cudaError_enum::*;
use atkd::cuda::cudarc::driver::sys::{
    CUcontext, CUdevice, CUdevice_attribute as Attribute, CUdeviceptr, CUevent, CUevent_flags,
    CUfunction, CUfunction_attribute, CUgraph, CUgraphExec, CUlaunchAttributeID, CUlaunchConfig,
    CUmodule, CUresult, CUstream, CUstream_flags, CUstreamCaptureMode, CUstreamCaptureStatus,
};
use atkd::plan::{DeviceProperties, LaunchShape};
use atkd::simt::find_kernel;

use device::{
    Answer, CURRENT_CONTEXT, Capture, Context, Done, Driver, Event, Function, Recorded, SMALL,
    Stream, Work,
};

mod cublas;
mod device;
mod nccl;
pub use device::{BLOCK, CLUSTER};

/// Device 2 is for tests that end its context, device 3 a small one without clusters.
const DEVICES: usize = 4;
/// Bytes of dynamic shared memory that a launch may ask for where nothing was set.
const DEFAULT_SHARED: u32 = 48 << 10;
/// Bytes of static shared memory of every kernel.
const STATIC_SHARED_BYTES: c_int = 1024;
/// Bytes of shared memory that a block can have.
const BLOCK_SHARED_BYTES: c_int = 227 << 10;
/// The first word of a fat binary.
const FAT_BINARY: u32 = 0xba55_ed50;
/// The first word of a module of candle's, in place of its code: see scripts/candle-cuda.
const CANDLE: u32 = u32::from_ne_bytes(*b"// c");
/// A step of candle's runs these beside atkd's kernels: a loss has the gradient 1, and a tensor's gradients are added.
const CANDLE_KERNELS: [&str; 4] = ["const_set_f32", "badd_f32", "badd_f16", "badd_bf16"];

static DRIVER: LazyLock<Mutex<Driver>> = LazyLock::new(Mutex::default);

thread_local! {
    static CALLS: RefCell<HashMap<&'static str, u64>> = RefCell::default();
    /// The kernel whose next launch is refused.
    static REFUSED: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn count(name: &'static str) {
    CALLS.with_borrow_mut(|calls| *calls.entry(name).or_default() += 1);
}

/// Refuses this thread's next launch of the kernel of that name, for want of memory.
///
/// # Safety
/// `name` is a string of C's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simt_driver_refuse(name: *const c_char) {
    // SAFETY: as this function's.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    REFUSED.set(Some(name.into()));
}

/// How many calls of driver functions, and launches of kernels, whose name starts with `name`, this
/// thread made.
///
/// # Safety
/// `name` is a string of C's.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simt_driver_count(name: *const c_char) -> u64 {
    // SAFETY: as this function's.
    let name = unsafe { CStr::from_ptr(name) }.to_string_lossy();
    CALLS.with_borrow(|calls| {
        calls.iter().filter(|(call, _)| call.starts_with(&*name)).map(|(_, count)| count).sum()
    })
}

/// Writes how many bytes atkd's kernels read from, and wrote to, allocations of so many bytes, as far as they have run.
///
/// # Safety
/// There is room for a number at either address.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn simt_driver_traffic(bytes: usize, read: *mut u64, written: *mut u64) {
    let driver = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    let traffic = driver.traffic.get(&bytes).copied().unwrap_or_default();
    // SAFETY: the caller's.
    unsafe {
        read.write(traffic[0]);
        written.write(traffic[1]);
    }
}

/// Hands a result to the caller.
fn give<T>(to: *mut T, value: T) -> Answer {
    if to.is_null() {
        return Err(CUDA_ERROR_INVALID_VALUE);
    }
    // SAFETY: the caller has room for a result there, as the driver's documentation asks for.
    unsafe { to.write(value) };
    Ok(())
}

fn supported(condition: bool) -> Answer {
    if condition { Ok(()) } else { Err(CUDA_ERROR_NOT_SUPPORTED) }
}

fn handle<T>(handle: usize) -> *mut T {
    std::ptr::without_provenance_mut(handle)
}

fn l2_bytes() -> c_int {
    let asked_for = std::env::var("ATKD_SIMT_L2_BYTES").ok().and_then(|bytes| bytes.parse().ok());
    asked_for.unwrap_or(50 << 20)
}

/// Few, since all blocks of a launch in teams run at once, and each of their threads has a stack.
fn multiprocessors(small: bool) -> c_int {
    if small { 3 } else { 12 }
}

/// The functions of the driver: their answers are the errors that a caller gets. Pointers are the caller's
/// for the duration of the call, as the driver's documentation asks for.
macro_rules! driver {
    ($(fn $name:ident($driver:ident $(, $argument:ident: $type:ty)*) $body:block)+) => {
        $(
            #[unsafe(no_mangle)]
            unsafe extern "C" fn $name($($argument: $type),*) -> CUresult {
                #[allow(clippy::too_many_arguments, reason = "as many as the driver's has")]
                fn answer($driver: &mut Driver $(, $argument: $type)*) -> Answer $body
                count(stringify!($name));
                let driver = &mut *DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
                answer(driver $(, $argument)*).err().unwrap_or(CUDA_SUCCESS)
            }
        )+
    };
}

driver! {
    fn cuInit(driver, flags: c_uint) {
        supported(flags == 0)?;
        while driver.contexts.len() < DEVICES {
            let context = driver.new_handle();
            driver.contexts.insert(context, Context::default());
            driver.streams.insert(context, Stream::new(context));
        }
        Ok(())
    }

    fn cuDriverGetVersion(_driver, version: *mut c_int) {
        give(version, 13000)
    }

    fn cuDeviceGetCount(driver, count: *mut c_int) {
        driver.context_of_device(0)?;
        give(count, DEVICES as c_int)
    }

    fn cuDeviceGet(driver, device: *mut CUdevice, ordinal: c_int) {
        driver.context_of_device(ordinal)?;
        give(device, ordinal)
    }

    fn cuDeviceGetName(driver, name: *mut c_char, length: c_int, device: CUdevice) {
        driver.context_of_device(device)?;
        let simulated = c"atkd's simulated device".to_bytes_with_nul();
        supported(simulated.len() <= length as usize)?;
        // SAFETY: there is room for `length` bytes.
        unsafe { name.copy_from_nonoverlapping(simulated.as_ptr().cast(), simulated.len()) };
        Ok(())
    }

    fn cuDeviceTotalMem_v2(driver, bytes: *mut usize, device: CUdevice) {
        driver.context_of_device(device)?;
        give(bytes, 80_000_000_000)
    }

    fn cuDeviceGetAttribute(driver, value: *mut c_int, attribute: c_uint, device: CUdevice) {
        driver.context_of_device(device)?;
        const MAJOR: u32 = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as u32;
        const MINOR: u32 = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as u32;
        const COUNT: u32 = Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT as u32;
        const L2: u32 = Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE as u32;
        const SHARED: u32 =
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR as u32;
        const BLOCK_SHARED: u32 =
            Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN as u32;
        const POOLS: u32 = Attribute::CU_DEVICE_ATTRIBUTE_MEMORY_POOLS_SUPPORTED as u32;
        give(value, match attribute {
            MAJOR if device == SMALL => 8,
            MAJOR => 9,
            MINOR => 0,
            COUNT => multiprocessors(device == SMALL),
            L2 => l2_bytes(),
            SHARED => DeviceProperties::H200.shared_bytes as c_int,
            BLOCK_SHARED => BLOCK_SHARED_BYTES,
            POOLS => 1,
            _ => return Err(CUDA_ERROR_NOT_SUPPORTED),
        })
    }

    fn cuDevicePrimaryCtxRetain(driver, context: *mut CUcontext, device: CUdevice) {
        let id = driver.context_of_device(device)?;
        driver.contexts.entry(id).or_default().users += 1;
        give(context, handle(id))
    }

    fn cuDevicePrimaryCtxRelease_v2(driver, device: CUdevice) {
        let id = driver.context_of_device(device)?;
        let context = driver.contexts.entry(id).or_default();
        context.users = context.users.checked_sub(1).ok_or(CUDA_ERROR_INVALID_CONTEXT)?;
        Ok(())
    }

    fn cuCtxGetCurrent(_driver, context: *mut CUcontext) {
        give(context, handle(CURRENT_CONTEXT.get()))
    }

    fn cuCtxSetCurrent(driver, context: CUcontext) {
        if !context.is_null() && !driver.contexts.contains_key(&(context as usize)) {
            return Err(CUDA_ERROR_INVALID_CONTEXT);
        }
        CURRENT_CONTEXT.set(context as usize);
        Ok(())
    }

    fn cuCtxSynchronize(driver) {
        driver.synchronize_context()
    }

    fn cuModuleLoadData(driver, module: *mut CUmodule, image: *const c_void) {
        driver.context()?;
        // SAFETY: an image has a header, which starts with what kind of image it is.
        let start = unsafe { image.cast::<u32>().read_unaligned() };
        if start != FAT_BINARY && start != CANDLE {
            return Err(CUDA_ERROR_INVALID_IMAGE);
        }
        give(module, handle(driver.new_handle()))
    }

    fn cuModuleUnload(driver, _module: CUmodule) {
        driver.context().map(drop)
    }

    fn cuModuleGetFunction(
        driver, function: *mut CUfunction, _module: CUmodule, name: *const c_char
    ) {
        let context = driver.context()?;
        // SAFETY: a string of C's.
        let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap_or_default();
        let of_candle = || CANDLE_KERNELS.iter().find(|kernel| **kernel == name);
        let (kernel, bytes) = find_kernel(name)
            .map(|kernel| (kernel.name, kernel.parameter_bytes))
            .or_else(|| of_candle().map(|kernel| (*kernel, 0)))
            .ok_or(CUDA_ERROR_NOT_FOUND)?;
        let id = driver.new_handle();
        driver.functions.insert(id, Function {
            context,
            kernel,
            bytes,
            shared: DEFAULT_SHARED,
        });
        give(function, handle(id))
    }

    fn cuFuncGetAttribute(driver, value: *mut c_int, attribute: c_uint, function: CUfunction) {
        const PTX_VERSION: u32 = CUfunction_attribute::CU_FUNC_ATTRIBUTE_PTX_VERSION as u32;
        const STATIC_SHARED: u32 =
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES as u32;
        let function = driver.functions.get(&(function as usize));
        let small = driver.is_small(function.ok_or(CUDA_ERROR_INVALID_HANDLE)?.context);
        give(value, match attribute {
            // The machine code is for sm_80 or sm_90.
            PTX_VERSION => if small { 80 } else { 90 },
            STATIC_SHARED => STATIC_SHARED_BYTES,
            _ => return Err(CUDA_ERROR_NOT_SUPPORTED),
        })
    }

    fn cuFuncSetAttribute(driver, function: CUfunction, attribute: c_uint, value: c_int) {
        const DYNAMIC_SHARED: u32 =
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as u32;
        const CARVEOUT: u32 =
            CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT as u32;
        let function = driver.functions.get_mut(&(function as usize));
        let function = function.ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let most = BLOCK_SHARED_BYTES - STATIC_SHARED_BYTES;
        match attribute {
            DYNAMIC_SHARED if (0..=most).contains(&value) => function.shared = value as u32,
            CARVEOUT if (-1..=100).contains(&value) => {}
            DYNAMIC_SHARED | CARVEOUT => return Err(CUDA_ERROR_INVALID_VALUE),
            _ => return Err(CUDA_ERROR_NOT_SUPPORTED),
        }
        Ok(())
    }

    fn cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
        driver, blocks: *mut c_int, function: CUfunction, threads: c_int, bytes: usize, flags: c_uint
    ) {
        let function = driver.functions.get(&(function as usize)).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let kernel = find_kernel(function.kernel).ok_or(CUDA_ERROR_NOT_SUPPORTED)?;
        supported(threads as u32 == kernel.threads && bytes == 0 && flags == 0)?;
        give(blocks, kernel.blocks as c_int)
    }

    fn cuMemAlloc_v2(driver, address: *mut CUdeviceptr, bytes: usize) {
        driver.nothing_captured()?;
        give(address, driver.allocate(bytes)?)
    }

    fn cuMemFree_v2(driver, address: CUdeviceptr) {
        driver.synchronize_context()?;
        let free = driver.execute(driver.context()?, Work::Free(address as usize));
        free.map_err(|_| CUDA_ERROR_INVALID_VALUE)
    }

    fn cuMemAllocAsync(driver, address: *mut CUdeviceptr, bytes: usize, stream: CUstream) {
        let stream = driver.stream(stream)?;
        driver.not_captured(stream)?;
        give(address, driver.allocate(bytes)?)
    }

    fn cuMemFreeAsync(driver, address: CUdeviceptr, stream: CUstream) {
        let stream = driver.stream(stream)?;
        driver.not_captured(stream)?;
        match driver.memory.contains_key(&(address as usize)) {
            true => driver.enqueue(stream, Work::Free(address as usize)),
            false => Err(CUDA_ERROR_INVALID_VALUE),
        }
    }

    fn cuMemsetD8Async(driver, to: CUdeviceptr, byte: u8, bytes: usize, stream: CUstream) {
        let stream = driver.stream(stream)?;
        let to = driver.range(to, bytes)?;
        driver.enqueue(stream, Work::Set { to, byte })
    }

    fn cuMemsetD2D8Async(
        driver, to: CUdeviceptr, pitch: usize, byte: u8, width: usize, height: usize, stream: CUstream
    ) {
        let stream = driver.stream(stream)?;
        if pitch < width {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        for row in 0..height {
            let to = driver.range(to + (row * pitch) as CUdeviceptr, width)?;
            driver.enqueue(stream, Work::Set { to, byte })?;
        }
        Ok(())
    }

    fn cuMemcpyHtoDAsync_v2(
        driver, to: CUdeviceptr, from: *const c_void, bytes: usize, stream: CUstream
    ) {
        let stream = driver.stream(stream)?;
        driver.not_captured(stream)?;
        let to = driver.range(to, bytes)?;
        // SAFETY: the caller has so many bytes there. They are pageable, so the driver takes them at once.
        let bytes = unsafe { std::slice::from_raw_parts(from.cast::<u8>(), bytes) };
        driver.enqueue(stream, Work::Write { to, bytes: bytes.into() })
    }

    fn cuMemcpyDtoHAsync_v2(
        driver, to: *mut c_void, from: CUdeviceptr, bytes: usize, stream: CUstream
    ) {
        let stream = driver.stream(stream)?;
        driver.not_captured(stream)?;
        let from = driver.range(from, bytes)?;
        driver.synchronize(stream)?;
        // SAFETY: the range is of an allocation, and the caller has room for it.
        unsafe { to.cast::<u8>().copy_from_nonoverlapping(from.start as *const u8, bytes) };
        Ok(())
    }

    fn cuMemcpyDtoDAsync_v2(
        driver, to: CUdeviceptr, from: CUdeviceptr, bytes: usize, stream: CUstream
    ) {
        let stream = driver.stream(stream)?;
        let (to, from) = (driver.range(to, bytes)?, driver.range(from, bytes)?.start);
        driver.enqueue(stream, Work::Copy { to, from })
    }

    fn cuStreamCreate(driver, stream: *mut CUstream, flags: c_uint) {
        supported(flags == CUstream_flags::CU_STREAM_NON_BLOCKING as c_uint)?;
        let context = driver.context()?;
        let id = driver.new_handle();
        driver.streams.insert(id, Stream::new(context));
        give(stream, handle(id))
    }

    fn cuStreamDestroy_v2(driver, stream: CUstream) {
        let id = driver.stream(stream)?;
        // A driver would let it finish on its own.
        driver.synchronize(id)?;
        driver.streams.remove(&id);
        Ok(())
    }

    fn cuStreamSynchronize(driver, stream: CUstream) {
        let stream = driver.stream(stream)?;
        driver.not_captured(stream)?;
        driver.nothing_captured()?;
        driver.synchronize(stream)
    }

    fn cuStreamWaitEvent(driver, stream: CUstream, event: CUevent, flags: c_uint) {
        supported(flags == 0)?;
        let id = driver.stream(stream)?;
        let event = driver.event(event)?.recorded.as_ref().map(|recorded| match recorded {
            Recorded::Queued(done) => Ok(*done),
            Recorded::Captured(capture) => Err(*capture),
        });
        let stream = driver.streams.get_mut(&id).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        match (event, &mut stream.capture) {
            (_, Some(Capture { valid: false, .. })) => {
                Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED)
            }
            (None, _) => Ok(()),
            (Some(Ok(done)), None) => driver.enqueue(id, Work::Wait(done)),
            (Some(Err(_)), None) => Err(CUDA_ERROR_CAPTURED_EVENT),
            (Some(Err(captured)), Some(capture)) if captured == capture.id => Ok(()),
            (Some(_), Some(capture)) => {
                capture.valid = false;
                Err(CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
            }
        }
    }

    fn cuStreamBeginCapture_v2(driver, stream: CUstream, mode: CUstreamCaptureMode) {
        let id = driver.stream(stream)?;
        if stream.is_null() {
            return Err(CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
        }
        let capture = driver.new_handle();
        let stream = driver.streams.get_mut(&id).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        if stream.capture.is_some() {
            return Err(CUDA_ERROR_ILLEGAL_STATE);
        }
        let thread = thread::current().id();
        stream.capture = Some(Capture { id: capture, mode, thread, work: Vec::new(), valid: true });
        Ok(())
    }

    fn cuStreamEndCapture(driver, stream: CUstream, graph: *mut CUgraph) {
        let id = driver.stream(stream)?;
        let stream = driver.streams.get_mut(&id).ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        let capture = stream.capture.take().ok_or(CUDA_ERROR_ILLEGAL_STATE)?;
        give(graph, std::ptr::null_mut())?;
        if !capture.valid {
            return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
        }
        driver.graphs.insert(capture.id, capture.work);
        give(graph, handle(capture.id))
    }

    fn cuStreamIsCapturing(driver, stream: CUstream, status: *mut CUstreamCaptureStatus) {
        let id = driver.stream(stream)?;
        give(status, match &driver.streams[&id].capture {
            None => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE,
            Some(Capture { valid: true, .. }) => {
                CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE
            }
            Some(_) => CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED,
        })
    }

    fn cuGraphInstantiateWithFlags(
        driver, exec: *mut CUgraphExec, graph: CUgraph, flags: c_ulonglong
    ) {
        supported(flags == 0)?;
        let graph = driver.graphs.get(&(graph as usize));
        let work = graph.ok_or(CUDA_ERROR_INVALID_VALUE)?.clone();
        let id = driver.new_handle();
        driver.graphs.insert(id, work);
        give(exec, handle(id))
    }

    fn cuGraphLaunch(driver, exec: CUgraphExec, stream: CUstream) {
        let stream = driver.stream(stream)?;
        let graph = driver.graphs.get(&(exec as usize));
        let work = graph.ok_or(CUDA_ERROR_INVALID_VALUE)?.clone();
        work.into_iter().try_for_each(|work| driver.enqueue(stream, work))
    }

    fn cuGraphDestroy(driver, graph: CUgraph) {
        let graph = driver.graphs.remove(&(graph as usize));
        graph.map(drop).ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    fn cuGraphExecDestroy(driver, exec: CUgraphExec) {
        let exec = driver.graphs.remove(&(exec as usize));
        exec.map(drop).ok_or(CUDA_ERROR_INVALID_VALUE)
    }

    fn cuEventCreate(driver, event: *mut CUevent, flags: c_uint) {
        let context = driver.context()?;
        let timed = flags & CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint == 0;
        let id = driver.new_handle();
        driver.events.insert(id, Event { context, timed, recorded: None, time: None });
        give(event, handle(id))
    }

    fn cuEventDestroy_v2(driver, event: CUevent) {
        let event = driver.events.remove(&(event as usize));
        event.map(drop).ok_or(CUDA_ERROR_INVALID_HANDLE)
    }

    fn cuEventRecord(driver, event: CUevent, stream: CUstream) {
        let id = driver.stream(stream)?;
        if driver.event(event)?.context != driver.streams[&id].context {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        let recorded = match &driver.streams[&id].capture {
            Some(Capture { valid: false, .. }) => {
                return Err(CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
            }
            Some(capture) => Recorded::Captured(capture.id),
            None => {
                driver.enqueue(id, Work::Time(event as usize))?;
                Recorded::Queued(Done { stream: id, works: driver.streams[&id].works })
            }
        };
        driver.event(event)?.recorded = Some(recorded);
        Ok(())
    }

    fn cuEventSynchronize(driver, event: CUevent) {
        driver.context()?;
        match driver.event(event)?.recorded {
            None => Ok(()),
            Some(Recorded::Captured(_)) => {
                driver.nothing_captured()?;
                Err(CUDA_ERROR_CAPTURED_EVENT)
            }
            Some(Recorded::Queued(done)) => {
                driver.nothing_captured()?;
                driver.run(done)
            }
        }
    }

    fn cuEventElapsedTime(driver, milliseconds: *mut f32, start: CUevent, end: CUevent) {
        driver.context()?;
        let mut time = |event| {
            let event = driver.event(event)?;
            match (event.timed, event.time) {
                (false, _) => Err(CUDA_ERROR_INVALID_HANDLE),
                (true, None) => Err(CUDA_ERROR_NOT_READY),
                (true, Some(time)) => Ok(time),
            }
        };
        let (start, end) = (time(start)?, time(end)?);
        give(milliseconds, 1e3 * end.saturating_duration_since(start).as_secs_f32())
    }

    fn cuLaunchKernelEx(
        driver,
        config: *const CUlaunchConfig,
        function: CUfunction,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        // SAFETY: the caller's configuration and as many attributes as it says.
        let (config, attributes) = unsafe {
            let attributes = match (*config).numAttrs as usize {
                0 => &[],
                count => std::slice::from_raw_parts((*config).attrs, count),
            };
            (&*config, attributes)
        };
        let stream = driver.stream(config.hStream)?;
        let function = driver.functions.get(&(function as usize));
        let &Function { context, kernel, bytes, shared } =
            function.ok_or(CUDA_ERROR_INVALID_HANDLE)?;
        if context != driver.context()? || context != driver.streams[&stream].context {
            return Err(CUDA_ERROR_INVALID_HANDLE);
        }
        count(kernel);
        if REFUSED.with_borrow_mut(|name| name.take_if(|name| name == kernel)).is_some() {
            return Err(CUDA_ERROR_OUT_OF_MEMORY);
        }
        let (grid, block) = (config.gridDimX, config.blockDimX);
        supported(
            [config.gridDimY, config.gridDimZ, config.blockDimY, config.blockDimZ] == [1; 4]
                && extra.is_null()
                && block.is_multiple_of(32),
        )?;
        if grid == 0
            || grid > i32::MAX as u32
            || !(1..=1024).contains(&block)
            || config.sharedMemBytes > shared
        {
            return Err(CUDA_ERROR_INVALID_VALUE);
        }
        let (mut cluster, mut team) = (1, 1);
        for attribute in attributes {
            // SAFETY of each: the attribute is of this kind.
            match attribute.id {
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION => {
                    let size = unsafe { attribute.value.clusterDim };
                    supported((size.y, size.z) == (1, 1))?;
                    cluster = size.x;
                }
                // Here a kernel starts when the one before has ended, as it may on a device.
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION => {
                    count("programmatic launch");
                    supported(
                        unsafe { attribute.value.programmaticStreamSerializationAllowed } == 1,
                    )?;
                }
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE => {
                    count("cooperative launch");
                    supported(unsafe { attribute.value.cooperative } == 1)?;
                    // Whatever teams there are, all of them run at once.
                    team = grid;
                }
                _ => return Err(CUDA_ERROR_NOT_SUPPORTED),
            }
        }
        let small = driver.is_small(context);
        let at_once = find_kernel(kernel).map_or(1, |kernel| kernel.blocks);
        if team > at_once * multiprocessors(small) as u32 {
            return Err(CUDA_ERROR_COOPERATIVE_LAUNCH_TOO_LARGE);
        }
        supported(attributes.len() <= 1 || (team == 1 && !small))?;
        if !(1..=8).contains(&cluster) || !grid.is_multiple_of(cluster) {
            return Err(CUDA_ERROR_INVALID_CLUSTER_SIZE);
        }
        let mut words = vec![0_u64; bytes.div_ceil(8)];
        // SAFETY: the kernel has one parameter of this size, and there is room for it.
        unsafe {
            words.as_mut_ptr().cast::<u8>().copy_from_nonoverlapping((*parameters).cast(), bytes);
        }
        let shape = LaunchShape { grid, block, cluster, team, shared: config.sharedMemBytes };
        driver.enqueue(stream, Work::Launch { kernel, shape, parameters: words.into() })
    }

    // Candle launches its kernels by this one. Here tensors are contiguous.
    fn cuLaunchKernel(
        driver,
        function: CUfunction,
        _grid_x: c_uint, _grid_y: c_uint, _grid_z: c_uint,
        _block_x: c_uint, _block_y: c_uint, _block_z: c_uint,
        _shared: c_uint,
        stream: CUstream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    ) {
        let stream = driver.stream(stream)?;
        let function = driver.functions.get(&(function as usize));
        let kernel = function.ok_or(CUDA_ERROR_INVALID_HANDLE)?.kernel;
        count(kernel);
        supported(CANDLE_KERNELS.contains(&kernel) && extra.is_null())?;
        // SAFETY: each of candle's kernels has this many parameters, and these are of 8 bytes.
        let word = |index: usize| unsafe { (*parameters.add(index)).cast::<u64>().read_unaligned() };
        let (elements, strides) = (word(0) as usize, word(2));
        supported(strides == 0)?;
        let size = if kernel.ends_with("_f32") { 4 } else { 2 };
        if kernel == "const_set_f32" {
            let to = driver.range(word(4), size * elements)?;
            // SAFETY: here the kernel has a number of 4 bytes.
            let value = unsafe { (*parameters.add(3)).cast::<[u8; 4]>().read() };
            return driver.enqueue(stream, Work::Write { to, bytes: value.repeat(elements).into() });
        }
        let range = |index| driver.range(word(index), size * elements);
        let (from, to) = ([range(3)?.start, range(4)?.start], range(5)?);
        driver.enqueue(stream, Work::Add { kernel, to, from })
    }

    fn cuGetErrorString(_driver, error: CUresult, text: *mut *const c_char) {
        // Never freed: the caller may keep it.
        let name = CString::new(format!("{error:?}")).unwrap_or_default();
        give(text, name.into_raw())
    }
}
