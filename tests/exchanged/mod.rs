//! The layouts that ranks exchange, against the words of kernels/params.h in float64, for any backend.

use std::ops::Range;

use atkd::battery::shards::Stages;
use atkd::shards::{Exchanged, RowState, Shard, SweepTerms};
use atkd::{Divergence, Logits, Objective};

pub const DIVERGENCES: [Divergence; 6] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.3 },
    Divergence::SkewKl { alpha: 0.1 },
    Divergence::SkewReverseKl { alpha: 0.2 },
    Divergence::TotalVariation,
];

/// Those of each of four ranks, of which one has none.
fn columns(vocab: usize) -> [Range<usize>; 4] {
    let (third, half) = (vocab / 3, vocab / 2);
    [0..third, third..third, third..half, half..vocab]
}

/// The ranks exchange states and, where the divergence has them, terms.
fn exchange(
    stages: &impl Stages,
    objective: &Objective,
    labels: &[i64],
    [teacher, student]: [Logits; 2],
) -> (Vec<RowState>, Vec<SweepTerms>) {
    let vocab = student.vocab();
    let (mut states, mut terms) = (Vec::new(), Vec::new());
    let ranks = columns(vocab).map(|columns| {
        let shard = Shard::new(labels, vocab, columns.start).unwrap();
        (shard, [teacher, student].map(|logits| logits.columns(columns.clone()).ok()))
    });
    for (shard, logits) in &ranks {
        match *logits {
            [Some(teacher), Some(student)] => {
                states.extend(stages.states(objective, shard, teacher, student).unwrap());
            }
            _ => states.extend(labels.iter().map(|_| RowState::EMPTY)),
        }
    }
    for (shard, logits) in ranks.iter().filter(|_| objective.has_two_sweeps()) {
        let exchanged = Exchanged::new(&states);
        match *logits {
            [Some(teacher), Some(student)] => {
                let own = stages.terms(objective, shard, &exchanged, teacher, student);
                terms.extend(own.unwrap());
            }
            _ => terms.extend(labels.iter().map(|_| SweepTerms::EMPTY)),
        }
    }
    (states, terms)
}

/// log2(e) / T, in float32, in which all that exchange states have it.
fn octaves(temperature: f64) -> f64 {
    ((1.0 / temperature) as f32 * std::f32::consts::LOG2_E).into()
}

const GAP_UNIT: f64 = 18_446_744_073_709_551_616.0;

/// The number that the exponents of a model are relative to, by kernels/params.h.
fn relative_to(max: f32, temperature: f64) -> f64 {
    let exact = f64::from(max) * octaves(temperature);
    let nearest = (max.mul_add(octaves(temperature) as f32, 12_582_912.0) - 12_582_912.0).into();
    if exact.abs() >= 262_144.0 {
        return exact;
    }
    assert!(f64::abs(nearest - exact) <= 0.5, "{nearest} is not the integer nearest to {exact}");
    nearest
}

