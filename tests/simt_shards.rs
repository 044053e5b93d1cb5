//! The CUDA kernels for shards of the vocabulary, run by the simulator: against float64, and rank against rank.

mod simulated;
#[path = "simulated/shards.rs"]
mod stages;

use std::cell::Cell;

use atkd::shards::RowState;
use atkd::simt::{Exchanged, Extra, Simulation};
use atkd::{
    Batch, Divergence, Error, Logits, LogitsMut, Objective, Output, Reduction, Target, battery,
    reference,
};
use half::bf16;
use simulated::Input;
use stages::Shards;

/// Shards of uneven widths, some of them empty; so many in turn that types and settings, which repeat by threes and fives, meet
/// them all.
const WIDTHS: [&[usize]; 4] = [&[3, 1], &[2, 0, 5], &[3, 1, 0, 5, 2, 1, 4, 7], &[1]];

const DIVERGENCES: [Divergence; 6] = [
    Divergence::ForwardKl,
    Divergence::ReverseKl,
    Divergence::Jsd { beta: 0.3 },
    Divergence::SkewKl { alpha: 0.1 },
    Divergence::SkewReverseKl { alpha: 0.2 },
    Divergence::TotalVariation,
];

fn small(seed: u64) -> Simulation {
    Simulation { seed, block: 32, ..Simulation::default() }
}

#[test]
fn shards_pass_the_battery() {
    let turn = Cell::new(0);
    let backend = |objective: &Objective, batch: &Batch, student: Logits, mut to: LogitsMut| {
        let turn = turn.replace(turn.get() + 1);
        let simulation = Simulation { cluster: 1 + turn as u32 / 4 % 2, ..small(turn as u64) };
        Shards::new(simulation, objective, batch, student, WIDTHS[turn % 4]).run(&mut to)
    };
    let checks = battery::run(battery::Bounds::Kernels, backend, |_| {});
    battery::assert_all_pass(&checks);
}

/// The outcome of a call in shards, against the reference.
fn check(
    simulation: Simulation,
    objective: &Objective,
    input: &Input,
    widths: &[usize],
) -> (Output, Vec<f32>) {
    let (batch, student) = (input.batch(), input.view(&input.student));
    let mut gradient = vec![f32::NAN; student.elements().len()];
    let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
    let shards = Shards::new(simulation, objective, &batch, student, widths);
    let output = shards.run(&mut to).unwrap();
    let (exact, exact_gradient) = reference::forward_backward(objective, &batch, student).unwrap();
    let allowed = battery::compare::loss_within(exact.loss, 1.0);
    assert!((output.loss - exact.loss).abs() <= allowed, "{} {}", output.loss, exact.loss);
    for (found, exact) in gradient.iter().zip(exact_gradient) {
        assert!((f64::from(*found) - exact).abs() <= 1e-6, "{found}, but exactly {exact}");
    }
    (output, gradient)
}

/// The lowest token is the target where the largest logits of the teacher are equal, be they of one shard or of several; those of
/// the others are no targets.
#[test]
fn equal_arg_maxima_of_shards() {
    let mut input = Input::new(3, 300);
    let high = bf16::from_f32(12.0);
    for (token, equal) in [[20, 40, 290], [150, 160, 299], [80, 120, 240]].iter().enumerate() {
        equal.iter().for_each(|column| input.teacher[300 * token + column] = high);
    }
    for divergence in DIVERGENCES {
        for objective in [Objective::plain(), Objective::tkd(), Objective::dkd()] {
            let objective = objective.with_target(Target::Teacher);
            let objective = objective.with_divergence(divergence).unwrap();
            check(small(1), &objective, &input, &[1, 0, 1, 1]);
        }
    }
}

/// A divergence is infinite where one shard alone has what makes it so.
#[test]
fn tokens_that_a_model_rules_out() {
    let mut input = Input::new(4, 300);
    input.student[40] = bf16::NEG_INFINITY;
    input.teacher[300 + 140] = bf16::NEG_INFINITY;
    input.student[600 + 240] = bf16::NAN;
    // Its mass is none beside that of the other shards.
    input.student[900 + 40] = bf16::NEG_INFINITY;
    input.teacher[900 + 100..].iter_mut().for_each(|z| *z += bf16::from_f32(200.0));
    for divergence in DIVERGENCES {
        let objective = Objective::dkd().with_divergence(divergence).unwrap();
        let (batch, student) = (input.batch(), input.view(&input.student));
        let (exact, _) = reference::forward_backward(&objective, &batch, student).unwrap();
        let shards = Shards::new(small(2), &objective, &batch, student, &[1, 1, 1]);
        let output = shards.finish(&shards.exchange().unwrap(), Some(&[false; 4])).unwrap();
        for (found, exact) in output.tokens.iter().zip(&exact.tokens) {
            let [found, exact] = [found, exact].map(|token| token.dkd);
            let near = (found - exact).abs() <= 2e-6 * (1.0 + exact);
            assert!(
                near || found == exact || (found.is_nan() && exact.is_nan()),
                "{found} {exact}"
            );
        }
    }
}

