//! Calls on memory that is known by its address alone, for other languages and frameworks; and the CPU
//! loss on such a call.
//!
//! ```
//! use atkd::raw::{self, RawCall, RawLabels, RawLogits, RawOutput};
//! use atkd::{Dtype, Objective};
//!
//! let (teacher, student, labels) = ([2.0_f32, 1.0, 0.0], [1.0_f32, 1.0, 1.0], [0_i64]);
//! let logits = |logits: &[f32; 3]| RawLogits {
//!     address: logits.as_ptr() as u64,
//!     dtype: Dtype::F32,
//!     strides: 3.into(),
//! };
//! let call = RawCall {
//!     tokens: 1,
//!     vocab: 3,
//!     teacher: logits(&teacher),
//!     student: logits(&student),
//!     gradient: None,
//!     labels: Some(RawLabels::I64(labels.as_ptr() as u64)),
//!     sequences: None,
//!     margins: None,
//!     hard: None,
//!     upstream: None,
//! };
//! let mut loss = 0.0_f32;
//! let output = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
//! // SAFETY: the addresses are of arrays of the shapes given.
//! unsafe { raw::run(None, &Objective::default(), &call, &output)? };
//! assert!(loss > 0.0);
//! # Ok::<(), atkd::Error>(())
//! ```

use rayon::ThreadPool;

use crate::cpu::Workers;
use crate::logits::span;
use crate::strides::ByteRows;
use crate::{Batch, Dtype, Error, Logits, LogitsMut, Objective, Result, Strides, Target, cpu};

/// Logits or a gradient `[tokens, vocab]` at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawLogits {
    /// Of the first element.
    pub address: u64,
    /// The type of the elements.
    pub dtype: Dtype,
    /// Where the rows start, in elements from the first: a row stride by `into()`, or [`Strides::nested`].
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

/// Everything that a call reads, and its gradient, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawCall {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The teacher's logits.
    pub teacher: RawLogits,
    /// The student's logits.
    pub student: RawLogits,
    /// Where the gradient goes, of the student's dtype or float32; may be the student's logits
    /// themselves. `None` for the loss alone.
    pub gradient: Option<RawLogits>,
    /// `None` for a batch without labels, with [`Target::Teacher`].
    pub labels: Option<RawLabels>,
    /// Hard tokens are selected within sequences: the address of their `count + 1` offsets, 64 bits each,
    /// and `count`.
    pub sequences: Option<(u64, usize)>,
    /// The teacher's margins, float32 `[N]`, where they are known from elsewhere: hard tokens are selected
    /// by these, and the teacher's logits are read once less.
    pub margins: Option<u64>,
    /// Which tokens are hard, a byte per token, 0 or not, where that was selected elsewhere: nothing is selected then,
    /// and hard ratio, sequences and margins are not used. Ignored tokens stay ignored.
    pub hard: Option<u64>,
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

    /// Whether an element of either, both of which can be there, is in a row of the other.
    fn overlaps(self, other: Self, tokens: usize, vocab: usize) -> bool {
        let [one, other] = [self, other].map(|Self { address, dtype, strides }| {
            ByteRows::new(address, dtype.size(), strides, tokens, vocab)
        });
        one.overlap(&other)
    }

    /// Whether both are the same rows.
    fn is_same(self, other: Self, tokens: usize) -> bool {
        let of_tokens = |logits: Self| Self { strides: logits.strides.of(tokens), ..logits };
        of_tokens(self) == of_tokens(other)
    }
}

impl RawCall {
    /// Whether the gradient overwrites the student's logits.
    pub(crate) fn is_in_place(&self) -> bool {
        self.gradient.is_some_and(|gradient| gradient.is_same(self.student, self.tokens))
    }

