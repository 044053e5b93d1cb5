//! What the student learns from: the teacher's logits, the labels, the sequences.

use crate::{Error, Logits, Objective, Result};

/// One label a token.
#[derive(Clone, Copy, Debug)]
pub enum Labels<'a> {
    /// 64 bits, as PyTorch has them.
    I64(&'a [i64]),
    /// 32 bits.
    I32(&'a [i32]),
}

impl Labels<'_> {
    fn len(&self) -> usize {
        match self {
            Labels::I64(s) => s.len(),
            Labels::I32(s) => s.len(),
        }
    }

    fn get(&self, token: usize) -> i64 {
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

/// A batch of tokens as the student sees it: the teacher's logits `[tokens, vocab]`, a label a token,
/// and the scope within which tokens compete for being hard.
#[derive(Clone, Copy, Debug)]
pub struct Batch<'a> {
    teacher: Logits<'a>,
    labels: Option<Labels<'a>>,
    sequences: Option<&'a [usize]>,
}

impl<'a> Batch<'a> {
    /// # Errors
    /// If there is not one label a token.
    pub fn new(teacher: Logits<'a>, labels: impl Into<Labels<'a>>) -> Result<Self> {
        let labels = labels.into();
        if labels.len() != teacher.tokens() {
            return Err(Error::LabelCount { labels: labels.len(), tokens: teacher.tokens() });
        }
        Ok(Self { teacher, labels: Some(labels), sequences: None })
    }

    /// A batch without labels, for objectives with [`Target::Teacher`](crate::Target::Teacher).
    pub fn unlabelled(teacher: Logits<'a>) -> Self {
        Self { teacher, labels: None, sequences: None }
    }

    /// Selects hard tokens within each sequence instead of the whole batch. Sequence `i` is tokens
    /// `offsets[i]..offsets[i + 1]`.
    ///
    /// # Errors
    /// If the offsets do not start at 0, never fall, and end at the number of tokens.
    pub fn with_sequences(mut self, offsets: &'a [usize]) -> Result<Self> {
        let tokens = self.teacher.tokens();
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
        self.sequences = Some(offsets);
        Ok(self)
    }

    /// The teacher's logits.
    pub fn teacher(&self) -> Logits<'a> {
        self.teacher
    }

    /// The labels, if there are any.
    pub fn labels(&self) -> Option<Labels<'a>> {
        self.labels
    }

    /// The offsets given to [`with_sequences`](Self::with_sequences).
    pub fn sequences(&self) -> Option<&'a [usize]> {
        self.sequences
    }

    /// The ranges of tokens within which hard tokens are selected.
    pub(crate) fn scopes(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        let whole = self.sequences.is_none().then_some(0..self.teacher.tokens());
        let offsets = self.sequences.unwrap_or_default();
        offsets.windows(2).map(|pair| pair[0]..pair[1]).chain(whole)
    }

    /// The label of each token; `None` for ignored ones, 0 for all of an unlabelled batch.
    pub(crate) fn valid_labels(&self, objective: &Objective) -> Result<Vec<Option<usize>>> {
        let (tokens, vocab) = (self.teacher.tokens(), self.teacher.vocab());
        let Some(labels) = self.labels else {
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

    pub(crate) fn check_shape(&self, what: &'static str, actual: [usize; 2]) -> Result<()> {
        let expected = [self.teacher.tokens(), self.teacher.vocab()];
        if actual == expected {
            Ok(())
        } else {
            Err(Error::ShapeMismatch { what, expected, actual })
        }
    }
}
