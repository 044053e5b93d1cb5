//! Cases of unusual rows: extremes, masks, infinities, NaN, and logits of any size.

use super::case::{Case, random};
use crate::{Dtype, Objective, Result};

/// A change to the rows of teacher and student, of which 3 is the target.
pub(super) type Edit = fn(&mut [f32], &mut [f32]);

pub(super) const MASK: f32 = f32::NEG_INFINITY;

pub(super) const EDGES: &[(&str, Edit)] = &[
    ("confident teacher", |a, _| a[3] = 43.0),
    ("hopeless teacher", |a, _| a[3] = -37.0),
    ("confident student", |_, b| b[3] = 43.0),
    ("hopeless student", |_, b| b[3] = -37.0),
    ("both confident", |a, b| (a[3], b[3]) = (43.0, 42.0)),
    ("both hopeless", |a, b| (a[3], b[3]) = (-37.0, -36.0)),
    ("confident teacher, hopeless student", |a, b| (a[3], b[3]) = (43.0, -37.0)),
    ("hopeless teacher, confident student", |a, b| (a[3], b[3]) = (-37.0, 43.0)),
    // Odds that float32 holds, but not their reciprocal.
    ("hopeless teacher at the end of float32", |a, _| hopeless_to_the_end(a)),
    ("hopeless student at the end of float32", |_, b| hopeless_to_the_end(b)),
    ("both hopeless at the end of float32", |a, b| {
        hopeless_to_the_end(a);
        hopeless_to_the_end(b);
    }),
    ("teacher certain beyond float64", |a, _| a[3] = 2000.0),
    ("teacher against it beyond float64", |a, _| a[3] = -2000.0),
    ("logits up to 50", |a, b| {
        a.iter_mut().for_each(|z| *z *= 50.0 / 8.0);
        b.iter_mut().for_each(|z| *z *= -50.0 / 8.0);
    }),
    ("logits up to 1e4", |a, b| {
        a.iter_mut().for_each(|z| *z *= 1250.0);
        b.iter_mut().for_each(|z| *z *= 1250.0);
    }),
    ("logits about 1e4", |a, b| {
        a.iter_mut().for_each(|z| *z += 1e4);
        b.iter_mut().for_each(|z| *z -= 1e4);
    }),
    ("one logit above all others", |a, b| {
        a.fill(0.0);
        b.fill(0.0);
        (a[30], b[31]) = (60.0, 60.0);
    }),
    ("equal logits", |a, b| {
        a.fill(1.5);
        b.fill(-2.5);
    }),
    ("student equals teacher", |a, b| b.copy_from_slice(a)),
    ("rising logits", |a, b| {
        for j in 0..a.len() {
            (a[j], b[j]) = (j as f32 / 64.0, -(j as f32) / 64.0);
        }
    }),
    ("padded vocabulary", |a, b| {
        a[33..].fill(MASK);
        b[33..].fill(MASK);
    }),
    ("padded at the front", |a, b| {
        a[..3].fill(MASK);
        b[..3].fill(MASK);
        a[4..9].fill(MASK);
        b[4..9].fill(MASK);
    }),
    ("padding of -3.4e38", |a, b| {
        a[33..].fill(f32::MIN);
        b[33..].fill(f32::MIN);
    }),
    ("padding of -65504", |a, b| {
        a[33..].fill(-65504.0);
        b[33..].fill(-65504.0);
    }),
    ("teacher masks more", |a, b| {
        a[20..].fill(MASK);
        b[33..].fill(MASK);
    }),
    ("student rules out what the teacher allows", |_, b| b[20] = MASK),
    ("student rules out all but the target", |_, b| {
        let target = b[3];
        b.fill(MASK);
        b[3] = target;
    }),
    ("target masked by the teacher", |a, _| a[3] = MASK),
    ("target masked by the student", |_, b| b[3] = MASK),
    ("target masked by both", |a, b| (a[3], b[3]) = (MASK, MASK)),
    ("teacher has no mass off the target", |a, _| {
        let target = a[3];
        a.fill(MASK);
        a[3] = target;
    }),
    ("neither has mass off the target", |a, b| {
        let targets = (a[3], b[3]);
        a.fill(MASK);
        b.fill(MASK);
        (a[3], b[3]) = targets;
    }),
    ("one token beside the target", |a, b| {
        let (target, other) = (a[3], a[17]);
        a.fill(MASK);
        (a[3], a[17]) = (target, other);
        b[33..].fill(MASK);
    }),
    ("teacher all -inf", |a, _| a.fill(MASK)),
    ("student all -inf", |_, b| b.fill(MASK)),
    ("NaN in the teacher", |a, _| a[12] = f32::NAN),
    ("NaN in the student", |_, b| b[12] = f32::NAN),
    ("NaN in the teacher's target", |a, _| a[3] = f32::NAN),
    ("NaN in the student's target", |_, b| b[3] = f32::NAN),
    ("+inf in the teacher", |a, _| a[12] = f32::INFINITY),
    ("+inf in the student", |_, b| b[12] = f32::INFINITY),
    ("+inf in the teacher's target", |a, _| a[3] = f32::INFINITY),
    ("+inf in the student's target", |_, b| b[3] = f32::INFINITY),
    ("far larger logits at the end", |a, b| {
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("far larger logits at the end of the teacher's row", |a, _| far_larger_at_the_end(a)),
    ("far larger logits at the end of the student's row", |_, b| far_larger_at_the_end(b)),
    ("NaN in the teacher before far larger logits", |a, b| {
        a[12] = f32::NAN;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("NaN in the student before far larger logits", |a, b| {
        b[12] = f32::NAN;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("student rules out a token before far larger logits", |a, b| {
        b[20] = MASK;
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("padding before far larger logits", |a, b| {
        let end = a.len() / 4 * 3;
        a[13..end].fill(MASK);
        b[13..end].fill(MASK);
        far_larger_at_the_end(a);
        far_larger_at_the_end(b);
    }),
    ("NaN among -inf", |a, _| {
        a.fill(MASK);
        a[12] = f32::NAN;
    }),
];

/// Raises the last quarter so far that the rest is nothing in float32. Every thread of a kernel meets a raised logit.
fn far_larger_at_the_end(z: &mut [f32]) {
    let start = z.len() / 4 * 3;
    z[start..].iter_mut().for_each(|z| *z += 150.0);
}

/// Gives the row a margin of 87.9.
fn hopeless_to_the_end(z: &mut [f32]) {
    z.fill(-20.0);
    (z[3], z[12], z[13]) = (-87.2, 0.0, 0.0);
}

/// The case with its finite logits in float16's range, infinities and NaN as they are.
pub(super) fn within_float16(mut case: Case) -> Case {
    for z in case.teacher.iter_mut().chain(&mut case.student) {
        *z = if z.is_finite() { z.clamp(-65504.0, 65504.0) } else { *z };
    }
    case
}

pub(super) fn edges() -> Vec<Case> {
    let mut cases = Vec::new();
    let ce = |objective: Objective| objective.with_ce_weight(0.5);
    let objectives = [
        ("atkd", Ok(Objective::default())),
        ("kl", Ok(Objective::kl())),
        ("tkd and cross entropy", ce(Objective::tkd())),
        ("dkd and cross entropy", ce(Objective::dkd())),
        (
            "atkd at 2, cross entropy",
            ce(Objective::default()).and_then(|o| o.with_temperature(2.0)),
        ),
    ];
    for (edge, edit) in EDGES {
        for (name, objective) in &objectives {
            for vocab in [40, 4500] {
                // The odd row in the middle of others, which must stay right.
                let mut case = random(3, vocab, 21).with(objective.clone());
                case.labels.fill(3);
                edit(&mut case.teacher[vocab..][..vocab], &mut case.student[vocab..][..vocab]);
                cases.push(case.clone().named(format!("{edge}, V = {vocab}, {name}")));
                if vocab == 40 {
                    for dtype in [Dtype::F16, Dtype::Bf16] {
                        let case = within_float16(case.clone());
                        let case = case.named(format!("{edge}, {dtype}, {name}"));
                        cases.push(case.dtypes(dtype, dtype, dtype));
                    }
                }
            }
        }
    }
    for (name, objective) in objectives {
        for u in [-40.0, 0.0, 40.0] {
            for w in [-40.0, 0.0, 40.0] {
                let mut case = random(1, 2, 1).with(objective.clone());
                (case.teacher, case.student, case.labels) = (vec![u, 0.0], vec![w, 0.0], vec![1]);
                cases.push(case.named(format!("V = 2, u = {u}, w = {w}, {name}")));
            }
        }
    }
    cases
}

/// Stand-ins for -inf where that is not to be had: float16's lowest and the customary ones.
pub(super) const FINITE_MASKS: [f32; 5] = [-1e4, -65504.0, -1e9, -1e30, f32::MIN];

/// Objectives for rows of unusual size: every term, at temperatures that make more and less of them.
fn at_temperatures() -> [(&'static str, Result<Objective>); 3] {
    let ce = |objective: Objective| objective.with_ce_weight(0.5);
    [
        ("kl and cross entropy", ce(Objective::kl())),
        (
            "atkd at 2, cross entropy",
            ce(Objective::default()).and_then(|o| o.with_temperature(2.0)),
        ),
        ("kl at 0.05", Objective::kl().with_temperature(0.05)),
    ]
}

/// The odd row in the middle of others, which must stay right, target 3.
pub(super) fn odd_row(
    objective: &Result<Objective>,
    vocab: usize,
    edit: impl Fn([&mut [f32]; 2]),
) -> Case {
    let mut case = random(3, vocab, 23).with(objective.clone());
    case.labels.fill(3);
    edit([&mut case.teacher[vocab..][..vocab], &mut case.student[vocab..][..vocab]]);
    case
}

pub(super) const MODELS: [(&str, [bool; 2]); 3] =
    [("teacher", [true, false]), ("student", [false, true]), ("both", [true, true])];

pub(super) fn finite_masks() -> Vec<Case> {
    let mut cases = Vec::new();
    for mask in FINITE_MASKS {
        for (models, masked) in MODELS {
            for (what, first) in [("the end", 33), ("all but the target", 0)] {
                let edit = |rows: [&mut [f32]; 2]| {
                    for (row, _) in rows.into_iter().zip(masked).filter(|(_, masked)| *masked) {
                        let target = row[3];
                        row[first..].fill(mask);
                        row[3] = target;
                    }
                };
                for (name, objective) in at_temperatures() {
                    let case = odd_row(&objective, 40, edit);
                    let name = format!("{mask:e} at {what}, {models}, {name}");
                    let dtype = if mask >= -65504.0 { Dtype::F16 } else { Dtype::Bf16 };
                    let narrow = case.clone().dtypes(dtype, dtype, dtype);
                    // float32's lowest is -inf in bfloat16.
                    if mask > f32::MIN {
                        cases.push(narrow.named(format!("{name}, {dtype}")));
                    }
                    cases.push(case.named(name));
                }
                let case = odd_row(&Ok(Objective::kl()), 4500, edit);
                cases.push(case.named(format!("{mask:e} at {what}, {models}, V = 4500, kl")));
            }
        }
    }
    cases
}

pub(super) fn magnitudes() -> Vec<Case> {
    let mut cases = Vec::new();
    // log2(e) / T times these lies below and beyond 2^24 and 2^31.
    for size in [1e6, 1.2e7, 3e8, 3.06e9, 5e9, 1e11, 1e20, 1e30, 3e38] {
        for (models, large) in MODELS {
            let large = move |rows: [&mut [f32]; 2], edit: fn(&mut f32, f32)| {
                for (row, _) in rows.into_iter().zip(large).filter(|(_, large)| *large) {
                    row.iter_mut().for_each(|z| edit(z, size));
                }
            };
            for (name, objective) in at_temperatures() {
                let name = format!("{size:e}, {models}, {name}");
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z *= size / 8.0));
                cases.push(case.clone().named(format!("logits up to {name}")));
                if size > 1e9 {
                    let case = case.dtypes(Dtype::Bf16, Dtype::Bf16, Dtype::Bf16);
                    cases.push(case.named(format!("logits up to {name}, BF16")));
                }
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z += size));
                cases.push(case.named(format!("logits about {name}")));
                let case = odd_row(&objective, 40, |rows| large(rows, |z, size| *z -= size));
                cases.push(case.named(format!("logits about -{name}")));
                for at in [3, 17] {
                    let case = odd_row(&objective, 40, |rows| {
                        large(rows.map(|row| &mut row[at..][..1]), |z, size| *z = size)
                    });
                    cases.push(case.named(format!("one logit, {at}, of {name}")));
                }
            }
            let objective = Ok(Objective::kl());
            let case = odd_row(&objective, 4500, |rows| large(rows, |z, size| *z *= size / 8.0));
            cases.push(case.named(format!("logits up to {size:e}, {models}, V = 4500, kl")));
        }
    }
    cases
}
