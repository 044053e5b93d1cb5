//! Every divergence but forward KL, which the other groups are about, through shapes, dtypes, objectives, and rows of all
//! kinds. There is too much to cross: what is not about one setting takes the next of its values from case to case.

use super::case::{Case, DTYPES, random};
use super::cases::{close_model, sure_teacher};
use super::edges::{EDGES, Edit, FINITE_MASKS, MASK, MODELS, odd_row, within_float16};
use crate::{
    Coefficient, Coefficients, Divergence, Dtype, Objective, Reduction, Result, SelectionRule,
    Target,
};

/// Forward KL first; of those with a number a customary one and others.
pub(super) const DIVERGENCES: [(&str, Divergence); 8] = [
    ("forward KL", Divergence::ForwardKl),
    ("reverse KL", Divergence::ReverseKl),
    ("JSD(0.5)", Divergence::Jsd { beta: 0.5 }),
    ("JSD(0.1)", Divergence::Jsd { beta: 0.1 }),
    ("JSD(0.9)", Divergence::Jsd { beta: 0.9 }),
    ("TVD", Divergence::TotalVariation),
    ("skew KL(0.1)", Divergence::SkewKl { alpha: 0.1 }),
    ("skew reverse KL(0.1)", Divergence::SkewReverseKl { alpha: 0.1 }),
];

/// One of each kind.
const KINDS: [(&str, Divergence); 5] =
    [DIVERGENCES[1], DIVERGENCES[2], DIVERGENCES[5], DIVERGENCES[6], DIVERGENCES[7]];

/// Every way in which a divergence's parts make an objective, beside what holds for all divergences.
fn ways() -> [(&'static str, Result<Objective>); 7] {
    let uncertainty = Objective::decoupled(
        Coefficients::new(0.7, Coefficient::Uncertainty),
        Coefficients::new(Coefficient::Uncertainty, 0.4),
    );
    [
        ("atkd", Ok(Objective::default())),
        ("plain", Ok(Objective::plain())),
        ("tkd and cross entropy", ce(Ok(Objective::tkd()))),
        ("dkd and cross entropy", ce(Ok(Objective::dkd()))),
        ("decoupled, cross entropy", ce(uncertainty)),
        ("atkd at 2 squared, cross entropy", ce(squared(Objective::default(), 2.0))),
        ("plain at 0.5, cross entropy", ce(Objective::plain().with_temperature(0.5))),
    ]
}

fn ce(objective: Result<Objective>) -> Result<Objective> {
    objective.and_then(|objective| objective.with_ce_weight(0.6))
}

fn squared(objective: Objective, temperature: f64) -> Result<Objective> {
    objective.with_temperature_squared(true).with_temperature(temperature)
}

fn by(divergence: Divergence, objective: &Result<Objective>) -> Result<Objective> {
    objective.clone().and_then(|objective| objective.with_divergence(divergence))
}

/// [`ways`] with each divergence but forward KL.
pub(super) fn all_objectives() -> Vec<(String, Result<Objective>)> {
    let mut objectives = Vec::new();
    for (name, divergence) in &DIVERGENCES[1..] {
        for (way, objective) in ways() {
            objectives.push((format!("{name}, {way}"), by(*divergence, &objective)));
        }
    }
    objectives
}

/// Takes one after the other, from the first again after the last.
struct Turns<'a, T>(std::iter::Cycle<std::slice::Iter<'a, T>>);

impl<'a, T> Turns<'a, T> {
    fn new(of: &'a [T]) -> Self {
        Self(of.iter().cycle())
    }

    fn next(&mut self) -> &'a T {
        self.0.next().expect("there is one")
    }
}

/// All dtypes of teacher, student and gradient.
fn dtypes() -> Vec<[Dtype; 3]> {
    let mut all = Vec::new();
    for teacher in DTYPES {
        for student in DTYPES {
            all.push([teacher, student, student]);
            if student != Dtype::F32 {
                all.push([teacher, student, Dtype::F32]);
            }
        }
    }
    all
}

