//! Shards of the vocabulary: each rank has some columns of the logits, and all agree on the loss.
//!
//! A rank sums up its part of each row into a [`RowState`], and the ranks exchange these. Every rank then merges all of them
//! in the same order, and so has the same bits: margins, hard tokens and loss; and it writes the gradient of its own columns.
//! How the states are exchanged is the caller's: by NCCL, MPI, shared memory. No stage keeps anything, so that each is given
//! what was exchanged before it. [`cpu::shards`](crate::cpu::shards) has the stages on the host, and
//! [`cpu::raw`](crate::cpu::raw) and [`cuda::Kernels`](crate::cuda::Kernels) have them by address.
//!
//! ```text
//! states      logits                               -> [tokens] RowState     exchanged: [ranks, tokens]
//! margins     states                               -> [tokens] the teacher's margins, for the selection
//! terms       logits, states                       -> [tokens] SweepTerms   exchanged: [ranks, tokens]
//! gradient    logits, states, terms, hard tokens   -> the gradient of the shard's columns
//! finish      states, terms, hard tokens           -> the loss and every token's terms
//! ```
//!
//! Only divergences of two sweeps have the stage of terms: all but forward and reverse KL
//! ([`has_two_sweeps`](crate::Objective::has_two_sweeps)). What is exchanged takes 40 bytes per token and rank, and 12 for the
//! terms.
//!
//! States are rounded to float32. So margins, losses and gradients are not the bits of whole rows, from which they differ by a
//! rounding more, and of rows that are as uncertain as each other without being the same, others may be hard than there.
//!
//! Labels are tokens of the whole vocabulary, and the target may be in any shard. The columns of the ranks, in their order,
//! are those of the vocabulary; a shard without columns has [`RowState::EMPTY`] for each token. By
//! [`Target::Teacher`](crate::Target::Teacher) each rank leaves out its own arg max, of which the largest is the target, the
//! lowest token among equals.
//!
//! A [`SparseTeacher`](crate::SparseTeacher), whose indices are tokens of the whole vocabulary, is the same on all ranks. Its
//! margins need no exchange ([`cpu::teacher_margins`](crate::cpu::teacher_margins)), and for the stages each rank makes the
//! logits of its own columns; by [`Tail::Bucket`](crate::Tail::Bucket) from the student's sums over the tokens that the teacher
//! does not know, 8 bytes per token and rank:
//!
//! ```text
//! rests            logits          -> [tokens] RowRest     exchanged: [ranks, tokens]
//! teacher_logits   logits, rests   -> the teacher's logits of the shard's columns, float32
//! ```
//!
//! If the tokens are split over ranks, too, the hard ones are selected by the margins of all ranks' tokens
//! ([`select_hard`](crate::select_hard)), and [`with_counts`](Shard::with_counts) makes a mean that of all. The losses of the
//! ranks of tokens then add up. On GPUs `cuda::Workspace::launch_over_ranks`, with the feature `nccl`, does all of it.

use crate::batch::{TokenSettings, check_count, valid_labels};
use crate::call::{HARD_MASK, ROW_STATES, SWEEP_TERMS, check_columns};
use crate::{Error, Labels, Objective, Result};

pub use crate::params::{atkd_row_state as RowState, atkd_sweep_terms as SweepTerms};

impl RowState {
    /// That of no columns, and of an ignored token.
    pub const EMPTY: Self = Self {
        teacher_sum: 0.0,
        student_sum: 0.0,
        student_sum_at_1: 0.0,
        cross_term: 0.0,
        teacher_max: f32::MIN,
        student_max: f32::MIN,
        teacher_reference: f32::MIN,
        teacher_target: 0.0,
        student_target: 0.0,
        target: -1,
    };
}

impl SweepTerms {
    /// Those of no columns, and of an ignored token.
    pub const EMPTY: Self = Self { teacher: 0.0, student: 0.0, slope: 0.0 };
}

/// A student's sum over the tokens of a row that a sparse teacher does not know, of one shard's columns: see
/// [`cpu::shards::rests`](crate::cpu::shards::rests).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RowRest {
    /// A logit near the largest of them.
    pub shift: f32,
    /// sum e^{(z_j - shift) / T}
    pub sum: f32,
}

impl RowRest {
    /// That of no columns, and of an ignored token.
    pub const EMPTY: Self = Self { shift: f32::MIN, sum: 0.0 };
}

/// One rank's shard of the vocabulary, and the tokens of its call.
#[derive(Clone, Copy, Debug)]
pub struct Shard<'a> {
    tokens: usize,
    labels: Option<Labels<'a>>,
    vocab: usize,
    first_column: usize,
    hard: Option<&'a [bool]>,
    own: TokenSettings<'a>,
    counts: Option<[usize; 2]>,
}

impl<'a> Shard<'a> {
    /// The shard whose columns begin with token `first_column` of the `vocab` in the whole vocabulary, of as many tokens as
    /// there are labels.
    ///
    /// # Errors
    /// If the first column is beyond the vocabulary.
    pub fn new(labels: impl Into<Labels<'a>>, vocab: usize, first_column: usize) -> Result<Self> {
        let labels = labels.into();
        Ok(Self { labels: Some(labels), ..Self::unlabelled(labels.len(), vocab, first_column)? })
    }

    /// The same without labels, for objectives with [`Target::Teacher`](crate::Target::Teacher).
    ///
    /// # Errors
    /// If the first column is beyond the vocabulary.
    pub fn unlabelled(tokens: usize, vocab: usize, first_column: usize) -> Result<Self> {
        check_columns(first_column, 0, vocab)?;
        let own = TokenSettings::default();
        Ok(Self { tokens, labels: None, vocab, first_column, hard: None, own, counts: None })
    }

