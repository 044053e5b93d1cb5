//! Cases of ordinary logits: shapes, dtypes and strides, objectives, selections, temperatures, models that agree.

use super::case::{Case, DTYPES, GRADIENT, STUDENT, TEACHER, random};
use super::divergences::all_objectives;
use crate::{
    Coefficient, Coefficients, Divergence, Dtype, Objective, Reduction, Result, SelectionRule,
    Target,
};

pub(super) fn decoupled(easy: (f64, f64), hard: (f64, f64)) -> Result<Objective> {
    Objective::decoupled(Coefficients::new(easy.0, easy.1), Coefficients::new(hard.0, hard.1))
}

/// A spread over everything an objective can say.
pub(super) fn objectives() -> Vec<(&'static str, Result<Objective>)> {
    let atkd = Objective::default();
    let mixed = || Objective::default().with_ce_weight(0.7).and_then(|o| o.with_kd_weight(0.3));
    vec![
        ("atkd", Ok(atkd)),
        ("atkd, lambda 0", Objective::atkd(0.0)),
        ("atkd, lambda 1", Objective::atkd(1.0)),
        ("kl", Ok(Objective::kl())),
        ("tkd", Ok(Objective::tkd())),
        ("dkd", Ok(Objective::dkd())),
        ("decoupled", decoupled((0.9, 0.1), (0.25, 0.75))),
        (
            "UNC on hard DKD alone",
            Objective::decoupled(
                Coefficients::new(0.5, 0.5),
                Coefficients::new(1.0, Coefficient::Uncertainty),
            ),
        ),
        ("cross entropy mixed in", mixed()),
        (
            "cross entropy alone",
            Objective::tkd().with_kd_weight(0.0).and_then(|o| o.with_ce_weight(1.0)),
        ),
        ("temperature 2", atkd.with_temperature(2.0)),
        ("temperature 0.5", Objective::kl().with_temperature(0.5)),
        (
            "temperature 4, squared",
            atkd.with_temperature(4.0).map(|o| o.with_temperature_squared(true)),
        ),
        ("temperature 3, cross entropy", mixed().and_then(|o| o.with_temperature(3.0))),
        ("hard ratio 0", atkd.with_hard_ratio(0.0)),
        ("hard ratio 0.25", atkd.with_hard_ratio(0.25)),
        ("hard ratio 1", atkd.with_hard_ratio(1.0)),
        ("sum", atkd.with_reduction(Reduction::Sum)),
        ("denominator 1000", atkd.with_reduction(Reduction::Denominator(1000.0))),
        ("group mean", of_groups(atkd)),
        ("group mean, hard ratio 0.2", atkd.with_hard_ratio(0.2).and_then(of_groups)),
        ("group mean, hard ratio 1", atkd.with_hard_ratio(1.0).and_then(of_groups)),
        (
            "group mean, temperature 3, cross entropy",
            mixed().and_then(|o| o.with_temperature(3.0)).and_then(of_groups),
        ),
        ("group mean, cross entropy", mixed().and_then(of_groups)),
        ("median", Ok(atkd.with_selection_rule(SelectionRule::Median))),
        ("group mean, median", authors()),
        (
            "group mean, median, cross entropy, upstream gradient -2.5",
            authors()
                .and_then(|o| o.with_ce_weight(0.4))
                .and_then(|o| o.with_upstream_gradient(-2.5)),
        ),
        ("upstream gradient -2.5", atkd.with_upstream_gradient(-2.5)),
        ("upstream gradient 0", atkd.with_upstream_gradient(0.0)),
        ("teacher's arg max", Ok(atkd.with_target(Target::Teacher))),
    ]
}

fn of_groups(objective: Objective) -> Result<Objective> {
    objective.with_reduction(Reduction::GroupMean)
}

/// The conventions of the code of ATKD's authors.
fn authors() -> Result<Objective> {
    of_groups(Objective::default().with_selection_rule(SelectionRule::Median))
}

