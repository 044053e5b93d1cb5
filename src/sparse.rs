//! A teacher of which a few log-probabilities per token are known, from disk or from a server.

mod row;

use crate::call::{INDICES, LOG_PROBS, TARGET_LOG_PROBS};
use crate::{Dtype, Elements, Error, Labels, Logits, Objective, Result, Target};

pub use row::TeacherRow;
pub(crate) use row::log_sum_exp;

/// The teacher of a batch.
#[derive(Clone, Copy, Debug)]
pub enum Teacher<'a> {
    /// The logits of the whole vocabulary.
    Dense(Logits<'a>),
    /// The log-probabilities of some tokens of the vocabulary.
    Sparse(SparseTeacher<'a>),
}

impl Teacher<'_> {
    /// Rows.
    pub fn tokens(&self) -> usize {
        match self {
            Teacher::Dense(logits) => logits.tokens(),
            Teacher::Sparse(sparse) => sparse.tokens,
        }
    }

    /// Tokens of the vocabulary.
    pub fn vocab(&self) -> usize {
        match self {
            Teacher::Dense(logits) => logits.vocab(),
            Teacher::Sparse(sparse) => sparse.vocab,
        }
    }
}

impl<'a> From<Logits<'a>> for Teacher<'a> {
    fn from(logits: Logits<'a>) -> Self {
        Teacher::Dense(logits)
    }
}

impl<'a> From<SparseTeacher<'a>> for Teacher<'a> {
    fn from(sparse: SparseTeacher<'a>) -> Self {
        Teacher::Sparse(sparse)
    }
}

/// The distribution that a sparse teacher is taken for, outside of the tokens whose log-probabilities are known: those of its
/// indices, and the target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Tail {
    /// No other token has a probability. The known ones are renormalised.
    Zero,
    /// The other tokens share what is left of the mass evenly.
    Uniform,
    /// The other tokens are one class of the divergences: what is left of the mass, against the student's mass on the same
    /// tokens. Nothing is assumed of how the teacher spreads it.
    #[default]
    Bucket,
    /// The known tokens but the target are draws from what the teacher gives all tokens but the target, and their
    /// log-probabilities are logarithms of weights, in any unit: how often each was drawn. They share what the target leaves,
    /// whose log-probability is exact, and needed. No other token has a probability.
    ///
    /// The gradient by forward KL then has the expectation of the whole teacher's, where that of the likeliest tokens would
    /// leave the others out ("Sparse Logit Sampling", Anshumann et al., ACL 2025); so do margins and TKD, which are exact.
    /// The divergence itself is larger in expectation, and other divergences, whose gradients are not linear in the teacher's
    /// probabilities, are refused unless the rest has no weight. [`TeacherRow::sampled`] makes such rows.
    Sampled,
}

/// The teacher's log-probabilities of up to K tokens of the vocabulary in each row, and of the target: all that is known where
/// its logits are not in memory.
///
/// Log-probabilities are natural logarithms at the temperature of the call: a temperature divides the student's logits alone.
/// The student's distribution is over the whole vocabulary. What the teacher gives the tokens that it does not know is a
/// matter of [`Tail`]. The uncertainty, by which tokens are selected, is 1 - e^(the target's log-probability), but by
/// [`Tail::Zero`] that of the renormalised probabilities.
///
/// ```
/// use atkd::{Batch, Logits, Objective, SparseTeacher, Tail, cpu};
///
/// // Two tokens, of whose teacher two probabilities each are known, and that of the target.
/// let indices = [3_i32, 0, 2, -1];
/// let log_probs = [-0.5_f32, -2.0, -0.1, 0.0];
/// let teacher = SparseTeacher::new(&indices, &log_probs[..], 2, 2, 5)?
///     .with_target_log_probs(&[-2.5, -0.1])?
///     .with_tail(Tail::Bucket);
/// let student = Logits::new(&[0.0_f32; 10][..], 2, 5)?;
/// let output = cpu::forward(&Objective::default(), &Batch::new(teacher, &[1_i64, 2])?, student)?;
/// assert!(output.tokens[0].hard && !output.tokens[1].hard);
/// # Ok::<(), atkd::Error>(())
/// ```
#[derive(Clone, Copy, Debug)]
pub struct SparseTeacher<'a> {
    tokens: usize,
    top_k: usize,
    vocab: usize,
    indices: Labels<'a>,
    log_probs: Elements<'a>,
    target_log_probs: Option<&'a [f32]>,
    target_rounding: Dtype,
    tail: Tail,
}

impl Tail {
    /// Checks that the objective is finite, and estimated without bias, with this tail.
    pub(crate) fn check(self, objective: &Objective) -> Result<()> {
        match self {
            Tail::Zero if objective.is_infinite_by_zero_tail() => Err(Error::ReverseKlOfZeroTail),
            Tail::Sampled if !objective.takes_draws() => Err(Error::SampledDivergence),
            _ => Ok(()),
        }
    }
}

