//! The selection of hard tokens by their margins, apart from any loss, so that the tokens of several calls, or ranks,
//! can compete with each other.

use std::ops::Range;

use crate::batch::check_count;
use crate::objective::unit_interval;
use crate::{Error, Objective, Result, SelectionRule};

/// Selects the hard tokens by [`SelectionRule::TopK`]: the `ceil(hard_ratio * valid tokens)` of the largest margin, exactly. Among equals the lower
/// index wins; NaN ranks below every number.
///
/// Margins are the teacher's, as [`cpu::teacher_margins`](crate::cpu::teacher_margins) returns them or
/// [`TokenTerms::margin`](crate::TokenTerms::margin) rounded to float32, by which every backend selects. `valid` tells
/// which tokens count: all of them if it is `None`. With the margins and valid tokens of one call the result is that
/// call's own selection. With those of many calls, in whatever order they are put together, it is the selection of one
/// call over all of their tokens; [`Batch::with_hard`](crate::Batch::with_hard) gives each call its share.
///
/// Selects within each sequence if there are `sequences`: sequence `i` is tokens `offsets[i]..offsets[i + 1]`.
///
/// ```
/// let margins = [0.5, -1.0, f32::NAN, 0.5, 3.0];
/// let hard = atkd::select_hard(&margins, None, 0.4, None)?;
/// assert_eq!(hard, [true, false, false, false, true]);
/// let valid = [true, true, true, true, false];
/// let hard = atkd::select_hard(&margins, Some(&valid), 0.5, None)?;
/// assert_eq!(hard, [true, false, false, true, false]);
/// # Ok::<(), atkd::Error>(())
/// ```
///
/// # Errors
/// If the ratio is not in [0, 1], there is not one `valid` per margin, or the offsets do not start at 0, never fall,
/// and end at the number of margins.
pub fn select_hard(
    margins: &[f32],
    valid: Option<&[bool]>,
    hard_ratio: f64,
    sequences: Option<&[usize]>,
) -> Result<Vec<bool>> {
    select_hard_by(SelectionRule::TopK, margins, valid, hard_ratio, sequences)
}

impl Objective {
    /// [`select_hard`] by this objective's rule and ratio.
    ///
    /// # Errors
    /// As there.
    pub fn select_hard(
        &self,
        margins: &[f32],
        valid: Option<&[bool]>,
        sequences: Option<&[usize]>,
    ) -> Result<Vec<bool>> {
        select_hard_by(self.selection_rule(), margins, valid, self.hard_ratio(), sequences)
    }
}

/// [`select_hard`] by either rule.
pub(crate) fn select_hard_by(
    rule: SelectionRule,
    margins: &[f32],
    valid: Option<&[bool]>,
    hard_ratio: f64,
    sequences: Option<&[usize]>,
) -> Result<Vec<bool>> {
    unit_interval("the hard ratio", hard_ratio)?;
    let tokens = margins.len();
    if let Some(valid) = valid {
        check_count("valid", valid.len(), tokens)?;
    }
    if let Some(offsets) = sequences {
        check_offsets(offsets, tokens)?;
    }
    let is_valid = |token: usize| valid.is_none_or(|valid| valid[token]);
    let of_valid = |token| is_valid(token).then_some(margins[token]);
    Ok(select(rule, hard_ratio, scopes(sequences, tokens), tokens, of_valid))
}

/// [`select_hard`] by either rule, for arguments that were checked: `margin` is `None` for a token that does not count.
pub(crate) fn select(
    rule: SelectionRule,
    hard_ratio: f64,
    scopes: impl Iterator<Item = Range<usize>>,
    tokens: usize,
    margin: impl Fn(usize) -> Option<f32>,
) -> Vec<bool> {
    let mut hard = vec![false; tokens];
    for scope in scopes {
        let mut ranked: Vec<(f32, usize)> = scope
            .filter_map(|token| {
                let margin = margin(token)?;
                // Adding 0 makes -0 and 0 equal in the total order, and a NaN of either sign last.
                Some((if margin.is_nan() { -f32::NAN } else { margin + 0.0 }, token))
            })
            .collect();
        let count = rule.hard_count(hard_ratio, ranked.len());
        if count > 0 && count < ranked.len() {
            ranked
                .select_nth_unstable_by(count - 1, |(a, i), (b, j)| b.total_cmp(a).then(i.cmp(j)));
        }
        let (first, others) = ranked.split_at(count);
        first.iter().for_each(|&(_, token)| hard[token] = true);
        if let (SelectionRule::Median, Some(&(median, _))) = (rule, first.last()) {
            // All that equal it.
            for &(_, token) in others.iter().filter(|(margin, _)| margin.total_cmp(&median).is_eq())
            {
                hard[token] = true;
            }
        }
    }
    hard
}

