//! Sparse teachers on a device.

use atkd::cuda::{DeviceBatch, DeviceLogits, DeviceLogitsMut, DeviceSparseTeacher, Workspace};
use atkd::{Error, Logits, LogitsMut, Objective, SparseTeacher, Tail, battery, cpu};
use half::bf16;

use super::Gpu;

/// Tail uniform, which kernels do not have, is the CPU's.
#[test]
fn sparse_teachers_pass_the_battery() {
    let Some(gpu) = Gpu::new() else { return };
    let checks = battery::sparse::run(
        battery::Bounds::Kernels,
        |objective, batch, student, mut gradient| {
            let to = gradient.columns(0..student.vocab())?;
            match gpu.kernels.forward_backward(objective, batch, student, to) {
                Err(Error::NoUniformTail) => {
                    cpu::forward_backward(objective, batch, student, gradient)
                }
                output => output,
            }
        },
        |_| {},
    );
    battery::assert_all_pass(&checks);
}

const TOKENS: usize = 5;
const VOCAB: usize = 9001;
const TOP_K: usize = 3;

/// In place and beside are the same bits, near the CPU's; values that are no distribution's are an error, once.
#[test]
fn sparse_teachers_by_the_safe_api() {
    let Some(gpu) = Gpu::new() else { return };
    let mut random = fastrand::Rng::with_seed(3);
    let mut indices: Vec<i64> = (0..TOKENS * TOP_K).map(|i| (i * 2999 % VOCAB) as i64).collect();
    let log_probs = vec![bf16::from_f32(-1.5); TOKENS * TOP_K];
    let of_targets = vec![-2.0_f32; TOKENS];
    let labels: Vec<i64> = (0..TOKENS).map(|i| 7 * i as i64 + 1).collect();
    let student: Vec<f32> = (0..TOKENS * VOCAB).map(|_| 8.0 * random.f32()).collect();

    let on_device = gpu.upload(&student);
    let mut over = gpu.upload(&student);
    let mut gradient = gpu.upload(&vec![0.0_f32; TOKENS * VOCAB]);
    let (log_probs_there, targets_there) = (gpu.upload(&log_probs), gpu.upload(&of_targets));
    let labels_there = gpu.upload(&labels);
    let mut workspace = Workspace::new(&gpu.kernels, &gpu.stream, TOKENS).unwrap();
    let (stream, objective) = (&gpu.stream, Objective::default());
    for mistake in [false, true] {
        if mistake {
            indices[TOP_K] = indices[TOP_K + 2];
        }
        let indices_there = gpu.upload(&indices);
        let batch = |tail| {
            let (log_probs, targets) = (&log_probs_there, targets_there.as_view());
            let teacher = DeviceSparseTeacher::new(&indices_there, log_probs, TOKENS, TOP_K, VOCAB);
            let teacher = teacher.and_then(|teacher| teacher.with_target_log_probs(targets));
            DeviceBatch::new(teacher.unwrap().with_tail(tail), &labels_there).unwrap()
        };
        let logits = DeviceLogits::new(&on_device, TOKENS, VOCAB).unwrap();
        let error = workspace.forward(stream, &objective, &batch(Tail::Uniform), &logits);
        assert_eq!(error, Err(Error::NoUniformTail));
        let beside = DeviceLogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
        let with = batch(Tail::Bucket);
        workspace.forward_backward(stream, &objective, &with, &logits, beside, None).unwrap();
        if mistake {
            assert!(stream.clone_dtoh(&workspace.loss()).unwrap()[0].is_nan());
            let fault = Error::DeviceTeacher { token: 1, vocab: VOCAB };
            assert_eq!(workspace.read_loss(stream), Err(fault));
            assert!(workspace.read_loss(stream).unwrap().is_nan());
            continue;
        }
        let output = workspace.read(stream).unwrap();
        let in_place = DeviceLogitsMut::new(&mut over, TOKENS, VOCAB).unwrap();
        workspace.forward_backward_in_place(stream, &objective, &with, in_place, None).unwrap();
        assert_eq!(workspace.read(stream).unwrap(), output);
        let gradient = stream.clone_dtoh(&gradient).unwrap();
        assert!(gradient == stream.clone_dtoh(&over).unwrap());

        let teacher = SparseTeacher::new(&indices, &log_probs[..], TOKENS, TOP_K, VOCAB).unwrap();
        let teacher = teacher.with_target_log_probs(&of_targets).unwrap();
        let batch = atkd::Batch::new(teacher, &labels).unwrap();
        let mut expected = vec![0.0_f32; TOKENS * VOCAB];
        let to = LogitsMut::new(&mut expected, TOKENS, VOCAB).unwrap();
        let view = Logits::new(&student, TOKENS, VOCAB).unwrap();
        let by_cpu = cpu::forward_backward(&objective, &batch, view, to).unwrap();
        assert!((output.loss - by_cpu.loss).abs() <= 2e-6 * by_cpu.loss);
        let largest = expected.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
        for (actual, expected) in gradient.iter().zip(&expected) {
            assert!((actual - expected).abs() <= 4e-6 * largest, "{actual} {expected}");
        }
    }
}
