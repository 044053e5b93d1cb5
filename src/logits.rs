//! Views of logits: shape, strides and dtype. The only place that checks lengths.

use std::marker::PhantomData;
use std::ops::Range;

use half::{bf16, f16};

use crate::{Error, Result, Strides};

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

    /// Checks the dtype of a gradient with respect to logits of this one: any of float32 logits; of half precision the
    /// same, or float32.
    pub(crate) fn check_gradient(self, gradient: Dtype) -> Result<()> {
        if self != gradient && self != Dtype::F32 && gradient != Dtype::F32 {
            return Err(Error::GradientDtype { student: self, actual: gradient });
        }
        Ok(())
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
    /// Elements of float32.
    F32(&'a [f32]),
    /// Elements of float16.
    F16(&'a [f16]),
    /// Elements of bfloat16.
    Bf16(&'a [bf16]),
}

/// Mutably borrowed elements of one of the three dtypes.
#[derive(Debug)]
pub enum ElementsMut<'a> {
    /// Elements of float32.
    F32(&'a mut [f32]),
    /// Elements of float16.
    F16(&'a mut [f16]),
    /// Elements of bfloat16.
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

    /// True if there are none.
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

    /// These elements alone. Panics as a slice does if the range is not within them.
    pub fn slice(self, range: std::ops::Range<usize>) -> Elements<'a> {
        each_dtype!(self, Elements => s => &s[range])
    }

    /// # Safety
    /// So many elements are at `first`, and nobody writes to them for `'a`.
    unsafe fn at(dtype: Dtype, first: *const u8, length: usize) -> Self {
        /// # Safety
        /// Those of the method.
        unsafe fn slice<'a, T>(first: *const u8, length: usize) -> &'a [T] {
            // SAFETY: the caller's.
            unsafe { std::slice::from_raw_parts(first.cast(), length) }
        }
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                Dtype::F32 => Self::F32(slice(first, length)),
                Dtype::F16 => Self::F16(slice(first, length)),
                Dtype::Bf16 => Self::Bf16(slice(first, length)),
            }
        }
    }
}

impl<'a> ElementsMut<'a> {
    /// # Safety
    /// So many elements are at `first`, and nobody else uses them for `'a`.
    unsafe fn at(dtype: Dtype, first: *mut u8, length: usize) -> Self {
        /// # Safety
        /// Those of the method.
        unsafe fn slice<'a, T>(first: *mut u8, length: usize) -> &'a mut [T] {
            // SAFETY: the caller's.
            unsafe { std::slice::from_raw_parts_mut(first.cast(), length) }
        }
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                Dtype::F32 => Self::F32(slice(first, length)),
                Dtype::F16 => Self::F16(slice(first, length)),
                Dtype::Bf16 => Self::Bf16(slice(first, length)),
            }
        }
    }

    fn as_mut_ptr(&mut self) -> *mut u8 {
        match self {
            ElementsMut::F32(s) => s.as_mut_ptr().cast(),
            ElementsMut::F16(s) => s.as_mut_ptr().cast(),
            ElementsMut::Bf16(s) => s.as_mut_ptr().cast(),
        }
    }

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

/// Elements that the rows of `tokens` x `vocab` span, or why they cannot.
pub(crate) fn span(
    what: &'static str,
    tokens: usize,
    vocab: usize,
    strides: Strides,
) -> Result<usize> {
    strides.span(tokens, vocab).map_err(|reason| Error::Shape {
        what,
        tokens,
        vocab,
        strides,
        reason,
    })
}

/// That so many elements hold the rows: exactly without gaps, at least with.
pub(crate) fn check_length(
    what: &'static str,
    actual: usize,
    [tokens, vocab]: [usize; 2],
    strides: Strides,
    exactly: bool,
) -> Result<()> {
    let expected = span(what, tokens, vocab, strides)?;
    if actual < expected || (exactly && actual != expected) {
        return Err(Error::Length { what, expected, tokens, vocab, strides, actual });
    }
    Ok(())
}

/// Checks that logits of so many columns have this vocabulary.
pub(crate) fn check_vocab(vocab: usize, columns: usize) -> Result<()> {
    if (1..=columns).contains(&vocab) { Ok(()) } else { Err(Error::Vocab { vocab, columns }) }
}

