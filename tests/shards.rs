//! Shards of the vocabulary on the CPU, beside what the battery (tests/battery.rs) goes through.

mod exchanged;

use std::ops::Range;

use atkd::battery::shards::{Cpu, columns};
use atkd::cpu::shards;
use atkd::shards::{Exchanged, RowRest, RowState, Shard, SweepTerms};
use atkd::{
    Batch, Divergence, Error, Logits, LogitsMut, Objective, Reduction, SelectionRule,
    SparseTeacher, Tail, Target, TeacherRow, cpu, reference,
};

const VOCAB: usize = 37;

fn random(seed: u64, tokens: usize) -> Vec<f32> {
    let mut random = fastrand::Rng::with_seed(seed);
    (0..tokens * VOCAB).map(|_| 6.0 * random.f32() - 3.0).collect()
}

fn logits(elements: &[f32]) -> Logits<'_> {
    Logits::new(elements, elements.len() / VOCAB, VOCAB).unwrap()
}

fn part(elements: &[f32], columns: Range<usize>) -> Logits<'_> {
    logits(elements).columns(columns).unwrap()
}

/// The states of all ranks, `[ranks, tokens]`.
fn states(
    objective: &Objective,
    shard: impl Fn(usize) -> Shard<'static>,
    teacher: &[f32],
    student: &[f32],
    ranks: &[Range<usize>],
) -> Vec<RowState> {
    let of_rank = |columns: &Range<usize>| {
        let shard = shard(columns.start);
        if columns.is_empty() {
            return vec![RowState::EMPTY; shard.tokens()];
        }
        let (teacher, student) = (part(teacher, columns.clone()), part(student, columns.clone()));
        shards::states(objective, &shard, teacher, student).unwrap()
    };
    ranks.iter().flat_map(of_rank).collect()
}

#[track_caller]
fn near(what: &str, actual: f32, expected: f64) {
    let error = (f64::from(actual) - expected).abs();
    assert!(error <= 2e-6 * (1.0 + expected.abs()), "{what} is {actual}, but must be {expected}");
}

#[test]
fn what_is_exchanged_is_what_the_header_says() {
    exchanged::states_are_what_they_say(&Cpu);
    exchanged::terms_are_what_they_say(&Cpu);
}

