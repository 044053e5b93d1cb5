//! A call's inputs and outputs by address: for memory that other languages and frameworks own, on the host or on a
//! device. [`cpu::raw`](crate::cpu::raw) and [`cuda`](crate::cuda) run such calls.

use crate::logits::span;
use crate::objective::check_temperature;
use crate::strides::ByteRows;
use crate::{Dtype, Error, Objective, Result, SelectionRule, SparseTeacher, Strides, Tail, Target};

/// Logits or a gradient `[tokens, vocab]` at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawLogits {
    /// The address of the first element.
    pub address: u64,
    /// The type of the elements.
    pub dtype: Dtype,
    /// The starts of the rows, in elements from the first: a row stride by `into()`, or [`Strides::nested`].
    pub strides: Strides,
}

/// One label a token at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawLabels {
    /// 64 bits each.
    I64(u64),
    /// 32 bits each.
    I32(u64),
}

/// Everything that a call reads but the logits, by address: what a call in stages begins with. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTokens {
    /// Rows of the whole call.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The labels of all tokens: see [`RawCall::labels`].
    pub labels: Option<RawLabels>,
    /// The offsets of the sequences, and their count: see [`RawCall::sequences`].
    pub sequences: Option<(u64, usize)>,
    /// The margins to select by: see [`RawCall::margins`].
    pub margins: Option<u64>,
    /// The mask of hard tokens: see [`RawCall::hard`].
    pub hard: Option<u64>,
    /// The weights of the tokens: see [`RawCall::token_weights`].
    pub token_weights: Option<u64>,
    /// The temperatures of the tokens: see [`RawCall::temperatures`].
    pub temperatures: Option<u64>,
    /// The gradient of what comes after: see [`RawCall::upstream`].
    pub upstream: Option<u64>,
}

/// The logits of some tokens of a call in stages, and their gradient, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawRows {
    /// Rows.
    pub tokens: usize,
    /// The teacher's logits.
    pub teacher: RawLogits,
    /// The student's logits.
    pub student: RawLogits,
    /// The memory for the gradient: see [`RawCall::gradient`].
    pub gradient: Option<RawLogits>,
    /// See [`RawCall::gradient_padding`].
    pub gradient_padding: usize,
}

impl RawRows {
    /// The teacher as its own student, for what reads the teacher alone.
    pub(crate) fn of_teacher(tokens: usize, teacher: RawLogits) -> Self {
        Self { tokens, teacher, student: teacher, gradient: None, gradient_padding: 0 }
    }

    /// The call about these rows, with nothing else known of their tokens.
    pub(crate) fn call(&self, vocab: usize) -> RawCall {
        let Self { tokens, teacher, student, gradient, gradient_padding } = *self;
        RawCall {
            tokens,
            vocab,
            teacher,
            student,
            gradient,
            gradient_padding,
            labels: None,
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
        }
    }
}

/// Everything that a call reads, and its gradient, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCall {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row that count. Either model may have more, as its strides tell: they are not read.
    pub vocab: usize,
    /// The teacher's logits.
    pub teacher: RawLogits,
    /// The student's logits.
    pub student: RawLogits,
    /// The memory for the gradient, of the student's dtype or float32, or of any if the student's is float32; may be the
    /// student's logits themselves. `None` for the loss alone.
    pub gradient: Option<RawLogits>,
    /// Columns of the gradient after the first `vocab`, which become 0: where the student's vocabulary is padded.
    pub gradient_padding: usize,
    /// `None` for a batch without labels, with [`Target::Teacher`].
    pub labels: Option<RawLabels>,
    /// Hard tokens are selected within sequences: the address of their `count + 1` offsets, 64 bits each,
    /// and `count`.
    pub sequences: Option<(u64, usize)>,
    /// The teacher's margins, float32 `[N]`, where they are known from elsewhere: hard tokens are selected
    /// by these, and the teacher's logits are read once less.
    pub margins: Option<u64>,
    /// The set of hard tokens, a byte per token, 0 or not, if that was selected elsewhere: nothing is selected then,
    /// and hard ratio, sequences and margins are not used. Ignored tokens stay ignored.
    pub hard: Option<u64>,
    /// float32 `[N]`, by which each token's terms are multiplied: see
    /// [`Batch::with_token_weights`](crate::Batch::with_token_weights).
    pub token_weights: Option<u64>,
    /// float32 `[N]`, each token's temperature instead of the objective's: see
    /// [`Batch::with_temperatures`](crate::Batch::with_temperatures). On a GPU the loss of a token whose temperature is not in
    /// [1e-30, 1e30] is NaN, which is an error on the CPU.
    pub temperatures: Option<u64>,
    /// The gradient of what comes after, a float32 scalar by which the gradient is multiplied. If it is infinite
    /// or NaN, as a trainer's loss scale may make it, the gradient of every valid token is NaN.
    pub upstream: Option<u64>,
}

