//! Sparse teachers on the CPU, beside what the battery goes through.

use atkd::battery::{self, Bounds};
use atkd::call::{RawLabels, RawLogits, RawOutput, RawSparseCall, RawSparseTeacher, RawTokens};
use atkd::{
    Batch, Divergence, Dtype, Error, Logits, LogitsMut, Objective, Reduction, Result,
    SelectionRule, SparseTeacher, Tail, Target, TeacherRow, cpu, select_hard,
};
use half::bf16;

const TAILS: [Tail; 3] = [Tail::Zero, Tail::Uniform, Tail::Bucket];

#[test]
fn cpu_battery() {
    let checks = battery::sparse::run(Bounds::Cpu, cpu::forward_backward, |_| {});
    battery::assert_all_pass(&checks);
    assert_eq!(checks.len(), battery::sparse::len());
}

#[test]
fn reference_battery() {
    let checks = battery::sparse::run(Bounds::Cpu, battery::reference_backend, |_| {});
    battery::assert_all_pass(&checks);
}

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..count).map(|_| 8.0 * random.f32() - 4.0).collect()
}

/// The likeliest `top_k` tokens of each row of logits, with the log-probability of the target.
struct Known {
    indices: Vec<i64>,
    log_probs: Vec<f32>,
    of_targets: Vec<f32>,
}

fn known(logits: &[f32], vocab: usize, top_k: usize, labels: &[i64]) -> Known {
    let mut known = Known { indices: Vec::new(), log_probs: Vec::new(), of_targets: Vec::new() };
    for (row, &label) in logits.chunks(vocab).zip(labels) {
        let log_sum = row.iter().map(|&z| f64::from(z).exp()).sum::<f64>().ln();
        let log_prob = |j: usize| (f64::from(row[j]) - log_sum) as f32;
        let mut order: Vec<usize> = (0..vocab).collect();
        order.sort_by(|&i, &j| row[j].total_cmp(&row[i]));
        known.indices.extend(order[..top_k].iter().map(|&j| j as i64));
        known.log_probs.extend(order[..top_k].iter().map(|&j| log_prob(j)));
        known.of_targets.push(usize::try_from(label).map_or(f32::NAN, log_prob));
    }
    known
}

impl Known {
    fn teacher(&self, vocab: usize) -> SparseTeacher<'_> {
        let tokens = self.of_targets.len();
        let top_k = self.indices.len() / tokens;
        SparseTeacher::new(&self.indices, &self.log_probs, tokens, top_k, vocab)
            .and_then(|teacher| teacher.with_target_log_probs(&self.of_targets))
            .unwrap()
    }
}

fn objectives() -> Vec<Objective> {
    let atkd = Objective::default();
    let jsd = Divergence::Jsd { beta: 0.3 };
    vec![
        atkd,
        Objective::kl(),
        atkd.with_divergence(Divergence::ReverseKl).unwrap(),
        atkd.with_divergence(jsd).and_then(|o| o.with_ce_weight(0.4)).unwrap(),
        Objective::plain().with_divergence(jsd).unwrap(),
        atkd.with_divergence(Divergence::TotalVariation).unwrap(),
        Objective::plain().with_divergence(Divergence::SkewKl { alpha: 0.1 }).unwrap(),
        atkd.with_reduction(Reduction::GroupMean)
            .unwrap()
            .with_selection_rule(SelectionRule::Median),
    ]
}

/// With all of the vocabulary known, every tail is the dense teacher.
#[test]
fn of_the_whole_vocabulary_it_is_the_dense_teacher() -> Result<()> {
    let (tokens, vocab) = (9, 57);
    let (teacher, student) = (random(1, tokens * vocab), random(2, tokens * vocab));
    let labels = [3_i64, 56, -100, 0, 12, 20, 56, 7, 8];
    let known = known(&teacher, vocab, vocab, &labels);
    let student = Logits::new(&student, tokens, vocab)?;
    for objective in objectives() {
        let batch = Batch::new(Logits::new(&teacher, tokens, vocab)?, &labels)?;
        let mut expected = vec![0.0_f32; tokens * vocab];
        let to = LogitsMut::new(&mut expected, tokens, vocab)?;
        let dense = cpu::forward_backward(&objective, &batch, student, to)?;
        for tail in TAILS {
            let batch = Batch::new(known.teacher(vocab).with_tail(tail), &labels)?;
            let reverse = objective.divergence() == Divergence::ReverseKl;
            let mut gradient = vec![f32::NAN; tokens * vocab];
            let to = LogitsMut::new(&mut gradient, tokens, vocab)?;
            let output = match cpu::forward_backward(&objective, &batch, student, to) {
                Err(Error::ReverseKlOfZeroTail) if reverse && tail == Tail::Zero => continue,
                output => output?,
            };
            assert!(
                (output.loss - dense.loss).abs() <= 2e-6 * dense.loss,
                "{objective:?} {tail:?}"
            );
            for (token, dense) in output.tokens.iter().zip(&dense.tokens) {
                assert_eq!((token.hard, token.valid), (dense.hard, dense.valid));
            }
            let largest = expected.iter().fold(0.0_f32, |largest, g| largest.max(g.abs()));
            for (actual, expected) in gradient.iter().zip(&expected) {
                assert!((actual - expected).abs() <= 2e-6 * largest, "{objective:?} {tail:?}");
            }
        }
    }
    Ok(())
}