    /// Whether the shapes, strides and addresses go together; what lies behind an address cannot be
    /// known.
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
            ("the margins", self.margins.unwrap_or(0), 4),
            ("the upstream gradient", self.upstream.unwrap_or(0), 4),
        ] {
            check_alignment(what, address, multiple)?;
        }
        for (what, address) in [("the margins", self.margins), (HARD_MASK, self.hard)] {
            check_there(what, address, self.tokens)?;
        }
        let mut spans = Vec::with_capacity(3);
        for (what, logits) in [
            ("the teacher's logits", Some(self.teacher)),
            ("the student's logits", Some(self.student)),
            ("the gradient", self.gradient),
        ] {
            let Some(logits) = logits else { continue };
            spans.push((what, logits.address, logits.end(what, self.tokens, self.vocab)?));
        }
        let Some(gradient) = self.gradient else { return Ok(()) };
        if gradient.dtype != self.student.dtype && gradient.dtype != Dtype::F32 {
            let (student, actual) = (self.student.dtype, gradient.dtype);
            return Err(Error::GradientDtype { student, actual });
        }
        let (_, start, end) = spans[2];
        for (&(what, other_start, other_end), other) in
            spans.iter().zip([self.teacher, self.student])
        {
            let in_place = what == "the student's logits" && self.is_in_place();
            // Rows may lie between the other's.
            if start < other_end
                && other_start < end
                && !in_place
                && gradient.overlaps(other, self.tokens, self.vocab)
            {
                return Err(Error::Overlap {
                    what,
                    gradient: [start, end],
                    other: [other_start, other_end],
                });
            }
        }
        Ok(())
    }
}

/// What the teacher's margins follow from, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawTeacher {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The teacher's logits.
    pub teacher: RawLogits,
    /// As [`RawCall::labels`].
    pub labels: Option<RawLabels>,
}

impl RawTeacher {
    /// A call about the same, with the teacher as its own student.
    pub(crate) fn call(&self) -> RawCall {
        let Self { tokens, vocab, teacher, labels } = *self;
        RawCall {
            tokens,
            vocab,
            teacher,
            student: teacher,
            gradient: None,
            labels,
            sequences: None,
            margins: None,
            hard: None,
            upstream: None,
        }
    }

    /// Whether the call can be made, and its margins written.
    pub(crate) fn check(&self, objective: &Objective, to: u64) -> Result<()> {
        self.call().check(objective)?;
        check_alignment("the margins", to, size_of::<f32>() as u64)?;
        check_there("the margins", Some(to), self.tokens)
    }
}

/// A selection apart from any loss, by address. N is `tokens`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RawSelection {
    /// Margins.
    pub tokens: usize,
    /// float32 `[N]`.
    pub margins: u64,
    /// Which tokens count, a byte per token, 0 or not; `None` for all.
    pub valid: Option<u64>,
    /// As [`RawCall::sequences`].
    pub sequences: Option<(u64, usize)>,
    /// Where one byte per token goes: 1 for a hard token, else 0.
    pub hard: u64,
}

impl RawSelection {
    /// Whether the addresses go together.
    pub(crate) fn check(&self) -> Result<()> {
        check_sequences(self.sequences, self.tokens)?;
        let offsets = self.sequences.map_or(0, |(address, _)| address);
        check_alignment("the sequences' offsets", offsets, 8)?;
        check_alignment("the margins", self.margins, size_of::<f32>() as u64)?;
        for (what, address) in [
            ("the margins", Some(self.margins)),
            ("valid", self.valid),
            (HARD_MASK, Some(self.hard)),
        ] {
            check_there(what, address, self.tokens)?;
        }
        Ok(())
    }
}

const HARD_MASK: &str = "the mask of hard tokens";