/// Tokens over three ranks, one of them without any, and the vocabulary over three: losses add up to the whole batch's, and
/// the gradients are its rows'.
#[test]
fn parts_of_tokens_add_up() {
    static LABELS: [i64; 7] = [3, 36, -100, 0, 12, 20, 36];
    let (teacher, student) = (random(3, 7), random(4, 7));
    let median = Objective::default().with_selection_rule(SelectionRule::Median);
    let group_mean = median.with_reduction(Reduction::GroupMean).unwrap();
    let jsd = Objective::default().with_divergence(Divergence::Jsd { beta: 0.5 }).unwrap();
    for objective in [Objective::default(), median, group_mean, jsd] {
        let objective = objective.with_ce_weight(0.3).unwrap();
        let mut whole = vec![0.0_f32; student.len()];
        let batch = Batch::new(logits(&teacher), &LABELS).unwrap();
        let to = LogitsMut::new(&mut whole, 7, VOCAB).unwrap();
        let expected = cpu::forward_backward(&objective, &batch, logits(&student), to).unwrap();
        let ranks = columns(VOCAB, 3);
        let of_tokens = [0..2, 2..2, 2..7].map(|tokens: Range<usize>| {
            let row = tokens.start * VOCAB..tokens.end * VOCAB;
            (tokens, &teacher[row.clone()], &student[row])
        });
        let shard = |tokens: &Range<usize>, first: usize| {
            Shard::new(&LABELS[tokens.clone()], VOCAB, first).unwrap()
        };
        let exchanged = of_tokens.each_ref().map(|(tokens, teacher, student)| {
            states(&objective, |first| shard(tokens, first), teacher, student, &ranks)
        });
        let mut margins = Vec::new();
        for ((tokens, ..), states) in of_tokens.iter().zip(&exchanged) {
            let shard = shard(tokens, 0);
            margins.extend(shards::margins(&objective, &shard, &Exchanged::new(states)).unwrap());
        }
        let valid = LABELS.map(|label| label >= 0);
        let hard = objective.select_hard(&margins, Some(&valid), None).unwrap();
        assert_eq!(hard, expected.tokens.iter().map(|token| token.hard).collect::<Vec<_>>());
        let counts = [6, hard.iter().filter(|&&hard| hard).count()];

        let (mut loss, mut gradient) = (0.0, vec![f32::NAN; student.len()]);
        for ((tokens, teacher, student), states) in of_tokens.iter().zip(&exchanged) {
            if tokens.is_empty() {
                let shard = shard(tokens, 0).with_counts(counts[0], counts[1]);
                let output =
                    shards::finish(&objective, &shard, &Exchanged::new(states).with_terms(&[]));
                assert!(matches!(output, Err(Error::NoHardTokens)));
                let shard = shard.with_hard(&[]).unwrap();
                let output =
                    shards::finish(&objective, &shard, &Exchanged::new(states).with_terms(&[]));
                assert_eq!(output.unwrap().loss, 0.0);
                continue;
            }
            let shard = |first| {
                let shard = shard(tokens, first).with_counts(counts[0], counts[1]);
                shard.with_hard(&hard[tokens.clone()]).unwrap()
            };
            let mut terms = Vec::new();
            for columns in &ranks {
                if columns.is_empty() || !objective.has_two_sweeps() {
                    terms.resize(terms.len() + tokens.len(), SweepTerms::EMPTY);
                } else {
                    let (a, b) = (part(teacher, columns.clone()), part(student, columns.clone()));
                    let exchanged = Exchanged::new(states);
                    let shard = shard(columns.start);
                    terms.extend(shards::terms(&objective, &shard, &exchanged, a, b).unwrap());
                }
            }
            let exchanged = Exchanged::new(states).with_terms(&terms);
            for columns in ranks.iter().filter(|columns| !columns.is_empty()) {
                // In place.
                let mut to = student.to_vec();
                let mut rows = LogitsMut::new(&mut to, tokens.len(), VOCAB).unwrap();
                let over = rows.columns(columns.clone()).unwrap();
                let a = part(teacher, columns.clone());
                shards::gradient_in_place(&objective, &shard(columns.start), &exchanged, a, over)
                    .unwrap();
                for (row, token) in tokens.clone().enumerate() {
                    let from = &to[row * VOCAB..][columns.clone()];
                    gradient[token * VOCAB..][columns.clone()].copy_from_slice(from);
                }
            }
            loss += shards::finish(&objective, &shard(0), &exchanged).unwrap().loss;
        }
        assert!(
            (loss - expected.loss).abs() <= 3e-7 * expected.loss.abs() + 2e-7,
            "{loss} {}",
            expected.loss
        );
        for (one, other) in gradient.iter().zip(&whole) {
            assert!((one - other).abs() <= 5e-7, "{one} {other}");
        }
    }
}

/// The teacher's arg max is the lowest token of those with the largest logit, in whatever shards they are, and the arg
/// maxima of other shards are tokens as any.
#[test]
fn the_largest_of_the_shards_arg_maxima_is_the_target() {
    let objective = Objective::default().with_target(Target::Teacher).with_ce_weight(1.0).unwrap();
    let (mut teacher, student) = (random(5, 3), random(6, 3));
    teacher[20] = 9.0;
    teacher[31] = 9.0;
    // A row without a number above the others, and one that has its largest in the last shard.
    teacher[VOCAB..2 * VOCAB].fill(1.5);
    teacher[2 * VOCAB + 36] = 8.0;
    let batch = Batch::unlabelled(logits(&teacher));
    let exact = reference::forward(&objective, &batch, logits(&student)).unwrap();
    let shard = |first| Shard::unlabelled(3, VOCAB, first).unwrap();
    for ranks in [2, 3, 8] {
        let all = states(&objective, shard, &teacher, &student, &columns(VOCAB, ranks));
        let hard: Vec<bool> = exact.tokens.iter().map(|token| token.hard).collect();
        let shard = shard(0).with_hard(&hard).unwrap();
        let output = shards::finish(&objective, &shard, &Exchanged::new(&all)).unwrap();
        for (token, exact) in output.tokens.iter().zip(&exact.tokens) {
            near("the margin", token.margin as f32, exact.margin);
            near("the loss", token.loss as f32, exact.loss);
        }
    }
}