#[test]
fn the_schedule_changes_no_bit() {
    let mut input = Input::new(3, 1003);
    input.labels[1] = -100;
    for divergence in DIVERGENCES {
        let objective = Objective::default().with_divergence(divergence).unwrap();
        for target in [Target::Label, Target::Teacher] {
            let objective = objective.with_target(target).with_ce_weight(0.4).unwrap();
            let run = |seed| check(small(seed), &objective, &input, &[2, 0, 5]);
            let first = run(0);
            for seed in 1..4 {
                assert_eq!(run(seed), first, "{divergence:?}, seed {seed}");
            }
        }
    }
}

/// As many blocks and clusters as an H200 gets.
#[test]
fn planned_shapes() {
    let input = Input::new(2, 60_001);
    let planned = Simulation { block: 1024, cluster: 8, ..Simulation::default() };
    for divergence in [Divergence::ForwardKl, Divergence::Jsd { beta: 0.5 }] {
        let objective = Objective::default().with_divergence(divergence).unwrap();
        check(planned, &objective, &input, &[3, 1]);
    }
}

/// More ranks than a warp has lanes.
#[test]
fn many_ranks() {
    let input = Input::new(4, 211);
    let widths: Vec<usize> = (0..75).map(|rank| rank % 3).collect();
    for divergence in DIVERGENCES {
        for target in [Target::Label, Target::Teacher] {
            let objective = Objective::plain().with_target(target);
            let objective = objective.with_divergence(divergence).unwrap();
            check(small(1), &objective, &input, &widths);
        }
    }
}

/// The gradient over the student's logits is that beside them; no rank writes another's columns.
#[test]
fn in_place() {
    let mut input = Input::new(4, 4000);
    input.labels[2] = -100;
    let (batch, student) = (input.batch(), input.view(&input.student));
    for divergence in DIVERGENCES {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let shards = Shards::new(small(3), &objective, &batch, student, &[1, 3, 0, 2]);
        let exchange = shards.exchange().unwrap();
        let mut in_place = input.student.clone();
        let mut gradient = vec![bf16::NAN; in_place.len()];
        for rank in shards.ranks() {
            let (shard, range) = (shards.shard(rank, None).unwrap(), shards.columns[rank].clone());
            if shard.empty {
                continue;
            }
            let before = (gradient.clone(), in_place.clone());
            let mut view = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
            let mut of = view.columns(range.clone()).unwrap();
            let view = exchange.view();
            small(4).shard_gradient(&objective, &shard, &view, &mut of).unwrap();
            let mut of = LogitsMut::new(&mut in_place, input.tokens, input.vocab).unwrap();
            let mut of = of.columns(range.clone()).unwrap();
            small(5).shard_gradient_in_place(&objective, &shard, &view, &mut of).unwrap();
            for i in 0..gradient.len() {
                if range.contains(&(i % input.vocab)) {
                    assert_eq!(gradient[i], in_place[i]);
                } else {
                    assert_eq!(gradient[i].to_bits(), before.0[i].to_bits());
                    assert_eq!(in_place[i], before.1[i]);
                }
            }
        }
    }
}

/// Two ranks of tokens, each of two ranks of the vocabulary: both have their part of the loss, and the gradient that the whole
/// call has.
#[test]
fn counts_of_all_ranks() {
    let mut input = Input::new(8, 500);
    input.labels[1] = -100;
    let atkd = Objective::default().with_ce_weight(0.3).unwrap();
    let hard: &[bool] = &[true, false, false, true, false, false, true, false];
    for objective in [atkd, atkd.with_reduction(Reduction::GroupMean).unwrap()] {
        let batch = input.batch().with_hard(hard).unwrap();
        let student = input.view(&input.student);
        let mut gradient = vec![f32::NAN; student.elements().len()];
        let mut to = LogitsMut::new(&mut gradient, 8, 500).unwrap();
        let whole =
            Shards::new(small(1), &objective, &batch, student, &[2, 1]).run(&mut to).unwrap();
        let mut loss = 0.0;
        for part in [0..3, 3..8] {
            let tokens = part.len();
            let of = |logits| Logits::new(logits, tokens, 500).unwrap();
            let elements = part.start * 500..part.end * 500;
            let batch =
                Batch::new(of(&input.teacher[elements.clone()]), &input.labels[part.clone()])
                    .and_then(|batch| batch.with_hard(&hard[part]))
                    .unwrap();
            let mut of_part = vec![f32::NAN; elements.len()];
            let mut to = LogitsMut::new(&mut of_part, tokens, 500).unwrap();
            let student = of(&input.student[elements.clone()]);
            let shards = Shards::new(small(2), &objective, &batch, student, &[2, 1]);
            let output = Shards { counts: Some([7, 3]), ..shards }.run(&mut to).unwrap();
            assert_eq!(of_part, gradient[elements]);
            loss += output.loss;
        }
        approx::assert_relative_eq!(loss, whole.loss, max_relative = 1e-12);
    }
}

