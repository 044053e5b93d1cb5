//! The distributions that a sparse teacher is taken for.

use super::{Softmax, Split, Weights, divergence_of_token, weighted};
use crate::output::TokenTerms;
use crate::sparse::{KnownTokens, SparseTeacher, Tail};
use crate::{Objective, ReductionScales, Result};

/// A row of a sparse teacher.
pub(crate) struct SparseRow {
    /// The columns that each class is of: one, but the last class may be of all that are left.
    pub classes: Vec<Vec<usize>>,
    /// The logarithm of the teacher's probability of each.
    log_probs: Vec<f64>,
    /// The class of the target.
    pub target: usize,
    /// log((1 - p_g) / p_g)
    pub margin: f64,
}

impl SparseRow {
    pub fn new(
        teacher: &SparseTeacher,
        objective: &Objective,
        token: usize,
        label: usize,
        vocab: usize,
    ) -> Result<Self> {
        let KnownTokens { columns, log_probs, target } = teacher.known(objective, token, label)?;
        let left: Vec<usize> = (0..vocab).filter(|column| !columns.contains(column)).collect();
        let mut classes: Vec<Vec<usize>> = columns.iter().map(|&column| vec![column]).collect();
        if teacher.tail() == Tail::Zero {
            let margin = Split::new(&log_probs, 1.0, target).margin;
            classes.extend(left.iter().map(|&column| vec![column]));
            let mut log_probs = log_probs;
            log_probs.resize(vocab, f64::NEG_INFINITY);
            return Ok(Self { classes, log_probs, target, margin });
        }

        let mut log_probs = log_probs;
        log_probs[target] = log_probs[target].min(0.0);
        if teacher.tail() == Tail::Sampled {
            // Weights share what the target leaves. Where that is nothing, they still are the distribution of the rest.
            let weights = Split::new(&log_probs, 1.0, target).rest;
            let all_but_target = (-log_probs[target].exp_m1()).ln();
            let margin = all_but_target - log_probs[target];
            if weights.max.is_finite() {
                // Their sum is 0 in float64 then, but their logarithms still have their proportions.
                let left = if all_but_target.is_finite() { all_but_target } else { -1e4 };
                let others = log_probs.iter_mut().enumerate().filter(|(k, _)| *k != target);
                for (_, log_prob) in others {
                    *log_prob = *log_prob - weights.max - weights.log_sum + left;
                }
            }
            classes.extend(left.iter().map(|&column| vec![column]));
            log_probs.resize(vocab, f64::NEG_INFINITY);
            return Ok(Self { classes, log_probs, target, margin });
        }
        // If float32 has rounded the target's probability to 1, the rest is that of the other known tokens.
        let of_known = Split::new(&log_probs, 1.0, target);
        let known = (of_known.rest.log_sum + of_known.rest.max).exp();
        let (all_but_target, margin) = match log_probs[target] {
            0.0 => (known, of_known.margin),
            log_target => {
                let all_but_target = -log_target.exp_m1();
                (all_but_target, all_but_target.ln() - log_target)
            }
        };
        let mut rest = all_but_target - known;
        // A share that float64 cannot tell from none is none.
        if rest < 1e-12 * all_but_target || left.is_empty() {
            // The mass of the others is what the target leaves, whatever rounding has made of it.
            let factor = (all_but_target / known).ln();
            for (k, log_prob) in log_probs.iter_mut().enumerate() {
                *log_prob += if k == target || !factor.is_finite() { 0.0 } else { factor };
            }
            rest = 0.0;
        }
        match teacher.tail() {
            Tail::Bucket if !left.is_empty() => {
                log_probs.push(rest.ln());
                classes.push(left);
            }
            _ => {
                let each = (rest / left.len() as f64).ln();
                log_probs.extend(left.iter().map(|_| each));
                classes.extend(left.into_iter().map(|column| vec![column]));
            }
        }
        Ok(Self { classes, log_probs, target, margin })
    }

    /// The logits of the classes of both models, given the student's logits of the whole vocabulary. That of a class of
    /// several columns is T log sum e^(b_j / T).
    pub fn logits(&self, b: &[f64], temperature: f64) -> (Vec<f64>, Vec<f64>) {
        // Relative to the largest, the logit of a class keeps its digits.
        let column = self.classes[self.target][0];
        let others = b.iter().enumerate().filter(|&(j, z)| j != column && z.is_finite());
        let largest = others.map(|(_, z)| *z).reduce(f64::max).unwrap_or(0.0);
        let of_class = |class: &Vec<usize>| {
            if let [column] = class[..] {
                return b[column] - largest;
            }
            let columns: Vec<f64> = class.iter().map(|&j| b[j] - largest).collect();
            if columns.iter().any(|z| z.is_nan()) {
                return f64::NAN;
            }
            let top = columns.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            if top.is_infinite() {
                return top;
            }
            top + temperature
                * columns.iter().map(|z| ((z - top) / temperature).exp()).sum::<f64>().ln()
        };
        let a = self.log_probs.iter().map(|log_prob| temperature * log_prob).collect();
        (a, self.classes.iter().map(of_class).collect())
    }

    /// The terms of the token whose student has the logits `b` of the whole vocabulary.
    #[expect(clippy::too_many_arguments)]
    pub fn terms(
        &self,
        objective: &Objective,
        b: &[f64],
        hard: bool,
        weight: f64,
        temperature: f64,
        scales: ReductionScales,
        gradient: Option<&mut [f64]>,
    ) -> Result<TokenTerms> {
        let Self { classes, target, margin, .. } = self;
        let column = classes[*target][0];
        let (a, b_of_classes) = self.logits(b, temperature);
        // Cross entropy is at temperature 1, and over the vocabulary.
        let distillation = objective.with_ce_weight(0.0)?;
        let mut of_classes = vec![0.0; classes.len()];
        let mut terms = divergence_of_token(
            &distillation,
            &a,
            &b_of_classes,
            *target,
            *margin,
            hard,
            weight,
            temperature,
            scales,
            Some(&mut of_classes),
        );
        let ce_weight =
            Weights::new(objective, temperature, terms.uncertainty, hard).times(weight).ce;
        let at_1 = Split::new(b, 1.0, column);
        if !terms.loss.is_nan() {
            terms.loss += weighted(ce_weight, -at_1.log_target);
        }
        if let Some(gradient) = gradient {
            for (class, slope) in classes.iter().zip(of_classes) {
                let q = Softmax::new(class.iter().map(|&j| b[j]).collect(), temperature);
                for (&j, log_share) in class.iter().zip(&q.log) {
                    let share = if class.len() == 1 { 1.0 } else { log_share.exp() };
                    let at_target = if j == column { 1.0 } else { 0.0 };
                    let ce = at_1.probability(j) - at_target;
                    gradient[j] = slope * share + scales.ce * weighted(ce_weight, ce);
                }
            }
        }
        Ok(terms)
    }
}