pub(super) fn shapes() -> Vec<Case> {
    let mut cases = Vec::new();
    for vocab in [1, 2, 3, 31, 32, 33, 1000, 4096, 50257] {
        for teacher in DTYPES {
            for student in DTYPES {
                let tokens = if vocab < 5000 { 6 } else { 2 };
                let case = random(tokens, vocab, vocab as u64);
                let name = format!("[{tokens}, {vocab}] {teacher} teacher, {student} student");
                cases.push(case.clone().named(&name).dtypes(teacher, student, student));
                let others = match student {
                    Dtype::F32 => vec![Dtype::F16, Dtype::Bf16],
                    _ => vec![Dtype::F32],
                };
                for gradient in others {
                    let name = format!("{name}, {gradient} gradient");
                    cases.push(case.clone().named(name).dtypes(teacher, student, gradient));
                }
            }
        }
    }
    for padding in [1, 3, 8, 61] {
        for dtype in DTYPES {
            for vocab in [5, 130, 4099] {
                let mut case = random(5, vocab, 77).dtypes(dtype, dtype, dtype);
                case.padding = padding;
                cases.push(
                    case.named(format!("[5, {vocab}] {dtype}, row stride {}", vocab + padding)),
                );
            }
        }
    }
    for (dtype, vocab, padding, nested) in [
        (Dtype::F32, 130, 0, [true; 3]),
        (Dtype::F16, 4096, 8, [true; 3]),
        (Dtype::Bf16, 4099, 0, [true; 3]),
        (Dtype::Bf16, 4096, 0, [true, false, false]),
        (Dtype::F32, 1024, 0, [false, true, false]),
        (Dtype::F16, 4096, 0, [false, false, true]),
        (Dtype::Bf16, 130, 1, [false, true, true]),
    ] {
        let mut case = random(9, vocab, 78).dtypes(dtype, dtype, dtype);
        (case.padding, case.nested) = (padding, nested);
        let strides = [TEACHER, STUDENT, GRADIENT].map(|matrix| case.strides(matrix).to_string());
        cases.push(case.named(format!("[9, {vocab}] {dtype}, {}", strides.join("; "))));
    }
    cases
}

pub(super) fn objective_cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, objective) in objectives() {
        let mut case = random(12, 97, 5).with(objective.clone());
        case.labels[3] = -100;
        case.labels[11] = -100;
        cases.push(case.clone().named(name));
        cases.push(case.named(format!("{name}, BF16")).dtypes(
            Dtype::Bf16,
            Dtype::Bf16,
            Dtype::Bf16,
        ));
        // More than one block of a row, and a sharper teacher.
        let mut case = random(4, 7001, 6).with(objective).named(format!("{name}, sharp"));
        case.teacher.iter_mut().for_each(|z| *z *= 3.0);
        cases.push(case);
    }
    cases.extend(hot());
    cases
}

/// Cross entropy at temperature 1 beside distillation at a high one: what is a small step for the one is
/// beyond float32's exponentials for the other.
fn hot() -> Vec<Case> {
    [50.0, 40.0]
        .into_iter()
        .map(|temperature| {
            let objective = Objective::kl()
                .with_ce_weight(1.0)
                .and_then(|objective| objective.with_temperature(temperature));
            let mut case = random(2, 9000, 8).with(objective);
            case.student.iter_mut().for_each(|z| *z -= 45.0);
            for late in [4000, 8999] {
                case.student[late] = 50.0;
            }
            case.named(format!("temperature {temperature}, cross entropy, a peak late in the row"))
        })
        .collect()
}