/// The selection is that of the margins, which are known without a student; the median of an even number included.
#[test]
fn margins_are_those_of_the_selection() -> Result<()> {
    let (tokens, vocab) = (40, 31);
    let (teacher, student) = (random(3, tokens * vocab), random(4, tokens * vocab));
    let labels: Vec<i64> = (0..tokens as i64).map(|i| if i == 5 { -100 } else { i % 31 }).collect();
    let known = known(&teacher, vocab, 4, &labels);
    for tail in TAILS {
        let batch = Batch::new(known.teacher(vocab).with_tail(tail), &labels)?;
        let objective = Objective::default();
        let margins = cpu::teacher_margins(&objective, &batch)?;
        let valid: Vec<bool> = labels.iter().map(|&label| label >= 0).collect();
        let hard = select_hard(&margins, Some(&valid), 0.5, None)?;
        let output = cpu::forward(&objective, &batch, Logits::new(&student, tokens, vocab)?)?;
        assert_eq!(hard, output.tokens.iter().map(|token| token.hard).collect::<Vec<_>>());
        assert_eq!(hard.iter().filter(|&&hard| hard).count(), 20);
        for (token, &log_prob) in known.of_targets.iter().enumerate() {
            // By tail zero the known probabilities are renormalised.
            if tail != Tail::Zero && valid[token] {
                let log_prob = f64::from(log_prob);
                let margin = (-log_prob.exp_m1()).ln() - log_prob;
                assert!((f64::from(margins[token]) - margin).abs() <= 1e-6 * (1.0 + margin.abs()));
            }
        }
    }
    Ok(())
}

/// The target's own log-probability counts instead of the one among the K.
#[test]
fn the_targets_log_probability_wins() -> Result<()> {
    let (indices, log_probs) = ([2_i32, 0], [-0.5_f32, -2.0]);
    let teacher = SparseTeacher::new(&indices, &log_probs[..], 1, 2, 4)?;
    let zeros = [0.0_f32; 4];
    let student = Logits::new(&zeros[..], 1, 4)?;
    let uncertainty = |teacher: SparseTeacher| -> Result<f64> {
        let batch = Batch::new(teacher, &[2_i64])?;
        Ok(cpu::forward(&Objective::default(), &batch, student)?.tokens[0].uncertainty)
    };
    assert!((uncertainty(teacher)? - (1.0 - (-0.5_f64).exp())).abs() < 1e-6);
    let known = teacher.with_target_log_probs(&[-0.7])?;
    assert!((uncertainty(known)? - (1.0 - (-0.7_f64).exp())).abs() < 1e-6);
    // p = e^-0.7, e^-2.
    let expected = (-2.0_f64).exp() / ((-2.0_f64).exp() + (-0.7_f64).exp());
    assert!((uncertainty(known.with_tail(Tail::Zero))? - expected).abs() < 1e-6);

    // The teacher's likeliest token is that of the K, whatever is given for the targets.
    let objective = Objective::default().with_target(Target::Teacher);
    let output = cpu::forward(&objective, &Batch::unlabelled(known), student)?;
    assert!((output.tokens[0].uncertainty - (1.0 - (-0.5_f64).exp())).abs() < 1e-6);
    Ok(())
}

/// A gradient over the logits, in bfloat16 and with cross entropy, is the one beside them.
#[test]
fn in_place_is_beside() -> Result<()> {
    let (tokens, vocab) = (5, 700);
    let (teacher, student) = (random(5, tokens * vocab), random(6, tokens * vocab));
    let student: Vec<bf16> = student.into_iter().map(bf16::from_f32).collect();
    let labels = [1_i64, 699, -100, 5, 6];
    let known = known(&teacher, vocab, 64, &labels);
    for tail in TAILS {
        for objective in [
            Objective::default(),
            Objective::kl().with_temperature(2.0).and_then(|o| o.with_ce_weight(0.5))?,
        ] {
            let batch = Batch::new(known.teacher(vocab).with_tail(tail), &labels)?;
            let (mut beside, mut over) = (vec![bf16::NAN; tokens * vocab], student.clone());
            let to = LogitsMut::new(&mut beside, tokens, vocab)?;
            let from = Logits::new(&student, tokens, vocab)?;
            let loss = cpu::forward_backward(&objective, &batch, from, to)?.loss;
            let to = LogitsMut::new(&mut over, tokens, vocab)?;
            assert_eq!(cpu::forward_backward_in_place(&objective, &batch, to)?.loss, loss);
            assert_eq!(cpu::forward(&objective, &batch, from)?.loss, loss);
            assert!(beside == over, "{tail:?}");
            assert!(beside[2 * vocab..3 * vocab].iter().all(|g| g.to_f32() == 0.0));
        }
    }
    Ok(())
}