/// Rows by address. Those of a gradient may lie between those of what it is computed from: whoever views one
/// matrix must not hold the elements between its rows.
#[derive(Clone, Copy, Debug)]
struct Rows {
    first: *mut u8,
    /// Elements that there are.
    length: usize,
    dtype: Dtype,
    tokens: usize,
    vocab: usize,
    strides: Strides,
}

// SAFETY: an address of plain numbers, which the views borrow as slices would be.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// The address of a row. Panics if there is no such row.
    fn row(&self, token: usize) -> *mut u8 {
        assert!(token < self.tokens, "token {token} of {}", self.tokens);
        self.first.wrapping_add(self.strides.start(token) * self.dtype.size())
    }

    fn columns(self, range: Range<usize>) -> Result<Self> {
        let Range { start, end } = range;
        if start >= end || end > self.vocab {
            return Err(Error::Columns { start, end, columns: self.vocab });
        }
        let first = self.first.wrapping_add(start * self.dtype.size());
        // Without rows there are no elements to skip.
        let length = self.length.saturating_sub(start);
        Ok(Self { first, length, vocab: end - start, ..self })
    }
}

/// Logits `[tokens, vocab]`, each row contiguous, rows where [`Strides`] say.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    rows: Rows,
    lifetime: PhantomData<Elements<'a>>,
}

impl<'a> Logits<'a> {
    /// Contiguous logits `[tokens, vocab]`.
    ///
    /// # Errors
    /// If the slice does not hold exactly `tokens * vocab` elements, or `vocab` is 0.
    pub fn new(elements: impl Into<Elements<'a>>, tokens: usize, vocab: usize) -> Result<Self> {
        let elements = elements.into();
        check_length("logits", elements.len(), [tokens, vocab], vocab.into(), true)?;
        Self::strided(elements, tokens, vocab, vocab)
    }

    /// Logits `[tokens, vocab]` whose rows start where `strides` say: a row stride, or [`Strides::nested`]. What
    /// lies between the rows is never read.
    ///
    /// # Errors
    /// If two rows share an element, `vocab` is 0, or the slice ends before the last row does.
    pub fn strided(
        elements: impl Into<Elements<'a>>,
        tokens: usize,
        vocab: usize,
        strides: impl Into<Strides>,
    ) -> Result<Self> {
        let (elements, strides) = (elements.into(), strides.into());
        let (length, dtype) = (elements.len(), elements.dtype());
        check_length("logits", length, [tokens, vocab], strides, false)?;
        let first = elements.as_ptr().cast_mut();
        let rows = Rows { first, length, dtype, tokens, vocab, strides };
        Ok(Self { rows, lifetime: PhantomData })
    }

    /// By address. Only the rows are there: [`elements`](Self::elements) is not to be asked for.
    ///
    /// # Errors
    /// If no memory can hold the rows.
    ///
    /// # Safety
    /// The rows are of initialised elements at `first`, aligned, that nobody writes to for `'a`.
    pub(crate) unsafe fn at(
        first: *const u8,
        dtype: Dtype,
        tokens: usize,
        vocab: usize,
        strides: Strides,
    ) -> Result<Self> {
        let length = span("logits", tokens, vocab, strides)?;
        let rows = Rows { first: first.cast_mut(), length, dtype, tokens, vocab, strides };
        Ok(Self { rows, lifetime: PhantomData })
    }

    /// The first `vocab` columns alone, where a model's vocabulary is padded: the others have no probability.
    ///
    /// # Errors
    /// If `vocab` is 0, or more than there are.
    pub fn with_vocab(mut self, vocab: usize) -> Result<Self> {
        check_vocab(vocab, self.rows.vocab)?;
        self.rows.vocab = vocab;
        Ok(self)
    }

    /// These columns alone, as a shard of the vocabulary has them: all of them if the range is `0..vocab`.
    ///
    /// # Errors
    /// If the range is empty or ends after the last column.
    pub fn columns(mut self, range: Range<usize>) -> Result<Self> {
        self.rows = self.rows.columns(range)?;
        Ok(self)
    }

    /// Number of tokens (rows).
    pub fn tokens(&self) -> usize {
        self.rows.tokens
    }

    /// Vocabulary size (logits in a row).
    pub fn vocab(&self) -> usize {
        self.rows.vocab
    }

    /// The strides of the rows, in elements.
    pub fn strides(&self) -> Strides {
        self.rows.strides
    }

    /// The type of the logits.
    pub fn dtype(&self) -> Dtype {
        self.rows.dtype
    }

