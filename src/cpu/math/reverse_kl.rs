//! Reverse Kullback-Leibler divergence: D(p, q) = sum q log(q / p).
//!
//! ```text
//! TKD = softplus(u) - softplus(w) - sigmoid(w) (u - w)             dTKD/dw = sigmoid'(w) (w - u)
//! DKD = mean + (m_p - r) / T + log(S_p / S_q)                      cross = sum e^{(z^q_j - m_q) / T} gap_j
//! dDKD/db_j = qhat_j (gap_j / T - mean)                            gap_j = (z^q_j - m_q) - (z^p_j - r)
//!                                                                  mean = cross / (S_q T), S the sums of exponentials
//! plain = TKD + s DKD, s = sigmoid(w)                              adds s' DKD to gamma
//! ```
//!
//! **The reference r.** Any constant may be added to all gaps. The student often has most of its mass on one token, and
//! then that token's own gap is about the mean, whatever the teacher thinks of it: their difference would lose the digits
//! of the gap. So gaps are relative to that of the token with the student's shift, whose own gap is exactly 0. (If
//! another one is more probable, it has at most e^2 times as much, and the difference loses one digit.)
//!
//! **Far gaps.** Where the teacher has a mask, a gap may be huge beside a tiny probability, whose float32 error is a part of
//! its logarithm then; and for masks of -1e30 the gap overflows where the probability underflows. Terms of gaps from
//! [`FAR_LOG2`] on are added in float64. In a row with such terms everything that is kept is computed in float64, too, as
//! qhat_j (gap_j / T - mean), times [`FAR_UNIT`].

use super::forward_kl::bernoulli_kl;
use super::{
    Flags, Fold, Margins, Moved, NoSweep, Pair, REFERENCE, RowDivergence, RowState, STUDENT, Sums,
    TEACHER, Terms, Weighed, sigmoid, sigmoid_slope, weighted,
};
use crate::cpu::exp::Exponent;
use crate::cpu::vector::Vector;

/// Lets float32 hold gradients that are above its range until the coefficients make them smaller.
const FAR_UNIT: f64 = 1.0 / 4_294_967_296.0;

/// The largest gap, over the temperature and in octaves, for float32.
const FAR_LOG2: f32 = 32768.0;

/// Exponents of 2 below which a probability is 0 even for the largest gap.
const LOWEST_LOG2: f32 = -2000.0;

#[derive(Clone, Copy)]
pub(crate) struct ReverseKl;

impl Fold for ReverseKl {
    const REFERENCE: bool = true;

    fn guards_reference(from_shift: f32, exponent: Exponent) -> bool {
        exponent.octaves(from_shift).abs() >= FAR_LOG2 / 2.0
    }

    /// Returns the cross terms.
    #[inline(always)]
    fn fold<V: Vector, const GUARDED: bool>(
        pair: &Pair<V>,
        cross: &mut V,
        flags: &mut Flags<V>,
    ) -> V {
        let ([a, b], db) = (pair.logits, pair.distances[STUDENT]);
        let q = pair.exponentials[STUDENT];
        let mut gap = db.sub(a.sub(pair.reference));
        if GUARDED {
            let (zero, one) = (V::splat(0.0), V::splat(1.0));
            let octaves = pair.exponent.log2(gap);
            // NaN, as of -inf less -inf, is not near either.
            let near = octaves.select_below(FAR_LOG2, one, zero);
            let near = zero.sub(octaves).select_below(FAR_LOG2, near, zero);
            gap = near.select_below(0.5, zero, gap);
            // The teacher rules out (-inf) a token that the student does not.
            let student_has_it = b.select_below(f32::MIN, zero, one);
            flags.mismatch = a.select_below(f32::MIN, student_has_it, zero).max_or(flags.mismatch);
            let finite = a.select_below(f32::MIN, zero, student_has_it);
            let counts = pair.exponent.log2(db).select_below(LOWEST_LOG2, zero, finite);
            flags.far = near.select_below(0.5, counts, zero).max_or(flags.far);
        }
        let kept = q.mul(gap);
        *cross = cross.add(kept);
        kept
    }

    fn far_term([a, b]: [f32; 2], shifts: [f32; 3], exponent: Exponent) -> f64 {
        let octaves = exponent.octaves((b - shifts[STUDENT]) - (a - shifts[REFERENCE]));
        if octaves.abs() < FAR_LOG2 {
            return 0.0;
        }
        let [db, gap] = distances([a, b], shifts.map(f64::from));
        (db * exponent.exact_inverse_temperature()).exp() * gap
    }

