//! Calls by address, as the Python and C packages make them, on the simulated driver.
#![cfg(target_os = "linux")]

use std::io::Write;

use atkd::call::{self, RawOutput, RawSparseCall, RawSparseTeacher, RawTokens};
use atkd::cuda::cudarc::driver::DevicePtr;
use atkd::cuda::{self, Kernels, RawCall, RawLabels, RawLogits, Workspace};
use atkd::{Batch, Dtype, Error, Logits, LogitsMut, Objective, Output, SparseTeacher, Tail, cpu};

mod loader;

#[used]
#[unsafe(link_section = ".init_array")]
static LOAD_DRIVER: extern "C" fn() = loader::load_driver;

const TOKENS: usize = 6;
const VOCAB: usize = 13_003;
const TOP_K: usize = 4;

#[test]
fn results_go_where_they_are_wanted() {
    results_go_where_they_are_wanted_on(0);
}

/// The blocks of a row are a team here.
#[test]
fn results_go_where_they_are_wanted_without_clusters() {
    results_go_where_they_are_wanted_on(3);
}

fn results_go_where_they_are_wanted_on(device: usize) {
    let context = cuda::context(device).unwrap();
    let kernels = match Kernels::load(&context) {
        Err(error @ Error::NoKernels { .. }) => {
            let _ = writeln!(std::io::stderr(), "SKIPPED: {error}");
            return;
        }
        kernels => kernels.unwrap(),
    };
    assert_eq!(kernels.device().portable_cluster() > 1, device == 0);
    let stream = context.default_stream();
    let mut random = fastrand::Rng::with_seed(1);
    let mut logits = || -> Vec<f32> { (0..TOKENS * VOCAB).map(|_| 4.0 * random.f32()).collect() };
    let (teacher, student, labels) = (logits(), logits(), [3_i64, -100, 0, 13_002, 7, 7]);
    let objective = Objective::default();

    let mut gradient = vec![0_f32; TOKENS * VOCAB];
    let view = |v| Logits::new(v, TOKENS, VOCAB).unwrap();
    let batch = Batch::new(view(&teacher[..]), &labels).unwrap();
    let batch = batch.with_sequences(&[0, 3, 6]).unwrap();
    let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
    let exact = cpu::forward_backward(&objective, &batch, view(&student[..]), to).unwrap();

    let on_device = [&teacher, &student].map(|v| stream.clone_htod(&v[..]).unwrap());
    let mut labels_on_device = stream.clone_htod(&labels).unwrap();
    let offsets = stream.clone_htod(&[0_i64, 3, 6]).unwrap();
    let mut written = stream.alloc_zeros::<f32>(TOKENS * VOCAB).unwrap();
    let mut floats = stream.alloc_zeros::<f32>(1 + 5 * TOKENS).unwrap();
    let mut groups = stream.alloc_zeros::<u8>(TOKENS).unwrap();
    // SAFETY: the call prepares it.
    let workspace = unsafe { stream.alloc::<u8>(Kernels::workspace_bytes(TOKENS)) }.unwrap();
    let matrix = |address| RawLogits { address, dtype: Dtype::F32, strides: VOCAB.into() };
    let call = RawCall {
        tokens: TOKENS,
        vocab: VOCAB,
        teacher: matrix(on_device[0].device_ptr(&stream).0),
        student: matrix(on_device[1].device_ptr(&stream).0),
        gradient: Some(matrix(written.device_ptr(&stream).0)),
        gradient_padding: 0,
        labels: Some(RawLabels::I64(labels_on_device.device_ptr(&stream).0)),
        sequences: Some((offsets.device_ptr(&stream).0, 2)),
        margins: None,
        hard: None,
        token_weights: None,
        temperatures: None,
        upstream: None,
    };
    let start = floats.device_ptr(&stream).0;
    let column = |index: usize| start + 4 * index as u64;
    let output = RawOutput {
        loss: Some(column(0)),
        uncertainty: Some(column(1)),
        tkd: Some(column(1 + TOKENS)),
        dkd: Some(column(1 + 2 * TOKENS)),
        margin: Some(column(1 + 3 * TOKENS)),
        token_loss: Some(column(1 + 4 * TOKENS)),
        groups: Some(groups.device_ptr(&stream).0),
    };
    let mut check = |exact: &Output, gradient: &[f32]| {
        let found = stream.clone_dtoh(&floats).unwrap();
        let near = |actual: f32, exact: f64| {
            let actual = f64::from(actual);
            assert!(
                actual == exact || (actual - exact).abs() < 2e-6 * (1.0 + exact.abs()),
                "{actual} {exact}"
            )
        };
        near(found[0], exact.loss);
        let found_groups = stream.clone_dtoh(&groups).unwrap();
        for (i, token) in exact.tokens.iter().enumerate() {
            near(found[1 + i], token.uncertainty);
            near(found[1 + TOKENS + i], token.tkd);
            near(found[1 + 2 * TOKENS + i], token.dkd);
            near(found[1 + 3 * TOKENS + i], token.margin);
            near(found[1 + 4 * TOKENS + i], token.loss);
            assert_eq!(
                (found_groups[i] != call::IGNORED, found_groups[i] == call::HARD),
                (token.valid, token.hard)
            );
        }
        for (actual, exact) in stream.clone_dtoh(&written).unwrap().into_iter().zip(gradient) {
            near(actual, f64::from(*exact));
        }
        // The next call must write all of it.
        stream.memset_zeros(&mut floats).unwrap();
        stream.memset_zeros(&mut groups).unwrap();
        stream.memset_zeros(&mut written).unwrap();
    };

    let address = workspace.device_ptr(&stream).0;
    for _ in 0..2 {
        // SAFETY: all is memory of the shapes given, used on one stream.
        unsafe { kernels.launch_raw(&stream, &objective, &call, address, &output) }.unwrap();
        check(&exact, &gradient);
    }
    let odd = RawOutput { tkd: Some(column(1) + 2), ..output };
    // SAFETY: it fails before anything is enqueued.
    let result = unsafe { kernels.launch_raw(&stream, &objective, &call, address, &odd) };
    assert!(matches!(result, Err(Error::Unaligned { what: "the TKD terms", .. })));
    let mut owned = Workspace::new(&kernels, &stream, 10).unwrap();
    // SAFETY: as above.
    unsafe { owned.launch(&stream, &objective, &call, &output) }.unwrap();
    check(&exact, &gradient);

    // Row 2 finds its label, 0, among the entries, the others do not.
    let mut indices: Vec<i32> = (0..TOKENS * TOP_K).map(|i| (i * 2999 % VOCAB) as i32).collect();
    indices[5] = -1;
    indices[2 * TOP_K] = 0;
    let log_probs: Vec<f32> = (0..TOKENS * TOP_K).map(|i| -2.0 - 0.1 * i as f32).collect();
    let of_targets: Vec<f32> = (0..TOKENS).map(|i| -1.0 - i as f32).collect();
    let indices_on_device = stream.clone_htod(&indices).unwrap();
    let [log_probs_on_device, targets_on_device] =
        [&log_probs, &of_targets].map(|v| stream.clone_htod(&v[..]).unwrap());
    for tail in [Tail::Bucket, Tail::Zero, Tail::Sampled] {
        let teacher = SparseTeacher::new(&indices, &log_probs[..], TOKENS, TOP_K, VOCAB)
            .and_then(|teacher| teacher.with_target_log_probs(&of_targets))
            .unwrap()
            .with_tail(tail);
        let batch = Batch::new(teacher, &labels).unwrap().with_sequences(&[0, 3, 6]).unwrap();
        let mut gradient = vec![0_f32; TOKENS * VOCAB];
        let to = LogitsMut::new(&mut gradient, TOKENS, VOCAB).unwrap();
        let exact = cpu::forward_backward(&objective, &batch, view(&student[..]), to).unwrap();
        let sparse = RawSparseCall {
            tokens: RawTokens {
                tokens: TOKENS,
                vocab: VOCAB,
                labels: call.labels,
                sequences: call.sequences,
                margins: None,
                hard: None,
                token_weights: None,
                temperatures: None,
                upstream: None,
            },
            teacher: RawSparseTeacher {
                top_k: TOP_K,
                indices: RawLabels::I32(indices_on_device.device_ptr(&stream).0),
                log_probs: log_probs_on_device.device_ptr(&stream).0,
                dtype: Dtype::F32,
                target_log_probs: Some(targets_on_device.device_ptr(&stream).0),
                target_rounding: Dtype::F32,
                tail,
            },
            student: call.student,
            gradient: call.gradient,
            gradient_padding: 0,
        };
        // SAFETY: all is memory of the shapes given, used on one stream.
        unsafe { kernels.launch_sparse_raw(&stream, &objective, &sparse, address, &output) }
            .unwrap();
        check(&exact, &gradient);
        // SAFETY: as above.
        unsafe { owned.launch_sparse(&stream, &objective, &sparse, &output) }.unwrap();
        check(&exact, &gradient);
        let unknown = RawSparseTeacher { tail: Tail::Uniform, ..sparse.teacher };
        let unknown = RawSparseCall { teacher: unknown, ..sparse };
        // SAFETY: it fails before anything is enqueued.
        let result =
            unsafe { kernels.launch_sparse_raw(&stream, &objective, &unknown, address, &output) };
        assert_eq!(result, Err(Error::NoUniformTail));
    }
    // SAFETY: as above.
    unsafe { kernels.launch_raw(&stream, &objective, &call, address, &output) }.unwrap();
    for factor in [1.0_f32, 3.0] {
        let factor_on_device = stream.clone_htod(&[factor]).unwrap();
        let (address, _) = factor_on_device.device_ptr(&stream);
        let to = call.gradient.unwrap();
        let before = stream.clone_dtoh(&written).unwrap();
        // SAFETY: as above.
        unsafe { kernels.scale_gradient(&stream, to, TOKENS, VOCAB, address) }.unwrap();
        let after = stream.clone_dtoh(&written).unwrap();
        assert!(before.iter().zip(after).all(|(before, after)| before * factor == after));
        // SAFETY: as above.
        let result = unsafe { kernels.scale_gradient(&stream, to, TOKENS, VOCAB, address + 2) };
        assert!(matches!(result, Err(Error::Unaligned { what: "the factor", .. })));
    }

    stream.memcpy_htod(&[3_i64, -100, 0, 13_003, 7, 7], &mut labels_on_device).unwrap();
    // SAFETY: as above.
    unsafe { kernels.launch_raw(&stream, &objective, &call, address, &output) }.unwrap();
    assert!(stream.clone_dtoh(&floats).unwrap()[0].is_nan());
}
