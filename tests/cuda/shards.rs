//! Shards of the vocabulary on a device, of ranks one after the other.

use atkd::Divergence;
use atkd::cuda::{RawShard, RawStates};

use super::*;

/// The columns of three ranks, one of which has none.
const COLUMNS: [std::ops::Range<usize>; 3] = [0..400, 400..400, 400..1003];
/// Columns of each rank's gradient after those that count.
const PADDING: usize = 5;

#[test]
fn ranks_agree_and_have_the_gradient_of_their_columns() {
    // The simulated device 3 has no clusters.
    for device in [0, 3] {
        let Some(gpu) = Gpu::or_skip(device) else { continue };
        for divergence in
            [Divergence::ForwardKl, Divergence::ReverseKl, Divergence::Jsd { beta: 0.4 }]
        {
            for target in [Target::Label, Target::Teacher] {
                let objective = Objective::default().with_ce_weight(0.2).unwrap();
                let objective = objective.with_divergence(divergence).unwrap().with_target(target);
                check(&gpu, &objective, false);
                check(&gpu, &objective, true);
            }
        }
    }
}

fn check(gpu: &Gpu, objective: &Objective, in_place: bool) {
    let mut input = Input::new(5, 1003, 7);
    input.labels[3] = -100;
    let hard = [true, false, true, true, false];
    let batch = input.batch().with_hard(&hard).unwrap();
    let exact = input.reference(objective, &batch);

    let stream = &gpu.stream;
    let mask = gpu.upload(&hard.map(u8::from));
    let labels = gpu.upload(&input.labels);
    let workspace = gpu.upload(&vec![0xa5_u8; Kernels::workspace_bytes(5)]);
    let of = |logits: &[bf16], columns: &std::ops::Range<usize>| -> Vec<bf16> {
        // Each rank's rows lie by themselves, with the padding after them.
        let rows = logits.chunks(input.vocab).map(|row| &row[columns.clone()]);
        rows.flat_map(|row| row.iter().copied().chain([bf16::ONE; PADDING])).collect()
    };
    let local = COLUMNS.map(|columns| {
        let [teacher, student] =
            [&input.teacher, &input.student].map(|logits| gpu.upload(&of(logits, &columns)));
        let gradient = gpu.upload(&vec![bf16::NAN; student.len()]);
        (columns, teacher, student, gradient)
    });
    let raw = |slice: &CudaSlice<bf16>, columns: usize| RawLogits {
        address: slice.device_ptr(stream).0,
        dtype: Dtype::Bf16,
        strides: (columns + PADDING).into(),
    };
    let shards = local.each_ref().map(|(columns, teacher, student, _)| RawShard {
        tokens: 5,
        vocab: 1003,
        first_column: columns.start,
        columns: columns.len(),
        teacher: raw(teacher, columns.len()),
        student: raw(student, columns.len()),
        labels: Some(RawLabels::I64(labels.device_ptr(stream).0)),
        hard: Some(mask.device_ptr(stream).0),
        token_weights: None,
        temperatures: None,
        upstream: None,
        counts: None,
    });
    let states = gpu.upload(&[0_u32; 3 * 5 * 10]);
    let terms = gpu.upload(&[0_u32; 3 * 5 * 3]);
    let [states, terms, workspace] =
        [states.device_ptr(stream).0, terms.device_ptr(stream).0, workspace.device_ptr(stream).0];
    let exchanged = RawStates { states, terms: Some(terms), ranks: 3 };
    let kernels = &gpu.kernels;
    for (rank, shard) in shards.iter().enumerate() {
        let to = states + (rank * 5 * 40) as u64;
        // SAFETY: the addresses are of memory of this function, used on one stream.
        unsafe { kernels.shard_states_raw(stream, objective, shard, to, workspace) }.unwrap();
    }
    if objective.has_two_sweeps() {
        for (rank, shard) in shards.iter().enumerate() {
            let to = terms + (rank * 5 * 12) as u64;
            // SAFETY: as above.
            unsafe { kernels.shard_terms_raw(stream, objective, shard, &exchanged, to, workspace) }
                .unwrap();
        }
    }
    let margins = gpu.upload(&[0_f32; 5]);
    let to = margins.device_ptr(stream).0;
    // SAFETY: as above.
    unsafe { kernels.shard_margins_raw(stream, objective, &shards[1], &exchanged, to, workspace) }
        .unwrap();
    for (margin, token) in stream.clone_dtoh(&margins).unwrap().iter().zip(&exact.0.tokens) {
        let (margin, exact) = (f64::from(*margin), token.margin);
        assert!(margin == exact || (margin - exact).abs() < 1e-5, "{margin}, but exactly {exact}");
    }
    let mut gradient = vec![bf16::NAN; input.student.len()];
    for (shard, (columns, _, student, beside)) in shards.iter().zip(&local) {
        let slice = if in_place { student } else { beside };
        let to = raw(slice, columns.len());
        // SAFETY: as above.
        unsafe {
            kernels.shard_gradient_raw(stream, objective, shard, &exchanged, to, PADDING, workspace)
        }
        .unwrap();
        let rows = stream.clone_dtoh(slice).unwrap();
        for (token, row) in rows.chunks(columns.len() + PADDING).enumerate() {
            let (row, padding) = row.split_at(columns.len());
            assert!(padding.iter().all(|&g| g == bf16::ZERO));
            gradient[token * input.vocab..][columns.clone()].copy_from_slice(row);
        }
    }
    check_gradient(objective, &gradient, &exact, input.vocab);
    for shard in &shards {
        let loss = gpu.upload(&[0_f32]);
        let output = RawOutput { loss: Some(loss.device_ptr(stream).0), ..RawOutput::default() };
        // SAFETY: as above.
        unsafe {
            kernels.shard_finish_raw(stream, objective, shard, &exchanged, &output, workspace)
        }
        .unwrap();
        let loss = f64::from(stream.clone_dtoh(&loss).unwrap()[0]);
        assert!((loss - exact.0.loss).abs() <= 1e-6 * (1.0 + exact.0.loss), "{loss}");
    }
}
