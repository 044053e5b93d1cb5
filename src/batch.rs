//! The batch that a student learns from: the teacher, the labels, the sequences.

use crate::call::{HARD_MASK, TEMPERATURES, TOKEN_WEIGHTS};
use crate::selection::{check_offsets, scopes};
use crate::{Error, Logits, Objective, Result, Teacher};

/// One label per token.
#[derive(Clone, Copy, Debug)]
pub enum Labels<'a> {
    /// 64 bits, as PyTorch has them.
    I64(&'a [i64]),
    /// 32 bits.
    I32(&'a [i32]),
}

impl Labels<'_> {
    pub(crate) fn len(&self) -> usize {
        match self {
            Labels::I64(s) => s.len(),
            Labels::I32(s) => s.len(),
        }
    }

    pub(crate) fn get(&self, token: usize) -> i64 {
        match self {
            Labels::I64(s) => s[token],
            Labels::I32(s) => s[token].into(),
        }
    }
}

macro_rules! from_slice {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a [$element]> for Labels<'a> {
            fn from(slice: &'a [$element]) -> Self {
                Labels::$variant(slice)
            }
        }
        impl<'a> From<&'a Vec<$element>> for Labels<'a> {
            fn from(vec: &'a Vec<$element>) -> Self {
                Labels::$variant(vec)
            }
        }
        impl<'a, const N: usize> From<&'a [$element; N]> for Labels<'a> {
            fn from(array: &'a [$element; N]) -> Self {
                Labels::$variant(array)
            }
        }
    )*};
}
from_slice!(i64 => I64, i32 => I32);

/// Bit for bit as [`Labels::I32`]: a tokenizer's ids are the same numbers, and a label of -100 is `-100_i32 as u32`.
///
/// ```
/// # use atkd::Labels;
/// let ids = [3, 7, -100_i32 as u32];
/// assert!(matches!(Labels::from(&ids), Labels::I32([3, 7, -100])));
/// ```
impl<'a> From<&'a [u32]> for Labels<'a> {
    fn from(labels: &'a [u32]) -> Self {
        // SAFETY: both types have the same size and alignment, and every bit pattern is one of both.
        Labels::I32(unsafe { std::slice::from_raw_parts(labels.as_ptr().cast(), labels.len()) })
    }
}

impl<'a> From<&'a Vec<u32>> for Labels<'a> {
    fn from(labels: &'a Vec<u32>) -> Self {
        labels.as_slice().into()
    }
}

impl<'a, const N: usize> From<&'a [u32; N]> for Labels<'a> {
    fn from(labels: &'a [u32; N]) -> Self {
        labels.as_slice().into()
    }
}

/// A batch of tokens as the student sees it: the teacher's logits `[tokens, vocab]`, or what is known of its
/// probabilities ([`SparseTeacher`](crate::SparseTeacher)), a label per token, and the scope within which tokens compete for
/// being hard.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    teacher: Teacher<'a>,
    labels: Option<Labels<'a>>,
    sequences: Option<&'a [usize]>,
    margins: Option<&'a [f32]>,
    hard: Option<&'a [bool]>,
    own: TokenSettings<'a>,
}

/// The settings that each token has of its own.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TokenSettings<'a> {
    pub weights: Option<&'a [f32]>,
    pub temperatures: Option<&'a [f32]>,
}

impl<'a> TokenSettings<'a> {
    /// # Errors
    /// If there is not one weight per token.
    pub fn with_weights(self, weights: &'a [f32], tokens: usize) -> Result<Self> {
        check_count(TOKEN_WEIGHTS, weights.len(), tokens)?;
        Ok(Self { weights: Some(weights), ..self })
    }

    /// # Errors
    /// If there is not one temperature per token.
    pub fn with_temperatures(self, temperatures: &'a [f32], tokens: usize) -> Result<Self> {
        check_count(TEMPERATURES, temperatures.len(), tokens)?;
        Ok(Self { temperatures: Some(temperatures), ..self })
    }

