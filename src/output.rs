//! The results of a call: the loss, each token's terms, and a summary of them.

use crate::batch::TokenSettings;
use crate::reference::Weights;
use crate::{Objective, Reduction};

/// The terms of one token, in nats, before the reduction. All 0 for an ignored token. Where a logit is NaN or
/// +inf, or all are -inf, they are NaN: all of them if it is the teacher's, all but `margin` and
/// `uncertainty` if it is the student's.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenTerms {
    /// The teacher's margin u, the log-odds against the target: UNC = sigmoid(u). It tells tokens apart
    /// where UNC is 0 or 1 in floating point. -inf for an ignored token.
    pub margin: f64,
    /// UNC = 1 - p(target) of the teacher.
    pub uncertainty: f64,
    /// Divergence of the two Bernoulli distributions "the target, or not". Rounding may leave it, and `dkd`, below 0 by
    /// as much as it may be off. NaN, as is `dkd`, for a plain divergence of two sweeps (JSD, total variation and the
    /// skewed ones): the parts are not computed.
    pub tkd: f64,
    /// Divergence of the renormalised non-target distributions. 0 where one of them does not exist, for want of
    /// probability off the target; but +inf for forward KL if that is the student's alone, and for reverse KL if that
    /// is the teacher's alone.
    pub dkd: f64,
    /// The token's loss: both parts, or the plain divergence, and the cross entropy, weighted as the objective says, and
    /// times the token's own weight if it has one.
    pub loss: f64,
    /// True if the token counts: its label is not `ignore_index`.
    pub valid: bool,
    /// True if it was among the hard tokens.
    pub hard: bool,
}

impl TokenTerms {
    pub(crate) const IGNORED: Self = Self {
        margin: f64::NEG_INFINITY,
        uncertainty: 0.0,
        tkd: 0.0,
        dkd: 0.0,
        loss: 0.0,
        valid: false,
        hard: false,
    };
}

/// The loss of a batch and the terms of each of its tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct Output {
    /// The reduced loss, in nats, without the upstream gradient.
    pub loss: f64,
    /// One entry per token.
    pub tokens: Vec<TokenTerms>,
}

/// Means and counts over an [`Output`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Summary {
    /// All tokens, the ignored ones included.
    pub tokens: usize,
    /// Tokens whose label is not `ignore_index`.
    pub valid_tokens: usize,
    /// Valid tokens that were hard.
    pub hard_tokens: usize,
    /// Valid tokens whose loss is NaN or infinite.
    pub non_finite_tokens: usize,
    /// The least uncertainty of a hard token; `None` where there is none.
    pub threshold_uncertainty: Option<f64>,
    /// Mean over the valid tokens; 0 where there are none. So are the next two.
    pub mean_uncertainty: f64,
    /// Mean TKD of the valid tokens.
    pub mean_tkd: f64,
    /// Mean DKD of the valid tokens.
    pub mean_dkd: f64,
}

impl Output {
    /// Adds up in the order of the tokens, so that the sum does not depend on the threads.
    pub(crate) fn reduce(
        objective: &Objective,
        tokens: Vec<TokenTerms>,
        own: TokenSettings,
    ) -> Self {
        let valid = tokens.iter().filter(|token| token.valid).count();
        let hard = tokens.iter().filter(|token| token.hard).count();
        Self::reduce_over(objective, tokens, own, [valid, hard])
    }

    /// The part of these tokens in a loss of so many valid and hard ones.
    pub(crate) fn reduce_over(
        objective: &Objective,
        tokens: Vec<TokenTerms>,
        own: TokenSettings,
        [valid, hard]: [usize; 2],
    ) -> Self {
        let scales = objective.reduction_scales(valid, hard);
        let loss = match objective.reduction() {
            _ if valid == 0 => 0.0,
            Reduction::GroupMean => {
                let of_token = |(i, token): (usize, &TokenTerms)| {
                    let temperature = own.temperature(i, objective);
                    let weights =
                        Weights::new(objective, temperature, token.uncertainty, token.hard);
                    let distillation = weights.times(own.weight(i)).distillation(token);
                    let of_group = scales.distillation(token.hard);
                    if distillation.is_finite() {
                        // The rest of the loss is cross entropy.
                        distillation * of_group + (token.loss - distillation) * scales.ce
                    } else {
                        token.loss * of_group
                    }
                };
                tokens.iter().enumerate().filter(|(_, token)| token.valid).map(of_token).sum()
            }
            Reduction::Sum | Reduction::Mean | Reduction::Denominator(_) => {
                tokens.iter().map(|token| token.loss).sum::<f64>() * scales.ce
            }
        };
        Self { loss, tokens }
    }

    /// The means and counts.
    pub fn summary(&self) -> Summary {
        let valid = || self.tokens.iter().filter(|token| token.valid);
        let valid_tokens = valid().count();
        let mean = |term: fn(&TokenTerms) -> f64| {
            // The sum of nothing is -0.
            (valid().map(term).sum::<f64>() + 0.0) / valid_tokens.max(1) as f64
        };
        Summary {
            tokens: self.tokens.len(),
            valid_tokens,
            hard_tokens: valid().filter(|token| token.hard).count(),
            non_finite_tokens: valid().filter(|token| !token.loss.is_finite()).count(),
            threshold_uncertainty: valid()
                .filter(|token| token.hard)
                .map(|token| token.uncertainty)
                .min_by(f64::total_cmp),
            mean_uncertainty: mean(|token| token.uncertainty),
            mean_tkd: mean(|token| token.tkd),
            mean_dkd: mean(|token| token.dkd),
        }
    }
}