impl RawLogits {
    /// The address after the last element, if all of them can be there.
    pub(crate) fn end(self, what: &'static str, tokens: usize, vocab: usize) -> Result<u64> {
        let Self { address, dtype, strides } = self;
        let elements = span(what, tokens, vocab, strides)?;
        if elements > 0 && address == 0 {
            return Err(Error::Null { what, elements });
        }
        check_alignment(what, address, dtype.size() as u64)?;
        let reason = "it ends beyond the address space";
        (elements as u64)
            .checked_mul(dtype.size() as u64)
            .and_then(|bytes| address.checked_add(bytes))
            .filter(|&end| end <= isize::MAX as u64)
            .ok_or(Error::Shape { what, tokens, vocab, strides, reason })
    }

    /// Returns whether an element of either, both of which can be there, is in a row of the other. Each has columns of its
    /// own.
    fn overlaps(self, other: Self, tokens: usize, columns: [usize; 2]) -> bool {
        let rows = |Self { address, dtype, strides }: Self, columns| {
            ByteRows::new(address, dtype.size(), strides, tokens, columns)
        };
        rows(self, columns[0]).overlap(&rows(other, columns[1]))
    }

    /// Returns whether both are the same rows.
    fn is_same(self, other: Self, tokens: usize) -> bool {
        let of_tokens = |logits: Self| Self { strides: logits.strides.of(tokens), ..logits };
        of_tokens(self) == of_tokens(other)
    }
}

impl RawCall {
    /// Returns whether the gradient overwrites the student's logits.
    pub(crate) fn is_in_place(&self) -> bool {
        self.gradient.is_some_and(|gradient| gradient.is_same(self.student, self.tokens))
    }

    /// Everything but the logits.
    pub fn without_logits(&self) -> RawTokens {
        RawTokens {
            tokens: self.tokens,
            vocab: self.vocab,
            labels: self.labels,
            sequences: self.sequences,
            margins: self.margins,
            hard: self.hard,
            token_weights: self.token_weights,
            temperatures: self.temperatures,
            upstream: self.upstream,
        }
    }

    /// Checks that the shapes, strides and addresses go together; what lies behind an address cannot be
    /// known.
    pub(crate) fn check(&self, objective: &Objective) -> Result<()> {
        self.without_logits().check(objective)?;
        self.check_logits()
    }

    /// Checks the logits and the gradient.
    pub(crate) fn check_logits(&self) -> Result<()> {
        let (teacher, student) = (self.teacher, self.student);
        self.check_inputs(&[("the teacher's logits", teacher), (STUDENT_LOGITS, student)])
    }