/// Checks that offsets partition the tokens.
pub(crate) fn check_offsets(offsets: &[usize], tokens: usize) -> Result<()> {
    let error = |index, offset, reason| Error::Sequences { index, offset, tokens, reason };
    match offsets.first() {
        Some(0) => {}
        Some(&first) => return Err(error(0, first, "the first must be 0")),
        None => return Err(error(0, 0, "there must be at least one")),
    }
    for (i, pair) in offsets.windows(2).enumerate() {
        if pair[1] < pair[0] {
            return Err(error(i + 1, pair[1], "offsets must not fall"));
        }
    }
    let last = offsets.len() - 1;
    if offsets[last] != tokens {
        return Err(error(last, offsets[last], "the last must be the number of tokens"));
    }
    Ok(())
}

/// The ranges of tokens within which hard tokens are selected.
pub(crate) fn scopes(
    sequences: Option<&[usize]>,
    tokens: usize,
) -> impl Iterator<Item = Range<usize>> {
    let whole = sequences.is_none().then_some(0..tokens);
    let offsets = sequences.unwrap_or_default();
    offsets.windows(2).map(|pair| pair[0]..pair[1]).chain(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// By sorting, in another order of operations than the selection.
    fn sorted(margins: &[f32], valid: &[bool], ratio: f64, offsets: &[usize]) -> Vec<bool> {
        let mut hard = vec![false; margins.len()];
        for scope in offsets.windows(2) {
            let mut order: Vec<usize> = (scope[0]..scope[1]).filter(|&i| valid[i]).collect();
            order.sort_by(|&i, &j| {
                let (a, b) = (margins[i], margins[j]);
                b.partial_cmp(&a).unwrap_or(a.is_nan().cmp(&b.is_nan()))
            });
            let count = (ratio * order.len() as f64).ceil() as usize;
            order[..count].iter().for_each(|&i| hard[i] = true);
        }
        hard
    }

    #[test]
    fn the_largest_of_any_margins() {
        let special =
            [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1.0, f32::MIN];
        let mut random = fastrand::Rng::with_seed(3);
        for tokens in [0, 1, 2, 3, 7, 50, 333] {
            for ratio in [0.0, 1e-9, 0.3, 0.5, 0.7, 1.0] {
                for distinct in [1, 3, special.len()] {
                    let margins: Vec<f32> =
                        (0..tokens).map(|_| special[random.usize(..distinct)]).collect();
                    let valid: Vec<bool> = (0..tokens).map(|_| random.u32(..4) > 0).collect();
                    let middle = random.usize(..=tokens);
                    let offsets = [0, middle, middle, tokens];
                    let found = select_hard(&margins, Some(&valid), ratio, Some(&offsets));
                    assert_eq!(found.unwrap(), sorted(&margins, &valid, ratio, &offsets));
                    let all = vec![true; tokens];
                    let found = select_hard(&margins, None, ratio, None).unwrap();
                    assert_eq!(found, sorted(&margins, &all, ratio, &[0, tokens]));
                }
            }
        }
    }

    /// Element (n - 1) / 2 in ascending order, and all that are at least that.
    #[test]
    fn from_the_lower_median_on() {
        let nan = f32::NAN;
        let cases: [(&[f32], &[bool]); 9] = [
            (&[], &[]),
            (&[3.0], &[true]),
            (&[1.0, 2.0], &[true, true]),
            (&[3.0, 1.0, 2.0], &[true, false, true]),
            // Three of four.
            (&[3.0, 1.0, 2.0, 4.0], &[true, false, true, true]),
            (&[2.0, 1.0, 2.0, 2.0, 5.0], &[true, false, true, true, true]),
            (&[0.0, -0.0, -1.0], &[true, true, false]),
            (&[nan, 1.0, 2.0, -nan, 3.0, 4.0], &[false, true, true, false, true, true]),
            // The median is NaN, and all is at least that.
            (&[nan, -nan, nan, 7.0], &[true; 4]),
        ];
        for (margins, expected) in cases {
            let of = |token: usize| Some(margins[token]);
            let tokens = margins.len();
            let hard = select(SelectionRule::Median, 0.0, scopes(None, tokens), tokens, of);
            assert_eq!(hard, expected, "{margins:?}");
        }
        // Within sequences, of the tokens that count.
        let margins = [1.0, 2.0, 9.0, 8.0, 7.0, 6.0];
        let of = |token: usize| (token != 4).then_some(margins[token]);
        let hard = select(SelectionRule::Median, 1.0, scopes(Some(&[0, 2, 2, 6]), 6), 6, of);
        assert_eq!(hard, [true, true, true, true, false, false]);
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let margins = [1.0, 2.0, 3.0];
        let fails = |valid: Option<&[bool]>, ratio, sequences: Option<&[usize]>, words: &str| {
            let message = select_hard(&margins, valid, ratio, sequences).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
        };
        fails(None, 1.5, None, "hard ratio is 1.5");
        fails(None, f64::NAN, None, "hard ratio is NaN");
        fails(Some(&[true; 2]), 0.5, None, "2 values of valid were given for 3 tokens");
        fails(None, 0.5, Some(&[0, 2]), "sequence offset 1 is 2");
        fails(None, 0.5, Some(&[0, 4, 3]), "sequence offset 2 is 3, but offsets must not fall");
        fails(None, 0.5, Some(&[]), "at least one");
    }
}