#[test]
fn an_upstream_gradient_from_the_device() {
    let input = Input::new(5, 700);
    let (batch, student) = (input.batch(), input.view(&input.student));
    let run = |objective: &Objective, extra| {
        let mut gradient = vec![f32::NAN; student.elements().len()];
        let mut to = LogitsMut::new(&mut gradient, input.tokens, input.vocab).unwrap();
        let shards = Shards::new(small(0), objective, &batch, student, &[1, 2]);
        let output = Shards { extra, ..shards }.run(&mut to).unwrap();
        (output, gradient)
    };
    let host = Objective::default().with_upstream_gradient(-2.5).unwrap();
    let by_device = run(&Objective::default(), Extra { upstream: Some(-2.5) });
    assert_eq!(by_device, run(&host, Extra::default()));
}

/// Where groups do not matter no mask is needed, and hard tokens are counted all the same.
#[test]
fn without_a_mask() {
    let input = Input::new(5, 300);
    let all_hard = Objective::default().with_hard_ratio(1.0).unwrap();
    let group_mean = all_hard.with_reduction(Reduction::GroupMean).unwrap();
    for (objective, hard) in [(Objective::kl(), 0), (all_hard, 5), (group_mean, 5)] {
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 2]);
        let output = shards.finish(&shards.exchange().unwrap(), None).unwrap();
        let (exact, _) = reference::forward_backward(&objective, &batch, student).unwrap();
        approx::assert_relative_eq!(output.loss, exact.loss, max_relative = 1e-6);
        assert_eq!(output.summary().hard_tokens, hard);
    }
}

/// A label beyond the whole vocabulary drops its token, whichever kernel meets it. The vocabulary is not the shard's.
#[test]
fn labels_out_of_range() {
    let mut input = Input::new(4, 100);
    let objective = Objective::default().with_divergence(Divergence::TotalVariation).unwrap();
    for label in [100, -1, i64::MAX] {
        input.labels[2] = label;
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 2]);
        let exchange = shards.exchange().unwrap();
        for rank in shards.ranks() {
            let (state, terms) =
                (exchange.states[4 * rank + 2], exchange.terms.as_ref().unwrap()[4 * rank + 2]);
            assert_eq!((state.target, state.teacher_sum, terms.teacher), (-1, 0.0, 0.0));
            assert_ne!(exchange.states[4 * rank + 1].teacher_sum, 0.0);
        }
        let margins = shards.margins(&exchange).unwrap();
        let nan: Vec<bool> = margins.iter().map(|margin| margin.is_nan()).collect();
        assert_eq!(nan, [false, false, true, false]);
        let error = shards.finish(&exchange, Some(&[false; 4])).unwrap_err();
        let expected = Error::DeviceLabel { token: 2, vocab: 100, ignore_index: -100 };
        assert_eq!(error, expected);
    }
}

/// Without the rank that has the target the token is NaN, and no other.
#[test]
fn a_target_that_no_rank_has() {
    let mut input = Input::new(3, 90);
    input.labels = vec![80, 5, 6];
    for divergence in DIVERGENCES {
        let objective = Objective::plain().with_divergence(divergence).unwrap();
        let (batch, student) = (input.batch(), input.view(&input.student));
        let shards = Shards::new(small(0), &objective, &batch, student, &[1, 1, 1]);
        let exchange = shards.exchange().unwrap();
        let view = exchange.view();
        let terms = view.terms.map(|terms| &terms[..6]);
        let two = Exchanged { ranks: 2, states: &view.states[..6], terms };
        let shard = shards.shard(1, None).unwrap();
        let (output, _) = small(1).shard_finish(&objective, &shard, &two).unwrap();
        let mut gradient = vec![0_f32; 3 * 90];
        let mut whole = LogitsMut::new(&mut gradient, 3, 90).unwrap();
        let mut to = whole.columns(30..60).unwrap();
        small(2).shard_gradient(&objective, &shard, &two, &mut to).unwrap();
        for (token, row) in gradient.chunks(90).enumerate() {
            assert_eq!(output.tokens[token].loss.is_nan(), token == 0);
            assert!(row[30..60].iter().all(|g| g.is_nan() == (token == 0)));
        }
    }
}

