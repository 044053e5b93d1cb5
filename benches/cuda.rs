//! The fused loss on a GPU against the unfused chain of kernels, timed with CUDA events.
//!
//! `cargo bench --bench cuda`. Throughput counts the three volumes that the fused kernels must move: teacher,
//! student, gradient. The same batch comes again and again, so that its rows are guessed right.
//! `atkd bench --backend cuda` compares with a copy, kernel by kernel, at any size.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use atkd::Objective;
use atkd::cuda::cudarc::driver::sys::CUevent_flags;
use atkd::cuda::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut};
use atkd::cuda::unfused::Unfused;
use atkd::cuda::{self, Kernels, RawCall, RawLabels, RawLogits, RawOutput, Workspace};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use half::bf16;

const TOKENS: usize = 8192;

/// The time on the device of `count` runs.
fn elapsed(stream: &Arc<CudaStream>, count: u64, mut work: impl FnMut()) -> Duration {
    let event = || stream.record_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).unwrap();
    let start = event();
    (0..count).for_each(|_| work());
    let milliseconds = start.elapsed_ms(&event()).unwrap();
    Duration::from_secs_f64(f64::from(milliseconds) / 1e3)
}

fn compare(c: &mut Criterion) {
    let kernels = match cuda::context(0).and_then(|context| Kernels::load(&context)) {
        Ok(kernels) => kernels,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: nothing was timed on a GPU: {error}");
            return;
        }
    };
    let stream = &kernels.context().default_stream();
    for vocab in [32_000, 50_257, 128_256] {
        let count = TOKENS * vocab;
        let mut random = fastrand::Rng::with_seed(1);
        let mut logits = || {
            // 64 rows, over and over.
            let rows: Vec<bf16> =
                (0..64 * vocab).map(|_| bf16::from_f32(12.0 * random.f32() - 6.0)).collect();
            let rows = stream.clone_htod(&rows).unwrap();
            let mut logits = stream.alloc_zeros::<bf16>(count).unwrap();
            for start in (0..count).step_by(64 * vocab) {
                stream
                    .memcpy_dtod(&rows, &mut logits.slice_mut(start..start + 64 * vocab))
                    .unwrap();
            }
            logits
        };
        let (teacher, student, mut gradient) = (logits(), logits(), logits());
        let labels: Vec<i64> = (0..TOKENS).map(|i| (i * 7919 % vocab) as i64).collect();
        let labels = stream.clone_htod(&labels).unwrap();
        let raw = |address| RawLogits { address, dtype: atkd::Dtype::Bf16, strides: vocab.into() };
        let call = RawCall {
            tokens: TOKENS,
            vocab,
            teacher: raw(teacher.device_ptr(stream).0),
            student: raw(student.device_ptr(stream).0),
            gradient: Some(raw(gradient.device_ptr_mut(stream).0)),
            gradient_padding: 0,
            labels: Some(RawLabels::I64(labels.device_ptr(stream).0)),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        };
        let mut workspace = Workspace::new(&kernels, stream, TOKENS).unwrap();
        let mut group = c.benchmark_group(format!("cuda {TOKENS} x {vocab} BF16"));
        group.throughput(Throughput::Bytes(2 * 3 * count as u64));
        for (name, objective) in [("fused", Objective::default()), ("fused, KL", Objective::kl())] {
            group.bench_function(name, |b| {
                b.iter_custom(|runs| {
                    elapsed(stream, runs, || {
                        // SAFETY: the call's memory lives to the end of this scope, past the events.
                        unsafe {
                            workspace.launch(stream, &objective, &call, &RawOutput::default())
                        }
                        .unwrap()
                    })
                })
            });
        }
        match Unfused::new(&kernels, stream, TOKENS, vocab) {
            Ok(mut unfused) => {
                group.sample_size(10);
                group.bench_function("unfused", |b| {
                    b.iter_custom(|runs| {
                        elapsed(stream, runs, || {
                            // SAFETY: as above, and every label is below the vocabulary's size.
                            unsafe { unfused.launch(stream, &call) }.unwrap();
                        })
                    })
                });
            }
            Err(error) => {
                let _ = writeln!(std::io::stderr(), "SKIPPED: unfused at V = {vocab}: {error}");
            }
        }
        group.finish();
    }
}

criterion_group!(benches, compare);
criterion_main!(benches);
