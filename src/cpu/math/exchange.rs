//! A row's state as ranks exchange it, in float32 and in octaves: `atkd_row_state` of kernels/params.h.

use super::{Fold, Found, Moved, REFERENCE, RowState, STUDENT, Sums, TEACHER};
use crate::cpu::exp::Exponent;
use crate::shards;

/// Adding and subtracting it rounds a float32 to an integer.
const ROUNDS: f32 = 12_582_912.0; // 1.5 * 2^23

/// From here on an exponent is not rounded to an integer.
const LARGE: f32 = 262_144.0;

/// The unit of exchanged cross terms, 2^64.
const GAP_UNIT: f64 = 18_446_744_073_709_551_616.0;

/// The exponent of a shift in octaves, less what exchanged sums are relative to.
fn residue(shift: f64, octaves: f32) -> f64 {
    // The kernels round it so (shift_of in kernels/math/online.cuh).
    let nearest = (shift as f32).mul_add(octaves, ROUNDS) - ROUNDS;
    if nearest.abs() < LARGE { shift * f64::from(octaves) - f64::from(nearest) } else { 0.0 }
}

/// The way from the shifts of a state to what exchanged sums are relative to, or `back`.
fn moved(shifts: [f64; 3], exponent: Exponent, back: bool) -> Moved {
    let octaves = exponent.octaves(1.0);
    let sign = if back { -1.0 } else { 1.0 };
    let residues = [TEACHER, STUDENT].map(|model| sign * residue(shifts[model], octaves));
    let [teacher, student] = residues.map(|residue| residue / f64::from(octaves));
    // Gaps from the reference stay as they are.
    Moved { distances: [teacher, student, student], factors: residues.map(f64::exp2) }
}

fn residue_at_1(shifts: [f64; 3]) -> f64 {
    residue(shifts[STUDENT], Exponent::new(1.0).octaves(1.0))
}

impl RowState {
    /// The state as it is exchanged, with the target and its logits if this part of the row has left it out. `at_1`: the
    /// student's sum at temperature 1 is one of its own.
    pub fn exchanged<F: Fold>(
        &self,
        exponent: Exponent,
        at_1: bool,
        target: Option<(usize, [f32; 2])>,
    ) -> shards::RowState {
        let Self { shifts, sums, .. } = self;
        let moved = moved(*shifts, exponent, false);
        let cross_term = if sums.mismatch {
            F::EXCHANGED_SIGN * f64::INFINITY
        } else {
            let octaves = f64::from(exponent.octaves(1.0));
            F::EXCHANGED_SIGN * F::rescaled_cross(sums, &moved) * (octaves / GAP_UNIT)
        };
        let sum_at_1 = if at_1 { sums.student_at_1 * residue_at_1(*shifts).exp2() } else { 0.0 };
        let (target, [teacher_target, student_target]) =
            target.map_or((-1, [0.0; 2]), |(target, logits)| (target as i32, logits));
        shards::RowState {
            teacher_sum: (sums.teacher * moved.factors[TEACHER]) as f32,
            student_sum: (sums.student * moved.factors[STUDENT]) as f32,
            student_sum_at_1: sum_at_1 as f32,
            cross_term: cross_term as f32,
            teacher_max: shifts[TEACHER] as f32,
            student_max: shifts[STUDENT] as f32,
            teacher_reference: shifts[REFERENCE] as f32,
            teacher_target,
            student_target,
            target,
        }
    }

    /// The state that was exchanged.
    pub fn of_exchanged<F: Fold>(state: &shards::RowState, exponent: Exponent, at_1: bool) -> Self {
        let shifts = [state.teacher_max, state.student_max, state.teacher_reference].map(f64::from);
        let moved = moved(shifts, exponent, true);
        let mismatch = f64::from(state.cross_term) == F::EXCHANGED_SIGN * f64::INFINITY;
        let octaves = f64::from(exponent.octaves(1.0));
        let cross = F::EXCHANGED_SIGN * f64::from(state.cross_term) * (GAP_UNIT / octaves);
        let mut sums = Sums {
            teacher: state.teacher_sum.into(),
            student: state.student_sum.into(),
            cross: if mismatch { 0.0 } else { cross },
            student_at_1: state.student_sum_at_1.into(),
            mismatch,
            far: false,
        };
        sums.cross = F::rescaled_cross(&sums, &moved);
        sums.teacher *= moved.factors[TEACHER];
        sums.student *= moved.factors[STUDENT];
        sums.student_at_1 *= (-residue_at_1(shifts)).exp2();
        if !at_1 {
            sums.student_at_1 = sums.student;
        }
        Self { shifts, sums, found: Found::default() }
    }
}