pub(super) fn shapes() -> Vec<Case> {
    let (mut cases, ways, dtypes) = (Vec::new(), ways(), dtypes());
    let (mut ways, mut dtypes) = (Turns::new(&ways), Turns::new(&dtypes));
    for (name, divergence) in &DIVERGENCES[1..] {
        for vocab in [1, 2, 3, 31, 33, 1000, 4096] {
            let tokens = if vocab < 4000 { 6 } else { 3 };
            for _ in 0..2 {
                let ((way, objective), [teacher, student, gradient]) = (ways.next(), dtypes.next());
                let case = random(tokens, vocab, vocab as u64).with(by(*divergence, objective));
                let case = case.dtypes(*teacher, *student, *gradient);
                cases.push(case.named(format!(
                    "{name}, [{tokens}, {vocab}] {teacher} teacher, {student} student, {gradient} gradient, {way}"
                )));
            }
        }
    }
    for (name, divergence) in KINDS {
        for (way, objective) in [("atkd", Objective::default()), ("plain", Objective::plain())] {
            let [teacher, student, gradient] = *dtypes.next();
            let case = random(2, 50257, 7).with(objective.with_divergence(divergence));
            let case = case.dtypes(teacher, student, gradient);
            cases.push(case.named(format!(
                "{name}, [2, 50257] {teacher} teacher, {student} student, {gradient} gradient, {way}"
            )));
        }
        let mut case = random(9, 130, 78).with(Objective::plain().with_divergence(divergence));
        (case.padding, case.nested) = (1, [true; 3]);
        cases.push(case.named(format!("{name}, [9, 130], nested strides, plain")));
    }
    cases
}

pub(super) fn objectives() -> Vec<Case> {
    let mut cases = Vec::new();
    let half = [Dtype::F16, Dtype::Bf16];
    let mut half = Turns::new(&half);
    for (i, (name, objective)) in all_objectives().into_iter().enumerate() {
        let mut case = random(12, 97, 5).with(objective.clone());
        (case.labels[3], case.labels[11]) = (-100, -100);
        cases.push(case.clone().named(&name));
        let dtype = *half.next();
        cases.push(case.named(format!("{name}, {dtype}")).dtypes(dtype, dtype, dtype));
        // More than one block of a row, and a sharper model.
        if i % 2 == 0 {
            let mut case = random(3, 7001, 6).with(objective);
            let (sharp, model) = match i % 4 {
                0 => ("teacher", &mut case.teacher),
                _ => ("student", &mut case.student),
            };
            model.iter_mut().for_each(|z| *z *= 3.0);
            cases.push(case.named(format!("{name}, sharp {sharp}")));
        }
    }
    type Set = fn(Objective) -> Result<Objective>;
    let settings: [(&str, Set); 10] = [
        ("group mean, median", |o| match o.easy() == o.hard() {
            true => Ok(o.with_selection_rule(SelectionRule::Median)),
            false => {
                o.with_selection_rule(SelectionRule::Median).with_reduction(Reduction::GroupMean)
            }
        }),
        ("sum", |o| o.with_reduction(Reduction::Sum)),
        ("denominator 1000", |o| o.with_reduction(Reduction::Denominator(1000.0))),
        ("upstream gradient -2.5", |o| o.with_upstream_gradient(-2.5)),
        ("upstream gradient 0", |o| o.with_upstream_gradient(0.0)),
        ("hard ratio 0", |o| o.with_hard_ratio(0.0)),
        ("hard ratio 0.25", |o| o.with_hard_ratio(0.25)),
        ("hard ratio 1", |o| o.with_hard_ratio(1.0)),
        ("cross entropy alone", |o| o.with_kd_weight(0.0)?.with_ce_weight(1.0)),
        ("teacher's arg max", |o| Ok(o.with_target(Target::Teacher))),
    ];
    for (i, (set, setting)) in settings.into_iter().enumerate() {
        for (j, (name, divergence)) in KINDS.into_iter().enumerate() {
            let (way, objective) = match (i + j) % 2 {
                0 => ("atkd", Objective::default()),
                _ => ("plain", Objective::plain()),
            };
            let objective = objective.with_divergence(divergence).and_then(setting);
            let mut case = random(13, 41, 9).with(objective);
            case.labels[5] = -100;
            cases.push(case.named(format!("{name}, {way}, {set}")));
        }
    }
    for (name, divergence) in KINDS {
        let objective = Objective::default().with_divergence(divergence);
        let mut case = random(20, 13, 2).with(objective);
        case.labels[6..9].fill(-100);
        let sequences = Some(vec![0, 1, 6, 9, 9, 20]);
        cases.push(Case { sequences, ..case.clone() }.named(format!("{name}, per sequence")));
        let hard = Some((0..20).map(|i| i % 3 == 0).collect());
        cases.push(Case { hard, ..case }.named(format!("{name}, a mask")));
    }
    cases
}