pub(super) fn selections() -> Vec<Case> {
    let atkd = Objective::default();
    let mut cases = Vec::new();
    for tokens in [1, 2, 3, 10, 101, 1000] {
        for ratio in [0.0, 0.1, 0.5, 0.7, 1.0] {
            let mut case = random(tokens, 11, tokens as u64).with(atkd.with_hard_ratio(ratio));
            for i in (2..tokens).step_by(5) {
                case.labels[i] = -100;
            }
            cases.push(case.named(format!("{tokens} tokens, hard ratio {ratio}")));
        }
    }
    // Rows that start equally far from a multiple of 16 bytes: others are summed in another order, and equal
    // ones may then differ in the last bit.
    let mut ties = random(12, 24, 1);
    let (first, label) = (ties.teacher[..24].to_vec(), ties.labels[0]);
    for i in [1, 2, 5, 6, 7, 8, 9, 11] {
        ties.teacher[i * 24..][..24].copy_from_slice(&first);
        ties.labels[i] = label;
    }
    cases.push(ties.clone().named("equal margins: the lower index"));
    ties.labels[5] = -100;
    cases.push(ties.clone().named("equal margins, one ignored"));
    ties.labels.clear();
    cases.push(
        ties.with(Ok(atkd.with_target(Target::Teacher))).named("no labels, teacher's arg max"),
    );
    let mut arg_max = random(6, 40, 8).with(Ok(atkd.with_target(Target::Teacher)));
    for row in arg_max.teacher.chunks_mut(40) {
        (row[7], row[21], row[39]) = (9.0, 9.0, 9.0);
    }
    cases.push(arg_max.named("teacher's arg max: the lowest index among equals"));
    let mut sequences = random(20, 13, 2);
    sequences.labels[6..9].fill(-100);
    sequences.sequences = Some(vec![0, 1, 6, 9, 9, 20]);
    cases.push(sequences.named("per sequence, one empty, one all ignored"));
    let mut ignored = random(5, 13, 3);
    ignored.labels.fill(-100);
    cases.push(ignored.clone().named("all ignored"));
    cases.push(
        ignored
            .with(atkd.with_reduction(Reduction::Denominator(8.0)))
            .named("all ignored, denominator"),
    );
    cases.push(random(0, 13, 4).with(Ok(atkd.with_target(Target::Teacher))).named("no tokens"));
    let mut negative = random(6, 13, 3).with(Ok(atkd.with_ignore_index(2)));
    negative.labels[4] = 2;
    cases.push(negative.named("ignore_index 2"));
    // 1 - p is 1 in float32 for all of these, and yet they differ.
    let mut hopeless = random(8, 50, 9);
    for (i, row) in hopeless.teacher.chunks_mut(50).enumerate() {
        row[hopeless.labels[i] as usize] = -30.0 - (i * 5 % 8) as f32;
    }
    cases.push(hopeless.named("hopeless teachers are told apart"));
    // Margins are compared in single precision, where those of the labels 1e-9 and 0 are one number.
    let mut alike = random(4, 13, 9);
    for (i, row) in alike.teacher.chunks_mut(13).enumerate() {
        row.fill(0.0);
        row[alike.labels[i] as usize] = if i % 2 == 0 { 1e-9 } else { 0.0 };
    }
    cases.push(alike.named("margins that differ in float64 alone: the lower index"));

    let mut given = random(40, 11, 10);
    for i in (2..40).step_by(5) {
        given.labels[i] = -100;
    }
    let in_sequences = Some(vec![0, 3, 3, 30, 40]);
    let unlabelled = |case: &Case| {
        Case { labels: Vec::new(), ..case.clone() }.with(Ok(atkd.with_target(Target::Teacher)))
    };
    // The selection is no longer the teacher's, and ignored tokens are among those chosen.
    let mask = Case { hard: Some((0..40).map(|i| i % 3 == 0).collect()), ..given.clone() };
    cases.push(mask.clone().named("a mask"));
    cases.push(unlabelled(&mask).named("a mask, no labels, teacher's arg max"));
    for (name, objective) in [
        ("a mask, hard ratio 0", atkd.with_hard_ratio(0.0)),
        ("a mask, hard ratio 1", atkd.with_hard_ratio(1.0)),
        ("a mask, which changes no loss", Ok(Objective::kl())),
    ] {
        cases.push(mask.clone().with(objective).named(name));
    }
    let all = Case { hard: Some(vec![true; 40]), ..mask.clone() };
    cases.push(all.named("a mask of all tokens"));
    cases.push(Case { hard: Some(vec![false; 40]), ..mask.clone() }.named("a mask of no token"));
    let mut one = random(1, 11, 11);
    one.hard = Some(vec![false]);
    cases.push(one.named("a mask of no token, for one"));
    let none = Case { hard: Some(Vec::new()), ..random(0, 11, 12) };
    cases.push(none.with(Ok(atkd.with_target(Target::Teacher))).named("a mask, no tokens"));
    let numbers = [3.0, f32::NAN, -2.0, 0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, 3.0];
    let margins = (0..40).map(|i| numbers[i * 5 % 8]).collect();
    let margins = Case { margins: Some(margins), ..given };
    cases.push(margins.clone().named("margins given, some equal, some NaN"));
    cases.push(unlabelled(&margins).named("margins given, no labels, teacher's arg max"));
    for ratio in [0.0, 0.01, 0.9, 1.0] {
        let case = margins.clone().with(atkd.with_hard_ratio(ratio));
        cases.push(case.named(format!("margins given, hard ratio {ratio}")));
    }
    cases.push(margins.clone().with(Ok(Objective::dkd())).named("margins given, to no effect"));
    let margins = Case { sequences: in_sequences, ..margins };
    cases.push(margins.clone().named("margins given, per sequence"));
    let beside = Case { hard: mask.hard.clone(), ..margins.clone() };
    cases.push(beside.named("a mask beside margins and sequences"));

    // Sets whose sizes no ratio tells, and groups that are empty.
    let median = Ok(atkd.with_selection_rule(SelectionRule::Median));
    let teachers = authors().map(|o| o.with_target(Target::Teacher));
    for (name, objective) in [
        ("median", median.clone()),
        ("group mean", of_groups(atkd)),
        ("group mean, median", authors()),
        ("group mean, median, cross entropy", authors().and_then(|o| o.with_ce_weight(0.6))),
        ("group mean, median, teacher's arg max", teachers),
        ("group mean, hard ratio 0", atkd.with_hard_ratio(0.0).and_then(of_groups)),
        ("group mean, hard ratio 1", atkd.with_hard_ratio(1.0).and_then(of_groups)),
    ] {
        let mut add = |case: &Case, what: String| {
            cases.push(case.clone().with(objective.clone()).named(format!("{name}, {what}")));
        };
        for tokens in [1, 2, 5, 6, 64] {
            add(&random(tokens, 11, tokens as u64), format!("{tokens} tokens"));
        }
        let mut none = random(4, 11, 12);
        none.labels.fill(-100);
        add(&none, "no valid token".into());
        // Rows of whole lines of a cache: equal ones elsewhere may add up to other last bits.
        let mut tied = random(9, 32, 13);
        for token in 1..9 {
            tied.teacher.copy_within(..32, 32 * token);
            tied.labels[token] = tied.labels[0];
        }
        add(&tied, "all margins equal".into());
        add(&Case { margins: None, ..margins.clone() }, "per sequence".into());
        add(&margins, "margins given, per sequence".into());
        add(&Case { sequences: None, ..margins.clone() }, "margins given, some NaN".into());
        let nan = Case { margins: Some(vec![f32::NAN; 40]), sequences: None, ..margins.clone() };
        add(&nan, "margins given, all NaN".into());
        add(&mask, "a mask".into());
        add(&Case { hard: Some(vec![true; 40]), ..mask.clone() }, "a mask of all tokens".into());
        add(&Case { hard: Some(vec![false; 40]), ..mask.clone() }, "a mask of no token".into());
    }
    let nothing = random(0, 11, 12).with(authors().map(|o| o.with_target(Target::Teacher)));
    cases.push(nothing.named("group mean, median, no tokens"));
    // A teacher whose margin is a number beside ones of NaN, which are below it.
    for broken in [1, 4] {
        let mut case = random(6, 11, 14).with(median.clone());
        (0..broken).for_each(|token| case.teacher[11 * token] = f32::NAN);
        cases.push(case.named(format!("median, {broken} of 6 margins NaN")));
    }
    cases
}

