//! The tests of the CUDA backend on the simulated driver, and what only that driver can tell.
#![cfg(target_os = "linux")]

use std::ffi::{CString, c_char};

use atkd::cuda::cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use atkd::cuda::cudarc::driver::{CudaSlice, DevicePtr, DriverError};
use atkd::cuda::cudarc::nvrtc::Ptx;
use atkd::cuda::{DeviceGradients, DeviceLayer, DeviceTokens, Head, RawCall, Workspace};
use atkd::head::Chunks;
use atkd::{Error, Objective, Target};
use half::bf16;

use cuda::{Gpu, Input, Loaded};

#[path = "../../tests/cuda.rs"]
mod cuda;

mod loader;

#[used]
#[unsafe(link_section = ".init_array")]
static LOAD_DRIVER: extern "C" fn() = loader::load_driver;

/// How many calls of driver functions, or launches of kernels, whose name starts so, this thread made.
fn count(name: &str) -> u64 {
    let name = CString::new(name).unwrap();
    // SAFETY: the simulated driver has this function.
    unsafe {
        let driver = loader::DRIVER.get().expect("it is loaded before main");
        let count = driver
            .get::<unsafe extern "C" fn(*const c_char) -> u64>(b"simt_driver_count")
            .expect("the simulated driver counts");
        count(name.as_ptr())
    }
}

/// Bytes that kernels read from, and wrote to, allocations of so many bytes.
fn traffic(bytes: usize) -> [u64; 2] {
    let (mut read, mut written) = (0, 0);
    // SAFETY: the simulated driver has this function, and there is room for two numbers.
    unsafe {
        let driver = loader::DRIVER.get().expect("it is loaded before main");
        let traffic = driver
            .get::<unsafe extern "C" fn(usize, *mut u64, *mut u64)>(b"simt_driver_traffic")
            .expect("the simulated driver counts");
        traffic(bytes, &mut read, &mut written);
    }
    [read, written]
}

/// Refuses the next launch of a kernel.
fn refuse(kernel: &str) {
    let kernel = CString::new(kernel).unwrap();
    // SAFETY: the simulated driver has this function.
    unsafe {
        let driver = loader::DRIVER.get().expect("it is loaded before main");
        let refuse = driver
            .get::<unsafe extern "C" fn(*const c_char)>(b"simt_driver_refuse")
            .expect("the simulated driver refuses");
        refuse(kernel.as_ptr())
    }
}

/// A call that fails halfway has no results, hides no fault, and leaves nothing behind that the next one counts.
#[test]
fn calls_of_which_a_launch_fails() {
    let Some(gpu) = Gpu::new() else { return };
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(9, 300, 1));
    let objective = Objective::default();
    let stream = &gpu.stream;
    loaded.backward(&objective, None).unwrap();
    let expected = loaded.workspace.read_loss(stream).unwrap();
    for kernel in ["count_valid", "row_resident_bf16", "select_hard", "token_terms"] {
        let fail = |loaded: &mut Loaded| {
            refuse(kernel);
            let error = loaded.backward(&objective, None).unwrap_err();
            assert!(error.to_string().contains("OUT_OF_MEMORY"), "{error}");
        };
        fail(&mut loaded);
        for _ in 0..2 {
            assert_eq!(loaded.workspace.read_loss(stream), Err(Error::FailedCall), "{kernel}");
            assert_eq!(loaded.workspace.read(stream), Err(Error::FailedCall), "{kernel}");
        }
        assert!(loaded.loss().is_nan(), "{kernel}");
        assert_eq!(loaded.workspace.token_losses().len(), 0);
        loaded.backward(&objective, None).unwrap();
        assert_eq!(loaded.workspace.read_loss(stream), Ok(expected), "{kernel}");

        // Labels beyond two tokens, which nobody has asked about when the next call fails.
        let faulty = RawCall { vocab: 2, ..loaded.raw() };
        loaded.launch(&objective, &faulty).unwrap();
        fail(&mut loaded);
        let error = loaded.workspace.read_loss(stream).unwrap_err();
        assert!(matches!(error, Error::DeviceLabel { .. }), "{kernel}: {error}");
        assert_eq!(loaded.workspace.read_loss(stream), Err(Error::FailedCall), "{kernel}");
        loaded.backward(&objective, None).unwrap();
        assert_eq!(loaded.workspace.read_loss(stream), Ok(expected), "{kernel}");
    }
}