/// Both calls by address are those by view, and bad addresses are refused.
#[test]
fn by_address() -> Result<()> {
    let (tokens, vocab, top_k) = (4, 50, 8);
    let (teacher, student) = (random(7, tokens * vocab), random(8, tokens * vocab));
    let labels = [1_i64, 49, -100, 5];
    let known = known(&teacher, vocab, top_k, &labels);
    let objective = Objective::default();
    let batch = Batch::new(known.teacher(vocab), &labels)?;
    let mut expected = vec![0.0_f32; tokens * vocab];
    let to = LogitsMut::new(&mut expected, tokens, vocab)?;
    let student_logits = Logits::new(&student, tokens, vocab)?;
    let output = cpu::forward_backward(&objective, &batch, student_logits, to)?;

    let (mut loss, mut gradient) = (f32::NAN, vec![f32::NAN; tokens * (vocab + 2)]);
    let logits =
        |address: u64, row: usize| RawLogits { address, dtype: Dtype::F32, strides: row.into() };
    let call = RawSparseCall {
        tokens: RawTokens {
            tokens,
            vocab,
            labels: Some(RawLabels::I64(labels.as_ptr() as u64)),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        },
        teacher: RawSparseTeacher {
            top_k,
            indices: RawLabels::I64(known.indices.as_ptr() as u64),
            log_probs: known.log_probs.as_ptr() as u64,
            dtype: Dtype::F32,
            target_log_probs: Some(known.of_targets.as_ptr() as u64),
            target_rounding: Dtype::F32,
            tail: Tail::Bucket,
        },
        student: logits(student.as_ptr() as u64, vocab),
        gradient: Some(logits(gradient.as_mut_ptr() as u64, vocab + 2)),
        gradient_padding: 2,
    };
    let to = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
    // SAFETY: the addresses are of arrays of the shapes given.
    let run = |call: &RawSparseCall| unsafe { cpu::raw::run_sparse(None, &objective, call, &to) };
    run(&call)?;
    assert_eq!(loss, output.loss as f32);
    for (padded, row) in gradient.chunks(vocab + 2).zip(expected.chunks(vocab)) {
        assert!(padded[..vocab] == *row && padded[vocab..] == [0.0, 0.0]);
    }

    let mut margins = vec![f32::NAN; tokens];
    let to_margins = margins.as_mut_ptr() as u64;
    let write_margins = |teacher: &RawSparseTeacher, to| {
        // SAFETY: as above.
        unsafe { cpu::raw::sparse_margins(None, &objective, &call.tokens, teacher, to) }
    };
    write_margins(&call.teacher, to_margins)?;
    assert_eq!(margins, output.tokens.iter().map(|t| t.margin as f32).collect::<Vec<_>>());
    for (top_k, to, expected) in
        [(0, to_margins, "from 1 to 1024"), (4, 0, "margins is null"), (4, 2, "margins is 0x2")]
    {
        let teacher = RawSparseTeacher { top_k, ..call.teacher };
        let error = write_margins(&teacher, to).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }

    let with = |teacher: RawSparseTeacher| RawSparseCall { teacher, ..call };
    for (call, expected) in [
        (
            with(RawSparseTeacher { top_k: 0, ..call.teacher }),
            "a sparse teacher has 0 tokens in a row, but must have from 1 to 1024",
        ),
        (
            with(RawSparseTeacher { log_probs: 0, ..call.teacher }),
            "the address of the log-probabilities is null, but 32 elements were announced",
        ),
        (
            with(RawSparseTeacher { indices: RawLabels::I64(4), ..call.teacher }),
            "the address of the indices is 0x4, which is no multiple of an element's 8 bytes",
        ),
    ] {
        assert_eq!(run(&call).unwrap_err().to_string(), expected);
    }
    let overlapping = RawLogits { address: call.student.address + 4, ..call.student };
    let overlapping = RawSparseCall { gradient: Some(overlapping), gradient_padding: 0, ..call };
    assert!(matches!(run(&overlapping), Err(Error::Overlap { what: "the student's logits", .. })));
    Ok(())
}

