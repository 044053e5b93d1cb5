//! Calls over ranks, by NCCL: on the simulated driver two of the vocabulary times two of the tokens, each a thread; on a GPU,
//! where NCCL wants one for each rank, a world of one.

use std::ops::Range;

use atkd::cuda::cudarc::nccl::{Comm, Id};
use atkd::cuda::{Ranks, RawShard};
use atkd::{Divergence, SelectionRule};

use super::*;

const TOKENS: usize = 7;
const VOCAB: usize = 611;

/// The part of the whole that a rank has, and what it computes.
struct Part {
    tokens: Range<usize>,
    columns: Range<usize>,
    gradient: Vec<bf16>,
    loss: f32,
}

/// A rank of a world that is cut so: `(tokens, columns)` of each, and the two ids of its communicators.
fn run(
    objective: &Objective,
    input: &Input,
    (tokens, columns): (Range<usize>, Range<usize>),
    [vocab_comm, token_comm]: [(Id, usize, usize); 2],
    counts: &[usize],
) -> Part {
    let gpu = Gpu::new().expect("it was there before");
    let stream = gpu.context.new_stream().unwrap();
    let comm = |(id, rank, size)| Comm::from_rank(stream.clone(), rank, size, id).unwrap();
    let (vocab, others) = (comm(vocab_comm), comm(token_comm));
    let rows = |logits: &[bf16]| -> Vec<bf16> {
        let rows = logits.chunks(VOCAB).skip(tokens.start).take(tokens.len());
        rows.flat_map(|row| row[columns.clone()].iter().copied()).collect()
    };
    // A rank without tokens has memory nevertheless.
    let padded = |mut row: Vec<bf16>| {
        row.push(bf16::ZERO);
        stream.clone_htod(&row).unwrap()
    };
    let [teacher, student] = [&input.teacher, &input.student].map(|logits| padded(rows(logits)));
    let labels = stream.clone_htod(&[&input.labels[tokens.clone()], &[0]].concat()).unwrap();
    let raw = |slice: &CudaSlice<bf16>| RawLogits {
        address: slice.device_ptr(&stream).0,
        dtype: Dtype::Bf16,
        strides: columns.len().into(),
    };
    let shard = RawShard {
        tokens: tokens.len(),
        vocab: VOCAB,
        first_column: columns.start,
        columns: columns.len(),
        teacher: raw(&teacher),
        student: raw(&student),
        labels: Some(RawLabels::I64(labels.device_ptr(&stream).0)),
        hard: None,
        token_weights: None,
        temperatures: None,
        upstream: None,
        counts: None,
    };
    let mut workspace = Workspace::new(&gpu.kernels, &stream, tokens.len()).unwrap();
    let loss = stream.clone_htod(&[f32::NAN]).unwrap();
    let output = RawOutput { loss: Some(loss.device_ptr(&stream).0), ..RawOutput::default() };
    let ranks = Ranks { vocab: Some(&vocab), tokens: Some((&others, counts)) };
    // In place, and once more by what the first call has left in the workspace.
    let gradient = Some((raw(&student), 0));
    // SAFETY: the addresses are of memory of this function, used on one stream.
    unsafe {
        workspace.launch_over_ranks(&stream, objective, &shard, &ranks, None, &output).unwrap();
        workspace.launch_over_ranks(&stream, objective, &shard, &ranks, gradient, &output).unwrap();
    }
    let loss = stream.clone_dtoh(&loss).unwrap()[0];
    let mut gradient = stream.clone_dtoh(&student).unwrap();
    gradient.pop();
    Part { tokens, columns, gradient, loss }
}

/// True where there are a device and NCCL; else the test says that it is skipped.
fn is_here() -> bool {
    // SAFETY: looks whether it can be loaded.
    let library = unsafe { atkd::cuda::cudarc::nccl::sys::is_culib_present() };
    if Gpu::new().is_some() && !library {
        let line = "SKIPPED: a test over ranks: there is no libnccl.so on the loader's path\n";
        let _ = std::io::stderr().write_all(line.as_bytes());
    }
    Gpu::new().is_some() && library
}