/// Room for more tokens, and the last call's threshold serves all the same.
#[test]
fn workspaces_that_grow() {
    let Some(gpu) = Gpu::new() else { return };
    let (tokens, vocab) = (12, 313);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(tokens, vocab, 1));
    let read_by = |loaded: &mut Loaded| {
        // No other test has allocations of this size.
        let [before, _] = traffic(2 * tokens * vocab);
        loaded.backward(&Objective::default(), None).unwrap();
        let loss = loaded.workspace.read_loss(&gpu.stream).unwrap();
        (loss, traffic(2 * tokens * vocab)[0] - before)
    };
    let (expected, first) = read_by(&mut loaded);
    for (wanted, capacity) in [(1000, 1000), (20, 1000)] {
        loaded.workspace.reserve(&gpu.stream, wanted).unwrap();
        assert_eq!(loaded.workspace.capacity(), capacity);
        assert_eq!(loaded.workspace.read_loss(&gpu.stream), Ok(expected));
    }
    let (loss, second) = read_by(&mut loaded);
    assert_eq!(loss, expected);
    // Half of the rows were done again at first; of the second call's, none but the token at the threshold.
    let row = 2 * 2 * vocab as u64;
    assert!(first - second >= row * (tokens as u64 / 2 - 1), "{first} {second}");
}

#[test]
fn the_driver_is_the_simulated_one() {
    let before = count("cuInit");
    let Some(gpu) = Gpu::new() else { return };
    assert!(count("cuInit") > before);
    // Else its tests would be skipped.
    Head::new(&gpu.stream).unwrap();
    assert_eq!(gpu.context.name().unwrap(), "atkd's simulated device");
    assert_eq!(gpu.kernels.device().l2_bytes, 1);
}

/// A call launches its kernels and does nothing else: it allocates, copies and waits for nothing.
#[test]
fn calls_only_launch() {
    let Some(gpu) = Gpu::new() else { return };
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(5, 60, 1));
    let raw = loaded.raw();
    let atkd = Objective::default();
    let teacher = Objective::kl().with_target(Target::Teacher);
    for objective in [atkd, Objective::kl(), teacher] {
        type Call<'a> = &'a mut dyn FnMut(&mut Loaded);
        let mut calls: [(&str, Call); 4] = [
            ("forward", &mut |loaded| loaded.forward(&objective).unwrap()),
            ("forward_backward", &mut |loaded| loaded.backward(&objective, None).unwrap()),
            ("in place", &mut |loaded| loaded.in_place(&objective).unwrap()),
            ("launch", &mut |loaded| loaded.launch(&objective, &raw).unwrap()),
        ];
        for (what, call) in &mut calls {
            // Margins beforehand, or rows done again beside a gradient; each of the others once.
            let margins = objective == teacher || (objective == atkd && *what == "in place");
            let again = objective == atkd && !["in place", "forward"].contains(what);
            let expected = [
                ("teacher_margin_bf16", u64::from(margins)),
                ("count_valid", u64::from(objective != atkd || *what != "in place")),
                ("row_", 1 + u64::from(again)),
                ("select_hard", 1),
                ("token_terms", 1),
            ];
            let names = ["programmatic launch", "cuLaunchKernelEx", "cuCtxGetCurrent", "cu"];
            let names: Vec<_> = expected.iter().map(|(name, _)| *name).chain(names).collect();
            let before: Vec<u64> = names.iter().map(|name| count(name)).collect();
            call(&mut loaded);
            let counts: Vec<u64> =
                names.iter().zip(before).map(|(name, before)| count(name) - before).collect();
            let (by_kernel, [overlapping, launches, current, functions]) =
                counts.split_last_chunk::<4>().unwrap();
            assert_eq!(by_kernel, expected.map(|(_, launches)| launches), "{what}");
            assert_eq!(*launches, by_kernel.iter().sum::<u64>(), "{what}");
            // All but the first, before which may be anything.
            assert_eq!(*overlapping, launches - 1, "{what}");
            assert_eq!(*functions, launches + current, "{what}");
        }
    }
}