/// The loss and the gradient of a sparse teacher on each rank are those of float64 on one, by every tail, wherever the known
/// tokens and the label are; its terms, and who is hard, too.
#[test]
fn sparse_teachers() {
    const TOKENS: usize = 7;
    static LABELS: [i64; TOKENS] = [3, 36, -100, 0, 12, 20, 36];
    let (teacher, student) = (random(9, TOKENS), random(10, TOKENS));
    let (mut indices, mut log_probs, mut of_targets) = (Vec::new(), Vec::new(), Vec::new());
    for (row, label) in teacher.chunks(VOCAB).zip(LABELS) {
        let target = usize::try_from(label).ok();
        let row = TeacherRow::top_k(row, target, 1.0, 6).unwrap();
        indices.extend(row.indices);
        log_probs.extend(row.log_probs);
        of_targets.push(row.target_log_prob);
    }
    let o = Objective::default();
    let jsd = o.with_divergence(Divergence::Jsd { beta: 0.3 }).unwrap();
    let plain = Objective::plain().with_divergence(Divergence::TotalVariation).unwrap();
    let objectives = [
        o.with_ce_weight(0.4).unwrap(),
        Objective::kl().with_temperature(2.0).unwrap(),
        o.with_divergence(Divergence::ReverseKl).unwrap(),
        jsd.with_ce_weight(0.3).and_then(|o| o.with_temperature(0.5)).unwrap(),
        plain,
        Objective::plain().with_divergence(Divergence::SkewReverseKl { alpha: 0.2 }).unwrap(),
    ];
    for objective in objectives {
        for tail in [Tail::Bucket, Tail::Uniform, Tail::Zero, Tail::Sampled] {
            let sparse = SparseTeacher::new(&indices, &log_probs, TOKENS, 6, VOCAB)
                .and_then(|teacher| teacher.with_target_log_probs(&of_targets))
                .unwrap()
                .with_tail(tail);
            let batch = Batch::new(sparse, &LABELS).unwrap();
            let exact = reference::forward_backward(&objective, &batch, logits(&student));
            let (exact, whole) = match exact {
                Err(Error::ReverseKlOfZeroTail | Error::SampledDivergence) => continue,
                exact => exact.unwrap(),
            };
            for ranks in [1, 2, 3] {
                let ranks = columns(VOCAB, ranks);
                let shard = |first| Shard::new(&LABELS, VOCAB, first).unwrap();
                let full = || ranks.iter().filter(|columns| !columns.is_empty());
                let rests: Vec<RowRest> = full()
                    .flat_map(|columns| {
                        let student = part(&student, columns.clone());
                        shards::rests(&objective, &shard(columns.start), &sparse, student).unwrap()
                    })
                    .collect();
                let parts: Vec<Vec<f32>> = full()
                    .map(|columns| {
                        let (student, shard) =
                            (part(&student, columns.clone()), shard(columns.start));
                        shards::teacher_logits(&objective, &shard, &sparse, &rests, student)
                            .unwrap()
                    })
                    .collect();
                let of_rank = |rank: usize, columns: &Range<usize>| {
                    let teacher = Logits::new(&parts[rank][..], TOKENS, columns.len()).unwrap();
                    (teacher, part(&student, columns.clone()))
                };
                let mut states = Vec::new();
                for (rank, columns) in full().enumerate() {
                    let (a, b) = of_rank(rank, columns);
                    states.extend(shards::states(&objective, &shard(columns.start), a, b).unwrap());
                }
                let exchanged = Exchanged::new(&states);
                let margins = shards::margins(&objective, &shard(0), &exchanged).unwrap();
                let direct = cpu::teacher_margins(&objective, &batch).unwrap();
                let valid = LABELS.map(|label| label >= 0);
                let hard = objective.select_hard(&direct, Some(&valid), None).unwrap();
                let mut terms = Vec::new();
                for (rank, columns) in full().enumerate().filter(|_| objective.has_two_sweeps()) {
                    let (a, b) = of_rank(rank, columns);
                    let shard = shard(columns.start);
                    terms.extend(shards::terms(&objective, &shard, &exchanged, a, b).unwrap());
                }
                let exchanged = match objective.has_two_sweeps() {
                    true => exchanged.with_terms(&terms),
                    false => exchanged,
                };
                let of_hard = shard(0).with_hard(&hard).unwrap();
                let output = shards::finish(&objective, &of_hard, &exchanged).unwrap();
                let context = format!("{objective:?} {tail:?} {ranks:?}");
                assert!(
                    (output.loss - exact.loss).abs() <= 1e-6 * exact.loss.abs() + 2e-7,
                    "{context}: {} {}",
                    output.loss,
                    exact.loss
                );
                for (i, (token, exact)) in output.tokens.iter().zip(&exact.tokens).enumerate() {
                    assert_eq!((token.hard, token.valid), (exact.hard, exact.valid), "{context}");
                    if token.valid {
                        near("the margin", margins[i], exact.margin);
                        near("the direct margin", direct[i], exact.margin);
                        near("the loss", token.loss as f32, exact.loss);
                    }
                }
                for (rank, columns) in full().enumerate() {
                    let (a, b) = of_rank(rank, columns);
                    let shard = shard(columns.start).with_hard(&hard).unwrap();
                    let mut gradient = vec![f32::NAN; TOKENS * columns.len()];
                    let to = LogitsMut::new(&mut gradient, TOKENS, columns.len()).unwrap();
                    shards::gradient(&objective, &shard, &exchanged, a, b, to).unwrap();
                    for (token, row) in gradient.chunks(columns.len()).enumerate() {
                        let exact = &whole[token * VOCAB..][columns.clone()];
                        let largest = whole[token * VOCAB..][..VOCAB].iter();
                        let largest = largest.fold(0.0_f64, |largest, g| largest.max(g.abs()));
                        for (&one, other) in row.iter().zip(exact) {
                            assert!(
                                (f64::from(one) - other).abs() <= 2e-6 * largest + 5e-7,
                                "{context}: {one} {other}"
                            );
                        }
                    }
                }
            }
        }
    }
}

