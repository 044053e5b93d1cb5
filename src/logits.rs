//! Views of logits: shape, row stride and dtype. The only place that checks lengths.

use half::{bf16, f16};

use crate::{Error, Result};

/// The type of a logit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary16.
    F16,
    /// bfloat16: the upper half of a binary32.
    Bf16,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::F16 | Dtype::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.write_str(match self {
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::Bf16 => "BF16",
        })
    }
}

/// Borrowed elements of one of the three dtypes.
#[derive(Clone, Copy, Debug)]
pub enum Elements<'a> {
    /// Of float32.
    F32(&'a [f32]),
    /// Of float16.
    F16(&'a [f16]),
    /// Of bfloat16.
    Bf16(&'a [bf16]),
}

/// Mutably borrowed elements of one of the three dtypes.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// Of float32.
    F32(&'a mut [f32]),
    /// Of float16.
    F16(&'a mut [f16]),
    /// Of bfloat16.
    Bf16(&'a mut [bf16]),
}

macro_rules! each_dtype {
    ($elements:expr, $variant:ident => $slice:ident => $body:expr) => {
        match $elements {
            $variant::F32($slice) => $variant::F32($body),
            $variant::F16($slice) => $variant::F16($body),
            $variant::Bf16($slice) => $variant::Bf16($body),
        }
    };
}

macro_rules! from_slice {
    ($($element:ty => $variant:ident),*) => {$(
        impl<'a> From<&'a [$element]> for Elements<'a> {
            fn from(slice: &'a [$element]) -> Self {
                Elements::$variant(slice)
            }
        }
        impl<'a> From<&'a Vec<$element>> for Elements<'a> {
            fn from(vec: &'a Vec<$element>) -> Self {
                Elements::$variant(vec)
            }
        }
        impl<'a> From<&'a mut [$element]> for ElementsMut<'a> {
            fn from(slice: &'a mut [$element]) -> Self {
                ElementsMut::$variant(slice)
            }
        }
        impl<'a> From<&'a mut Vec<$element>> for ElementsMut<'a> {
            fn from(vec: &'a mut Vec<$element>) -> Self {
                ElementsMut::$variant(vec)
            }
        }
    )*};
}
from_slice!(f32 => F32, f16 => F16, bf16 => Bf16);

impl<'a> Elements<'a> {
    /// Their type.
    pub fn dtype(&self) -> Dtype {
        match self {
            Elements::F32(_) => Dtype::F32,
            Elements::F16(_) => Dtype::F16,
            Elements::Bf16(_) => Dtype::Bf16,
        }
    }

    /// Their number.
    pub fn len(&self) -> usize {
        match self {
            Elements::F32(s) => s.len(),
            Elements::F16(s) => s.len(),
            Elements::Bf16(s) => s.len(),
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Element `index`, widened; exact for every dtype.
    pub fn get(&self, index: usize) -> f32 {
        match self {
            Elements::F32(s) => s[index],
            Elements::F16(s) => s[index].to_f32(),
            Elements::Bf16(s) => s[index].to_f32(),
        }
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        match self {
            Elements::F32(s) => s.as_ptr().cast(),
            Elements::F16(s) => s.as_ptr().cast(),
            Elements::Bf16(s) => s.as_ptr().cast(),
        }
    }

    pub(crate) fn slice(self, range: std::ops::Range<usize>) -> Elements<'a> {
        each_dtype!(self, Elements => s => &s[range])
    }
}

impl ElementsMut<'_> {
    /// The same elements, read-only.
    pub fn as_ref(&self) -> Elements<'_> {
        match self {
            ElementsMut::F32(s) => Elements::F32(s),
            ElementsMut::F16(s) => Elements::F16(s),
            ElementsMut::Bf16(s) => Elements::Bf16(s),
        }
    }

    pub(crate) fn reborrow(&mut self) -> ElementsMut<'_> {
        each_dtype!(self, ElementsMut => s => s)
    }

    pub(crate) fn slice(&mut self, range: std::ops::Range<usize>) -> ElementsMut<'_> {
        each_dtype!(self, ElementsMut => s => &mut s[range])
    }

    /// Writes `value` rounded to nearest, ties to even.
    pub(crate) fn set(&mut self, index: usize, value: f32) {
        match self {
            ElementsMut::F32(s) => s[index] = value,
            ElementsMut::F16(s) => s[index] = f16::from_f32(value),
            ElementsMut::Bf16(s) => s[index] = bf16::from_f32(value),
        }
    }

    pub(crate) fn fill_zero(&mut self) {
        match self {
            ElementsMut::F32(s) => s.fill(0.0),
            ElementsMut::F16(s) => s.fill(f16::ZERO),
            ElementsMut::Bf16(s) => s.fill(bf16::ZERO),
        }
    }
}

/// Elements that the rows of `tokens` x `vocab` span at `row_stride`, or why they cannot.
pub(crate) fn span(
    what: &'static str,
    tokens: usize,
    vocab: usize,
    row_stride: usize,
) -> Result<usize> {
    let impossible = |reason| Error::Shape { what, tokens, vocab, row_stride, reason };
    if vocab == 0 {
        return Err(impossible("the vocabulary must hold at least one token"));
    }
    if row_stride < vocab {
        return Err(impossible("the row stride must be at least the vocabulary size"));
    }
    match tokens.checked_sub(1) {
        None => Ok(0),
        Some(last) => {
            last.checked_mul(row_stride).and_then(|start| start.checked_add(vocab)).ok_or_else(
                || impossible("tokens times row stride does not fit into the address space"),
            )
        }
    }
}