    /// Checks logits that are read, and the gradient beside them.
    fn check_inputs(&self, inputs: &[(&'static str, RawLogits)]) -> Result<()> {
        let padded = self.vocab.saturating_add(self.gradient_padding);
        let mut ends = Vec::with_capacity(inputs.len());
        for &(what, logits) in inputs {
            ends.push(logits.end(what, self.tokens, self.vocab)?);
        }
        let Some(gradient) = self.gradient else { return Ok(()) };
        let start = gradient.address;
        let end = gradient.end("the gradient", self.tokens, padded)?;
        self.student.dtype.check_gradient(gradient.dtype)?;
        for (&(what, other), other_end) in inputs.iter().zip(ends) {
            let in_place = what == STUDENT_LOGITS && self.is_in_place();
            // Rows may lie between the other's.
            if start < other_end
                && other.address < end
                && !in_place
                && gradient.overlaps(other, self.tokens, [padded, self.vocab])
            {
                return Err(Error::Overlap {
                    what,
                    gradient: [start, end],
                    other: [other.address, other_end],
                });
            }
        }
        Ok(())
    }
}

/// A teacher of which some log-probabilities per token are known: see [`SparseTeacher`]. N is the call's
/// tokens, K `top_k`; all three are without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSparseTeacher {
    /// K
    pub top_k: usize,
    /// `[N, K]`
    pub indices: RawLabels,
    /// The address of the log-probabilities `[N, K]`.
    pub log_probs: u64,
    /// Their type.
    pub dtype: Dtype,
    /// The log-probabilities of the targets, float32 `[N]`.
    pub target_log_probs: Option<u64>,
    /// The type that they were rounded to before: see [`SparseTeacher::with_target_rounding`].
    pub target_rounding: Dtype,
    /// The distribution outside of the known tokens.
    pub tail: Tail,
}

/// A call with a sparse teacher, by address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSparseCall {
    /// Everything but the logits.
    pub tokens: RawTokens,
    /// The teacher.
    pub teacher: RawSparseTeacher,
    /// The student's logits `[N, V]`.
    pub student: RawLogits,
    /// See [`RawCall::gradient`].
    pub gradient: Option<RawLogits>,
    /// See [`RawCall::gradient_padding`].
    pub gradient_padding: usize,
}

impl RawSparseCall {
    /// The call about the student's logits, as its own teacher.
    pub(crate) fn of_student(&self) -> RawCall {
        let Self { tokens, student, gradient, gradient_padding, .. } = *self;
        let RawTokens { sequences, margins, hard, .. } = tokens;
        let count = tokens.tokens;
        let rows = RawRows { tokens: count, teacher: student, student, gradient, gradient_padding };
        let RawTokens { labels, token_weights, temperatures, upstream, .. } = tokens;
        RawCall {
            sequences,
            margins,
            hard,
            labels,
            token_weights,
            temperatures,
            upstream,
            ..rows.call(tokens.vocab)
        }
    }

    /// Checks that the shapes, strides and addresses go together.
    pub(crate) fn check(&self, objective: &Objective) -> Result<()> {
        self.tokens.check(objective)?;
        self.teacher.check(self.tokens.tokens)?;
        self.of_student().check_inputs(&[(STUDENT_LOGITS, self.student)])
    }
}

impl RawSparseTeacher {
    /// Checks that the teacher's margins of these tokens can be written.
    pub(crate) fn check_margins(
        &self,
        objective: &Objective,
        tokens: &RawTokens,
        to: u64,
    ) -> Result<()> {
        tokens.check(objective)?;
        self.check(tokens.tokens)?;
        check_alignment(MARGINS, to, size_of::<f32>() as u64)?;
        check_there(MARGINS, Some(to), tokens.tokens)
    }

    pub(crate) fn check(&self, tokens: usize) -> Result<()> {
        let (most, top_k) = (SparseTeacher::MAX_TOP_K, self.top_k);
        if !(1..=most).contains(&top_k) {
            return Err(Error::TopK { top_k, most });
        }
        let (indices, index_bytes) = match self.indices {
            RawLabels::I64(address) => (address, 8),
            RawLabels::I32(address) => (address, 4),
        };
        for (what, address, multiple, elements) in [
            (INDICES, Some(indices), index_bytes, tokens.saturating_mul(top_k)),
            (
                LOG_PROBS,
                Some(self.log_probs),
                self.dtype.size() as u64,
                tokens.saturating_mul(top_k),
            ),
            (TARGET_LOG_PROBS, self.target_log_probs, 4, tokens),
        ] {
            check_alignment(what, address.unwrap_or(0), multiple)?;
            check_there(what, address, elements)?;
        }
        Ok(())
    }
}