impl<'a> SparseTeacher<'a> {
    /// The most that K may be.
    pub const MAX_TOP_K: usize = 1024;

    /// A teacher of a vocabulary of `vocab` tokens, with tail [`Tail::Bucket`]. `indices` and `log_probs` are
    /// `[tokens, top_k]` without gaps, in any order within a row. An index of -1 says that a row has fewer; its
    /// log-probability is not used.
    ///
    /// What is wrong with single values is told by the call that uses them, which knows what tokens are ignored.
    ///
    /// # Errors
    /// If there are more or fewer of either, `top_k` is 0 or above [`MAX_TOP_K`](Self::MAX_TOP_K), or `vocab` above 2^31 - 1.
    pub fn new(
        indices: impl Into<Labels<'a>>,
        log_probs: impl Into<Elements<'a>>,
        tokens: usize,
        top_k: usize,
        vocab: usize,
    ) -> Result<Self> {
        let (indices, log_probs) = (indices.into(), log_probs.into());
        Self::check_shape([indices.len(), log_probs.len()], tokens, top_k, vocab)?;
        let (target_log_probs, target_rounding, tail) = (None, Dtype::F32, Tail::default());
        Ok(Self {
            tokens,
            top_k,
            vocab,
            indices,
            log_probs,
            target_log_probs,
            target_rounding,
            tail,
        })
    }

    /// Checks a shape, given how many indices and log-probabilities there are.
    pub(crate) fn check_shape(
        [indices, log_probs]: [usize; 2],
        tokens: usize,
        top_k: usize,
        vocab: usize,
    ) -> Result<()> {
        if !(1..=Self::MAX_TOP_K).contains(&top_k) {
            return Err(Error::TopK { top_k, most: Self::MAX_TOP_K });
        }
        // Known tokens are sorted with 32 bits for one of the vocabulary.
        if vocab > i32::MAX as usize {
            let (what, most) = ("the vocabulary size", i32::MAX as usize);
            return Err(Error::TooLarge { what, value: vocab, most });
        }
        let expected = tokens.saturating_mul(top_k);
        for (what, actual) in [(INDICES, indices), (LOG_PROBS, log_probs)] {
            if actual != expected {
                return Err(Error::SparseLength { what, actual, expected, tokens, top_k });
            }
        }
        Ok(())
    }

    /// With the log-probability of each token's target, which then need not be among the K, and counts instead of that one if
    /// it is. Not used with [`Target::Teacher`](crate::Target::Teacher), whose target is the likeliest of the K.
    ///
    /// # Errors
    /// If there is not one per token.
    pub fn with_target_log_probs(mut self, log_probs: &'a [f32]) -> Result<Self> {
        crate::batch::check_count(TARGET_LOG_PROBS, log_probs.len(), self.tokens)?;
        self.target_log_probs = Some(log_probs);
        Ok(self)
    }

    /// With the dtype that the targets' log-probabilities were rounded to before they became float32. A row's probabilities may
    /// then add up to as much more than 1 as that rounding, or that of the others, makes of 1.
    #[must_use]
    pub fn with_target_rounding(mut self, dtype: Dtype) -> Self {
        self.target_rounding = dtype;
        self
    }

    /// With another tail.
    #[must_use]
    pub fn with_tail(mut self, tail: Tail) -> Self {
        self.tail = tail;
        self
    }

    /// The tail.
    pub fn tail(&self) -> Tail {
        self.tail
    }

    /// Rows.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of the vocabulary.
    pub(crate) fn vocab(&self) -> usize {
        self.vocab
    }