/// Logits `[tokens, vocab]`, each row contiguous, rows `row_stride` elements apart.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    elements: Elements<'a>,
    tokens: usize,
    vocab: usize,
    row_stride: usize,
}

impl<'a> Logits<'a> {
    /// Contiguous logits `[tokens, vocab]`.
    ///
    /// # Errors
    /// If the slice does not hold exactly `tokens * vocab` elements, or `vocab` is 0.
    pub fn new(elements: impl Into<Elements<'a>>, tokens: usize, vocab: usize) -> Result<Self> {
        let elements = elements.into();
        let expected = span("logits", tokens, vocab, vocab)?;
        if elements.len() != expected {
            return Err(Error::Length {
                what: "logits",
                expected,
                tokens,
                vocab,
                row_stride: vocab,
                actual: elements.len(),
            });
        }
        Ok(Self { elements, tokens, vocab, row_stride: vocab })
    }

    /// Logits `[tokens, vocab]` whose rows start `row_stride` elements apart; what lies between a
    /// row's end and the next row's start is never read.
    ///
    /// # Errors
    /// If `row_stride < vocab`, `vocab` is 0, or the slice ends before the last row does.
    pub fn strided(
        elements: impl Into<Elements<'a>>,
        tokens: usize,
        vocab: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let elements = elements.into();
        let expected = span("logits", tokens, vocab, row_stride)?;
        if elements.len() < expected {
            return Err(Error::Length {
                what: "logits",
                expected,
                tokens,
                vocab,
                row_stride,
                actual: elements.len(),
            });
        }
        Ok(Self { elements, tokens, vocab, row_stride })
    }

    /// Number of tokens (rows).
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Vocabulary size (logits in a row).
    pub fn vocab(&self) -> usize {
        self.vocab
    }

    /// Elements from the start of one row to the start of the next.
    pub fn row_stride(&self) -> usize {
        self.row_stride
    }

    /// The type of the logits.
    pub fn dtype(&self) -> Dtype {
        self.elements.dtype()
    }

    /// All elements, those between the rows included.
    pub fn elements(&self) -> Elements<'a> {
        self.elements
    }

    /// The logits of one token. Panics if `token` is not below [`tokens`](Self::tokens).
    pub fn row(&self, token: usize) -> Elements<'a> {
        assert!(token < self.tokens, "token {token} of {}", self.tokens);
        let start = token * self.row_stride;
        self.elements.slice(start..start + self.vocab)
    }
}

/// Mutable logits, or a gradient, `[tokens, vocab]`: see [`Logits`].
#[derive(Debug)]
pub struct LogitsMut<'a> {
    elements: ElementsMut<'a>,
    tokens: usize,
    vocab: usize,
    row_stride: usize,
}

impl<'a> LogitsMut<'a> {
    /// Contiguous `[tokens, vocab]`; errors as [`Logits::new`].
    pub fn new(elements: impl Into<ElementsMut<'a>>, tokens: usize, vocab: usize) -> Result<Self> {
        let elements = elements.into();
        Logits::new(elements.as_ref(), tokens, vocab)?;
        Ok(Self { elements, tokens, vocab, row_stride: vocab })
    }

    /// Rows `row_stride` elements apart; errors as [`Logits::strided`]. What lies between the rows
    /// is never written.
    pub fn strided(
        elements: impl Into<ElementsMut<'a>>,
        tokens: usize,
        vocab: usize,
        row_stride: usize,
    ) -> Result<Self> {
        let elements = elements.into();
        Logits::strided(elements.as_ref(), tokens, vocab, row_stride)?;
        Ok(Self { elements, tokens, vocab, row_stride })
    }

    /// The same logits, read-only.
    pub fn as_logits(&self) -> Logits<'_> {
        Logits {
            elements: self.elements.as_ref(),
            tokens: self.tokens,
            vocab: self.vocab,
            row_stride: self.row_stride,
        }
    }

    /// All elements, those between the rows included.
    #[cfg(feature = "cuda")]
    pub(crate) fn elements_mut(&mut self) -> ElementsMut<'_> {
        self.elements.reborrow()
    }

    /// The rows, disjoint, in order.
    pub(crate) fn rows(&mut self) -> Vec<ElementsMut<'_>> {
        let (vocab, row_stride, tokens) = (self.vocab, self.row_stride, self.tokens);
        macro_rules! rows {
            ($slice:expr, $variant:ident) => {
                $slice
                    .chunks_mut(row_stride)
                    .take(tokens)
                    .map(|row| ElementsMut::$variant(&mut row[..vocab]))
                    .collect()
            };
        }
        match self.elements.reborrow() {
            ElementsMut::F32(s) => rows!(s, F32),
            ElementsMut::F16(s) => rows!(s, F16),
            ElementsMut::Bf16(s) => rows!(s, Bf16),
        }
    }
}