/// Weights of all kinds, with every objective and divergence.
pub(super) fn token_weights() -> Vec<Case> {
    let given = Case {
        token_weights: Some((0..24).map(|i| [1.0, 0.25, 0.0, 3.0, -2.0][i % 5]).collect()),
        ..random(24, 97, 51)
    };
    let forward = objectives().into_iter().map(|(name, objective)| (name.into(), objective));
    let mut cases = Vec::new();
    for (name, objective) in forward.chain(all_objectives()) {
        let mut case = given.clone().with(objective);
        case.labels[5] = -100;
        cases.push(case.named(name));
    }
    let grouped = Objective::default().with_reduction(Reduction::GroupMean).and_then(|objective| {
        objective.with_selection_rule(SelectionRule::Median).with_ce_weight(0.3)
    });
    cases.push(given.clone().with(grouped).named("group mean, median, cross entropy"));
    let mut odd = given.clone().with(Objective::default().with_ce_weight(0.3));
    odd.token_weights = Some(
        (0..24).map(|i| [f32::NAN, 1.0, f32::INFINITY, 2.0, f32::NEG_INFINITY][i % 5]).collect(),
    );
    cases.push(odd.named("NaN and infinite"));
    // Tokens whose loss would be infinite, of the weights 0, 3 and -2: by a logit of -inf at the target, or beside it.
    for divergence in [Divergence::ForwardKl, Divergence::ReverseKl] {
        for (name, objective) in [("atkd", Objective::default()), ("plain", Objective::plain())] {
            for (place, distance) in [("the target", 0), ("another token", 1)] {
                let objective = objective.with_divergence(divergence);
                let mut case = given.clone().with(objective.and_then(|o| o.with_ce_weight(0.3)));
                case.hard = Some(vec![true; 24]);
                let model = match divergence {
                    Divergence::ForwardKl => &mut case.student,
                    _ => &mut case.teacher,
                };
                for token in [2, 3, 4] {
                    let other = (case.labels[token] as usize + distance) % 97;
                    model[97 * token + other] = f32::NEG_INFINITY;
                }
                cases.push(case.named(format!("{divergence:?}, {name}, -inf at {place}")));
            }
        }
    }
    for (name, dtype) in [("BF16", Dtype::Bf16), ("F16", Dtype::F16)] {
        cases.push(given.clone().dtypes(dtype, dtype, dtype).named(name));
    }
    cases
}