/// What is wrong is told with its token and numbers, before anything is written.
#[test]
fn mistakes() -> Result<()> {
    let (tokens, vocab) = (3, 10);
    let student = random(9, tokens * vocab);
    let fails = |indices: [i64; 6], log_probs: [f32; 6], of_targets: Option<[f32; 3]>| {
        let teacher = SparseTeacher::new(&indices, &log_probs[..], tokens, 2, vocab).unwrap();
        let of_targets = of_targets.unwrap_or([-0.7; 3]);
        let teacher = teacher.with_target_log_probs(&of_targets).unwrap();
        let batch = Batch::new(teacher, &[1_i64, -100, 4]).unwrap();
        let mut gradient = vec![7.0_f32; tokens * vocab];
        let to = LogitsMut::new(&mut gradient, tokens, vocab).unwrap();
        let logits = Logits::new(&student, tokens, vocab).unwrap();
        let error = cpu::forward_backward(&Objective::default(), &batch, logits, to).unwrap_err();
        assert!(gradient.iter().all(|&g| g == 7.0));
        let of_margins = cpu::teacher_margins(&Objective::default(), &batch).unwrap_err();
        // NaN is no equal of itself.
        assert_eq!(of_margins.to_string(), error.to_string());
        error.to_string()
    };
    let (indices, log_probs) = ([1, 2, -9, 99, 5, 6], [-1.0, -2.0, f32::NAN, 9.0, -2.0, -3.0]);
    let replaced = |at: usize, index: i64| {
        let mut indices = indices;
        indices[at] = index;
        indices
    };
    let changed = |at: usize, log_prob: f32| {
        let mut log_probs = log_probs;
        log_probs[at] = log_prob;
        log_probs
    };
    for (error, expected) in [
        (
            fails(replaced(5, 10), log_probs, None),
            "index 1 of the teacher's token 2 is 10, but must be at least 0 and below the vocabulary size 10, or -1 for none",
        ),
        (
            fails(replaced(0, -2), log_probs, None),
            "index 0 of the teacher's token 0 is -2, but must be at least 0 and below the vocabulary size 10, or -1 for none",
        ),
        (
            fails(replaced(5, 5), log_probs, None),
            "the teacher's token 2 has index 5 twice, at 0 and at 1",
        ),
        (
            fails(indices, changed(4, f32::NAN), None),
            "log-probability 0 of the teacher's token 2 is NaN",
        ),
        (
            fails(indices, log_probs, Some([-0.7, 0.0, 0.001])),
            "the teacher's log-probability of token 2 is 0.001, but a probability is at most 1",
        ),
        (
            fails(indices, log_probs, Some([-0.7, 0.0, f32::NAN])),
            "the teacher's log-probability of token 2 is NaN, but a probability is at most 1",
        ),
    ] {
        assert_eq!(error, expected);
    }
    let error = fails(indices, changed(5, -0.5), None);
    assert!(
        error.starts_with("the teacher's probabilities of token 2 add up to 1.2384"),
        "{error}"
    );

    let student = Logits::new(&student, tokens, vocab)?;
    let teacher =
        SparseTeacher::new(&[1_i32, 2, 1, 2, 1, -1], &[-2.0_f32; 6][..], tokens, 2, vocab)?;
    let batch = Batch::new(teacher, &[1_i64, 2, 7])?;
    let error = cpu::forward(&Objective::default(), &batch, student).unwrap_err();
    assert_eq!(error, Error::SparseTarget { token: 2, target: 7, top_k: 2 });
    let zero = Batch::new(teacher.with_tail(Tail::Zero), &[1_i64, 2, 1])?;
    let reverse = Objective::default().with_divergence(Divergence::ReverseKl)?;
    assert_eq!(cpu::forward(&reverse, &zero, student).unwrap_err(), Error::ReverseKlOfZeroTail);
    let none = SparseTeacher::new(&[-1_i32; 3], &[0.0_f32; 3][..], tokens, 1, vocab)?;
    let by_teacher = Objective::default().with_target(Target::Teacher);
    let error = cpu::forward(&by_teacher, &Batch::unlabelled(none), student).unwrap_err();
    assert_eq!(error, Error::SparseEmpty { token: 0, top_k: 1 });

    // Rounding is no mistake: what is above 1 by as much as the dtype may make it is taken for 1.
    let above = [bf16::from_f32(-0.69), bf16::from_f32(-0.69)];
    let teacher = SparseTeacher::new(&[1_i32, 2], &above[..], 1, 2, vocab)?;
    let batch = Batch::new(teacher.with_target_log_probs(&[-0.69])?, &[1_i64])?;
    let one = Logits::new(&[0.0_f32; 10][..], 1, vocab)?;
    assert!(matches!(
        SparseTeacher::new(&[1_i32], &[0.0_f32; 2][..], 1, 1, vocab),
        Err(Error::SparseLength { .. })
    ));
    let error = cpu::forward(&Objective::default(), &batch, one);
    assert!(error.is_ok(), "{error:?}");
    for top_k in [0, 1025] {
        let entries = vec![0_i32; top_k];
        let log_probs = vec![-9.0_f32; top_k];
        let teacher = SparseTeacher::new(&entries, &log_probs, 1, top_k, vocab);
        assert!(matches!(teacher, Err(Error::TopK { .. })));
    }
    let teacher = SparseTeacher::new(&[0_i32], &[-9.0_f32][..], 1, 1, i32::MAX as usize + 1);
    assert!(matches!(teacher, Err(Error::TooLarge { value: 2_147_483_648, .. })));
    Ok(())
}