/// Masks of the student's, and rests of nothing: the gradient is finite where one rank has no part of the rest.
#[test]
fn sparse_teachers_at_the_edges() {
    let objective = Objective::kl();
    let (indices, log_probs) = ([0_i32, 1, 2], [-1.0_f32, -1.5, -2.0]);
    let sparse = SparseTeacher::new(&indices, &log_probs[..], 1, 3, 6).unwrap();
    let shard = |first| Shard::new(&[1_i64], 6, first).unwrap();
    let student = [1.0_f32, 0.0, 2.0, f32::NEG_INFINITY, -1e30, 3.0];
    let of = |columns: Range<usize>| Logits::new(&student[columns.clone()], 1, columns.len());
    let rests: Vec<RowRest> = [0..3, 3..6]
        .into_iter()
        .flat_map(|columns| {
            shards::rests(&objective, &shard(columns.start), &sparse, of(columns.clone()).unwrap())
                .unwrap()
        })
        .collect();
    assert_eq!(rests[0], RowRest::EMPTY);
    let made = |rests: &[RowRest], columns: Range<usize>| {
        let student = of(columns.clone())?;
        shards::teacher_logits(&objective, &shard(columns.start), &sparse, rests, student)
    };
    let (known, unknown) = (made(&rests, 0..3).unwrap(), made(&rests, 3..6).unwrap());
    let mass: f64 = log_probs.iter().map(|&p| f64::from(p).exp()).sum();
    let expected = (1.0 - mass).ln() - f64::from(log_probs[0]);
    assert!((f64::from(unknown[2] - known[0]) - expected).abs() < 1e-6);
    assert_eq!((unknown[0], unknown[1]), (f32::NEG_INFINITY, -1e30));

    let error = made(&[], 0..3).unwrap_err();
    assert_eq!(
        error.to_string(),
        "there are 0 of the student's sums for 1 token, but there must be one per rank and token, such as 1"
    );
    let by_teacher = objective.with_target(Target::Teacher);
    let error = shards::rests(&by_teacher, &shard(0), &sparse, of(0..3).unwrap()).unwrap_err();
    assert_eq!(error, Error::ShardOfTeacherTarget);
    let other = SparseTeacher::new(&indices, &log_probs[..], 1, 3, 7).unwrap();
    let error = shards::rests(&objective, &shard(0), &other, of(0..3).unwrap()).unwrap_err();
    assert!(matches!(error, Error::ShapeMismatch { what: "the sparse teacher", .. }));
    let reverse = objective.with_divergence(Divergence::ReverseKl).unwrap_or(Objective::plain());
    let zero = sparse.with_tail(Tail::Zero);
    let error = shards::rests(&reverse, &shard(0), &zero, of(0..3).unwrap()).unwrap_err();
    assert_eq!(error, Error::ReverseKlOfZeroTail);
}

