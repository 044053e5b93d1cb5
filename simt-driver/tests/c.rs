//! C's workspaces of a CUDA device, on the simulated driver, against those of host memory.
#![cfg(target_os = "linux")]

use std::ffi::{CStr, c_void};
use std::io::Write;
use std::ptr::{null, null_mut};

use atkd::cuda;
use atkd::cuda::cudarc::driver::{DevicePtr, DeviceRepr};
use atkd_c::*;

mod loader;

#[used]
#[unsafe(link_section = ".init_array")]
static LOAD_DRIVER: extern "C" fn() = loader::load_driver;

const TOKENS: usize = 5;
const VOCAB: usize = 1003;
const TOP_K: usize = 3;
const TAILS: [i32; 3] = [ATKD_TAIL_BUCKET, ATKD_TAIL_ZERO, ATKD_TAIL_SAMPLED];

fn message() -> String {
    // SAFETY: this thread makes no other call meanwhile.
    unsafe { CStr::from_ptr(atkd_error_message()) }.to_str().unwrap().into()
}

/// A call whose tensors are at these addresses: the student's logits, labels, gradient, loss and margins.
fn call([student, labels, gradient, loss, margin]: [u64; 5]) -> AtkdCall {
    let matrix = |address| AtkdMatrix {
        data: address as *mut c_void,
        row_stride: VOCAB as i64,
        dtype: ATKD_F32,
        inner: 0,
        outer_stride: 0,
    };
    AtkdCall {
        tokens: TOKENS as i64,
        vocab: VOCAB as i64,
        teacher: matrix(0),
        student: matrix(student),
        labels: AtkdLabels { data: labels as *const c_void, dtype: ATKD_I64 },
        gradient: matrix(gradient),
        gradient_padding: 0,
        upstream: null(),
        sequences: 0,
        sequence_offsets: null(),
        margins: null(),
        hard: null(),
        token_weights: null(),
        temperatures: null(),
        loss: loss as *mut f32,
        uncertainty: null_mut(),
        tkd: null_mut(),
        dkd: null_mut(),
        margin: margin as *mut f32,
        token_loss: null_mut(),
        groups: null_mut(),
        stream: null_mut(),
    }
}

fn sparse([indices, log_probs, targets]: [u64; 3], tail: i32) -> AtkdSparseTeacher {
    AtkdSparseTeacher {
        top_k: TOP_K as i64,
        indices: AtkdLabels { data: indices as *const c_void, dtype: ATKD_I32 },
        log_probs: log_probs as *const c_void,
        dtype: ATKD_F32,
        tail,
        target_log_probs: targets as *const f32,
    }
}