/// Compares a state with what kernels/params.h says that it is.
fn check_state(
    state: &RowState,
    rows: [&[f64]; 2],
    target: usize,
    objective: &Objective,
    at_1: bool,
) {
    let t = objective.temperature();
    let others: Vec<usize> = (0..rows[0].len()).filter(|&j| j != target).collect();
    let near = |found: f32, exact: f64, unit: f64, what: &str| {
        let near = exact.is_finite() && (f64::from(found) - exact).abs() <= 3e-6 * unit;
        assert!(near || found == exact as f32, "{what}: {found}, but exactly {exact}");
    };
    let sum = |row: &[f64], max: f32, t: f64| -> f64 {
        let shift = relative_to(max, t);
        others.iter().map(|&j| (row[j] * octaves(t) - shift).exp2()).sum()
    };
    let maxima = [state.teacher_max, state.student_max];
    for (row, max) in rows.iter().zip(maxima) {
        let largest = others.iter().map(|&j| row[j]).fold(f64::from(f32::MIN), f64::max);
        let below = (largest - f64::from(max)) * octaves(t);
        assert!((0.0..5.0).contains(&below), "{max} of {largest}");
    }
    let [teacher, student] = [0, 1].map(|model| sum(rows[model], maxima[model], t));
    near(state.teacher_sum, teacher, teacher, "the teacher's sum");
    near(state.student_sum, student, student, "the student's sum");
    let exact_at_1 = if at_1 { sum(rows[1], state.student_max, 1.0) } else { 0.0 };
    near(state.student_sum_at_1, exact_at_1, exact_at_1, "the student's sum at temperature 1");

    let [x_of, y_of] = [0, 1].map(|model| {
        let shift = relative_to(maxima[model], t);
        move |j: usize| rows[model][j] * octaves(t) - shift
    });
    let mut cross = (0.0, 0.0);
    let mut add = |weight: f64, gap: f64| {
        if weight > 0.0 {
            cross = (cross.0 + weight * gap, cross.1 + weight * (1.0 + gap.abs()));
        }
    };
    match objective.divergence() {
        Divergence::ForwardKl => {
            for &j in &others {
                let ruled_out = rows[0][j] > f64::NEG_INFINITY && rows[1][j] == f64::NEG_INFINITY;
                let gap = x_of(j) - y_of(j);
                add(
                    if ruled_out { 1.0 } else { x_of(j).exp2() },
                    if ruled_out { f64::INFINITY } else { gap },
                );
            }
        }
        Divergence::ReverseKl => {
            let [reference, max] = [state.teacher_reference, state.student_max].map(f64::from);
            for &j in &others {
                let ruled_out = rows[1][j] > f64::NEG_INFINITY && rows[0][j] == f64::NEG_INFINITY;
                // In this order no logit is lost beside a finite mask.
                let gap = ((rows[0][j] - reference) - (rows[1][j] - max)) * octaves(t);
                add(
                    if ruled_out { 1.0 } else { y_of(j).exp2() },
                    if ruled_out { f64::NEG_INFINITY } else { gap },
                );
            }
            let is_reference = |&j: &usize| {
                rows[1][j] as f32 == state.student_max
                    && rows[0][j].max(f32::MIN.into()) as f32 == state.teacher_reference
            };
            assert!(
                student == 0.0 || others.iter().any(is_reference),
                "{}",
                state.teacher_reference
            );
        }
        _ => {}
    }
    near(state.cross_term, cross.0 / GAP_UNIT, cross.1 / GAP_UNIT, "the cross term");
}

pub fn states_are_what_they_say(stages: &impl Stages) {
    let (tokens, vocab) = (12, 613);
    let mut random = fastrand::Rng::with_seed(3);
    let mut teacher: Vec<f32> = (0..tokens * vocab).map(|_| 20.0 * random.f32() - 10.0).collect();
    let mut student: Vec<f32> = teacher.iter().map(|z| z + 3.0 * random.f32()).collect();
    let row = |token: usize| token * vocab..(token + 1) * vocab;
    // Logits of sizes whose exponents have no digits to spare.
    for logits in [&mut teacher, &mut student] {
        logits[row(1)].iter_mut().for_each(|z| *z += 3e6);
        logits[row(2)].iter_mut().for_each(|z| *z *= 1e5);
    }
    // The largest logits are last, so that every estimate of them is exceeded; and first.
    (teacher[row(3).end - 1], student[row(3).end - 1]) = (60.0, 50.0);
    (teacher[row(4).start], student[row(4).start]) = (60.0, 50.0);
    // Tokens that a model rules out, or both do; all of a shard.
    let [out, lowest] = [f32::NEG_INFINITY, f32::MIN];
    student[row(5).start + 300] = out;
    teacher[row(6).start + 300] = out;
    (teacher[row(7).start + 300], student[row(7).start + 300]) = (out, out);
    teacher[row(8)][..300].fill(out);
    student[row(8)][..300].fill(out);
    student[row(9)][300..].fill(lowest);
    teacher[row(10)][..500].fill(-1e4);
    let labels: Vec<i64> = (0..tokens).map(|token| (token * 97 % vocab) as i64).collect();
    let logits = [&teacher, &student].map(|l| Logits::new(l, tokens, vocab).unwrap());
    for divergence in DIVERGENCES {
        for (temperature, ce_weight) in [(1.0, 0.5), (2.0, 0.0), (2.5, 1.0)] {
            let objective = Objective::default()
                .with_divergence(divergence)
                .and_then(|o| o.with_temperature(temperature))
                .and_then(|o| o.with_ce_weight(ce_weight))
                .unwrap();
            let (states, _) = exchange(stages, &objective, &labels, logits);
            for (rank, columns) in columns(vocab).into_iter().enumerate() {
                for token in 0..tokens {
                    let state = &states[rank * tokens + token];
                    let of = |logits: &[f32]| -> Vec<f64> {
                        logits[row(token)][columns.clone()].iter().map(|&z| z.into()).collect()
                    };
                    let (teacher, student) = (of(&teacher), of(&student));
                    let target = labels[token] as usize;
                    if columns.contains(&target) {
                        let within = target - columns.start;
                        assert_eq!(state.target, target as i32);
                        assert_eq!(f64::from(state.teacher_target), teacher[within]);
                        assert_eq!(f64::from(state.student_target), student[within]);
                    } else {
                        assert_eq!(state.target, -1);
                    }
                    let at_1 = temperature != 1.0 && ce_weight != 0.0;
                    let target = target.wrapping_sub(columns.start);
                    check_state(state, [&teacher, &student], target, &objective, at_1);
                }
            }
        }
    }
}