/// All blocks of a launch in teams must fit the device, and nothing overlaps.
#[test]
fn teams_are_launched_together() {
    let Some(gpu) = Gpu::or_skip(3) else { return };
    assert_eq!(gpu.kernels.device().portable_cluster(), 1);
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(9, 20_011, 1));
    let names = ["cooperative launch", "programmatic launch", "cuLaunchKernelEx"];
    let before = names.map(count);
    loaded.backward(&Objective::default(), None).unwrap();
    let after = names.map(count);
    assert_eq!(std::array::from_fn(|i| after[i] - before[i]), [2, 0, 5]);
}

/// A loss behind a head takes two products a chunk, and two for all gradients that wait; without gradients, or where they
/// depend on no selection, nothing waits for the device. A stream that is being captured is refused.
#[test]
fn heads_multiply_no_more_than_they_must() {
    let Some(gpu) = Gpu::new() else { return };
    let (tokens, vocab, size) = (9, 60, 8);
    let stream = &gpu.stream;
    let [hidden, weight] =
        [tokens, vocab].map(|rows| stream.alloc_zeros::<bf16>(rows * size).unwrap());
    let labels = stream.alloc_zeros::<i64>(tokens).unwrap();
    let mut workspace = Workspace::new(&gpu.kernels, stream, tokens).unwrap();
    let mut head = Head::new(stream).unwrap().with_chunks(Chunks::Tokens(3));
    let layer = || DeviceLayer::new(&hidden, &weight, size).unwrap();
    let mut of_hidden = stream.alloc_zeros::<bf16>(tokens * size).unwrap();
    let mut of_weight = stream.alloc_zeros::<f32>(vocab * size).unwrap();
    for (objective, with_gradient, expected) in
        [(Objective::default(), false, [6, 0]), (Objective::kl(), true, [8, 0])]
    {
        let gradients = DeviceGradients {
            hidden: with_gradient.then(|| (&mut of_hidden).into()),
            weight: with_gradient.then(|| of_weight.as_view_mut()),
            bias: None,
        };
        let names = ["cublasLtMatmulAlgoGetHeuristic", "cuStreamSynchronize"];
        let before = names.map(count);
        let of_tokens = DeviceTokens::new(&labels, vocab);
        head.loss(&mut workspace, &objective, of_tokens, &layer(), &layer(), gradients).unwrap();
        let after = names.map(count);
        assert_eq!(std::array::from_fn(|i| after[i] - before[i]), expected, "{with_gradient}");
    }
    // SAFETY: every use of memory below is on one stream or waited for.
    unsafe { gpu.context.disable_event_tracking() };
    let stream = gpu.context.new_stream().unwrap();
    let mut head = Head::new(&stream).unwrap();
    let labels = stream.alloc_zeros::<i64>(tokens).unwrap();
    let [hidden, weight] =
        [tokens, vocab].map(|rows| stream.alloc_zeros::<bf16>(rows * size).unwrap());
    let layer = || DeviceLayer::new(&hidden, &weight, size).unwrap();
    let mut workspace = Workspace::new(&gpu.kernels, &stream, tokens).unwrap();
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let of_tokens = DeviceTokens::new(&labels, vocab);
    let (objective, none) = (Objective::default(), DeviceGradients::default());
    let error = head.loss(&mut workspace, &objective, of_tokens, &layer(), &layer(), none);
    assert_eq!(error.map(drop), Err(Error::CapturedHead));
    stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap();
    // SAFETY: as before.
    unsafe { gpu.context.enable_event_tracking() };
}

fn code<T>(result: Result<T, DriverError>) -> CUresult {
    result.map_or_else(|error| error.0, |_| CUresult::CUDA_SUCCESS)
}