/// A row whose probabilities cannot be those of a distribution, by its tail, is told with its token and its mass.
#[test]
fn masses_that_no_tail_completes() -> Result<()> {
    let (tokens, vocab) = (2, 3);
    let student = random(12, tokens * vocab);
    let student = Logits::new(&student, tokens, vocab)?;
    let run = |log_probs: &[f32; 6], of_targets: &[f32; 2], tail, rounding| {
        let teacher = SparseTeacher::new(&[0_i32, 1, 2, 0, 1, 2], &log_probs[..], 2, 3, vocab)?;
        let teacher = teacher.with_target_log_probs(of_targets)?.with_target_rounding(rounding);
        let batch = Batch::new(teacher.with_tail(tail), &[0_i64, 1])?;
        let margins = cpu::teacher_margins(&Objective::default(), &batch);
        let output = cpu::forward(&Objective::default(), &batch, student);
        assert_eq!(margins.err(), output.as_ref().err().cloned());
        output
    };
    let third = (1.0_f32 / 3.0).ln();
    let none = f32::NEG_INFINITY;
    let empty = [third, third, third, none, none, none];
    let error = run(&empty, &[third, none], Tail::Zero, Dtype::F32).unwrap_err();
    assert_eq!(error, Error::SparseNoMass { token: 1 });
    assert!(error.to_string().contains("of token 1, its target's among them, are all 0"));
    // The least mass is one to renormalise.
    let least =
        run(&[third, third, third, none, none, -1e30], &[third, none], Tail::Zero, Dtype::F32);
    assert!(least?.tokens.iter().all(|token| !token.uncertainty.is_nan()));

    let tenth = 0.1_f32.ln();
    let short = [third, third, third, tenth, tenth, tenth];
    for tail in [Tail::Uniform, Tail::Bucket] {
        for log_probs in [&short, &empty] {
            let of_target = log_probs[4];
            let error = run(log_probs, &[third, of_target], tail, Dtype::F32).unwrap_err();
            let Error::SparseMassMissing { token: 1, mass, vocab: 3, .. } = error else {
                panic!("{error}")
            };
            assert!((mass - 3.0 * f64::from(of_target).exp()).abs() < 1e-6);
        }
    }
    let renormalised = run(&short, &[third, tenth], Tail::Zero, Dtype::F32)?;
    assert!((renormalised.tokens[1].uncertainty - 2.0 / 3.0).abs() < 1e-6);

    // Half a percent too much, or too little, is what rounding makes of float16, and not of float32.
    for off in [1.005_f32, 0.995] {
        let scaled = [third, third, third, third, third + off.ln() * 3.0, third];
        let of_targets = [third, scaled[4]];
        for tail in [Tail::Uniform, Tail::Bucket] {
            assert!(run(&scaled, &of_targets, tail, Dtype::F32).is_err(), "{off} {tail:?}");
            assert!(run(&scaled, &of_targets, tail, Dtype::F16).is_ok(), "{off} {tail:?}");
        }
    }
    let error = run(&[-0.7; 6], &[-0.7; 2], Tail::Bucket, Dtype::Bf16).unwrap_err();
    assert!(matches!(error, Error::SparseMass { dtype: Dtype::Bf16, .. }), "{error}");
    Ok(())
}

/// By tail zero reverse KL of the target, or not, is finite, and is that of the known probabilities, renormalised.
#[test]
fn reverse_kl_of_targets_alone_has_tail_zero() -> Result<()> {
    let (tokens, vocab) = (9, 57);
    let (teacher, student) = (random(13, tokens * vocab), random(14, tokens * vocab));
    let labels = [3_i64, 56, -100, 0, 12, 20, 56, 7, 8];
    let known = known(&teacher, vocab, 5, &labels);
    let batch = Batch::new(known.teacher(vocab).with_tail(Tail::Zero), &labels)?;
    let objective = Objective::tkd().with_divergence(Divergence::ReverseKl)?;
    let mut gradient = vec![f32::NAN; tokens * vocab];
    let to = LogitsMut::new(&mut gradient, tokens, vocab)?;
    let logits = Logits::new(&student, tokens, vocab)?;
    let output = cpu::forward_backward(&objective, &batch, logits, to)?;

    let loss_at = |student: &[f32]| {
        let mut total = 0.0;
        for (token, &label) in labels.iter().enumerate().filter(|(_, label)| **label >= 0) {
            let label = label as usize;
            let row = token * 5..token * 5 + 5;
            let entries = known.indices[row.clone()].iter().zip(&known.log_probs[row]);
            let others = entries.filter(|(j, _)| **j != label as i64);
            let others: f64 = others.map(|(_, &p)| f64::from(p).exp()).sum();
            let own = f64::from(known.of_targets[token]).exp();
            let p = own / (own + others);
            let logits = &student[token * vocab..][..vocab];
            let sum: f64 = logits.iter().map(|&z| f64::from(z).exp()).sum();
            let q = f64::from(logits[label]).exp() / sum;
            total += q * (q / p).ln() + (1.0 - q) * ((1.0 - q) / (1.0 - p)).ln();
        }
        total / 8.0
    };
    let exact = loss_at(&student);
    assert!((output.loss - exact).abs() <= 1e-6 * exact, "{} {exact}", output.loss);
    let mut moved = student.clone();
    for at in (0..tokens * vocab).step_by(7) {
        let ends = [0.01_f32, -0.01].map(|step| {
            moved[at] = student[at] + step;
            (f64::from(moved[at]), loss_at(&moved))
        });
        moved[at] = student[at];
        let slope = (ends[0].1 - ends[1].1) / (ends[0].0 - ends[1].0);
        assert!((f64::from(gradient[at]) - slope).abs() <= 1e-5, "{} {slope}", gradient[at]);
    }
    for weight in [0.0, 1.0] {
        let objective = Objective::default().with_divergence(Divergence::ReverseKl)?;
        let objective = objective.with_ce_weight(1.0)?.with_kd_weight(weight)?;
        assert_eq!(cpu::forward(&objective, &batch, logits).is_ok(), weight == 0.0);
    }
    Ok(())
}