/// Mixtures of which one model has a small share, down to the least that is allowed.
pub(super) fn small_shares() -> Vec<Case> {
    let (mut cases, ways) = (Vec::new(), ways());
    let mut ways = Turns::new(&ways);
    for share in [1e-9, 1e-6, 1e-4, 1e-3, 1.0 - 1e-4, 1.0 - 1e-9] {
        for (name, divergence) in [
            ("JSD", Divergence::Jsd { beta: share }),
            ("skew KL", Divergence::SkewKl { alpha: share }),
            ("skew reverse KL", Divergence::SkewReverseKl { alpha: share }),
        ] {
            for (vocab, spread) in [(7, 2.0), (97, 1.0), (4099, 0.75)] {
                for _ in 0..2 {
                    let (way, objective) = ways.next();
                    let mut case = random(6, vocab, 12).with(by(divergence, objective));
                    case.teacher.iter_mut().for_each(|z| *z *= spread);
                    case.student.iter_mut().for_each(|z| *z *= spread);
                    cases.push(case.named(format!("{name}({share:e}), [6, {vocab}], {way}")));
                }
            }
        }
    }
    cases
}

/// Rows of which a divergence makes more than forward KL does.
const MORE_EDGES: &[(&str, Edit)] = &[
    ("teacher rules out one token", |a, _| a[20] = MASK),
    ("each rules out tokens of its own", |a, b| {
        a[10..20].fill(MASK);
        b[20..30].fill(MASK);
    }),
    ("nothing in common but the target", |a, b| {
        (4..a.len()).for_each(|j| [&mut *a, &mut *b][j % 2][j] = MASK);
        a[..3].fill(MASK);
    }),
    ("nothing in common", |a, b| {
        (0..a.len()).for_each(|j| [&mut *a, &mut *b][j % 2][j] = MASK);
    }),
    ("teacher certain, target masked by the student", |a, b| (a[3], b[3]) = (1e4, MASK)),
    ("teacher allows the target alone, which the student rules out", |a, b| {
        a.fill(MASK);
        (a[3], b[3]) = (1.0, MASK);
    }),
    ("student allows the target alone, which the teacher rules out", |a, b| {
        b.fill(MASK);
        (a[3], b[3]) = (MASK, 1.0);
    }),
    ("student has no mass off the target, teacher has none on it", |a, b| {
        b[4..].fill(MASK);
        b[..3].fill(MASK);
        a[3] = MASK;
    }),
    // The tokens that the student allows have next to none of the teacher's probability, and yet a distribution.
    ("teacher sure of what the student all but rules out", |a, b| (a[17], b[17]) = (60.0, -60.0)),
    ("teacher sure of what the student rules out", |a, b| (a[17], b[17]) = (1e4, MASK)),
    ("student sure of what the teacher all but rules out", |a, b| (a[17], b[17]) = (-60.0, 60.0)),
    ("sure of two tokens, and at odds", |a, b| {
        (a[17], a[18], b[17], b[18]) = (50.0, 30.0, 30.0, 50.0);
    }),
    ("student is the teacher, shifted", |a, b| {
        for (a, b) in a.iter_mut().zip(b) {
            *a = (*a * 256.0).round() / 256.0;
            *b = *a - 3.0;
        }
    }),
    ("logits about 1e3", |a, b| {
        a.iter_mut().for_each(|z| *z += 1e3);
        b.iter_mut().for_each(|z| *z -= 1e3);
    }),
    ("half of the logits equal", |a, b| {
        a[13..].iter_mut().for_each(|z| *z = z.round());
        b[13..].copy_from_slice(&a[13..]);
    }),
];