    /// # Errors
    /// If the temperature of a token that is not ignored, `None` here, is outside its domain.
    pub fn check(&self, targets: &[Option<usize>]) -> Result<()> {
        for (token, &temperature) in self.temperatures.unwrap_or_default().iter().enumerate() {
            // In single precision, as kernels do.
            if targets[token].is_some() && !(1e-30..=1e30).contains(&temperature) {
                return Err(Error::Temperature { token, temperature });
            }
        }
        Ok(())
    }

    /// The factor of the weights of a token's terms: its own, or 1.
    pub fn weight(&self, token: usize) -> f64 {
        self.weights.map_or(1.0, |weights| weights[token].into())
    }

    /// The temperature of a token: its own, or the objective's.
    pub fn temperature(&self, token: usize, objective: &Objective) -> f64 {
        self.temperatures.map_or(objective.temperature(), |own| own[token].into())
    }
}

impl<'a> Batch<'a> {
    /// A batch with one label per token.
    ///
    /// # Errors
    /// If there are more labels than tokens, or fewer.
    pub fn new(teacher: impl Into<Teacher<'a>>, labels: impl Into<Labels<'a>>) -> Result<Self> {
        let (teacher, labels) = (teacher.into(), labels.into());
        if labels.len() != teacher.tokens() {
            return Err(Error::LabelCount { labels: labels.len(), tokens: teacher.tokens() });
        }
        Ok(Self { labels: Some(labels), ..Self::unlabelled(teacher) })
    }

    /// A batch without labels, for objectives with [`Target::Teacher`](crate::Target::Teacher).
    pub fn unlabelled(teacher: impl Into<Teacher<'a>>) -> Self {
        Self {
            teacher: teacher.into(),
            labels: None,
            sequences: None,
            margins: None,
            hard: None,
            own: TokenSettings::default(),
        }
    }

    /// Selects hard tokens within each sequence instead of the whole batch, which is this call's tokens. Sequence `i`
    /// is tokens `offsets[i]..offsets[i + 1]`.
    ///
    /// # Errors
    /// If the offsets do not start at 0, never fall, and end at the number of tokens.
    pub fn with_sequences(mut self, offsets: &'a [usize]) -> Result<Self> {
        check_offsets(offsets, self.teacher.tokens())?;
        self.sequences = Some(offsets);
        Ok(self)
    }

    /// Selects hard tokens by these margins instead of the teacher's own: NaN ranks below every number, among equals
    /// the lower index wins. [`TokenTerms::margin`](crate::TokenTerms::margin) stays the teacher's.
    ///
    /// # Errors
    /// If there is not one margin per token.
    pub fn with_margins(mut self, margins: &'a [f32]) -> Result<Self> {
        let tokens = self.teacher.tokens();
        if margins.len() != tokens {
            return Err(Error::MarginCount { margins: margins.len(), tokens });
        }
        self.margins = Some(margins);
        Ok(self)
    }

    /// The hard tokens, from a selection made elsewhere: see [`select_hard`](crate::select_hard). Nothing is selected
    /// then; the objective's hard ratio, sequences and margins are not used. Ignored tokens stay ignored.
    ///
    /// # Errors
    /// If there is not one value per token.
    pub fn with_hard(mut self, hard: &'a [bool]) -> Result<Self> {
        check_count(HARD_MASK, hard.len(), self.teacher.tokens())?;
        self.hard = Some(hard);
        Ok(self)
    }

    /// Multiplies the weights of each token's terms, cross entropy's too: its loss and its gradient. A mean divides by
    /// the number of valid tokens nevertheless, and a token of weight 0 is selected as any other. A token whose weight is
    /// infinite or NaN has the loss NaN, and a gradient of NaN.
    ///
    /// # Errors
    /// If there is not one weight per token.
    pub fn with_token_weights(mut self, weights: &'a [f32]) -> Result<Self> {
        self.own = self.own.with_weights(weights, self.teacher.tokens())?;
        Ok(self)
    }