#[test]
fn ranks_have_the_loss_and_gradient_of_one() {
    if !is_here() {
        return;
    }
    // The simulated driver says so.
    let simulated = std::env::var_os("ATKD_SIMT_L2_BYTES").is_some();
    let cut = |at: &[usize]| at.windows(2).map(|ends| ends[0]..ends[1]).collect::<Vec<_>>();
    let mut worlds = vec![[cut(&[0, TOKENS]), cut(&[0, VOCAB])]];
    if simulated {
        worlds.push([cut(&[0, 3, TOKENS]), cut(&[0, 200, VOCAB])]);
        // A rank without tokens.
        worlds.push([cut(&[0, 0, TOKENS]), cut(&[0, 200, VOCAB])]);
    }
    let mut input = Input::new(TOKENS, VOCAB, 3);
    input.labels[2] = -100;
    let default = Objective::default().with_ce_weight(0.3).unwrap();
    let median = default.with_selection_rule(SelectionRule::Median);
    let group_mean = median.with_reduction(Reduction::GroupMean).unwrap();
    let jsd = default.with_divergence(Divergence::Jsd { beta: 0.4 }).unwrap();
    for objective in [default, group_mean, jsd.with_target(Target::Teacher)] {
        let exact = input.reference(&objective, &input.batch());
        for [of_tokens, of_columns] in &worlds {
            let counts: Vec<usize> = of_tokens.iter().map(ExactSizeIterator::len).collect();
            let vocab_ids: Vec<Id> = of_tokens.iter().map(|_| Id::new().unwrap()).collect();
            let token_ids: Vec<Id> = of_columns.iter().map(|_| Id::new().unwrap()).collect();
            let parts: Vec<Part> = std::thread::scope(|scope| {
                let mut ranks = Vec::new();
                for (i, tokens) in of_tokens.iter().enumerate() {
                    for (j, columns) in of_columns.iter().enumerate() {
                        let comms = [
                            (vocab_ids[i], j, of_columns.len()),
                            (token_ids[j], i, of_tokens.len()),
                        ];
                        let part = (tokens.clone(), columns.clone());
                        let (objective, input, counts) = (&objective, &input, &counts);
                        ranks.push(scope.spawn(move || run(objective, input, part, comms, counts)));
                    }
                }
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            let mut gradient = vec![bf16::NAN; TOKENS * VOCAB];
            let mut loss = 0.0;
            for part in &parts {
                for (row, token) in part.tokens.clone().enumerate() {
                    let from = &part.gradient[row * part.columns.len()..][..part.columns.len()];
                    gradient[token * VOCAB..][part.columns.clone()].copy_from_slice(from);
                }
                // Those of the same tokens have the same bits.
                let first = parts.iter().find(|other| other.tokens == part.tokens).unwrap();
                assert_eq!(part.loss.to_bits(), first.loss.to_bits());
                if part.columns.start == 0 {
                    loss += f64::from(part.loss);
                }
            }
            assert!((loss - exact.0.loss).abs() <= 1e-6 * (1.0 + exact.0.loss), "{loss}");
            check_gradient(&objective, &gradient, &exact, VOCAB);
        }
    }
}

#[test]
fn ranks_that_do_not_go_together() {
    if !is_here() {
        return;
    }
    let gpu = Gpu::new().expect("it is here");
    let stream = gpu.context.new_stream().unwrap();
    let comm = Comm::from_rank(stream.clone(), 0, 1, Id::new().unwrap()).unwrap();
    let logits = gpu.upload(&[bf16::ZERO; 12]);
    let labels = gpu.upload(&[0_i64; 3]);
    let raw = RawLogits {
        address: logits.device_ptr(&gpu.stream).0,
        dtype: Dtype::Bf16,
        strides: 4.into(),
    };
    let shard = RawShard {
        tokens: 3,
        vocab: 4,
        first_column: 0,
        columns: 4,
        teacher: raw,
        student: raw,
        labels: Some(RawLabels::I64(labels.device_ptr(&gpu.stream).0)),
        hard: None,
        token_weights: None,
        temperatures: None,
        upstream: None,
        counts: None,
    };
    let mut workspace = Workspace::new(&gpu.kernels, &stream, 3).unwrap();
    let mut fails = |shard: &RawShard, ranks: Ranks, stream: &Arc<CudaStream>, words: &str| {
        let (objective, output) = (Objective::default(), RawOutput::default());
        // SAFETY: it fails before it launches anything.
        let call = unsafe {
            workspace.launch_over_ranks(stream, &objective, shard, &ranks, None, &output)
        };
        let message = call.unwrap_err().to_string();
        assert!(message.contains(words), "{words:?} is not in {message:?}");
    };
    let of_tokens = |counts| Ranks { vocab: None, tokens: Some((&comm, counts)) };
    fails(&shard, of_tokens(&[4]), &stream, "rank 0 of 1 has 3 tokens");
    fails(&shard, of_tokens(&[3, 3]), &stream, "counts, 2 of them");
    fails(&shard, of_tokens(&[]), &stream, "counts, 0 of them");
    fails(&RawShard { hard: Some(8), ..shard }, of_tokens(&[3]), &stream, "how many tokens of all");
    fails(&shard, of_tokens(&[3]), &gpu.stream, "another stream");
    let ranks = Ranks { vocab: Some(&comm), tokens: None };
    fails(&shard, ranks, &gpu.stream, "another stream");
}