pub(super) fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let ways = ways();
    let forms = [(4500, Dtype::F32), (40, Dtype::F16), (40, Dtype::Bf16), (40, Dtype::F32)];
    let (mut turn, mut form) = (Turns::new(&ways), Turns::new(&forms));
    for (edge, edit) in EDGES.iter().chain(MORE_EDGES) {
        for (name, divergence) in KINDS {
            let on = |objective: &Result<Objective>, vocab| {
                odd_row(&by(divergence, objective), vocab, |[a, b]| edit(a, b))
            };
            for (way, objective) in [
                ("atkd and cross entropy", Objective::default()),
                ("plain and cross entropy", Objective::plain()),
            ] {
                let case = on(&objective.with_ce_weight(0.5), 40);
                cases.push(case.named(format!("{name}, {edge}, {way}")));
            }
            let ((way, objective), (vocab, dtype)) = (turn.next(), form.next());
            let mut case = on(objective, *vocab);
            if *dtype != Dtype::F32 {
                case = within_float16(case).dtypes(*dtype, *dtype, *dtype);
            }
            cases.push(case.named(format!("{name}, {edge}, V = {vocab}, {dtype}, {way}")));
        }
    }
    for (name, divergence) in KINDS {
        for (way, objective) in [("atkd", Objective::default()), ("plain", Objective::plain())] {
            for u in [-40.0, 0.0, 40.0] {
                for w in [-40.0, 0.0, 40.0] {
                    let mut case = random(1, 2, 1).with(objective.with_divergence(divergence));
                    (case.teacher, case.student, case.labels) =
                        (vec![u, 0.0], vec![w, 0.0], vec![1]);
                    cases.push(case.named(format!("{name}, V = 2, u = {u}, w = {w}, {way}")));
                }
            }
        }
    }
    cases
}