#[test]
fn sparse_teachers_on_a_device_are_as_on_the_host() {
    let mut random = fastrand::Rng::with_seed(4);
    let student: Vec<f32> = (0..TOKENS * VOCAB).map(|_| 8.0 * random.f32()).collect();
    let labels = [3_i64, -100, 0, 1002, 7];
    let mut indices: Vec<i32> = (0..TOKENS * TOP_K).map(|i| (i * 299 % VOCAB) as i32 + 8).collect();
    let log_probs: Vec<f32> = (0..TOKENS * TOP_K).map(|_| -2.0 - random.f32()).collect();
    let targets = [-1.0_f32; TOKENS];

    let (mut workspace, mut objective) = (null_mut(), null_mut());
    // SAFETY: there is room for both handles.
    let created = unsafe { atkd_workspace_create_cuda(0, TOKENS, &mut workspace) };
    if created == ATKD_NOT_SUPPORTED {
        let _ = writeln!(std::io::stderr(), "SKIPPED: {}", message());
        return;
    }
    assert_eq!(created, ATKD_OK, "{}", message());
    let settings = atkd_default_settings();
    // SAFETY: as above.
    assert_eq!(unsafe { atkd_objective_create(&settings, &mut objective) }, ATKD_OK);

    let context = cuda::context(0).unwrap();
    let stream = context.default_stream();
    fn copied<T: DeviceRepr>(
        stream: &std::sync::Arc<cuda::cudarc::driver::CudaStream>,
        values: &[T],
    ) -> cuda::cudarc::driver::CudaSlice<T> {
        stream.clone_htod(values).unwrap()
    }
    let on_device = copied(&stream, &student);
    let labels_on_device = copied(&stream, &labels);
    let written = stream.alloc_zeros::<f32>(TOKENS * VOCAB).unwrap();
    let floats = stream.alloc_zeros::<f32>(1 + TOKENS).unwrap();
    let mut known_on_device = copied(&stream, &indices);
    let [log_probs_there, targets_there] =
        [&log_probs[..], &targets].map(|values| copied(&stream, values));
    stream.synchronize().unwrap();
    let start = floats.device_ptr(&stream).0;
    let there = [
        on_device.device_ptr(&stream).0,
        labels_on_device.device_ptr(&stream).0,
        written.device_ptr(&stream).0,
        start,
        start + 4,
    ];
    let known_there = [
        known_on_device.device_ptr(&stream).0,
        log_probs_there.device_ptr(&stream).0,
        targets_there.device_ptr(&stream).0,
    ];
    let call_there = AtkdCall { stream: stream.cu_stream().cast(), ..call(there) };

    let mut on_host = null_mut();
    // SAFETY: as above.
    assert_eq!(unsafe { atkd_workspace_create(1, &mut on_host) }, ATKD_OK);
    for tail in TAILS {
        let mut gradient = vec![0_f32; TOKENS * VOCAB];
        let mut expected = [0_f32; 1 + TOKENS];
        let loss = expected.as_mut_ptr() as u64;
        let here = [student.as_ptr() as u64, labels.as_ptr() as u64, gradient.as_mut_ptr() as u64];
        let here = call([here[0], here[1], here[2], loss, loss + 4]);
        let known = [indices.as_ptr() as u64, log_probs.as_ptr() as u64, targets.as_ptr() as u64];
        let known = sparse(known, tail);
        // SAFETY: all is memory of the shapes given, that nobody else uses.
        let status = unsafe { atkd_sparse_forward_backward(objective, on_host, &here, &known) };
        assert_eq!(status, ATKD_OK, "{}", message());
        let known = sparse(known_there, tail);
        // SAFETY: as above, on the device.
        let status =
            unsafe { atkd_sparse_forward_backward(objective, workspace, &call_there, &known) };
        assert_eq!(status, ATKD_OK, "{}", message());
        let found = stream.clone_dtoh(&floats).unwrap();
        for (actual, expected) in found.iter().zip(expected) {
            let near = (actual - expected).abs() <= 2e-6 * (1.0 + expected.abs());
            assert!(near || *actual == expected, "{actual} {expected}");
        }
        assert!(found[0] > 0.1, "{found:?}");
        let largest = gradient.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
        for (actual, expected) in stream.clone_dtoh(&written).unwrap().iter().zip(&gradient) {
            assert!((actual - expected).abs() <= 4e-6 * largest, "{actual} {expected}");
        }
        let alone = AtkdCall { gradient: call([0; 5]).gradient, ..call_there };
        // SAFETY: as above.
        let status = unsafe { atkd_sparse_forward(objective, workspace, &alone, &known) };
        assert_eq!(status, ATKD_OK, "{}", message());
        assert_eq!(stream.clone_dtoh(&floats).unwrap(), found);
    }

    let uniform = sparse(known_there, ATKD_TAIL_UNIFORM);
    // SAFETY: it fails before anything is enqueued.
    let status =
        unsafe { atkd_sparse_forward_backward(objective, workspace, &call_there, &uniform) };
    assert_eq!(status, ATKD_NOT_SUPPORTED);
    assert!(message().contains("no tail uniform"), "{}", message());
    indices[2 * TOP_K] = VOCAB as i32;
    stream.memcpy_htod(&indices, &mut known_on_device).unwrap();
    let known = sparse(known_there, ATKD_TAIL_BUCKET);
    // SAFETY: all is memory of the shapes given.
    unsafe {
        let status = atkd_sparse_forward_backward(objective, workspace, &call_there, &known);
        assert_eq!(status, ATKD_OK, "{}", message());
        let status = atkd_workspace_synchronize(workspace, stream.cu_stream().cast());
        assert_eq!(status, ATKD_INVALID_ARGUMENT);
        assert!(message().contains("token 2"), "{}", message());
        assert!(stream.clone_dtoh(&floats).unwrap()[0].is_nan());
        atkd_workspace_destroy(workspace);
        atkd_workspace_destroy(on_host);
        atkd_objective_destroy(objective);
    }
}