    /// All elements, those between the rows included.
    pub fn elements(&self) -> Elements<'a> {
        // SAFETY: what the view was made of, unless it was made by address.
        unsafe { Elements::at(self.rows.dtype, self.rows.first, self.rows.length) }
    }

    /// The logits of one token. Panics if `token` is not below [`tokens`](Self::tokens).
    pub fn row(&self, token: usize) -> Elements<'a> {
        // SAFETY: every row lies within what the view was made of.
        unsafe { Elements::at(self.rows.dtype, self.rows.row(token), self.rows.vocab) }
    }
}

/// Mutable logits, or a gradient, `[tokens, vocab]`: see [`Logits`].
#[derive(Debug)]
pub struct LogitsMut<'a> {
    rows: Rows,
    lifetime: PhantomData<ElementsMut<'a>>,
}

impl<'a> LogitsMut<'a> {
    /// Contiguous `[tokens, vocab]`; errors as [`Logits::new`].
    pub fn new(elements: impl Into<ElementsMut<'a>>, tokens: usize, vocab: usize) -> Result<Self> {
        let elements = elements.into();
        Logits::new(elements.as_ref(), tokens, vocab)?;
        Self::strided(elements, tokens, vocab, vocab)
    }

    /// Rows where `strides` say; errors as [`Logits::strided`]. What lies between the rows is never
    /// written.
    pub fn strided(
        elements: impl Into<ElementsMut<'a>>,
        tokens: usize,
        vocab: usize,
        strides: impl Into<Strides>,
    ) -> Result<Self> {
        let mut elements = elements.into();
        let Logits { rows, .. } = Logits::strided(elements.as_ref(), tokens, vocab, strides)?;
        Ok(Self { rows: Rows { first: elements.as_mut_ptr(), ..rows }, lifetime: PhantomData })
    }

    /// By address; errors as [`Logits::at`].
    ///
    /// # Safety
    /// The rows are of initialised elements at `first`, aligned, that nobody else uses for `'a`.
    pub(crate) unsafe fn at(
        first: *mut u8,
        dtype: Dtype,
        tokens: usize,
        vocab: usize,
        strides: Strides,
    ) -> Result<Self> {
        // SAFETY: the caller's.
        let Logits { rows, .. } = unsafe { Logits::at(first, dtype, tokens, vocab, strides)? };
        Ok(Self { rows, lifetime: PhantomData })
    }

    /// The first `vocab` columns alone: see [`Logits::with_vocab`]. The others become 0, here and now: as a gradient, that
    /// is theirs, and as logits they are not read.
    ///
    /// # Errors
    /// As there.
    pub fn with_vocab(mut self, vocab: usize) -> Result<Self> {
        check_vocab(vocab, self.rows.vocab)?;
        let columns = std::mem::replace(&mut self.rows.vocab, vocab);
        let Rows { dtype, tokens, .. } = self.rows;
        for token in 0..tokens {
            let padding = self.rows.row(token).wrapping_add(vocab * dtype.size());
            // SAFETY: the padding lies within what the view was made of, and no two rows share an element.
            unsafe { ElementsMut::at(dtype, padding, columns - vocab) }.fill_zero();
        }
        Ok(self)
    }

    /// These columns alone: see [`Logits::columns`].
    ///
    /// # Errors
    /// As there.
    pub fn columns(&mut self, range: Range<usize>) -> Result<LogitsMut<'_>> {
        Ok(LogitsMut { rows: self.rows.columns(range)?, lifetime: PhantomData })
    }

    /// The same logits, read-only.
    pub fn as_logits(&self) -> Logits<'_> {
        Logits { rows: self.rows, lifetime: PhantomData }
    }

    /// All elements, those between the rows included.
    #[cfg(feature = "cuda")]
    pub(crate) fn elements_mut(&mut self) -> ElementsMut<'_> {
        // SAFETY: what the view was made of, unless it was made by address.
        unsafe { ElementsMut::at(self.rows.dtype, self.rows.first, self.rows.length) }
    }

    /// The rows, in order.
    pub(crate) fn rows(&mut self) -> Vec<ElementsMut<'_>> {
        let Rows { dtype, tokens, vocab, .. } = self.rows;
        let row = |token| {
            // SAFETY: every row lies within what the view was made of, and no two share an element.
            unsafe { ElementsMut::at(dtype, self.rows.row(token), vocab) }
        };
        (0..tokens).map(row).collect()
    }
}
