use crate::Dtype;

/// Everything that can be wrong with a call. Every message carries the numbers that explain it.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
#[expect(missing_docs, reason = "the messages name the fields")]
pub enum Error {
    /// A setting of the [`Objective`](crate::Objective) outside its domain.
    #[error("{name} is {value}, but must be {allowed}")]
    Setting { name: &'static str, value: f64, allowed: &'static str },
    /// A slice too short, or too long, for the shape that was given with it.
    #[error(
        "{what} needs {expected} elements for {tokens} tokens of {vocab} logits with row stride \
         {row_stride}, but the slice holds {actual}"
    )]
    Length {
        what: &'static str,
        expected: usize,
        tokens: usize,
        vocab: usize,
        row_stride: usize,
        actual: usize,
    },
    /// A shape that no tensor can have.
    #[error(
        "{what} has an impossible shape: {tokens} tokens, vocabulary {vocab}, row stride {row_stride}; {reason}"
    )]
    Shape {
        what: &'static str,
        tokens: usize,
        vocab: usize,
        row_stride: usize,
        reason: &'static str,
    },
    /// Teacher, student and gradient must be of one shape.
    #[error("{what} is [{}, {}], but the teacher's logits are [{}, {}]", .actual[0], .actual[1], .expected[0], .expected[1])]
    ShapeMismatch { what: &'static str, expected: [usize; 2], actual: [usize; 2] },
    /// The gradient has a dtype that the student's logits do not allow.
    #[error(
        "the gradient is {actual}, but for {student} student logits it must be {student} or F32"
    )]
    GradientDtype { student: Dtype, actual: Dtype },
    /// One label a token, no more and no fewer.
    #[error("{labels} labels were given for {tokens} tokens")]
    LabelCount { labels: usize, tokens: usize },
    /// The objective's target is the label, but the batch has none.
    #[error(
        "the objective's target is the label of each token, but the batch has no labels; give labels or choose Target::Teacher"
    )]
    NoLabels,
    /// A label that names no token of the vocabulary.
    #[error(
        "the label of token {token} is {label}, but must be at least 0 and below the vocabulary size {vocab}, or ignore_index {ignore_index}"
    )]
    LabelOutOfRange { token: usize, label: i64, vocab: usize, ignore_index: i64 },
    /// The row offsets of the sequences do not partition the tokens.
    #[error("sequence offset {index} is {offset}, but {reason} ({tokens} tokens)")]
    Sequences { index: usize, offset: usize, tokens: usize, reason: &'static str },
    /// Elements at no possible address.
    #[error(
        "the address of {what} is {address:#x}, but {elements} elements of {size} bytes need one that is not null and a multiple of {size}"
    )]
    Address { what: &'static str, address: usize, elements: usize, size: usize },
    /// A gradient written where something else is read.
    #[error("{what} at {:#x}..{:#x} overlaps {with} at {:#x}..{:#x}; give it memory of its own, or exactly that of the student's logits", .addresses[0].start, .addresses[0].end, .addresses[1].start, .addresses[1].end)]
    Overlap { what: &'static str, with: &'static str, addresses: [std::ops::Range<usize>; 2] },
}

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;