/// The terms of the second sweep against their meaning in float64.
pub fn terms_are_what_they_say(stages: &impl Stages) {
    const VOCAB: usize = 419;
    let mut random = fastrand::Rng::with_seed(4);
    let [teacher, student] =
        [(); 2].map(|()| Vec::from_iter((0..3 * VOCAB).map(|_| 6.0 * random.f32() - 3.0)));
    let labels = [7_i64, 400, 139];
    for divergence in &DIVERGENCES[2..] {
        for objective in [Objective::plain(), Objective::dkd()] {
            let objective = objective.with_divergence(*divergence).unwrap();
            let objective = objective.with_temperature(1.7).unwrap();
            let logits = [&teacher, &student].map(|l| Logits::new(l, 3, VOCAB).unwrap());
            let (_, terms) = exchange(stages, &objective, &labels, logits);
            for token in 0..3 {
                let target = labels[token] as usize;
                let counts = |j: usize| objective.is_plain() || j != target;
                let [p, q] = [&teacher, &student].map(|logits| {
                    let row = &logits[VOCAB * token..][..VOCAB];
                    let powers: Vec<f64> =
                        row.iter().map(|&z| (f64::from(z) / 1.7).exp()).collect();
                    let sum: f64 =
                        powers.iter().enumerate().filter(|(j, _)| counts(*j)).map(|(_, e)| e).sum();
                    powers.into_iter().map(|power| power / sum).collect::<Vec<_>>()
                });
                for (rank, columns) in columns(VOCAB).into_iter().enumerate() {
                    let mut exact = [0.0; 3];
                    for j in columns.filter(|&j| j != target) {
                        let (p, q) = (p[j], q[j]);
                        let share = match *divergence {
                            Divergence::Jsd { beta } => beta,
                            Divergence::SkewKl { alpha } => alpha,
                            Divergence::SkewReverseKl { alpha } => 1.0 - alpha,
                            _ => {
                                exact[0] += (p - q).abs();
                                exact[1] += if p == q { 0.0 } else { q * (q - p).signum() };
                                continue;
                            }
                        };
                        let m = share * p + (1.0 - share) * q;
                        exact[0] += p * (p / m).log2();
                        exact[1] += q * (q / m).log2();
                        if !matches!(divergence, Divergence::Jsd { .. }) {
                            exact[2] += q * (p - q) / m;
                        }
                    }
                    let found = &terms[3 * rank + token];
                    for (found, exact) in
                        [found.teacher, found.student, found.slope].into_iter().zip(exact)
                    {
                        let error = (f64::from(found) - exact).abs();
                        assert!(
                            error < 1e-6,
                            "{divergence:?} rank {rank}: {found}, but exactly {exact}"
                        );
                    }
                }
            }
        }
    }
}