#[test]
fn stages_without_what_they_need() {
    let input = Input::new(2, 90);
    let (batch, student) = (input.batch(), input.view(&input.student));
    let jsd = Objective::plain().with_divergence(Divergence::Jsd { beta: 0.5 }).unwrap();
    let run = |objective: &Objective, ranks, terms: bool| {
        let shards = Shards::new(small(0), objective, &batch, student, &[1, 1]);
        let exchange = shards.exchange().unwrap();
        let view = exchange.view();
        let exchanged = Exchanged { ranks, terms: view.terms.filter(|_| terms), ..view };
        let shard = shards.shard(0, None).unwrap();
        small(0).shard_finish(objective, &shard, &exchanged).map(|_| ())
    };
    assert_eq!(run(&jsd, 2, true), Ok(()));
    assert_eq!(run(&jsd, 2, false), Err(Error::NoSweepTerms));
    assert_eq!(run(&jsd, 0, true), Err(Error::NoStates));
    assert_eq!(run(&Objective::default(), 2, true), Err(Error::NoHardTokens));
    let kl = Objective::kl();
    let shards = Shards::new(small(0), &kl, &batch, student, &[1, 1]);
    let (exchange, shard) = (shards.exchange().unwrap(), shards.shard(0, None).unwrap());
    let terms = small(0).shard_terms(&kl, &shard, &exchange.view()).map(|_| ());
    assert_eq!(terms, Err(Error::NoSecondSweep));
    let shard = atkd::simt::Shard { first_column: 46, ..shard };
    let states = small(0).shard_states(&kl, &shard).map(|_| ());
    assert_eq!(states, Err(Error::ShardColumns { first: 46, columns: 45, vocab: 90 }));
}

/// log2(e) / T, in float32, in which all that exchange states have it.
fn octaves(temperature: f64) -> f64 {
    ((1.0 / temperature) as f32 * std::f32::consts::LOG2_E).into()
}

const GAP_UNIT: f64 = 18_446_744_073_709_551_616.0;

/// What the exponents of a model are relative to, by kernels/params.h.
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

#[test]
fn states_are_what_they_say() {
    let (tokens, vocab) = (12, 613);
    let mut random = fastrand::Rng::with_seed(3);
    let mut teacher: Vec<f32> = (0..tokens * vocab).map(|_| 20.0 * random.f32() - 10.0).collect();
    let mut student: Vec<f32> = teacher.iter().map(|z| z + 3.0 * random.f32()).collect();
    let row = |token: usize| token * vocab..(token + 1) * vocab;
    // Of sizes whose exponents have no digits to spare.
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
    let [of_teacher, of_student] =
        [&teacher, &student].map(|l| Logits::new(l, tokens, vocab).unwrap());
    let batch = Batch::new(of_teacher, &labels).unwrap();
    for divergence in DIVERGENCES {
        for (temperature, ce_weight) in [(1.0, 0.5), (2.0, 0.0), (2.5, 1.0)] {
            let objective = Objective::default()
                .with_divergence(divergence)
                .and_then(|o| o.with_temperature(temperature))
                .and_then(|o| o.with_ce_weight(ce_weight))
                .unwrap();
            let shards = Shards::new(small(7), &objective, &batch, of_student, &[2, 0, 1, 3]);
            let exchange = shards.exchange().unwrap();
            for (rank, columns) in shards.columns.iter().enumerate() {
                for token in 0..tokens {
                    let state = &exchange.states[rank * tokens + token];
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
#[test]
fn terms_are_what_they_say() {
    let input = Input::new(3, 419);
    let (batch, student) = (input.batch(), input.view(&input.student));
    for divergence in &DIVERGENCES[2..] {
        for objective in [Objective::plain(), Objective::dkd()] {
            let objective = objective.with_divergence(*divergence).unwrap();
            let objective = objective.with_temperature(1.7).unwrap();
            let shards = Shards::new(small(7), &objective, &batch, student, &[2, 0, 1, 3]);
            let terms = shards.exchange().unwrap().terms.unwrap();
            for token in 0..3 {
                let target = input.labels[token] as usize;
                let counts = |j: usize| objective.is_plain() || j != target;
                let [p, q] = [&input.teacher, &input.student].map(|logits| {
                    let row = &logits[419 * token..][..419];
                    let powers: Vec<f64> = row.iter().map(|z| (z.to_f64() / 1.7).exp()).collect();
                    let sum: f64 =
                        powers.iter().enumerate().filter(|(j, _)| counts(*j)).map(|(_, e)| e).sum();
                    powers.into_iter().map(|power| power / sum).collect::<Vec<_>>()
                });
                for (rank, columns) in shards.columns.iter().enumerate() {
                    let mut exact = [0.0; 3];
                    for j in columns.clone().filter(|&j| j != target) {
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