/// Over many seeds the mean gradient of draws is the dense teacher's, within what its own spread allows, for the objectives of
/// forward KL; that of the renormalised likeliest tokens is not, nor that of draws by other divergences.
#[test]
fn draws_are_unbiased() -> Result<()> {
    let (tokens, vocab, draws, runs) = (4, 40, 6, 4000_u32);
    let (teacher, student) = (random(15, tokens * vocab), random(16, tokens * vocab));
    let teacher: Vec<f32> = teacher.iter().map(|z| 0.6 * z).collect();
    let labels = [3_i64, 39, 7, 0];
    let gradient_of = |objective: &Objective, batch: &Batch| -> Result<Vec<f64>> {
        let mut gradient = vec![0.0_f32; tokens * vocab];
        let to = LogitsMut::new(&mut gradient, tokens, vocab)?;
        cpu::forward_backward(objective, batch, Logits::new(&student, tokens, vocab)?, to)?;
        Ok(gradient.iter().map(|&g| g.into()).collect())
    };
    let drawn = |rng: &mut fastrand::Rng, unit: f32| -> Result<Known> {
        let (mut indices, mut log_probs, mut of_targets) = (Vec::new(), Vec::new(), Vec::new());
        for (logits, &label) in teacher.chunks(vocab).zip(&labels) {
            let row = TeacherRow::sampled(logits, label as usize, 1.0, draws, rng.f64())?;
            let empty = draws - row.indices.len();
            indices.extend(row.indices.iter().map(|&j| i64::from(j)));
            log_probs.extend(row.log_probs.iter().map(|p| p + unit));
            indices.extend([-1].repeat(empty));
            log_probs.extend([0.0].repeat(empty));
            of_targets.push(row.target_log_prob);
        }
        Ok(Known { indices, log_probs, of_targets })
    };
    // The largest distance of a mean from the exact gradient, in its standard deviations; a run is a batch of draws.
    let distance = |objective: &Objective, tail: Tail| -> Result<f64> {
        let dense = Batch::new(Logits::new(&teacher, tokens, vocab)?, &labels)?;
        let exact = gradient_of(objective, &dense)?;
        let (mut sum, mut squares) = (vec![0.0; exact.len()], vec![0.0; exact.len()]);
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..runs {
            // Weights in any unit are the same weights.
            let known = drawn(&mut rng, if tail == Tail::Sampled { 5.0 } else { 0.0 })?;
            let batch = Batch::new(known.teacher(vocab).with_tail(tail), &labels)?;
            for (i, gradient) in gradient_of(objective, &batch)?.into_iter().enumerate() {
                sum[i] += gradient - exact[i];
                squares[i] += (gradient - exact[i]).powi(2);
            }
        }
        let runs = f64::from(runs);
        let scale = exact.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
        let distances = sum.iter().zip(&squares).map(|(sum, squares)| {
            let mean = sum / runs;
            let deviation = ((squares / runs - mean * mean).max(0.0) / runs).sqrt();
            mean.abs() / (deviation + 1e-6 * scale)
        });
        Ok(distances.fold(0.0, f64::max))
    };
    // Of 160 means one is 4.5 of its deviations off in one of 900 tests.
    let bound = 4.5;
    for objective in [
        Objective::default(),
        Objective::kl(),
        Objective::dkd(),
        Objective::tkd().with_ce_weight(0.5)?,
    ] {
        let found = distance(&objective, Tail::Sampled)?;
        assert!(found < bound, "{objective:?}: {found}");
    }
    // JSD is not linear in the teacher's probabilities. Tail zero takes the same rows, and refuses no divergence but one.
    let jsd = Objective::plain().with_divergence(Divergence::Jsd { beta: 0.5 })?;
    let found = distance(&jsd, Tail::Zero)?;
    assert!(found > 10.0 * bound, "{found}");

    let likeliest = known(&teacher, vocab, draws, &labels);
    let batch = Batch::new(likeliest.teacher(vocab).with_tail(Tail::Zero), &labels)?;
    let dense = Batch::new(Logits::new(&teacher, tokens, vocab)?, &labels)?;
    let norm = |of: &[f64]| of.iter().map(|g| g * g).sum::<f64>().sqrt();
    let exact = gradient_of(&Objective::kl(), &dense)?;
    let of_likeliest = gradient_of(&Objective::kl(), &batch)?;
    let off: Vec<f64> = of_likeliest.iter().zip(&exact).map(|(one, other)| one - other).collect();
    assert!(norm(&off) > 0.3 * norm(&exact), "{} {}", norm(&off), norm(&exact));
    Ok(())
}