impl RawTokens {
    /// The call without logits, for stages that read none.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    pub(crate) fn call_without_logits(&self) -> RawCall {
        let Self { tokens, vocab, .. } = *self;
        let teacher = RawLogits { address: 0, dtype: Dtype::F32, strides: vocab.into() };
        self.whole_call(&RawRows::of_teacher(tokens, teacher))
    }

    /// The call about all of these tokens.
    #[cfg(any(test, feature = "cuda", feature = "simt"))]
    pub(crate) fn whole_call(&self, rows: &RawRows) -> RawCall {
        let Self { sequences, margins, hard, .. } = *self;
        RawCall { sequences, margins, hard, ..self.call(0, rows) }
    }

    /// The call about some of these tokens, in the order of their rows, with the labels and other values from token
    /// `first` on.
    #[cfg(any(test, feature = "cuda", feature = "simt"))]
    pub(crate) fn call(&self, first: usize, rows: &RawRows) -> RawCall {
        let labels = self.labels.map(|labels| match labels {
            RawLabels::I64(address) => RawLabels::I64(address + 8 * first as u64),
            RawLabels::I32(address) => RawLabels::I32(address + 4 * first as u64),
        });
        let [token_weights, temperatures] = [self.token_weights, self.temperatures]
            .map(|address| address.map(|address| address + 4 * first as u64));
        let upstream = self.upstream;
        RawCall { labels, token_weights, temperatures, upstream, ..rows.call(self.vocab) }
    }

    /// Checks that the addresses go together.
    pub(crate) fn check(&self, objective: &Objective) -> Result<()> {
        if self.labels.is_none() && objective.target() == Target::Label {
            return Err(Error::NoLabels);
        }
        check_sequences(self.sequences, self.tokens)?;
        let (labels, label_bytes) = match self.labels {
            None => (0, 1),
            Some(RawLabels::I64(address)) => (address, 8),
            Some(RawLabels::I32(address)) => (address, 4),
        };
        for (what, address, multiple) in [
            ("the labels", labels, label_bytes),
            ("the sequences' offsets", self.sequences.map_or(0, |(address, _)| address), 8),
            (MARGINS, self.margins.unwrap_or(0), 4),
            (TOKEN_WEIGHTS, self.token_weights.unwrap_or(0), 4),
            (TEMPERATURES, self.temperatures.unwrap_or(0), 4),
            ("the upstream gradient", self.upstream.unwrap_or(0), 4),
        ] {
            check_alignment(what, address, multiple)?;
        }
        for (what, address, elements) in [
            ("the labels", self.labels.map(|_| labels), self.tokens),
            ("the sequences' offsets", self.sequences.map(|(address, _)| address), self.tokens),
            (MARGINS, self.margins, self.tokens),
            (HARD_MASK, self.hard, self.tokens),
            (TOKEN_WEIGHTS, self.token_weights, self.tokens),
            (TEMPERATURES, self.temperatures, self.tokens),
            ("the upstream gradient", self.upstream, 1),
        ] {
            check_there(what, address, elements)?;
        }
        Ok(())
    }
}