/// More than 48 KiB of shared memory must be allowed first.
#[test]
fn shared_memory_is_what_was_allowed() {
    let Some(gpu) = Gpu::new() else { return };
    let image = Ptx::from_binary(0xba55_ed50_u32.to_ne_bytes().into());
    let function =
        gpu.context.load_module(image).unwrap().load_function("scale_gradient_f32").unwrap();
    let stream = gpu.context.new_stream().unwrap();
    // Captured and never run.
    stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
    let launch = |bytes| {
        let mut block = [0_u64; 5];
        let mut parameters = [block.as_mut_ptr().cast()];
        // SAFETY: plain numbers and pointers; the block is as large as the kernel's.
        unsafe {
            let mut config: sys::CUlaunchConfig = std::mem::zeroed();
            (config.gridDimX, config.gridDimY, config.gridDimZ) = (1, 1, 1);
            (config.blockDimX, config.blockDimY, config.blockDimZ) = (32, 1, 1);
            (config.sharedMemBytes, config.hStream) = (bytes, stream.cu_stream());
            let (function, extra) = (function.cu_function(), std::ptr::null_mut());
            sys::cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), extra)
        }
    };
    let (success, invalid) = (CUresult::CUDA_SUCCESS, CUresult::CUDA_ERROR_INVALID_VALUE);
    assert_eq!((launch(48 << 10), launch((48 << 10) + 1)), (success, invalid));
    let most = 232_448 - function.shared_size_bytes().unwrap();
    let dynamic = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
    let allow = |bytes| code(function.set_attribute(dynamic, bytes));
    assert_eq!((allow(most + 1), allow(most)), (invalid, success));
    assert_eq!((launch(most as u32), launch(most as u32 + 1)), (success, invalid));
    stream.end_capture(sys::CUgraphInstantiate_flags(0)).unwrap();
}

/// A real driver refuses these within a capture, as its documentation says.
#[test]
fn captures_refuse_what_cannot_be_replayed() {
    let Some(gpu) = Gpu::new() else { return };
    // SAFETY: every use of memory below is on one stream or waited for.
    unsafe { gpu.context.disable_event_tracking() };
    let stream = gpu.context.new_stream().unwrap();
    let memory: CudaSlice<u8> = stream.alloc_zeros(16).unwrap();
    let event = stream.record_event(None).unwrap();
    let unsupported = CUresult::CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    let isolation = CUresult::CUDA_ERROR_STREAM_CAPTURE_ISOLATION;
    let calls: [(&dyn Fn() -> CUresult, CUresult); 7] = [
        (&|| code(stream.synchronize()), unsupported),
        (&|| code(gpu.context.synchronize()), unsupported),
        (&|| code(event.synchronize()), unsupported),
        (&|| code(stream.clone_dtoh(&memory)), unsupported),
        (&|| code(stream.clone_htod(&[1_u8])), unsupported),
        (&|| code(stream.wait(&event)), isolation),
        // SAFETY: freed by nobody, since it is not allocated.
        (&|| unsafe { sys::cuMemAlloc_v2(&mut 0, 16) }, unsupported),
    ];
    for (i, (call, expected)) in calls.iter().enumerate() {
        stream.begin_capture(CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL).unwrap();
        assert_eq!(call(), *expected, "call {i}");
        let status = stream.capture_status().unwrap();
        assert_eq!(status, CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_INVALIDATED);
        let invalidated = CUresult::CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
        assert_eq!(code(stream.end_capture(sys::CUgraphInstantiate_flags(0))), invalidated);
        stream.synchronize().unwrap();
    }
}

/// A read that comes too early, or in a stream that did not wait, finds the poison of fresh memory.
#[test]
fn streams_are_late() {
    let Some(gpu) = Gpu::new() else { return };
    // SAFETY: only that 16 bytes are valid in whatever state.
    unsafe { gpu.context.disable_event_tracking() };
    let (one, two) = (gpu.context.new_stream().unwrap(), gpu.context.new_stream().unwrap());
    let zeros: CudaSlice<u8> = one.alloc_zeros(16).unwrap();
    assert_eq!(two.clone_dtoh(&zeros).unwrap(), [0xcd; 16]);
    two.join(&one).unwrap();
    assert_eq!(two.clone_dtoh(&zeros).unwrap(), [0; 16]);
}

/// A kernel that leaves its memory ends the context. Device 2 is not used after that.
#[test]
fn accesses_outside_memory_are_errors() {
    let Some(gpu) = Gpu::or_skip(2) else { return };
    let mut loaded = Loaded::new(&gpu, &gpu.stream, &Input::new(4, 40, 2));
    let call = loaded.raw();
    loaded.launch(&Objective::default(), &RawCall { tokens: 3, vocab: 41, ..call }).unwrap_err();
    let teacher = loaded.teacher.device_ptr(&gpu.stream).0 + 2;
    let teacher = atkd::cuda::RawLogits { address: teacher, ..call.teacher };
    loaded.launch(&Objective::default(), &RawCall { teacher, ..call }).unwrap();
    for _ in 0..2 {
        let error = loaded.workspace.read_loss(&gpu.stream).unwrap_err();
        assert!(matches!(error, Error::Driver { code: 700, .. }), "{error}");
    }
}
