//! The frame of divergences that need both probabilities of an element at once, and so a second sweep.
//!
//! ```text
//! first sweep     the sums of both models' exponentials, which are kept
//! second sweep    D, mean = sum q_j h_j, and h_j times the student's exponentials in place of the teacher's
//! gradient        c q_j h_j + (gamma - c mean) q_j
//! ```
//!
//! For a plain objective the second sweep's probabilities are those of the whole vocabulary, and the target's are added
//! to its sums in float64. D is bounded, and so are its elements: no logit is too far for float32.

use super::{
    Flags, Fold, Found, Margins, Moved, Pair, RowDivergence, RowState, STUDENT, SecondSums,
    SecondSweep, Sums, TEACHER, Terms, Weighed, sigmoid,
};
use crate::cpu::exp::Exponent;
use crate::cpu::vector::Vector;

pub(crate) trait TwoSweeps: SecondSweep + Sync {
    /// h_j times the student's exponential, per what [`SecondSweep::add`] returns.
    fn unit(self) -> f64;

    /// See [`RowDivergence::found`].
    fn found(self, sums: SecondSums<f64>, target: Option<Margins>) -> Found;

    /// TKD and dTKD/dw.
    fn bernoulli(self, margins: Margins) -> [f64; 2];

    /// h of the target in the whole vocabulary; any number where the student gives it no probability.
    fn target_slope(self, margins: Margins) -> f64;
}

/// Keeps the teacher's exponentials for the second sweep.
pub(crate) struct KeepTeacher;

impl Fold for KeepTeacher {
    const REFERENCE: bool = false;

    #[inline(always)]
    fn fold<V: Vector, const GUARDED: bool>(pair: &Pair<V>, _: &mut V, _: &mut Flags<V>) -> V {
        pair.exponentials[TEACHER]
    }

    fn far_term(_: [f32; 2], _: [f32; 3], _: Exponent) -> f64 {
        0.0
    }

    fn rescaled_cross(_: &Sums, _: &Moved) -> f64 {
        0.0
    }
}

impl<D: TwoSweeps> RowDivergence for D {
    type Fold = KeepTeacher;
    type Second = D;

    fn second(self) -> Option<D> {
        Some(self)
    }

    fn found(self, sums: SecondSums<f64>, target: Option<Margins>) -> Found {
        TwoSweeps::found(self, sums, target)
    }

    fn terms(self, state: &RowState, margins: Margins, _: f64) -> Terms {
        let [tkd, slope] = self.bernoulli(margins);
        Terms { tkd, slope, dkd: if has_rest(state) { state.found.divergence } else { 0.0 } }
    }

    fn dkd_gradient(self, state: &RowState, c: f64, _: f64) -> [f64; 2] {
        if has_rest(state) { [c * self.unit(), -c * state.found.mean] } else { [0.0; 2] }
    }

    fn plain(self, state: &RowState, _: &Terms, margins: Margins, c: f64, _: f64) -> Weighed {
        let Found { divergence, mean } = state.found;
        let (of_target, of_rest) = (sigmoid(-margins.w), sigmoid(margins.w));
        let target = match of_target {
            0.0 => 0.0,
            _ => c * of_target * (self.target_slope(margins) - mean),
        };
        Weighed {
            loss: c * divergence,
            kept: c * self.unit() * of_rest,
            student: -c * mean * of_rest,
            target,
        }
    }

    /// They are not computed: D is no combination of them.
    fn plain_columns(self, _: &Terms) -> [f64; 2] {
        [f64::NAN; 2]
    }

    fn kept_sum(self, state: &RowState) -> f64 {
        state.sums.student
    }

    fn rescaled_coefficients(
        self,
        _: &RowState,
        coefficients: [f64; 2],
        moved: &Moved,
    ) -> [f64; 2] {
        coefficients.map(|coefficient| coefficient * moved.factors[STUDENT])
    }
}

/// Neither model is without mass off the target.
fn has_rest(state: &RowState) -> bool {
    state.sums.teacher != 0.0 && state.sums.student != 0.0
}