/// One rank's shard of the vocabulary and the tokens of its call, by address: what every stage of
/// [`shards`](crate::shards) is about. N is `tokens`, R the ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawShard {
    /// Rows.
    pub tokens: usize,
    /// Tokens of the whole vocabulary.
    pub vocab: usize,
    /// The token of the vocabulary that the shard's first column is about.
    pub first_column: usize,
    /// Columns of the shard, of those that count; may be 0.
    pub columns: usize,
    /// The teacher's logits `[N, columns]`.
    pub teacher: RawLogits,
    /// The student's logits `[N, columns]`.
    pub student: RawLogits,
    /// Tokens of the whole vocabulary: see [`RawCall::labels`].
    pub labels: Option<RawLabels>,
    /// The mask of hard tokens, a byte per token, 0 or not; needed where the terms or the gradient depend on it.
    pub hard: Option<u64>,
    /// See [`RawCall::token_weights`].
    pub token_weights: Option<u64>,
    /// See [`RawCall::temperatures`].
    pub temperatures: Option<u64>,
    /// See [`RawCall::upstream`].
    pub upstream: Option<u64>,
    /// The numbers of valid and of hard tokens of all ranks that the reduction is over, 32 bits each; `None` for those of
    /// these tokens.
    pub counts: Option<u64>,
}

/// The states and terms that the ranks of a vocabulary have exchanged, by address: `[ranks, N]`, in the order of their
/// columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawStates {
    /// The [`RowState`](crate::shards::RowState)s.
    pub states: u64,
    /// The [`SweepTerms`](crate::shards::SweepTerms), after the second exchange of a divergence of two sweeps.
    pub terms: Option<u64>,
    /// R
    pub ranks: usize,
}

/// A stage of a call on a shard, with the memory for its result: see [`shards`](crate::shards).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RawStage {
    /// The states of the shard's part of each row, to an address: [`RowState`](crate::shards::RowState) `[N]`.
    States(u64),
    /// The teacher's margins, to an address: float32 `[N]`.
    Margins(RawStates, u64),
    /// The terms of the second sweep, to an address: [`SweepTerms`](crate::shards::SweepTerms) `[N]`.
    Terms(RawStates, u64),
    /// The gradient of the shard's columns, and as many more that become 0: see [`RawCall::gradient`] and
    /// [`RawCall::gradient_padding`].
    Gradient(RawStates, RawLogits, usize),
    /// The loss of the tokens, and the terms of each.
    Finish(RawStates, RawOutput),
}

impl RawShard {
    /// The call about the shard's columns, with the labels and settings of the tokens.
    pub(crate) fn call(&self, gradient: Option<RawLogits>, gradient_padding: usize) -> RawCall {
        let Self { tokens, columns, teacher, student, labels, hard, .. } = *self;
        let rows = RawRows { tokens, teacher, student, gradient, gradient_padding };
        RawCall {
            labels,
            hard,
            token_weights: self.token_weights,
            temperatures: self.temperatures,
            upstream: self.upstream,
            ..rows.call(columns)
        }
    }

    /// The labels and settings alone.
    fn settings(&self) -> RawTokens {
        RawTokens { vocab: self.vocab, ..self.call(None, 0).without_logits() }
    }

    /// Checks all but the logits, and what was exchanged.
    pub(crate) fn check(&self, objective: &Objective, exchanged: Option<&RawStates>) -> Result<()> {
        check_columns(self.first_column, self.columns, self.vocab)?;
        self.settings().check(objective)?;
        check_alignment("the counts", self.counts.unwrap_or(0), 4)?;
        check_there("the counts", self.counts, 2)?;
        let Some(&RawStates { states, terms, ranks }) = exchanged else { return Ok(()) };
        if ranks == 0 && self.tokens > 0 {
            return Err(Error::NoStates);
        }
        for (what, address) in [(ROW_STATES, Some(states)), (SWEEP_TERMS, terms)] {
            check_alignment(what, address.unwrap_or(0), 4)?;
            check_there(what, address, ranks.saturating_mul(self.tokens))?;
        }
        Ok(())
    }