    fn rescaled_cross(sums: &Sums, moved: &Moved) -> f64 {
        moved.factors[STUDENT] * (sums.cross + sums.student * gap_moved(moved))
    }

    fn is_mismatch(a: f32, b: f32) -> bool {
        a == f32::NEG_INFINITY && b > f32::NEG_INFINITY
    }

    /// There the gap is the teacher's less the student's.
    const EXCHANGED_SIGN: f64 = -1.0;
}

/// z^q - m_q and the gap.
fn distances([a, b]: [f32; 2], shifts: [f64; 3]) -> [f64; 2] {
    let db = f64::from(b) - shifts[STUDENT];
    [db, db - (f64::from(a) - shifts[REFERENCE])]
}

fn gap_moved(moved: &Moved) -> f64 {
    moved.distances[STUDENT] - moved.distances[REFERENCE]
}

/// sum qhat_j gap_j / T
fn mean(sums: &Sums, inverse_temperature: f64) -> f64 {
    sums.cross / sums.student * inverse_temperature
}

impl RowDivergence for ReverseKl {
    type Fold = Self;
    type Second = NoSweep;

    const KEEPS_FAR: bool = true;

    fn far_kept(self, [a, b]: [f32; 2], state: &RowState, exponent: Exponent) -> f32 {
        if a == f32::NEG_INFINITY || b == f32::NEG_INFINITY {
            return 0.0;
        }
        let inverse_temperature = exponent.exact_inverse_temperature();
        let [db, gap] = distances([a, b], state.shifts);
        let q = (db * inverse_temperature).exp() / state.sums.student;
        let centred = gap * inverse_temperature - mean(&state.sums, inverse_temperature);
        (q * centred * FAR_UNIT) as f32
    }

    fn terms(self, state: &RowState, margins: Margins, inverse_temperature: f64) -> Terms {
        let sums = &state.sums;
        let Margins { u, w } = margins;
        let dkd = if sums.student == 0.0 {
            0.0
        } else if sums.mismatch {
            f64::INFINITY
        } else {
            let reference = state.shifts[TEACHER] - state.shifts[REFERENCE];
            (sums.cross / sums.student + reference) * inverse_temperature + sums.teacher.ln()
                - sums.student.ln()
        };
        // An infinite margin has no slope, and no probability that could move.
        let slope = sigmoid_slope(w);
        let slope = if slope == 0.0 { 0.0 } else { slope * (w - u) };
        Terms { tkd: bernoulli_kl(w, u), slope, dkd }
    }

    fn dkd_gradient(self, state: &RowState, c: f64, inverse_temperature: f64) -> [f64; 2] {
        let sums = &state.sums;
        if sums.student == 0.0 || c == 0.0 {
            [0.0, 0.0]
        } else if sums.far {
            [c / FAR_UNIT, 0.0]
        } else {
            [c * inverse_temperature, -c * mean(sums, inverse_temperature)]
        }
    }

    fn plain(
        self,
        state: &RowState,
        terms: &Terms,
        margins: Margins,
        c: f64,
        inverse_temperature: f64,
    ) -> Weighed {
        if terms.dkd == f64::INFINITY && c != 0.0 {
            return Weighed { loss: c * f64::INFINITY, kept: 0.0, student: 0.0, target: 0.0 };
        }
        let s = sigmoid(margins.w);
        let mut weighed = self.decoupled(state, terms, [c, c * s], inverse_temperature);
        let of_mass = weighted(c * sigmoid_slope(margins.w), terms.dkd);
        weighed.student += of_mass;
        weighed.target -= of_mass;
        weighed
    }

    const GRADIENT_BESIDE_INFINITY: bool = false;

    fn kept_sum(self, state: &RowState) -> f64 {
        if state.sums.far { 1.0 } else { state.sums.student }
    }

    fn rescaled_coefficients(
        self,
        state: &RowState,
        [kept, student]: [f64; 2],
        moved: &Moved,
    ) -> [f64; 2] {
        let factor = moved.factors[STUDENT];
        if state.sums.far {
            [kept, student * factor]
        } else {
            [kept * factor, (student + kept * gap_moved(moved)) * factor]
        }
    }
}