/// Margins and the terms of the target are exact, in whatever unit the weights are.
#[test]
fn draws_leave_the_target_exact() -> Result<()> {
    let (tokens, vocab) = (6, 31);
    let (teacher, student) = (random(17, tokens * vocab), random(18, tokens * vocab));
    let labels = [3_i64, 30, -100, 0, 12, 20];
    let dense = Batch::new(Logits::new(&teacher, tokens, vocab)?, &labels)?;
    let student = Logits::new(&student, tokens, vocab)?;
    let exact = cpu::forward(&Objective::default(), &dense, student)?;
    // The counts of draws themselves; the label's own is not looked at.
    let indices: Vec<i64> = labels.iter().flat_map(|&label| [5, label.max(0), 6, 7]).collect();
    let log_counts = [2.0_f32.ln(), 9.0, 0.0, 4.0_f32.ln()].repeat(tokens);
    let known = known(&teacher, vocab, 1, &labels);
    let sampled = SparseTeacher::new(&indices, &log_counts, tokens, 4, vocab)?
        .with_tail(Tail::Sampled)
        .with_target_log_probs(&known.of_targets)?;
    let batch = Batch::new(sampled, &labels)?;
    let output = cpu::forward(&Objective::default(), &batch, student)?;
    for (token, exact) in output.tokens.iter().zip(&exact.tokens) {
        assert_eq!((token.valid, token.hard), (exact.valid, exact.hard));
        assert!((token.tkd - exact.tkd).abs() <= 2e-6 * (1.0 + exact.tkd));
        assert!(
            (token.margin - exact.margin).abs() <= 2e-6 * (1.0 + exact.margin.abs())
                || !token.valid
        );
    }
    // DKD of the counts 2, 1, 4 over 7.
    let logits = |j: usize| f64::from(student.row(0).get(j));
    let others = (0..vocab).filter(|&j| j != 3);
    let log_sum = others.map(|j| logits(j).exp()).sum::<f64>().ln();
    let dkd: f64 = [(5, 2.0), (6, 1.0), (7, 4.0)]
        .map(|(j, count): (usize, f64)| count / 7.0 * ((count / 7.0).ln() - (logits(j) - log_sum)))
        .iter()
        .sum();
    assert!(
        (output.tokens[0].dkd - dkd).abs() <= 2e-6 * (1.0 + dkd),
        "{} {dkd}",
        output.tokens[0].dkd
    );
    Ok(())
}