/// Objectives for rows of unusual size: every term, at temperatures that make more and less of them.
fn at_temperatures() -> [(&'static str, Result<Objective>); 5] {
    let at = |objective: Objective, temperature| ce(objective.with_temperature(temperature));
    [
        ("plain", at(Objective::plain(), 1.0)),
        ("atkd at 2", at(Objective::default(), 2.0)),
        ("plain at 0.05", Objective::plain().with_temperature(0.05)),
        ("tkd and dkd", at(Objective::atkd(0.5).expect("in [0, 1]"), 1.0)),
        ("dkd at 0.05", Objective::dkd().with_temperature(0.05)),
    ]
}

pub(super) fn finite_masks() -> Vec<Case> {
    let (mut cases, ways) = (Vec::new(), at_temperatures());
    let mut turn = Turns::new(&ways);
    for mask in FINITE_MASKS {
        for (models, masked) in MODELS {
            for (what, first) in [("the end", 33), ("all but the target", 0)] {
                for (name, divergence) in KINDS {
                    let (way, objective) = turn.next();
                    let case = odd_row(&by(divergence, objective), 40, |rows| {
                        for (row, _) in rows.into_iter().zip(masked).filter(|(_, yes)| *yes) {
                            let target = row[3];
                            row[first..].fill(mask);
                            row[3] = target;
                        }
                    });
                    let dtype = if mask >= -65504.0 { Dtype::F16 } else { Dtype::Bf16 };
                    // float32's lowest is -inf in bfloat16.
                    let case = match cases.len() % 3 {
                        0 if mask > f32::MIN => case.dtypes(dtype, dtype, dtype),
                        _ => case,
                    };
                    let dtype = case.student_dtype;
                    cases.push(
                        case.named(format!("{name}, {mask:e} at {what}, {models}, {dtype}, {way}")),
                    );
                }
                turn.next();
            }
        }
    }
    cases
}

pub(super) fn magnitudes() -> Vec<Case> {
    let (mut cases, ways) = (Vec::new(), at_temperatures());
    let mut turn = Turns::new(&ways);
    type Enlarge = fn(&mut [f32], f32);
    let enlarged: [(&str, Enlarge); 4] = [
        ("logits up to", |row, size| row.iter_mut().for_each(|z| *z *= size / 8.0)),
        ("logits about", |row, size| row.iter_mut().for_each(|z| *z += size)),
        ("the target's logit", |row, size| row[3] = size),
        ("one logit", |row, size| row[17] = size),
    ];
    for size in [1e6, 3e8, 1e11, 1e30, 3e38] {
        for (models, large) in MODELS {
            for (what, enlarge) in enlarged {
                for (name, divergence) in KINDS {
                    let (way, objective) = turn.next();
                    let case = odd_row(&by(divergence, objective), 40, |rows| {
                        for (row, _) in rows.into_iter().zip(large).filter(|(_, yes)| *yes) {
                            enlarge(row, size);
                        }
                    });
                    cases.push(case.named(format!("{name}, {what} {size:e}, {models}, {way}")));
                }
                turn.next();
            }
        }
    }
    cases
}

pub(super) fn temperatures() -> Vec<Case> {
    let mut cases = Vec::new();
    let vocabularies = [40, 1000, 40, 5003];
    let mut vocab = Turns::new(&vocabularies);
    for temperature in [0.05, 0.3, 3.0, 10.0] {
        for (name, divergence) in &DIVERGENCES[1..] {
            for (way, objective) in [
                ("plain", Ok(Objective::plain())),
                ("atkd, cross entropy", ce(Ok(Objective::default()))),
            ] {
                for square in [false, true] {
                    let vocab = *vocab.next();
                    let objective = by(*divergence, &objective)
                        .map(|objective| objective.with_temperature_squared(square))
                        .and_then(|objective| objective.with_temperature(temperature));
                    let case = random(if vocab == 5003 { 2 } else { 8 }, vocab, 41).with(objective);
                    let weight = if square { ", squared" } else { "" };
                    cases.push(
                        case.named(format!("{name}, {temperature}{weight}, V = {vocab}, {way}")),
                    );
                }
            }
            // The cycle would give every way the same.
            vocab.next();
        }
    }
    cases
}

pub(super) fn close_models() -> Vec<Case> {
    let mut cases = Vec::new();
    let forms = [
        (40, "plain", Objective::plain()),
        (1000, "atkd", Objective::default()),
        (40, "dkd", Objective::dkd()),
        (5003, "plain", Objective::plain()),
        (40, "atkd", Objective::default()),
        (40, "tkd", Objective::tkd()),
        (1000, "plain", Objective::plain()),
    ];
    let mut form = Turns::new(&forms);
    for difference in [1e-1, 1e-2, 1e-3, 1e-4] {
        for temperature in [0.05, 1.0, 4.0, 10.0] {
            for (name, divergence) in KINDS {
                let (vocab, way, objective) = *form.next();
                let objective = squared(objective, temperature)
                    .and_then(|objective| objective.with_divergence(divergence));
                let tokens = if vocab == 5003 { 2 } else { 12 };
                let case = close_model(tokens, vocab, difference).with(objective);
                cases.push(case.named(format!(
                    "{name}, {difference:e} apart, temperature {temperature} squared, V = {vocab}, {way}"
                )));
            }
        }
    }
    cases
}

pub(super) fn sure_teachers() -> Vec<Case> {
    let mut cases = Vec::new();
    let forms = [17, 257, 1000].map(|vocab| DTYPES[..2].iter().map(move |dtype| (vocab, *dtype)));
    let forms: Vec<(usize, Dtype)> = forms.into_iter().flatten().collect();
    let mut form = Turns::new(&forms);
    for (name, divergence) in &DIVERGENCES[1..] {
        for (way, objective) in [
            ("plain", Ok(Objective::plain())),
            ("dkd", Ok(Objective::dkd())),
            ("plain at 0.5", Objective::plain().with_temperature(0.5)),
            ("atkd at 4, squared", squared(Objective::default(), 4.0)),
        ] {
            let (vocab, dtype) = *form.next();
            let case = sure_teacher(16, vocab).with(by(*divergence, &objective));
            let case = case.dtypes(dtype, dtype, Dtype::F32);
            cases.push(case.named(format!("{name}, V = {vocab}, {dtype}, {way}")));
        }
    }
    cases
}