/// A NaN is that of its token, in whatever shard.
#[test]
fn a_nan_stays_with_its_token() {
    static LABELS: [i64; 3] = [1, 2, 3];
    let objective = Objective::default();
    let (mut teacher, student) = (random(7, 3), random(8, 3));
    teacher[VOCAB + 30] = f32::NAN;
    let shard = |first| Shard::new(&LABELS, VOCAB, first).unwrap();
    let all = states(&objective, shard, &teacher, &student, &columns(VOCAB, 3));
    let exchanged = Exchanged::new(&all);
    let margins = shards::margins(&objective, &shard(0), &exchanged).unwrap();
    let hard = objective.select_hard(&margins, None, None).unwrap();
    let shard = shard(0).with_hard(&hard).unwrap();
    let output = shards::finish(&objective, &shard, &exchanged).unwrap();
    let are_nan: Vec<bool> = output.tokens.iter().map(|token| token.loss.is_nan()).collect();
    assert_eq!(are_nan, [false, true, false]);
}

#[test]
fn mistakes() {
    static LABELS: [i64; 2] = [1, 36];
    let objective = Objective::default();
    let (teacher, student) = (random(1, 2), random(2, 2));
    let says = |error: Error, words: &str| {
        assert!(error.to_string().contains(words), "{words:?} is not in {:?}", error.to_string());
    };
    says(
        Shard::new(&LABELS, VOCAB, 38).unwrap_err(),
        "0 columns from 38 on, but the vocabulary has 37",
    );
    let huge = Shard::unlabelled(1, 1 << 31, 0).unwrap_err();
    says(huge, "the vocabulary size is 2147483648, but must be at most 2147483647");
    let shard = |first| Shard::new(&LABELS, VOCAB, first).unwrap();
    let (a, b) = (part(&teacher, 0..9), part(&student, 0..9));
    let wrong = |first, a, b| shards::states(&objective, &shard(first), a, b).unwrap_err();
    says(wrong(30, a, b), "9 columns from 30 on, but the vocabulary has 37 tokens");
    says(wrong(0, a, part(&student, 0..8)), "the student's logits is [2, 8]");
    let other = Shard::new(&[1_i64, 37], VOCAB, 0).unwrap();
    says(shards::states(&objective, &other, a, b).unwrap_err(), "the label of token 1 is 37");
    let unlabelled = Shard::unlabelled(2, VOCAB, 0).unwrap();
    says(shards::states(&objective, &unlabelled, a, b).unwrap_err(), "no labels");
    says(shard(0).with_hard(&[true]).unwrap_err(), "mask of hard tokens");

    let all = states(&objective, shard, &teacher, &student, &columns(VOCAB, 3));
    let margins = |states: &[RowState]| {
        shards::margins(&objective, &shard(0), &Exchanged::new(states)).unwrap_err()
    };
    says(margins(&[]), "no row states");
    says(margins(&all[..5]), "5 of the row states for 2 tokens");
    // The second of the three has token 36.
    let without = [&all[..2], &all[4..]].concat();
    says(margins(&without), "no shard has the target of token 1");
    let exchanged = Exchanged::new(&all);
    says(
        shards::finish(&objective, &shard(0), &exchanged).unwrap_err(),
        "give the mask that select_hard makes",
    );
    says(shards::terms(&objective, &shard(0), &exchanged, a, b).unwrap_err(), "no second sweep");
    let jsd = objective.with_divergence(Divergence::Jsd { beta: 0.5 }).unwrap();
    let hard = shard(0).with_hard(&[true, false]).unwrap();
    says(shards::finish(&jsd, &hard, &exchanged).unwrap_err(), "the second sweep's terms");
    let terms = [SweepTerms::EMPTY; 3];
    says(
        shards::finish(&jsd, &hard, &exchanged.with_terms(&terms)).unwrap_err(),
        "3 of the second sweep's terms for 2 tokens",
    );
    let mut gradient = vec![7.0_f32; 16];
    let to = LogitsMut::new(&mut gradient, 2, 8).unwrap();
    says(shards::gradient(&objective, &hard, &exchanged, a, b, to).unwrap_err(), "[2, 8]");
    assert!(gradient.iter().all(|&g| g == 7.0), "nothing is written");
}
