//! One row of a teacher's logits, down to what a cache keeps of it.

use super::Settings;
use crate::cpu::math::log_sum_exp;

/// What a cache keeps of a token.
pub(super) struct TopK {
    pub indices: Vec<i32>,
    pub log_probs: Vec<f32>,
    pub target_log_prob: f32,
    pub tail_mass: f32,
}

impl TopK {
    /// `logits` are used up. The error says what is wrong with them.
    pub fn new(logits: &mut [f32], label: i64, settings: &Settings) -> Result<Self, String> {
        let k = settings.top_k;
        let wrong = logits.iter().position(|z| z.is_nan() || *z == f32::INFINITY);
        let highest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        if label < 0 && (wrong.is_some() || highest == f32::NEG_INFINITY) {
            // The writer keeps nothing of an ignored token without a distribution.
            let log_probs = vec![f32::NAN; k];
            return Ok(Self {
                indices: vec![0; k],
                log_probs,
                target_log_prob: 0.0,
                tail_mass: 0.0,
            });
        }
        if let Some(index) = wrong {
            let logit = logits[index];
            return Err(format!("the logit of {index} is {logit}, but must be finite or -inf"));
        }
        if highest == f32::NEG_INFINITY {
            return Err("all logits are -inf, but one at least must be finite".into());
        }
        let vocab = logits.len();
        let target = usize::try_from(label).ok();
        if target.is_some_and(|target| target >= vocab) {
            return Err(format!(
                "the label is {label}, but must be below the vocabulary size {vocab}, or negative for a token to be ignored"
            ));
        }
        let scaled = |z: f32| f64::from(z) / settings.temperature;
        let of_target = target.map_or(f64::NEG_INFINITY, |target| scaled(logits[target]));
        let top = top_k(logits, k);
        for &(_, index) in &top {
            logits[index] = f32::NEG_INFINITY;
        }
        if let Some(target) = target {
            logits[target] = f32::NEG_INFINITY;
        }
        // All logarithms are of sums without the target, so that one that the teacher is sure of loses nothing.
        let tail = log_sum_exp(logits.iter().map(|&z| scaled(z)));
        let entries =
            top.iter().filter(|entry| Some(entry.1) != target).map(|entry| scaled(entry.0));
        let others = log_sum_exp(entries.chain([tail]));
        let margin = others - of_target;
        let target_log_prob = match margin > 0.0 {
            true => -margin - (-margin).exp().ln_1p(),
            false => -margin.exp().ln_1p(),
        };
        let all = if margin > 0.0 {
            others + (-margin).exp().ln_1p()
        } else {
            of_target - target_log_prob
        };

        let mut row = Self {
            indices: top.iter().map(|entry| entry.1 as i32).collect(),
            log_probs: top.iter().map(|entry| (scaled(entry.0) - all) as f32).collect(),
            target_log_prob: target_log_prob as f32,
            tail_mass: (tail - all).exp() as f32,
        };
        row.indices.resize(k, -1);
        row.log_probs.resize(k, 0.0);
        Ok(row)
    }
}

/// The largest k logits with their indices, by lower index where they are equal.
fn top_k(logits: &[f32], k: usize) -> Vec<(f32, usize)> {
    let larger = |a: &(f32, usize), b: &(f32, usize)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    let mut top: Vec<(f32, usize)> = Vec::with_capacity(2 * k);
    let mut least = f32::NEG_INFINITY;
    for (index, &logit) in logits.iter().enumerate() {
        // A later logit that is equal to the least comes after k others.
        if logit > least || top.len() < k {
            top.push((logit, index));
            if top.len() == 2 * k {
                top.select_nth_unstable_by(k - 1, larger);
                top.truncate(k);
                least = top[k - 1].0;
            }
        }
    }
    top.sort_unstable_by(larger);
    top.truncate(k);
    top
}