/// A temperature for each token, with every objective and divergence.
pub(super) fn token_temperatures() -> Vec<Case> {
    let given = Case {
        temperatures: Some((0..24).map(|i| [1.0, 0.5, 2.0, 4.0, 1.3][i % 5]).collect()),
        ..random(24, 97, 52)
    };
    let forward = objectives().into_iter().map(|(name, objective)| (name.into(), objective));
    let mut cases = Vec::new();
    for (i, (name, objective)) in forward.chain(all_objectives()).enumerate() {
        let objective = objective.map(|o| o.with_temperature_squared(i % 2 == 0));
        let mut case = given.clone().with(objective);
        case.labels[5] = -100;
        cases.push(case.named(name));
    }
    let grouped = Objective::default().with_reduction(Reduction::GroupMean).and_then(|objective| {
        let objective = objective.with_temperature_squared(true);
        objective.with_selection_rule(SelectionRule::Median).with_ce_weight(0.3)
    });
    let mut weighted = given.clone().with(grouped);
    weighted.token_weights = Some((0..24).map(|i| [1.0, 0.25, 0.0, 3.0][i % 4]).collect());
    cases.push(weighted.named("group mean, median, cross entropy, weights"));
    for (name, dtype) in [("BF16", Dtype::Bf16), ("F16", Dtype::F16)] {
        cases.push(given.clone().dtypes(dtype, dtype, dtype).named(name));
    }
    // More than one block of a row.
    let long = Case {
        temperatures: Some(vec![0.7, 3.0, 1.0, 10.0]),
        ..random(4, 7001, 53).with(Objective::default().with_ce_weight(0.3))
    };
    cases.push(long.named("V = 7001"));
    cases
}