    /// The hard tokens, as the margins of all ranks' tokens have them: needed where terms or gradient depend on them.
    ///
    /// # Errors
    /// If there is not one value per token.
    pub fn with_hard(mut self, hard: &'a [bool]) -> Result<Self> {
        check_count(HARD_MASK, hard.len(), self.tokens)?;
        self.hard = Some(hard);
        Ok(self)
    }

    /// Multiplies the weights of each token's terms: see [`Batch::with_token_weights`](crate::Batch::with_token_weights).
    ///
    /// # Errors
    /// If there is not one weight per token.
    pub fn with_token_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        self.own = self.own.with_weights(weights, self.tokens)?;
        Ok(self)
    }

    /// Gives each token a temperature of its own: see [`Batch::with_temperatures`](crate::Batch::with_temperatures).
    ///
    /// # Errors
    /// If there is not one temperature per token.
    pub fn with_temperatures(mut self, temperatures: &'a [f32]) -> Result<Self> {
        self.own = self.own.with_temperatures(temperatures, self.tokens)?;
        Ok(self)
    }

    /// The numbers of valid and of hard tokens that the reduction is over, where these are a part of them.
    #[must_use]
    pub fn with_counts(mut self, valid: usize, hard: usize) -> Self {
        self.counts = Some([valid, hard]);
        self
    }

    /// Tokens of the call.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The token of the vocabulary that the first column is about.
    pub fn first_column(&self) -> usize {
        self.first_column
    }

    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }

    pub(crate) fn settings(&self) -> TokenSettings<'a> {
        self.own
    }

    /// The label of each token, `None` for ignored ones; 0 for all of a shard without labels.
    pub(crate) fn valid_labels(&self, objective: &Objective) -> Result<Vec<Option<usize>>> {
        let labels = valid_labels(objective, self.labels, self.tokens, self.vocab)?;
        self.own.check(&labels)?;
        Ok(labels)
    }

    pub(crate) fn check_columns(&self, columns: usize) -> Result<()> {
        check_columns(self.first_column, columns, self.vocab)
    }

    /// The group of each token, false for ignored ones.
    pub(crate) fn groups(
        &self,
        objective: &Objective,
        labels: &[Option<usize>],
    ) -> Result<Vec<bool>> {
        let hard = |token: usize| self.hard.map_or(objective.hard_ratio() == 1.0, |h| h[token]);
        if self.hard.is_none() && objective.depends_on_selection() {
            return Err(Error::NoHardTokens);
        }
        Ok(labels.iter().enumerate().map(|(token, l)| l.is_some() && hard(token)).collect())
    }

    /// The numbers of valid and of hard tokens that the reduction is over.
    pub(crate) fn counts(&self, labels: &[Option<usize>], hard: &[bool]) -> [usize; 2] {
        let counted =
            || [labels.iter().flatten().count(), hard.iter().filter(|&&hard| hard).count()];
        self.counts.unwrap_or_else(counted)
    }
}

/// The states and terms that the ranks have exchanged, `[ranks, tokens]`, in the order of their columns.
#[derive(Clone, Copy, Debug)]
pub struct Exchanged<'a> {
    states: &'a [RowState],
    terms: Option<&'a [SweepTerms]>,
}

impl<'a> Exchanged<'a> {
    /// The states of all ranks.
    pub fn new(states: &'a [RowState]) -> Self {
        Self { states, terms: None }
    }

    /// With the terms of all ranks, which the gradient and the loss by a divergence of two sweeps need.
    #[must_use]
    pub fn with_terms(self, terms: &'a [SweepTerms]) -> Self {
        Self { terms: Some(terms), ..self }
    }

    /// Checks that each rank has exchanged all tokens'.
    pub(crate) fn check(&self, tokens: usize) -> Result<()> {
        let (states, terms) = (self.states.len(), self.terms.map_or(0, <[_]>::len));
        if tokens > 0 && states == 0 {
            return Err(Error::NoStates);
        }
        for (what, values, expected) in [
            (ROW_STATES, states, states.next_multiple_of(tokens.max(1))),
            (SWEEP_TERMS, terms, self.terms.map_or(0, |_| states)),
        ] {
            if values != expected {
                return Err(Error::StateCount { what, values, expected, tokens });
            }
        }
        Ok(())
    }

    /// The states of a token, in the order of the ranks.
    pub(crate) fn states_of(
        &self,
        token: usize,
        tokens: usize,
    ) -> impl Iterator<Item = &'a RowState> {
        self.states.iter().skip(token).step_by(tokens)
    }

    /// The terms of a token, likewise, if there are any.
    pub(crate) fn terms_of(
        &self,
        token: usize,
        tokens: usize,
    ) -> Option<impl Iterator<Item = &'a SweepTerms>> {
        self.terms.map(|terms| terms.iter().skip(token).step_by(tokens))
    }
}

/// The copies that the stages by view make for a device or the simulator.
#[cfg(all(feature = "battery", any(feature = "cuda", feature = "simt")))]
impl<'a> Shard<'a> {
    pub(crate) fn labels(&self) -> Option<Labels<'a>> {
        self.labels
    }

    pub(crate) fn hard(&self) -> Option<&'a [bool]> {
        self.hard
    }

    pub(crate) fn given_counts(&self) -> Option<[usize; 2]> {
        self.counts
    }
}

#[cfg(all(feature = "battery", any(feature = "cuda", feature = "simt")))]
impl<'a> Exchanged<'a> {
    pub(crate) fn states(&self) -> &'a [RowState] {
        self.states
    }

    pub(crate) fn terms(&self) -> Option<&'a [SweepTerms]> {
        self.terms
    }
}