/// That there is an address where values are to be.
fn check_there(what: &'static str, address: Option<u64>, tokens: usize) -> Result<()> {
    match address {
        Some(0) if tokens > 0 => Err(Error::Null { what, elements: tokens }),
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

/// The mode of an ignored token.
pub const IGNORED: u8 = 0;
/// The mode of a token that is not hard.
pub const EASY: u8 = 1;
/// The mode of a hard token.
pub const HARD: u8 = 2;

/// Where the results of a call go.
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
    /// One byte a token: [`IGNORED`], [`EASY`] or [`HARD`].
    pub modes: Option<u64>,
}

impl RawOutput {
    /// Whether each address suits its elements.
    pub(crate) fn check(&self) -> Result<()> {
        for (what, address) in [
            ("the loss", self.loss),
            ("the uncertainties", self.uncertainty),
            ("the TKD terms", self.tkd),
            ("the DKD terms", self.dkd),
            ("the margins", self.margin),
        ] {
            check_alignment(what, address.unwrap_or(0), size_of::<f32>() as u64)?;
        }
        Ok(())
    }
}

/// The loss on host memory: forward alone if the call has no gradient. The calling thread works, and all but
/// one of the threads of `pool`, or of rayon's current pool, if they are free: see [`cpu`] for that, and for forks.
///
/// # Errors
/// As [`cpu::forward_backward`]; and if an address is null or not aligned, or the gradient overlaps what it
/// is computed from without being the student's logits themselves. Nothing was written then.
///
/// # Safety
/// Every address is of what it is described to be: logits and gradient of `tokens` rows of `vocab` elements,
/// all of them initialised. Until the call returns nobody else writes to any of it, nor
/// reads what is written: gradient and outputs.
pub unsafe fn run(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    call: &RawCall,
    output: &RawOutput,
) -> Result<()> {
    call.check(objective)?;
    output.check()?;
    let mut objective = *objective;
    if let Some(upstream) = call.upstream {
        // SAFETY: the caller says that it is one number.
        let upstream = unsafe { slice::<f32>("the upstream gradient", upstream, 1)?[0] };
        objective = objective.times_upstream_gradient(upstream.into());
    }
    let workers = Workers::of(pool);
    let (offsets, hard): (Vec<usize>, Vec<bool>);
    // SAFETY: the caller's, for as long as this function runs. What is borrowed mutably overlaps nothing
    // else: checked for the logits, and the caller's word for the rest.
    let result = unsafe {
        let mut batch = call.batch()?;
        if let Some(sequences) = call.sequences {
            offsets = offsets_at(sequences)?;
            batch = batch.with_sequences(&offsets)?;
        }
        if let Some(at) = call.margins {
            batch = batch.with_margins(slice("the margins", at, call.tokens)?)?;
        }
        if let Some(at) = call.hard {
            hard = bools_at(HARD_MASK, at, call.tokens)?;
            batch = batch.with_hard(&hard)?;
        }
        match call.gradient {
            None => cpu::forward_by(workers, &objective, &batch, call.logits(call.student)?)?,
            Some(gradient) if call.is_in_place() => {
                let student = call.logits_mut(gradient)?;
                cpu::forward_backward_in_place_by(workers, &objective, &batch, student)?
            }
            Some(gradient) => {
                let (student, gradient) = (call.logits(call.student)?, call.logits_mut(gradient)?);
                cpu::forward_backward_by(workers, &objective, &batch, student, gradient)?
            }
        }
    };
    // SAFETY: the caller says that each has room for one number a token, the loss for one.
    unsafe {
        if let Some(loss) = output.loss {
            (loss as *mut f32).write(result.loss as f32);
        }
        write(output.uncertainty, &result.tokens, |token| token.uncertainty as f32);
        write(output.tkd, &result.tokens, |token| token.tkd as f32);
        write(output.dkd, &result.tokens, |token| token.dkd as f32);
        write(output.margin, &result.tokens, |token| token.margin as f32);
        write(output.modes, &result.tokens, |token| match (token.valid, token.hard) {
            (false, _) => IGNORED,
            (true, false) => EASY,
            (true, true) => HARD,
        });
    }
    Ok(())
}

/// The teacher's margins in host memory, to `to`, float32 `[N]`: see [`cpu::teacher_margins`]. Threads as [`run`].
///
/// # Errors
/// As [`cpu::teacher_margins`]; and if an address is null or not aligned. Nothing was written then.
///
/// # Safety
/// As [`run`].
pub unsafe fn teacher_margins(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    teacher: &RawTeacher,
    to: u64,
) -> Result<()> {
    teacher.check(objective, to)?;
    // SAFETY: the caller's, for as long as this function runs.
    let batch = unsafe { teacher.call().batch()? };
    let margins = cpu::teacher_margins_by(Workers::of(pool), objective, &batch)?;
    // SAFETY: the caller says that there is room for one number per token.
    unsafe { write(Some(to), &margins, |&margin| margin) };
    Ok(())
}

/// A selection in host memory: see [`select_hard`](crate::select_hard).
///
/// # Errors
/// As [`select_hard`](crate::select_hard); and if an address is null or not aligned. Nothing was written then.
///
/// # Safety
/// As [`run`].
pub unsafe fn select_hard(selection: &RawSelection, hard_ratio: f64) -> Result<()> {
    selection.check()?;
    let RawSelection { tokens, margins, valid, sequences, hard } = *selection;
    // SAFETY: the caller's, for as long as this function runs.
    let selected = unsafe {
        let margins = slice("the margins", margins, tokens)?;
        let valid = valid.map(|at| bools_at("valid", at, tokens)).transpose()?;
        let offsets = sequences.map(|sequences| offsets_at(sequences)).transpose()?;
        crate::select_hard(margins, valid.as_deref(), hard_ratio, offsets.as_deref())?
    };
    // SAFETY: the caller says that there is room for one byte per token.
    unsafe { write(Some(hard), &selected, |&hard| u8::from(hard)) };
    Ok(())
}

/// # Safety
/// `count + 1` offsets are at the address, unless it is null, and aligned.
unsafe fn offsets_at((address, count): (u64, usize)) -> Result<Vec<usize>> {
    // SAFETY: the caller's.
    let signed = unsafe { slice::<i64>("the sequences' offsets", address, count + 1)? };
    let offsets = signed.iter().enumerate().map(|(index, &offset)| {
        usize::try_from(offset).map_err(|_| Error::NegativeOffset { index, offset })
    });
    offsets.collect()
}

/// # Safety
/// `length` bytes are at the address, unless it is null.
unsafe fn bools_at(what: &'static str, address: u64, length: usize) -> Result<Vec<bool>> {
    // SAFETY: the caller's.
    let bytes = unsafe { slice::<u8>(what, address, length)? };
    Ok(bytes.iter().map(|&byte| byte != 0).collect())
}

impl RawCall {
    /// The teacher and the labels.
    ///
    /// # Safety
    /// As [`run`], for `'a`, of a call that is valid.
    unsafe fn batch<'a>(&self) -> Result<Batch<'a>> {
        // SAFETY: the caller's.
        unsafe {
            let teacher = self.logits(self.teacher)?;
            match self.labels {
                Some(RawLabels::I64(at)) => {
                    Batch::new(teacher, slice::<i64>("the labels", at, self.tokens)?)
                }
                Some(RawLabels::I32(at)) => {
                    Batch::new(teacher, slice::<i32>("the labels", at, self.tokens)?)
                }
                None => Ok(Batch::unlabelled(teacher)),
            }
        }
    }

    /// # Safety
    /// As [`run`], for `'a`, of a call that is valid.
    unsafe fn logits<'a>(&self, logits: RawLogits) -> Result<Logits<'a>> {
        let RawLogits { address, dtype, strides } = logits;
        // SAFETY: the caller's.
        unsafe { Logits::at(address as *const u8, dtype, self.tokens, self.vocab, strides) }
    }

    /// # Safety
    /// As [`run`], for `'a`, of a call that is valid.
    unsafe fn logits_mut<'a>(&self, logits: RawLogits) -> Result<LogitsMut<'a>> {
        let RawLogits { address, dtype, strides } = logits;
        // SAFETY: the caller's.
        unsafe { LogitsMut::at(address as *mut u8, dtype, self.tokens, self.vocab, strides) }
    }
}

pub(crate) fn check_alignment(what: &'static str, address: u64, multiple: u64) -> Result<()> {
    if address.is_multiple_of(multiple) {
        Ok(())
    } else {
        Err(Error::Unaligned { what, address, multiple })
    }
}

/// # Safety
/// `address` is valid for `length` elements for `'a`, unless it is null, and aligned.
unsafe fn slice<'a, T>(what: &'static str, address: u64, length: usize) -> Result<&'a [T]> {
    if length == 0 {
        return Ok(&[]);
    }
    if address == 0 {
        return Err(Error::Null { what, elements: length });
    }
    // SAFETY: the caller's, and not null.
    Ok(unsafe { std::slice::from_raw_parts(address as *const T, length) })
}