    /// Checks the logits and the gradient. A shard without columns has none, but for padding that is to be cleared.
    pub(crate) fn check_logits(
        &self,
        gradient: Option<RawLogits>,
        gradient_padding: usize,
    ) -> Result<()> {
        if self.columns > 0 {
            return self.call(gradient, gradient_padding).check_logits();
        }
        match gradient.filter(|_| gradient_padding > 0) {
            Some(gradient) => gradient.end("the gradient", self.tokens, gradient_padding).map(drop),
            None => Ok(()),
        }
    }

    /// Checks memory that a stage writes one value per token to.
    pub(crate) fn check_output(&self, what: &'static str, to: u64) -> Result<()> {
        check_alignment(what, to, 4)?;
        check_there(what, Some(to), self.tokens)
    }
}

/// Checks that a shard's columns are some of the vocabulary's.
pub(crate) fn check_columns(first: usize, columns: usize, vocab: usize) -> Result<()> {
    // A row state has 32 bits for a token of the vocabulary.
    if vocab > i32::MAX as usize {
        let (what, most) = ("the vocabulary size", i32::MAX as usize);
        return Err(Error::TooLarge { what, value: vocab, most });
    }
    match first.checked_add(columns) {
        Some(end) if end <= vocab => Ok(()),
        _ => Err(Error::ShardColumns { first, columns, vocab }),
    }
}

pub(crate) const MARGINS: &str = "the margins";
pub(crate) const ROW_STATES: &str = "the row states";
pub(crate) const SWEEP_TERMS: &str = "the second sweep's terms";

/// The inputs of the teacher's margins, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTeacher {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The teacher's logits.
    pub teacher: RawLogits,
    /// The same as [`RawCall::labels`].
    pub labels: Option<RawLabels>,
    /// The temperatures of the tokens: see [`RawCall::temperatures`].
    pub temperatures: Option<u64>,
}

impl RawTeacher {
    /// A call about the same, with the teacher as its own student.
    pub(crate) fn call(&self) -> RawCall {
        let Self { tokens, vocab, teacher, labels, temperatures } = *self;
        let rows = RawRows::of_teacher(tokens, teacher);
        RawCall { labels, temperatures, ..rows.call(vocab) }
    }

    /// Checks that the call can be made, and its margins written.
    pub(crate) fn check(&self, objective: &Objective, to: u64) -> Result<()> {
        self.call().check(objective)?;
        check_alignment(MARGINS, to, size_of::<f32>() as u64)?;
        check_there(MARGINS, Some(to), self.tokens)
    }
}

/// A selection apart from any loss, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSelection {
    /// Margins.
    pub tokens: usize,
    /// float32 `[N]`.
    pub margins: u64,
    /// The tokens that count, a byte per token, 0 or not; `None` for all.
    pub valid: Option<u64>,
    /// The same as [`RawCall::sequences`].
    pub sequences: Option<(u64, usize)>,
    /// By the median there is no ratio.
    pub rule: SelectionRule,
    /// The memory for one byte per token: 1 for a hard token, else 0.
    pub hard: u64,
}

impl RawSelection {
    /// Checks that the addresses go together.
    pub(crate) fn check(&self) -> Result<()> {
        check_sequences(self.sequences, self.tokens)?;
        let offsets = self.sequences.map_or(0, |(address, _)| address);
        check_alignment("the sequences' offsets", offsets, 8)?;
        check_alignment(MARGINS, self.margins, size_of::<f32>() as u64)?;
        for (what, address) in [
            (MARGINS, Some(self.margins)),
            ("valid", self.valid),
            ("the sequences' offsets", self.sequences.map(|(address, _)| address)),
            (HARD_MASK, Some(self.hard)),
        ] {
            check_there(what, address, self.tokens)?;
        }
        Ok(())
    }
}

/// The entropies of one model's distributions, by address. N is `tokens`, V `vocab`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RawEntropies {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// `[N, V]`.
    pub logits: RawLogits,
    /// It divides the logits.
    pub temperature: f64,
    /// The memory for the entropies, float32 `[N]`.
    pub to: u64,
}

