use crate::{Error, Result, SparseTeacher};

/// What a [`SparseTeacher`] keeps of a row of logits.
///
/// All logarithms are of sums without the target, so that one that the teacher is sure of loses nothing.
///
/// ```
/// use atkd::TeacherRow;
///
/// let logits = [2.0_f32, 0.0, 1.0, -3.0];
/// let likeliest = TeacherRow::top_k(&logits, Some(1), 1.0, 2)?;
/// assert_eq!(likeliest.indices, [0, 2]);
/// // Six draws from the tokens but the target, by a random number.
/// let drawn = TeacherRow::sampled(&logits, 1, 1.0, 6, 0.3)?;
/// assert_eq!(drawn.indices, [0, 2]);
/// # Ok::<(), atkd::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct TeacherRow {
    /// Tokens of the vocabulary.
    pub indices: Vec<i32>,
    /// The log-probability of each, or the logarithm of its weight, which is an estimate of its probability.
    pub log_probs: Vec<f32>,
    /// The target's log-probability, -inf without a target.
    pub target_log_prob: f32,
    /// The probability of all tokens that are neither the target nor among the indices; of draws 0, which stand for all.
    pub tail_mass: f32,
}

impl TeacherRow {
    /// The `top_k` likeliest tokens of a row of logits, the most probable first, by lower index where they are equal; fewer if
    /// the vocabulary has fewer. The temperature divides the logits.
    ///
    /// # Errors
    /// If a logit is NaN or +inf, all are -inf, or the target is none of them.
    pub fn top_k(
        logits: &[f32],
        target: Option<usize>,
        temperature: f64,
        top_k: usize,
    ) -> Result<Self> {
        check(logits, target)?;
        let scaled = |z: f32| f64::from(z) / temperature;
        let of_target = target.map_or(f64::NEG_INFINITY, |target| scaled(logits[target]));
        let top = largest(logits, top_k);
        let mut left = logits.to_vec();
        for index in top.iter().map(|entry| entry.1).chain(target) {
            left[index] = f32::NEG_INFINITY;
        }
        let tail = log_sum_exp(left.iter().map(|&z| scaled(z)));
        let entries = top.iter().filter(|entry| Some(entry.1) != target);
        let others = log_sum_exp(entries.map(|entry| scaled(entry.0)).chain([tail]));
        let margin = others - of_target;
        let target_log_prob = log_sigmoid(-margin);
        let all =
            if margin > 0.0 { others - log_sigmoid(margin) } else { of_target - target_log_prob };
        Ok(Self {
            indices: top.iter().map(|entry| entry.1 as i32).collect(),
            log_probs: top.iter().map(|entry| (scaled(entry.0) - all) as f32).collect(),
            target_log_prob: target_log_prob as f32,
            tail_mass: (tail - all).exp() as f32,
        })
    }

    /// Draws with replacement from the teacher's distribution of all tokens but the target, for
    /// [`Tail::Sampled`](crate::Tail::Sampled): the tokens drawn, ascending, each with its share of the draws times what the
    /// target leaves. The expectation of that is the token's probability. None are drawn if the target has all of the mass. The temperature
    /// divides the logits.
    ///
    /// All draws come from one number `random`, which must be uniform in [0, 1) and another for each row: they are
    /// evenly spaced in the cumulative distribution (systematic sampling), so that a token is drawn as often as its
    /// probability says, rounded down or up. That has the expectation of independent draws, and a smaller variance.
    ///
    /// # Errors
    /// If a logit is NaN or +inf, all are -inf, or the target is none of them; if `draws` is 0 or above
    /// [`SparseTeacher::MAX_TOP_K`], or `random` not in [0, 1).
    pub fn sampled(
        logits: &[f32],
        target: usize,
        temperature: f64,
        draws: usize,
        random: f64,
    ) -> Result<Self> {
        check(logits, Some(target))?;
        let most = SparseTeacher::MAX_TOP_K;
        if !(1..=most).contains(&draws) {
            return Err(Error::TopK { top_k: draws, most });
        }
        if !(0.0..1.0).contains(&random) {
            let (name, allowed) = ("the random number", "in [0, 1)");
            return Err(Error::Setting { name, value: random, allowed });
        }
        let scaled = |z: f32| f64::from(z) / temperature;
        let off_target = || logits.iter().enumerate().filter(|&(j, _)| j != target);
        let others = log_sum_exp(off_target().map(|(_, &z)| scaled(z)));
        let margin = others - scaled(logits[target]);
        let of_others = log_sigmoid(margin);
        let mut counts: Vec<(usize, usize)> = Vec::with_capacity(draws);
        let (mut sum, mut drawn) = (0.0, 0);
        for (j, &z) in off_target() {
            let probability = (scaled(z) - others).exp();
            // NaN where no other token has a probability.
            if probability == 0.0 || probability.is_nan() {
                continue;
            }
            sum += draws as f64 * probability;
            // Draw i is at i + random.
            let until = ((sum - random).ceil().max(0.0) as usize).min(draws);
            if until > drawn {
                counts.push((j, until - drawn));
                drawn = until;
            }
        }
        if let Some((_, count)) = counts.last_mut() {
            // Rounding has left the sum below the last draw.
            *count += draws - drawn;
        }
        let weight = |count: usize| (of_others + (count as f64 / draws as f64).ln()) as f32;
        Ok(Self {
            indices: counts.iter().map(|&(j, _)| j as i32).collect(),
            log_probs: counts.iter().map(|&(_, count)| weight(count)).collect(),
            target_log_prob: log_sigmoid(-margin) as f32,
            tail_mass: 0.0,
        })
    }
}

fn check(logits: &[f32], target: Option<usize>) -> Result<()> {
    if let Some(index) = logits.iter().position(|z| z.is_nan() || *z == f32::INFINITY) {
        return Err(Error::TeacherLogit { index, logit: logits[index] });
    }
    if logits.iter().all(|&z| z == f32::NEG_INFINITY) {
        return Err(Error::NoTeacherMass);
    }
    match target {
        Some(target) if target >= logits.len() => {
            Err(Error::TeacherTarget { target, vocab: logits.len() })
        }
        _ => Ok(()),
    }
}

/// log(1 / (1 + e^-x))
fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// The logarithm of the sum of exponentials, -inf of none.
pub(crate) fn log_sum_exp(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY {
        return largest;
    }
    largest + values.map(|value| (value - largest).exp()).sum::<f64>().ln()
}

/// The largest k logits with their indices, by lower index where they are equal.
fn largest(logits: &[f32], k: usize) -> Vec<(f32, usize)> {
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