/// # Safety
/// `address` is null, or has room for one value a token.
unsafe fn write<T, U>(address: Option<u64>, tokens: &[U], value: impl Fn(&U) -> T) {
    let Some(address) = address else { return };
    for (i, token) in tokens.iter().enumerate() {
        // SAFETY: inside the column.
        unsafe { (address as *mut T).add(i).write(value(token)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::forward_backward;

    const TOKENS: usize = 3;
    const VOCAB: usize = 5;

    fn at<T>(data: &[T]) -> u64 {
        data.as_ptr() as u64
    }

    fn logits(data: &[f32], row_stride: usize) -> RawLogits {
        RawLogits { address: at(data), dtype: Dtype::F32, strides: row_stride.into() }
    }

    fn call(teacher: &[f32], student: &[f32], labels: &[i64], row_stride: usize) -> RawCall {
        RawCall {
            tokens: TOKENS,
            vocab: VOCAB,
            teacher: logits(teacher, row_stride),
            student: logits(student, row_stride),
            gradient: None,
            labels: Some(RawLabels::I64(at(labels))),
            sequences: None,
            margins: None,
            hard: None,
            upstream: None,
        }
    }

    fn random(seed: u64, count: usize) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| 4.0 * random.f32()).collect()
    }

    #[test]
    fn same_as_on_slices() -> Result<()> {
        let (teacher, student, labels) = (random(1, 15), random(2, 15), [4_i64, -100, 0]);
        let objective = Objective::default();
        let mut expected = vec![0_f32; 15];
        let view = |v| Logits::new(v, TOKENS, VOCAB);
        let batch = Batch::new(view(&teacher)?, &labels)?.with_sequences(&[0, 1, 3])?;
        let to = LogitsMut::new(&mut expected, TOKENS, VOCAB)?;
        let output = forward_backward(&objective, &batch, view(&student)?, to)?;

        let mut loss = f32::NAN;
        let mut terms = [[f32::NAN; TOKENS]; 4];
        let mut modes = [9_u8; TOKENS];
        let mut gradient = vec![f32::NAN; 15];
        let to = RawOutput {
            loss: Some(&raw mut loss as u64),
            uncertainty: Some(terms[0].as_mut_ptr() as u64),
            tkd: Some(terms[1].as_mut_ptr() as u64),
            dkd: Some(terms[2].as_mut_ptr() as u64),
            margin: Some(terms[3].as_mut_ptr() as u64),
            modes: Some(modes.as_mut_ptr() as u64),
        };
        let call = RawCall {
            gradient: Some(RawLogits {
                address: gradient.as_mut_ptr() as u64,
                ..logits(&student, VOCAB)
            }),
            sequences: Some((at(&[0_i64, 1, 3]), 2)),
            upstream: Some(at(&[2_f32])),
            ..call(&teacher, &student, &labels, VOCAB)
        };
        // SAFETY: all are arrays of the shapes given.
        unsafe { run(None, &objective, &call, &to)? };
        assert_eq!(loss, output.loss as f32);
        assert_eq!(gradient, expected.iter().map(|d| 2.0 * d).collect::<Vec<_>>());
        for (i, token) in output.tokens.iter().enumerate() {
            let expected = [token.uncertainty, token.tkd, token.dkd, token.margin];
            let expected = expected.map(|term| term as f32);
            assert_eq!(terms.map(|column| column[i]), expected);
            assert_eq!((modes[i] != IGNORED, modes[i] == HARD), (token.valid, token.hard));
        }

        let mut in_place = student.clone();
        let place = RawLogits { address: in_place.as_mut_ptr() as u64, ..call.student };
        let call = RawCall { student: place, gradient: Some(place), ..call };
        // SAFETY: as before.
        unsafe { run(None, &objective, &call, &to)? };
        assert_eq!(in_place, gradient);
        Ok(())
    }

    #[test]
    fn rows_apart_leave_the_gaps_alone() -> Result<()> {
        let (teacher, mut student, labels) = (random(1, 19), random(2, 19), [4_i64, -100, 0]);
        let before = student.clone();
        let place =
            RawLogits { address: student.as_mut_ptr() as u64, ..logits(&before, VOCAB + 2) };
        let call = RawCall {
            student: place,
            gradient: Some(place),
            ..call(&teacher, &before, &labels, VOCAB + 2)
        };
        // SAFETY: 19 elements are two rows at stride 7, and a third of 5.
        unsafe { run(None, &Objective::default(), &call, &RawOutput::default())? };
        for (i, (now, before)) in student.iter().zip(&before).enumerate() {
            assert_eq!(now == before, i % 7 >= VOCAB, "element {i}: {before} became {now}");
        }
        Ok(())
    }

    /// [3, 2, VOCAB]: the student's rows, and beside each the gradient's, or the other way round in a dimension.
    #[test]
    fn rows_between_rows() -> Result<()> {
        let (teacher, student, labels) = (random(1, 15), random(2, 15), [4_i64, -100, 0]);
        let mut expected = vec![0_f32; 15];
        let view = |v| Logits::new(v, TOKENS, VOCAB);
        let batch = Batch::new(view(&teacher)?, &labels)?;
        let to = LogitsMut::new(&mut expected, TOKENS, VOCAB)?;
        forward_backward(&Objective::default(), &batch, view(&student)?, to)?;
        let mut both = vec![13_f32; 30];
        for (row, to) in student.chunks(VOCAB).zip(both.chunks_mut(2 * VOCAB)) {
            to[..VOCAB].copy_from_slice(row);
        }
        let address = both.as_mut_ptr() as u64;
        let at = |element: usize| RawLogits {
            address: address + 4 * element as u64,
            dtype: Dtype::F32,
            strides: (2 * VOCAB).into(),
        };
        let call = RawCall {
            student: at(0),
            gradient: Some(at(VOCAB)),
            ..call(&teacher, &student, &labels, VOCAB)
        };
        // SAFETY: all are arrays of the shapes given.
        unsafe { run(None, &Objective::default(), &call, &RawOutput::default())? };
        for (i, (row, gradient)) in both.chunks(2 * VOCAB).zip(expected.chunks(VOCAB)).enumerate() {
            assert_eq!((&row[..VOCAB], &row[VOCAB..]), (&student[i * VOCAB..][..VOCAB], gradient));
        }
        for element in [1, VOCAB - 1, VOCAB + 1] {
            let call = RawCall { gradient: Some(at(element)), ..call };
            // SAFETY: it fails before it touches anything.
            let result = unsafe { run(None, &Objective::default(), &call, &RawOutput::default()) };
            assert!(matches!(result, Err(Error::Overlap { .. })), "{element}: {result:?}");
        }
        Ok(())
    }

    /// The same rows described in two ways are in place.
    #[test]
    fn in_place_however_it_is_said() -> Result<()> {
        let (teacher, mut student, labels) = (random(1, 15), random(2, 15), [4_i64, 1, 0]);
        let call = call(&teacher, &student, &labels, VOCAB);
        let place = RawLogits { address: student.as_mut_ptr() as u64, ..call.student };
        let again = RawLogits { strides: Strides::nested(TOKENS, 7, VOCAB), ..place };
        let call = RawCall { student: place, gradient: Some(again), ..call };
        // SAFETY: all are arrays of the shapes given.
        unsafe { run(None, &Objective::default(), &call, &RawOutput::default()) }
    }

    #[test]
    fn upstream_gradients_that_are_not_finite() -> Result<()> {
        let (teacher, student, labels) = (random(1, 15), random(2, 15), [4_i64, -100, 0]);
        for upstream in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN] {
            let (mut gradient, mut loss, upstream) = (vec![13_f32; 15], f32::NAN, [upstream]);
            let call = RawCall {
                gradient: Some(RawLogits {
                    address: gradient.as_mut_ptr() as u64,
                    ..logits(&student, VOCAB)
                }),
                upstream: Some(at(&upstream)),
                ..call(&teacher, &student, &labels, VOCAB)
            };
            let to = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
            // SAFETY: all are arrays of the shapes given.
            unsafe { run(None, &Objective::default(), &call, &to)? };
            assert!(loss > 0.0 && loss.is_finite());
            for (i, g) in gradient.iter().enumerate() {
                assert!(if i / VOCAB == 1 { *g == 0.0 } else { g.is_nan() }, "{i}: {g}");
            }
        }
        Ok(())
    }

    #[test]
    fn no_tokens_may_have_no_address() -> Result<()> {
        let nowhere = RawLogits { address: 0, dtype: Dtype::F16, strides: VOCAB.into() };
        let mut loss = f32::NAN;
        let call = RawCall {
            tokens: 0,
            teacher: nowhere,
            student: nowhere,
            labels: Some(RawLabels::I32(0)),
            gradient: Some(nowhere),
            ..call(&[], &[], &[], VOCAB)
        };
        let to = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
        // SAFETY: nothing but the loss is touched.
        unsafe { run(None, &Objective::default(), &call, &to)? };
        assert_eq!(loss, 0.0);
        Ok(())
    }

    #[test]
    fn impossible_addresses_are_errors() {
        let (teacher, student, labels) = (random(1, 20), random(2, 20), [0_i64; TOKENS]);
        let good = call(&teacher, &student, &labels, VOCAB);
        let at = |logits: RawLogits, address| RawLogits { address, ..logits };
        let fails = |call: RawCall, parts: [&str; 2]| {
            // SAFETY: it fails before it touches anything.
            let result = unsafe { run(None, &Objective::default(), &call, &RawOutput::default()) };
            let message = result.unwrap_err().to_string();
            assert!(parts.iter().all(|part| message.contains(part)), "{message}");
        };
        fails(RawCall { teacher: at(good.teacher, 0), ..good }, ["the teacher's logits", "15"]);
        let odd = good.student.address + 2;
        fails(
            RawCall { student: at(good.student, odd), ..good },
            ["the student's logits", &format!("{odd:#x}")],
        );
        fails(RawCall { labels: Some(RawLabels::I64(0)), ..good }, ["the labels", "3"]);
        fails(RawCall { labels: Some(RawLabels::I64(4)), ..good }, ["the labels", "0x4"]);
        let later = at(good.student, good.student.address + 4);
        fails(RawCall { gradient: Some(later), ..good }, ["overlaps", "the student's logits"]);
        fails(RawCall { gradient: Some(good.teacher), ..good }, ["overlaps", "teacher's"]);
        fails(RawCall { tokens: usize::MAX / 8, ..good }, ["address space", "vocabulary 5"]);
        fails(RawCall { labels: None, ..good }, ["no labels", ""]);
        let offsets = [0_i64, -7, 3];
        for count in [usize::MAX, i64::MAX as usize, 1 << 60, 1 << 40, 1 << 31] {
            let sequences = Some((offsets.as_ptr() as u64, count));
            fails(RawCall { sequences, ..good }, ["number of sequences", &count.to_string()]);
        }
        let sequences = Some((offsets.as_ptr() as u64, 2));
        fails(RawCall { sequences, ..good }, ["sequence offset 1 is -7", "negative"]);
        let nested = |inner, outer, row| RawLogits {
            strides: Strides::nested(inner, outer, row),
            ..good.student
        };
        fails(RawCall { student: nested(2, 11, 5), ..good }, ["multiple", "2 rows"]);
        fails(RawCall { student: nested(0, 11, 5), ..good }, ["multiple", "0 rows"]);
        let four = RawCall { tokens: 4, ..good };
        fails(RawCall { student: nested(2, 9, 5), ..four }, ["the rows overlap", "outer stride 9"]);
        fails(RawCall { margins: Some(6), ..good }, ["the margins", "0x6"]);
        fails(RawCall { margins: Some(0), ..good }, ["the margins", "is null"]);
        fails(RawCall { hard: Some(0), ..good }, ["the mask of hard tokens", "is null"]);

        let good = RawSelection {
            tokens: TOKENS,
            margins: teacher.as_ptr() as u64,
            valid: None,
            sequences: None,
            hard: 8,
        };
        let fails = |selection: RawSelection, ratio, part: &str| {
            // SAFETY: it fails before it touches anything.
            let message = unsafe { select_hard(&selection, ratio) }.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        fails(RawSelection { margins: 0, ..good }, 0.5, "the address of the margins is null");
        fails(RawSelection { margins: 6, ..good }, 0.5, "the address of the margins is 0x6");
        fails(RawSelection { valid: Some(0), ..good }, 0.5, "the address of valid is null");
        fails(
            RawSelection { hard: 0, ..good },
            0.5,
            "the address of the mask of hard tokens is null",
        );
        fails(RawSelection { sequences: Some((8, 0)), ..good }, 0.5, "number of tokens");
        fails(good, -0.5, "the hard ratio is -0.5");
        let offsets = [0_i64, -1, 3];
        let sequences = Some((offsets.as_ptr() as u64, 2));
        fails(RawSelection { sequences, ..good }, 0.5, "sequence offset 1 is -1");
    }

    #[test]
    fn margins_and_a_selection_apart_from_the_loss() -> Result<()> {
        let (teacher, student, labels) = (random(1, 15), random(2, 15), [4_i64, -100, 0]);
        let call = call(&teacher, &student, &labels, VOCAB);
        let RawCall { tokens, vocab, .. } = call;
        let of_teacher = RawTeacher { tokens, vocab, teacher: call.teacher, labels: call.labels };
        let objective = Objective::default();
        let [mut margins, mut in_call] = [[f32::NAN; TOKENS]; 2];
        let [mut hard, mut modes] = [[9_u8; TOKENS]; 2];
        let valid = [1_u8, 0, 255];
        let selection = RawSelection {
            tokens,
            margins: margins.as_mut_ptr() as u64,
            valid: Some(valid.as_ptr() as u64),
            sequences: None,
            hard: hard.as_mut_ptr() as u64,
        };
        let to = RawOutput {
            margin: Some(in_call.as_mut_ptr() as u64),
            modes: Some(modes.as_mut_ptr() as u64),
            ..RawOutput::default()
        };
        // SAFETY: all are arrays of the shapes given.
        unsafe {
            teacher_margins(None, &objective, &of_teacher, selection.margins)?;
            select_hard(&selection, 0.5)?;
            run(None, &objective, &call, &to)?;
        }
        assert_eq!(margins, in_call);
        assert_eq!(margins[1], f32::NEG_INFINITY);
        assert_eq!(hard, modes.map(|mode| u8::from(mode == HARD)));

        // The others are hard, and the ignored one stays so.
        let mask = hard.map(|hard| (1 - hard) * 7);
        let given = margins.map(|margin| -margin);
        let masked = RawCall { hard: Some(mask.as_ptr() as u64), ..call };
        let by_margins = RawCall { margins: Some(given.as_ptr() as u64), ..call };
        for call in [masked, by_margins] {
            // SAFETY: as above.
            unsafe { run(None, &objective, &call, &to)? };
            assert_eq!(margins, in_call);
            let expected = [0, 1, 2].map(|i| match (valid[i], hard[i]) {
                (0, _) => IGNORED,
                (_, 0) => HARD,
                _ => EASY,
            });
            assert_eq!(modes, expected);
        }
        Ok(())
    }
}