impl RawEntropies {
    /// Checks the temperature, and that shape, strides and addresses go together.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { tokens, vocab, logits, temperature, to } = *self;
        check_temperature(temperature)?;
        logits.end("the logits", tokens, vocab)?;
        check_alignment(ENTROPIES, to, size_of::<f32>() as u64)?;
        check_there(ENTROPIES, Some(to), tokens)
    }
}

pub(crate) const ENTROPIES: &str = "the entropies";
pub(crate) const HARD_MASK: &str = "the mask of hard tokens";
pub(crate) const TOKEN_WEIGHTS: &str = "the token weights";
pub(crate) const TEMPERATURES: &str = "the temperatures";
pub(crate) const TARGET_LOG_PROBS: &str = "the target's log-probabilities";
pub(crate) const INDICES: &str = "the indices";
pub(crate) const LOG_PROBS: &str = "the log-probabilities";
const STUDENT_LOGITS: &str = "the student's logits";

/// That there is an address where values are to be.
pub(crate) fn check_there(what: &'static str, address: Option<u64>, elements: usize) -> Result<()> {
    match address {
        Some(0) if elements > 0 => Err(Error::Null { what, elements }),
        _ => Ok(()),
    }
}

fn check_sequences(sequences: Option<(u64, usize)>, tokens: usize) -> Result<()> {
    if let Some((_, count)) = sequences
        && count > i32::MAX as usize
    {
        let (what, most) = ("the number of sequences", i32::MAX as usize);
        return Err(Error::TooLarge { what, value: count, most });
    }
    if let Some((_, 0)) = sequences
        && tokens > 0
    {
        let reason = "the last must be the number of tokens";
        return Err(Error::Sequences { index: 0, offset: 0, tokens, reason });
    }
    Ok(())
}

/// The group of an ignored token.
pub const IGNORED: u8 = 0;
/// The group of a token that is not hard.
pub const EASY: u8 = 1;
/// The group of a hard token.
pub const HARD: u8 = 2;

/// The memory for the results of a call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RawOutput {
    /// One float32: the reduced loss. On a GPU NaN if a label, or a sequence's offset, is out of range, which is an
    /// error on the CPU.
    pub loss: Option<u64>,
    /// float32 `[N]`: see [`TokenTerms::uncertainty`](crate::TokenTerms::uncertainty). In single precision it is exactly 1 above a margin of 17.4, and
    /// no order of the tokens any more: `margin` is.
    pub uncertainty: Option<u64>,
    /// float32 `[N]`: see [`TokenTerms::tkd`](crate::TokenTerms::tkd).
    pub tkd: Option<u64>,
    /// float32 `[N]`: see [`TokenTerms::dkd`](crate::TokenTerms::dkd).
    pub dkd: Option<u64>,
    /// float32 `[N]`: see [`TokenTerms::margin`](crate::TokenTerms::margin), of the teacher even if the call was given margins.
    pub margin: Option<u64>,
    /// float32 `[N]`: see [`TokenTerms::loss`](crate::TokenTerms::loss).
    pub token_loss: Option<u64>,
    /// One byte a token: [`IGNORED`], [`EASY`] or [`HARD`].
    pub groups: Option<u64>,
}

impl RawOutput {
    /// Checks that each address suits its elements.
    pub(crate) fn check(&self) -> Result<()> {
        for (what, address) in [
            ("the loss", self.loss),
            ("the uncertainties", self.uncertainty),
            ("the TKD terms", self.tkd),
            ("the DKD terms", self.dkd),
            ("the tokens' losses", self.token_loss),
            ("the margins", self.margin),
        ] {
            check_alignment(what, address.unwrap_or(0), size_of::<f32>() as u64)?;
        }
        Ok(())
    }
}

pub(crate) fn check_alignment(what: &'static str, address: u64, multiple: u64) -> Result<()> {
    if address.is_multiple_of(multiple) {
        Ok(())
    } else {
        Err(Error::Unaligned { what, address, multiple })
    }
}