    /// The indices, the log-probabilities and those of the targets.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    pub(crate) fn values(&self) -> (Labels<'a>, Elements<'a>, Option<&'a [f32]>) {
        (self.indices, self.log_probs, self.target_log_probs)
    }

    /// The dtype that the targets' log-probabilities were rounded to.
    #[cfg(any(feature = "cuda", feature = "simt"))]
    pub(crate) fn target_rounding(&self) -> Dtype {
        self.target_rounding
    }

    /// K.
    pub fn top_k(&self) -> usize {
        self.top_k
    }

    /// The tokens of a row of which something is known. `label` is the row's.
    ///
    /// # Errors
    /// If a value is none that it may be, or the target has no probability.
    pub(crate) fn known(
        &self,
        objective: &Objective,
        token: usize,
        label: usize,
    ) -> Result<KnownTokens> {
        let Self { top_k, vocab, .. } = *self;
        // Sorted as integers: the token in the high bits, its place in the low ones.
        let mut entries = Vec::with_capacity(top_k);
        for place in 0..top_k {
            let at = token * top_k + place;
            let index = self.indices.get(at);
            if index == -1 {
                continue;
            }
            let column = u64::try_from(index).ok().filter(|&column| column < vocab as u64);
            let column = column.ok_or(Error::SparseIndex { token, place, index, vocab })?;
            let log_prob = self.log_probs.get(at);
            if log_prob.is_nan() || log_prob == f32::INFINITY {
                return Err(Error::SparseLogProb { token, place, log_prob });
            }
            entries.push(column << 32 | place as u64);
        }
        entries.sort_unstable();
        let place_of = |entry: u64| entry as u32 as usize;
        if let Some(pair) = entries.windows(2).find(|pair| pair[0] >> 32 == pair[1] >> 32) {
            let places = [pair[0], pair[1]].map(place_of);
            return Err(Error::SparseDuplicate { token, index: (pair[0] >> 32) as usize, places });
        }
        let mut columns = Vec::with_capacity(top_k + 1);
        let mut log_probs = Vec::with_capacity(top_k + 1);
        columns.extend(entries.iter().map(|entry| (entry >> 32) as usize));
        let log_prob = |entry| f64::from(self.log_probs.get(token * top_k + place_of(entry)));
        log_probs.extend(entries.iter().map(|&entry| log_prob(entry)));

        let target = match objective.target() {
            Target::Label => label,
            // The likeliest, and the lowest token among equals.
            Target::Teacher => {
                let both = columns.iter().zip(&log_probs);
                let likeliest = both.reduce(|best, one| if one.1 > best.1 { one } else { best });
                *likeliest.ok_or(Error::SparseEmpty { token, top_k })?.0
            }
        };
        let place = columns.binary_search(&target);
        let own = self.target_log_probs.filter(|_| objective.target() == Target::Label);
        if self.tail == Tail::Sampled && own.is_none() {
            return Err(Error::SampledTarget);
        }
        match (place, own) {
            (Err(_), None) => return Err(Error::SparseTarget { token, target, top_k }),
            (Ok(_), None) => {}
            (place, Some(own)) => {
                let log_prob = own[token];
                if log_prob.is_nan() || f64::from(log_prob) > tolerance(Dtype::F32) {
                    return Err(Error::LogProb { token, log_prob });
                }
                let log_prob = f64::from(log_prob);
                match place {
                    Ok(at) => log_probs[at] = log_prob,
                    Err(at) => {
                        columns.insert(at, target);
                        log_probs.insert(at, log_prob);
                    }
                }
            }
        }

        let dtype = less_exact(self.log_probs.dtype(), own.map(|_| self.target_rounding));
        let tolerance = tolerance(dtype);
        let mass = log_probs.iter().map(|log_prob| log_prob.exp()).sum::<f64>();
        let target = place.unwrap_or_else(|at| at);
        if mass > 1.0 + tolerance && self.tail != Tail::Sampled {
            return Err(Error::SparseMass { token, mass, tolerance, dtype });
        }
        match self.tail {
            Tail::Sampled => {
                let is_draw = |(k, &weight)| k != target && weight > f64::NEG_INFINITY;
                if log_probs[target] < 0.0 && !log_probs.iter().enumerate().any(is_draw) {
                    let log_prob = log_probs[target] as f32;
                    return Err(Error::SparseNoDraws { token, log_prob });
                }
            }
            Tail::Zero => {
                if log_probs.iter().all(|&log_prob| log_prob == f64::NEG_INFINITY) {
                    return Err(Error::SparseNoMass { token });
                }
            }
            Tail::Uniform | Tail::Bucket => {
                if columns.len() == vocab && mass < 1.0 - tolerance {
                    return Err(Error::SparseMassMissing { token, mass, tolerance, dtype, vocab });
                }
            }
        }
        Ok(KnownTokens { columns, log_probs, target })
    }
}

/// The dtype of the two by which the sum of probabilities may be further off.
pub(crate) fn less_exact(of_known: Dtype, of_target: Option<Dtype>) -> Dtype {
    let wider = |&dtype: &Dtype| tolerance(dtype) > tolerance(of_known);
    of_target.filter(wider).unwrap_or(of_known)
}

/// How far rounding log-probabilities to this dtype may move their probabilities' sum from 1.
pub(crate) fn tolerance(dtype: Dtype) -> f64 {
    match dtype {
        Dtype::F32 => 1e-4,
        Dtype::F16 => 1e-2,
        Dtype::Bf16 => 3e-2,
    }
}

/// What a sparse teacher knows of a row: its K tokens and the target.
pub(crate) struct KnownTokens {
    /// Tokens of the vocabulary, ascending.
    pub columns: Vec<usize>,
    /// The log-probability of each, as given.
    pub log_probs: Vec<f64>,
    /// The place of the target among them.
    pub target: usize,
}
