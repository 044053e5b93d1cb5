//! Forward Kullback-Leibler divergence: D(p, q) = sum p log(p / q).
//!
//! ```text
//! TKD = softplus(w) - softplus(u) - sigmoid(u) (w - u)             dTKD/dw = sigmoid(w) - sigmoid(u)
//! DKD = sum_{j != g} phat_j (a_j - b_j) - (L_p - L_q)              cross = sum e^{(z^p_j - m_p) / T} (d^p_j - d^q_j)
//! dloss/db_j = (c_dkd + gamma) qhat_j - c_dkd phat_j               d = z - m, in logits
//! ```

use super::{Divergence, FAR, Flags, Pair, STUDENT, Sums, TEACHER, Terms, over, sigmoid, softplus};
use crate::cpu::vector::Vector;

pub(crate) struct ForwardKl;

impl Divergence for ForwardKl {
    const SWEEPS: usize = 1;

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

    fn far_term([a, b]: [f32; 2], shifts: [f32; 2], inverse_temperature: f64) -> f64 {
        if b - shifts[STUDENT] < -FAR {
            let da = f64::from(a) - f64::from(shifts[TEACHER]);
            let db = f64::from(b) - f64::from(shifts[STUDENT]);
            (da * inverse_temperature).exp() * (da - db)
        } else {
            0.0
        }
    }

    fn rescaled_cross(sums: &Sums, moved: [f64; 2], factors: [f64; 2]) -> f64 {
        factors[TEACHER] * (sums.cross + sums.teacher * (moved[TEACHER] - moved[STUDENT]))
    }

    fn terms(sums: &Sums, u: f64, w: f64, inverse_temperature: f64) -> Terms {
        let (tkd, slope) = bernoulli(u, w);
        let dkd = if sums.teacher == 0.0 {
            0.0
        } else if sums.mismatch {
            f64::INFINITY
        } else {
            // Rounding may fall below 0: a mean over tokens needs that as much as what is too large.
            sums.cross / sums.teacher * inverse_temperature - sums.teacher.ln() + sums.student.ln()
        };
        Terms { tkd, slope, dkd }
    }

    fn coefficients(
        sums: &Sums,
        c_dkd: f64,
        gamma: f64,
        inverse_temperature: f64,
        scale: f64,
    ) -> [f64; 2] {
        // If the teacher has no mass off the target, DKD is 0 whatever the student does.
        let c_dkd = if sums.teacher == 0.0 { 0.0 } else { c_dkd };
        [
            -over(c_dkd * inverse_temperature, scale, sums.teacher),
            over((c_dkd + gamma) * inverse_temperature, scale, sums.student),
        ]
    }

    fn rescaled_coefficients(
        [teacher, student]: [f64; 2],
        _moved: [f64; 2],
        factors: [f64; 2],
    ) -> [f64; 2] {
        [teacher * factors[TEACHER], student * factors[STUDENT]]
    }

    #[inline(always)]
    fn gradient<V: Vector>(teacher: V, _student: V, coefficient: V, gradient: V) -> V {
        teacher.mul_add(coefficient, gradient)
    }
}

/// TKD and its derivative with respect to w. Both are computed on the side where sigmoid(u) is small; swapping "the
/// target" for "not the target" only flips the signs.
fn bernoulli(u: f64, w: f64) -> (f64, f64) {
    let (sign, u, w) = if u > 0.0 { (-1.0, -u, -w) } else { (1.0, u, w) };
    let slope = sign * (sigmoid(w) - sigmoid(u));
    let kl = if u == f64::NEG_INFINITY {
        softplus(w)
    } else if w.is_infinite() {
        f64::INFINITY
    } else {
        softplus(w) - softplus(u) - sigmoid(u) * (w - u)
    };
    (kl, slope)
}