    /// Divides each token's logits, of both models, by a temperature of its own instead of the objective's; the square of
    /// that multiplies its distillation terms if the objective says so. Tokens are selected by their margins at these
    /// temperatures. In a call, that of a token which is not ignored must be in [1e-30, 1e30].
    ///
    /// # Errors
    /// If there is not one temperature per token.
    pub fn with_temperatures(mut self, temperatures: &'a [f32]) -> Result<Self> {
        self.own = self.own.with_temperatures(temperatures, self.teacher.tokens())?;
        Ok(self)
    }

    /// The teacher.
    pub fn teacher(&self) -> Teacher<'a> {
        self.teacher
    }

    /// The teacher's logits.
    ///
    /// # Errors
    /// If the teacher is sparse, which has none.
    pub fn teacher_logits(&self) -> Result<Logits<'a>> {
        match self.teacher {
            Teacher::Dense(logits) => Ok(logits),
            Teacher::Sparse(_) => Err(Error::NoTeacherLogits),
        }
    }

    /// The labels, if there are any.
    pub fn labels(&self) -> Option<Labels<'a>> {
        self.labels
    }

    /// The offsets given to [`with_sequences`](Self::with_sequences).
    pub fn sequences(&self) -> Option<&'a [usize]> {
        self.sequences
    }

    /// The margins given to [`with_margins`](Self::with_margins).
    pub fn margins(&self) -> Option<&'a [f32]> {
        self.margins
    }

    /// The mask given to [`with_hard`](Self::with_hard).
    pub fn hard(&self) -> Option<&'a [bool]> {
        self.hard
    }

    /// The weights given to [`with_token_weights`](Self::with_token_weights).
    pub fn token_weights(&self) -> Option<&'a [f32]> {
        self.own.weights
    }

    /// The temperatures given to [`with_temperatures`](Self::with_temperatures).
    pub fn temperatures(&self) -> Option<&'a [f32]> {
        self.own.temperatures
    }

    pub(crate) fn token_settings(&self) -> TokenSettings<'a> {
        self.own
    }

    /// The ranges of tokens within which hard tokens are selected.
    pub(crate) fn scopes(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        scopes(self.sequences, self.teacher.tokens())
    }

    /// The label of each token; `None` for ignored ones, 0 for all of an unlabelled batch.
    pub(crate) fn valid_labels(&self, objective: &Objective) -> Result<Vec<Option<usize>>> {
        valid_labels(objective, self.labels, self.teacher.tokens(), self.teacher.vocab())
    }

    pub(crate) fn check_shape(&self, what: &'static str, actual: [usize; 2]) -> Result<()> {
        let expected = [self.teacher.tokens(), self.teacher.vocab()];
        if actual == expected {
            Ok(())
        } else {
            Err(Error::ShapeMismatch { what, expected, actual })
        }
    }
}

/// That there is one value per token.
pub(crate) fn check_count(what: &'static str, values: usize, tokens: usize) -> Result<()> {
    if values == tokens { Ok(()) } else { Err(Error::MaskCount { what, values, tokens }) }
}

/// The label of each token; `None` for ignored ones, 0 for all of a batch without labels.
pub(crate) fn valid_labels(
    objective: &Objective,
    labels: Option<Labels>,
    tokens: usize,
    vocab: usize,
) -> Result<Vec<Option<usize>>> {
    let Some(labels) = labels else {
        return match objective.target() {
            crate::Target::Label => Err(Error::NoLabels),
            crate::Target::Teacher => Ok(vec![Some(0); tokens]),
        };
    };
    let ignore_index = objective.ignore_index();
    (0..tokens)
        .map(|token| match labels.get(token) {
            label if label == ignore_index => Ok(None),
            label => match usize::try_from(label) {
                Ok(index) if index < vocab => Ok(Some(index)),
                _ => Err(Error::LabelOutOfRange { token, label, vocab, ignore_index }),
            },
        })
        .collect()
}
