//! Forward Kullback-Leibler divergence: D(p, q) = sum p log(p / q).
//!
//! ```text
//! TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)             dTKD/dw = sigmoid(w) - sigmoid(u)
//! DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)              cross = sum e^{(z^p_j - m_p) / T} (d^p_j - d^q_j)
//! dloss/db_j = (c_dkd + gamma) qhat_j - c_dkd phat_j               d = z - m, in logits
//!
//! plain = TKD + sigmoid(u) DKD
//! ```

use super::{
    FAR, Flags, Fold, Margins, Moved, NoSweep, Pair, RowDivergence, RowState, STUDENT, Sums,
    TEACHER, Terms, Weighed, sigmoid, sigmoid_difference, softplus,
};
use crate::cpu::exp::Exponent;
use crate::cpu::vector::Vector;

#[derive(Clone, Copy)]
pub(crate) struct ForwardKl;

impl Fold for ForwardKl {
    const REFERENCE: bool = false;

    /// Returns the teacher's exponentials.
    #[inline(always)]
    fn fold<V: Vector, const GUARDED: bool>(
        pair: &Pair<V>,
        cross: &mut V,
        flags: &mut Flags<V>,
    ) -> V {
        let ([a, b], [da, db]) = (pair.logits, pair.distances);
        let p = pair.exponentials[TEACHER];
        let mut gap = da.sub(db);
        if GUARDED {
            let (zero, one) = (V::splat(0.0), V::splat(1.0));
            // The product below is never 0 * inf, nor a far term, which is added in float64.
            gap = p.select_below(f32::MIN_POSITIVE, zero, gap);
            gap = db.select_below(-FAR, zero, gap);
            let far = b.select_below(f32::MIN, zero, db.select_below(-FAR, one, zero));
            flags.far = far.max_or(flags.far);
            // The student rules out (-inf) a token that the teacher does not.
            let teacher_has_it = a.select_below(f32::MIN, zero, one);
            flags.mismatch = b.select_below(f32::MIN, teacher_has_it, zero).max_or(flags.mismatch);
        }
        *cross = p.mul_add(gap, *cross);
        p
    }

    fn far_term([a, b]: [f32; 2], shifts: [f32; 3], exponent: Exponent) -> f64 {
        if b - shifts[STUDENT] < -FAR {
            let da = f64::from(a) - f64::from(shifts[TEACHER]);
            let db = f64::from(b) - f64::from(shifts[STUDENT]);
            (da * exponent.inverse_temperature()).exp() * (da - db)
        } else {
            0.0
        }
    }

    fn rescaled_cross(sums: &Sums, moved: &Moved) -> f64 {
        let gap = moved.distances[TEACHER] - moved.distances[STUDENT];
        moved.factors[TEACHER] * (sums.cross + sums.teacher * gap)
    }

    fn is_mismatch(a: f32, b: f32) -> bool {
        a > f32::NEG_INFINITY && b == f32::NEG_INFINITY
    }
}

impl RowDivergence for ForwardKl {
    type Fold = Self;
    type Second = NoSweep;

    fn terms(self, state: &RowState, margins: Margins, inverse_temperature: f64) -> Terms {
        let sums = &state.sums;
        let Margins { u, w } = margins;
        let dkd = if sums.teacher == 0.0 {
            0.0
        } else if sums.mismatch {
            f64::INFINITY
        } else {
            // Rounding may fall below 0: a mean over tokens needs that as much as what is too large.
            sums.cross / sums.teacher * inverse_temperature - sums.teacher.ln() + sums.student.ln()
        };
        Terms { tkd: bernoulli_kl(u, w), slope: sigmoid_difference(w, u), dkd }
    }

    fn dkd_gradient(self, state: &RowState, c: f64, _: f64) -> [f64; 2] {
        // If the teacher has no mass off the target, DKD is 0 whatever the student does.
        let c = if state.sums.teacher == 0.0 { 0.0 } else { c };
        [-c, c]
    }

    fn plain(
        self,
        state: &RowState,
        terms: &Terms,
        margins: Margins,
        c: f64,
        inverse_temperature: f64,
    ) -> Weighed {
        self.decoupled(state, terms, [c, c * sigmoid(margins.u)], inverse_temperature)
    }

    fn kept_sum(self, state: &RowState) -> f64 {
        state.sums.teacher
    }

    fn rescaled_coefficients(
        self,
        _: &RowState,
        [teacher, student]: [f64; 2],
        moved: &Moved,
    ) -> [f64; 2] {
        [teacher * moved.factors[TEACHER], student * moved.factors[STUDENT]]
    }
}

/// KL of the two classes with log-odds w from those with u, on the side where sigmoid(u) is small: swapping "the target"
/// for "not the target" only flips the signs.
pub(super) fn bernoulli_kl(u: f64, w: f64) -> f64 {
    let (u, w) = if u > 0.0 { (-u, -w) } else { (u, w) };
    if u == f64::NEG_INFINITY {
        softplus(w)
    } else if w.is_infinite() {
        f64::INFINITY
    } else {
        softplus(w) - softplus(u) - sigmoid(u) * (w - u)
    }
}