/// From 0.05 to 10, with the square of it as a weight.
pub(super) fn temperatures() -> Vec<Case> {
    let mut cases = Vec::new();
    let mixed = Objective::default().with_ce_weight(0.3);
    for temperature in [0.05, 0.1, 0.3, 3.0, 5.0, 8.0, 10.0] {
        for (name, objective) in
            [("kl", Ok(Objective::kl())), ("atkd, cross entropy", mixed.clone())]
        {
            for squared in [false, true] {
                for vocab in [40, 1000, 5003] {
                    let objective = objective.clone().and_then(|o| o.with_temperature(temperature));
                    let case = random(if vocab == 5003 { 2 } else { 8 }, vocab, 41)
                        .with(objective.map(|o| o.with_temperature_squared(squared)));
                    let weight = if squared { ", squared" } else { "" };
                    cases.push(case.named(format!("{temperature}{weight}, V = {vocab}, {name}")));
                }
            }
        }
    }
    cases
}

/// Students that have all but learnt.
pub(super) fn close_model(tokens: usize, vocab: usize, difference: f32) -> Case {
    let mut case = random(tokens, vocab, 42);
    for (b, a) in case.student.iter_mut().zip(&case.teacher) {
        *b = a + difference * *b;
    }
    case
}

pub(super) fn close_models() -> Vec<Case> {
    let mut cases = Vec::new();
    for difference in [1e-1, 1e-2, 1e-3, 1e-4] {
        for temperature in [0.05, 1.0, 4.0, 10.0] {
            for vocab in [40, 1000, 5003] {
                let tokens = if vocab == 5003 { 2 } else { 12 };
                for (name, objective) in [("kl", Objective::kl()), ("atkd", Objective::default())] {
                    let objective =
                        objective.with_temperature_squared(true).with_temperature(temperature);
                    let case = close_model(tokens, vocab, difference).with(objective);
                    cases.push(case.named(format!(
                        "{difference:e} apart, temperature {temperature} squared, V = {vocab}, {name}"
                    )));
                }
            }
        }
    }
    cases
}

/// Teachers that are sure of a token which is not the target, and students that agree: probabilities near 1
/// whose difference is the gradient.
pub(super) fn sure_teacher(tokens: usize, vocab: usize) -> Case {
    let mut random = fastrand::Rng::with_seed(vocab as u64);
    let mut case = self::random(tokens, vocab, 43);
    let rows = case.teacher.chunks_mut(vocab).zip(case.student.chunks_mut(vocab));
    for (i, (a, b)) in rows.enumerate() {
        a.iter_mut().for_each(|z| *z = 4.0 * random.f32() - 2.0);
        let sure = (case.labels[i] as usize + 1 + random.usize(0..vocab - 1)) % vocab;
        a[sure] = 6.0 + 14.0 * random.f32();
        for (b, a) in b.iter_mut().zip(&*a) {
            *b = a + random.f32() - 0.5;
        }
    }
    case
}

pub(super) fn sure_teachers() -> Vec<Case> {
    let mut cases = Vec::new();
    for (name, objective) in [
        ("kl", Ok(Objective::kl())),
        ("dkd", Ok(Objective::dkd())),
        ("kl at 0.5", Objective::kl().with_temperature(0.5)),
        ("kl at 4, squared", Objective::kl().with_temperature_squared(true).with_temperature(4.0)),
    ] {
        for vocab in [17, 257, 1000, 5003] {
            let tokens = if vocab == 5003 { 3 } else { 24 };
            for dtype in [Dtype::F32, Dtype::Bf16] {
                let case = sure_teacher(tokens, vocab).with(objective.clone());
                let case = case.dtypes(dtype, dtype, Dtype::F32);
                cases.push(case.named(format!("V = {vocab}, {dtype}, {name}")));
            }
        }
    }
    cases
}