/// What draws cannot stand for is told.
#[test]
fn mistakes_of_draws() -> Result<()> {
    let student = Logits::new(&[0.0_f32; 10][..], 2, 5)?;
    let (indices, weights) = ([1_i32, 2, 3, -1], [0.0_f32, 1.0, 0.0, 0.0]);
    let alone = SparseTeacher::new(&indices, &weights[..], 2, 2, 5)?.with_tail(Tail::Sampled);
    let teacher = alone.with_target_log_probs(&[-0.5, -0.25])?;
    let run = |objective: &Objective, teacher, labels: &[i64; 2]| {
        cpu::forward(objective, &Batch::new(teacher, labels)?, student).map(|output| output.loss)
    };
    let default = Objective::default();
    assert!(run(&default, teacher, &[0, 0])?.is_finite());
    let none = run(&default, teacher, &[0, 3]).unwrap_err();
    assert_eq!(none, Error::SparseNoDraws { token: 1, log_prob: -0.25 });
    assert!(
        none.to_string().contains("token 1 has no draw but its target")
            && none.to_string().contains("-0.25")
    );
    // One that has all of the mass leaves nothing to draw.
    assert!(run(&default, teacher.with_target_log_probs(&[-0.5, 0.0])?, &[0, 3])?.is_finite());
    assert_eq!(run(&default, alone, &[1, 3]).unwrap_err(), Error::SampledTarget);
    let by_teacher = default.with_target(Target::Teacher);
    assert_eq!(run(&by_teacher, teacher, &[0, 0]).unwrap_err(), Error::SampledTarget);
    for divergence in [
        Divergence::ReverseKl,
        Divergence::TotalVariation,
        Divergence::Jsd { beta: 0.5 },
        Divergence::SkewKl { alpha: 0.1 },
    ] {
        let error = run(&default.with_divergence(divergence)?, teacher, &[0, 0]).unwrap_err();
        assert_eq!(error, Error::SampledDivergence);
        assert!(run(&Objective::tkd().with_divergence(divergence)?, teacher, &[0, 0])?.is_finite());
    }
    assert!(
        run(&default.with_divergence(Divergence::Jsd { beta: 0.0 })?, teacher, &[0, 0]).is_ok()
    );

    let logits = [0.0_f32, 1.0, f32::NEG_INFINITY];
    assert_eq!(
        TeacherRow::sampled(&logits, 3, 1.0, 2, 0.0).unwrap_err(),
        Error::TeacherTarget { target: 3, vocab: 3 }
    );
    assert_eq!(
        TeacherRow::sampled(&logits, 0, 1.0, 0, 0.0).unwrap_err(),
        Error::TopK { top_k: 0, most: 1024 }
    );
    assert!(matches!(
        TeacherRow::sampled(&logits, 0, 1.0, 2, 1.0),
        Err(Error::Setting { value: 1.0, .. })
    ));
    assert!(matches!(
        TeacherRow::sampled(&logits, 0, 1.0, 2, f64::NAN),
        Err(Error::Setting { .. })
    ));
    assert!(matches!(
        TeacherRow::top_k(&[0.0, f32::NAN], None, 1.0, 1),
        Err(Error::TeacherLogit { index: 1, .. })
    ));
    assert_eq!(
        TeacherRow::top_k(&[f32::NEG_INFINITY; 2], None, 1.0, 1).unwrap_err(),
        Error::NoTeacherMass
    );
    // All draws are of the one token that has a probability, and none where that is the target.
    let row = TeacherRow::sampled(&logits, 0, 1.0, 7, 0.99)?;
    assert_eq!(row.indices, [1]);
    assert!(
        (f64::from(row.log_probs[0]).exp() + f64::from(row.target_log_prob).exp() - 1.0).abs()
            < 1e-6
    );
    let row = TeacherRow::sampled(&[0.0, f32::NEG_INFINITY], 0, 1.0, 7, 0.5)?;
    assert_eq!((row.indices.len(), row.target_log_prob), (0, 0.0));
    Ok(())
}

/// Where a student's tail is far below all known tokens, its mass is still told apart from none.
#[test]
fn a_minute_tail_keeps_its_digits() -> Result<()> {
    let vocab = 5000;
    let mut student = vec![-60.0_f32; vocab];
    (student[17], student[4000]) = (30.0, 29.5);
    let (indices, log_probs) = ([17_i32, 4000], [-0.8_f32, -0.9]);
    let teacher = SparseTeacher::new(&indices, &log_probs[..], 1, 2, vocab)?;
    let batch = Batch::new(teacher, &[17_i64])?;
    let output = cpu::forward(&Objective::kl(), &batch, Logits::new(&student, 1, vocab)?)?;
    let p = log_probs.map(|p| f64::from(p).exp());
    let rest = 1.0 - p[0] - p[1];
    let log_sum = 30.0 + (-0.5_f64).exp().ln_1p();
    let of_rest = -60.0 + 4998_f64.ln() - log_sum;
    let expected = p[0] * (p[0].ln() - (30.0 - log_sum))
        + p[1] * (p[1].ln() - (29.5 - log_sum))
        + rest * (rest.ln() - of_rest);
    assert!((output.loss - expected).abs() <= 1e-6 * expected, "{} {expected}", output.loss);
    Ok(())
}

/// A student that agrees with its teacher to rounding has one sign per token, in the mean of all signs and by itself: the rows
/// of the gradient add up to 0.
#[test]
fn ties_of_total_variation_add_up_to_0() -> Result<()> {
    let (tokens, vocab) = (300, 6);
    let student = random(11, tokens * vocab);
    let labels: Vec<i64> = (0..tokens as i64).map(|i| i % 6).collect();
    let tvd = Objective::plain().with_divergence(Divergence::TotalVariation)?;
    for top_k in [2, 6] {
        let known = known(&student, vocab, top_k, &labels);
        for tail in TAILS {
            let batch = Batch::new(known.teacher(vocab).with_tail(tail), &labels)?;
            let mut gradient = vec![f32::NAN; tokens * vocab];
            let to = LogitsMut::new(&mut gradient, tokens, vocab)?;
            cpu::forward_backward(&tvd, &batch, Logits::new(&student, tokens, vocab)?, to)?;
            for (token, row) in gradient.chunks(vocab).enumerate() {
                let sum: f32 = row.iter().sum();
                assert!(sum.abs() <= 1e-8, "{sum} of token {token}, K = {top_k}, {tail:?}");
            }
        }
    }
    Ok(())
}
