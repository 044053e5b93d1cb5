//! The CPU loss on raw host pointers, for callers from other languages.
//!
//! ```
//! use atkd::{Dtype, Objective, raw};
//!
//! let (teacher, student, labels) = ([2.0_f32, 1.0, 0.0], [1.0_f32, 1.0, 1.0], [0_i64]);
//! let matrix = |logits: &[f32; 3]| raw::Matrix {
//!     data: logits.as_ptr().cast_mut().cast(),
//!     dtype: Dtype::F32,
//!     row_stride: 3,
//! };
//! let mut loss = 0.0;
//! let call = raw::Call {
//!     tokens: 1,
//!     vocab: 3,
//!     teacher: matrix(&teacher),
//!     student: matrix(&student),
//!     labels: Some(raw::Labels::I64(labels.as_ptr())),
//!     sequences: None,
//!     upstream: std::ptr::null(),
//!     gradient: None,
//!     output: raw::Output { loss: &mut loss, ..raw::Output::NONE },
//! };
//! // SAFETY: the pointers are to arrays of the shapes given.
//! unsafe { raw::run(&Objective::default(), &call)? };
//! assert!(loss > 0.0);
//! # Ok::<(), atkd::Error>(())
//! ```

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::null_mut;

use half::{bf16, f16};

use crate::logits::span;
use crate::{
    Batch, Dtype, Elements, ElementsMut, Error, Logits, LogitsMut, Objective, Result, TokenTerms,
    cpu,
};

/// Logits, or a gradient, `[tokens, vocab]` at an address: each row contiguous, rows `row_stride`
/// elements apart.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Matrix {
    /// The first element. Never written through for a teacher, nor for a student whose gradient goes
    /// elsewhere.
    pub data: *mut c_void,
    /// The type of the elements.
    pub dtype: Dtype,
    /// At least the vocabulary size.
    pub row_stride: usize,
}

/// One label a token, at an address.
#[derive(Clone, Copy, Debug)]
pub enum Labels {
    /// 64 bits.
    I64(*const i64),
    /// 32 bits.
    I32(*const i32),
}

/// Where the results go; null for one that is not wanted.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// One number: the reduced loss.
    pub loss: *mut f32,
    /// `[tokens]`: see [`TokenTerms::uncertainty`].
    pub uncertainty: *mut f32,
    /// `[tokens]`: see [`TokenTerms::tkd`].
    pub tkd: *mut f32,
    /// `[tokens]`: see [`TokenTerms::dkd`].
    pub dkd: *mut f32,
    /// `[tokens]`, 1 or 0: see [`TokenTerms::hard`].
    pub hard: *mut u8,
}

impl Output {
    /// Nothing wanted.
    pub const NONE: Self = Self {
        loss: null_mut(),
        uncertainty: null_mut(),
        tkd: null_mut(),
        dkd: null_mut(),
        hard: null_mut(),
    };
}

/// All of a call but the objective.
#[derive(Clone, Copy, Debug)]
pub struct Call<'a> {
    /// Rows.
    pub tokens: usize,
    /// Logits in a row.
    pub vocab: usize,
    /// The teacher's logits.
    pub teacher: Matrix,
    /// The student's logits.
    pub student: Matrix,
    /// The labels, if there are any.
    pub labels: Option<Labels>,
    /// See [`Batch::with_sequences`].
    pub sequences: Option<&'a [usize]>,
    /// One number that the gradient is multiplied by, beside the objective's; null for 1.
    pub upstream: *const f32,
    /// Where the gradient goes, if it is wanted: over the student's logits if equal to `student`.
    pub gradient: Option<Matrix>,
    /// Where everything else goes.
    pub output: Output,
}

// SAFETY: addresses belong to no thread; who touches what they point to is what `run` asks about.
unsafe impl Send for Call<'_> {}
// SAFETY: as above.
unsafe impl Sync for Call<'_> {}

/// The loss, on the cores of rayon's current thread pool: forward alone if there is no gradient.
///
/// # Errors
/// As [`cpu::forward_backward`]; and if an address is null or not aligned, or the gradient overlaps
/// what it is computed from without being the student's logits themselves. Nothing was written then.
///
/// # Safety
/// Every pointer that is not null is valid for what it is described to hold: logits and gradient for
/// `(tokens - 1) * row_stride + vocab` elements, all of them initialised. Until the call returns nobody
/// else writes to any of it, nor reads what is written: gradient and outputs.
pub unsafe fn run(objective: &Objective, call: &Call) -> Result<()> {
    let teacher = Place::new("the teacher's logits", call, call.teacher)?;
    let student = Place::new("the student's logits", call, call.student)?;
    let gradient = call.gradient.map(|to| Place::new("the gradient", call, to)).transpose()?;
    let in_place = call.gradient == Some(call.student);
    if let Some(gradient) = &gradient {
        gradient.check_apart(&teacher)?;
        if !in_place {
            gradient.check_apart(&student)?;
        }
    }
    let mut objective = *objective;
    if !call.upstream.is_null() {
        // SAFETY: the caller says that it is one number.
        let upstream = f64::from(unsafe { call.upstream.read() });
        objective = objective.with_upstream_gradient(upstream * objective.upstream_gradient())?;
    }

    // SAFETY: the caller's, for as long as this function runs. What is borrowed mutably overlaps
    // nothing else: checked above for the logits, and the caller's word for labels and outputs.
    let output = unsafe {
        let teacher = teacher.logits(call)?;
        let mut batch = match call.labels {
            Some(Labels::I64(data)) => Batch::new(teacher, slice("labels", data, call.tokens)?)?,
            Some(Labels::I32(data)) => Batch::new(teacher, slice("labels", data, call.tokens)?)?,
            None => Batch::unlabelled(teacher),
        };
        if let Some(offsets) = call.sequences {
            batch = batch.with_sequences(offsets)?;
        }
        match gradient {
            None => cpu::forward(&objective, &batch, student.logits(call)?)?,
            Some(gradient) if in_place => {
                cpu::forward_backward_in_place(&objective, &batch, gradient.logits_mut(call)?)?
            }
            Some(gradient) => cpu::forward_backward(
                &objective,
                &batch,
                student.logits(call)?,
                gradient.logits_mut(call)?,
            )?,
        }
    };

    let to = call.output;
    // SAFETY: the caller says that each has room for one number a token, the loss for one.
    unsafe {
        if !to.loss.is_null() {
            to.loss.write(output.loss as f32);
        }
        write(to.uncertainty, &output.tokens, |token| token.uncertainty as f32);
        write(to.tkd, &output.tokens, |token| token.tkd as f32);
        write(to.dkd, &output.tokens, |token| token.dkd as f32);
        write(to.hard, &output.tokens, |token| token.hard.into());
    }
    Ok(())
}

/// A matrix whose shape and address are possible.
struct Place {
    what: &'static str,
    matrix: Matrix,
    elements: usize,
}

impl Place {
    fn new(what: &'static str, call: &Call, matrix: Matrix) -> Result<Self> {
        let (tokens, vocab, row_stride) = (call.tokens, call.vocab, matrix.row_stride);
        let elements = span(what, tokens, vocab, row_stride)?;
        if elements > isize::MAX as usize / matrix.dtype.size() {
            let reason = "tokens times row stride does not fit into the address space";
            return Err(Error::Shape { what, tokens, vocab, row_stride, reason });
        }
        check_address(what, matrix.data as usize, matrix.dtype.size(), elements)?;
        Ok(Self { what, matrix, elements })
    }

    fn addresses(&self) -> Range<usize> {
        let start = self.matrix.data as usize;
        start..start + self.elements * self.matrix.dtype.size()
    }

    fn check_apart(&self, other: &Self) -> Result<()> {
        let (a, b) = (self.addresses(), other.addresses());
        if a.start < b.end && b.start < a.end {
            return Err(Error::Overlap { what: self.what, with: other.what, addresses: [a, b] });
        }
        Ok(())
    }

    /// # Safety
    /// As [`run`], for `'a`.
    unsafe fn logits<'a>(&self, call: &Call) -> Result<Logits<'a>> {
        let data = self.matrix.data;
        // SAFETY: the caller's; the address was checked.
        let elements: Elements = unsafe {
            match self.matrix.dtype {
                Dtype::F32 => slice(self.what, data.cast::<f32>(), self.elements)?.into(),
                Dtype::F16 => slice(self.what, data.cast::<f16>(), self.elements)?.into(),
                Dtype::Bf16 => slice(self.what, data.cast::<bf16>(), self.elements)?.into(),
            }
        };
        Logits::strided(elements, call.tokens, call.vocab, self.matrix.row_stride)
    }

    /// # Safety
    /// As [`run`], for `'a`.
    unsafe fn logits_mut<'a>(&self, call: &Call) -> Result<LogitsMut<'a>> {
        /// # Safety
        /// As [`run`], for `'a`.
        unsafe fn slice_mut<'a, T>(data: *mut c_void, length: usize) -> &'a mut [T] {
            if length == 0 {
                return &mut [];
            }
            // SAFETY: the caller's; the address was checked.
            unsafe { std::slice::from_raw_parts_mut(data.cast(), length) }
        }
        let data = self.matrix.data;
        // SAFETY: the caller's.
        let elements: ElementsMut = unsafe {
            match self.matrix.dtype {
                Dtype::F32 => slice_mut::<f32>(data, self.elements).into(),
                Dtype::F16 => slice_mut::<f16>(data, self.elements).into(),
                Dtype::Bf16 => slice_mut::<bf16>(data, self.elements).into(),
            }
        };
        LogitsMut::strided(elements, call.tokens, call.vocab, self.matrix.row_stride)
    }
}

fn check_address(what: &'static str, address: usize, size: usize, elements: usize) -> Result<()> {
    if elements > 0 && (address == 0 || !address.is_multiple_of(size)) {
        return Err(Error::Address { what, address, elements, size });
    }
    Ok(())
}

/// # Safety
/// `data` is valid for `length` elements for `'a`, unless it is null or not aligned.
unsafe fn slice<'a, T>(what: &'static str, data: *const T, length: usize) -> Result<&'a [T]> {
    check_address(what, data as usize, size_of::<T>(), length)?;
    if length == 0 {
        return Ok(&[]);
    }
    // SAFETY: the caller's, and neither null nor unaligned.
    Ok(unsafe { std::slice::from_raw_parts(data, length) })
}

/// # Safety
/// `column` is null, or has room for one value a token.
unsafe fn write<T>(column: *mut T, tokens: &[TokenTerms], value: impl Fn(&TokenTerms) -> T) {
    if column.is_null() {
        return;
    }
    for (i, token) in tokens.iter().enumerate() {
        // SAFETY: inside the column.
        unsafe { column.add(i).write(value(token)) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::forward_backward;

    const TOKENS: usize = 3;
    const VOCAB: usize = 5;

    fn matrix<T>(data: &[T], dtype: Dtype, row_stride: usize) -> Matrix {
        Matrix { data: data.as_ptr().cast_mut().cast(), dtype, row_stride }
    }

    fn call(teacher: &[f32], student: &[f32], labels: &[i64], row_stride: usize) -> Call<'static> {
        Call {
            tokens: TOKENS,
            vocab: VOCAB,
            teacher: matrix(teacher, Dtype::F32, row_stride),
            student: matrix(student, Dtype::F32, row_stride),
            labels: Some(Labels::I64(labels.as_ptr())),
            sequences: None,
            upstream: std::ptr::null(),
            gradient: None,
            output: Output::NONE,
        }
    }

    fn logits(seed: u64, count: usize) -> Vec<f32> {
        let mut random = fastrand::Rng::with_seed(seed);
        (0..count).map(|_| 4.0 * random.f32()).collect()
    }

    #[test]
    fn same_as_on_slices() -> Result<()> {
        let (teacher, student, labels) = (logits(1, 15), logits(2, 15), [4_i64, -100, 0]);
        let objective = Objective::default();
        let mut expected = vec![0_f32; 15];
        let view = |v| Logits::new(v, TOKENS, VOCAB);
        let batch = Batch::new(view(&teacher)?, &labels)?;
        let to = LogitsMut::new(&mut expected, TOKENS, VOCAB)?;
        let output = forward_backward(&objective, &batch, view(&student)?, to)?;

        let (mut loss, upstream) = (f32::NAN, 2.0);
        let (mut terms, mut hard) = ([[f32::NAN; TOKENS]; 3], [9; TOKENS]);
        let [uncertainty, tkd, dkd] = &mut terms;
        let mut gradient = vec![f32::NAN; 15];
        let call = Call {
            upstream: &upstream,
            gradient: Some(Matrix {
                data: gradient.as_mut_ptr().cast(),
                ..matrix(&student, Dtype::F32, VOCAB)
            }),
            output: Output {
                loss: &mut loss,
                uncertainty: uncertainty.as_mut_ptr(),
                tkd: tkd.as_mut_ptr(),
                dkd: dkd.as_mut_ptr(),
                hard: hard.as_mut_ptr(),
            },
            ..call(&teacher, &student, &labels, VOCAB)
        };
        // SAFETY: all are arrays of the shapes given.
        unsafe { run(&objective, &call)? };
        assert_eq!(loss, output.loss as f32);
        assert_eq!(gradient, expected.iter().map(|d| 2.0 * d).collect::<Vec<_>>());
        for (i, token) in output.tokens.iter().enumerate() {
            let expected = [token.uncertainty, token.tkd, token.dkd].map(|term| term as f32);
            assert_eq!(terms.map(|column| column[i]), expected);
            assert_eq!(hard[i], u8::from(token.hard));
        }

        let mut in_place = student.clone();
        let place = Matrix { data: in_place.as_mut_ptr().cast(), ..call.student };
        let call = Call { student: place, gradient: Some(place), ..call };
        // SAFETY: as before.
        unsafe { run(&objective, &call)? };
        assert_eq!(in_place, gradient);
        Ok(())
    }

    #[test]
    fn rows_apart_leave_the_gaps_alone() -> Result<()> {
        let (teacher, mut student, labels) = (logits(1, 19), logits(2, 19), [4_i64, -100, 0]);
        let before = student.clone();
        let place =
            Matrix { data: student.as_mut_ptr().cast(), ..matrix(&student, Dtype::F32, VOCAB + 2) };
        let call = Call {
            student: place,
            gradient: Some(place),
            ..call(&teacher, &before, &labels, VOCAB + 2)
        };
        // SAFETY: 19 elements are two rows at stride 7, and a third of 5.
        unsafe { run(&Objective::default(), &call)? };
        for (i, (now, before)) in student.iter().zip(&before).enumerate() {
            assert_eq!(now == before, i % 7 >= VOCAB, "element {i}: {before} became {now}");
        }
        Ok(())
    }

    #[test]
    fn no_tokens_may_have_no_address() -> Result<()> {
        let nowhere = Matrix { data: null_mut(), dtype: Dtype::F16, row_stride: VOCAB };
        let mut loss = f32::NAN;
        let call = Call {
            tokens: 0,
            teacher: nowhere,
            student: nowhere,
            labels: Some(Labels::I32(std::ptr::null())),
            gradient: Some(nowhere),
            output: Output { loss: &mut loss, ..Output::NONE },
            ..call(&[], &[], &[], VOCAB)
        };
        // SAFETY: nothing but the loss is touched.
        unsafe { run(&Objective::default(), &call)? };
        assert_eq!(loss, 0.0);
        Ok(())
    }

    #[test]
    fn impossible_addresses_are_errors() {
        let (teacher, student, labels) = (logits(1, 20), logits(2, 20), [0_i64; TOKENS]);
        let good = call(&teacher, &student, &labels, VOCAB);
        let at = |matrix: Matrix, data: usize| Matrix { data: data as *mut c_void, ..matrix };
        let message = |call: Call| {
            // SAFETY: it fails before it touches anything.
            unsafe { run(&Objective::default(), &call) }.unwrap_err().to_string()
        };
        let null = message(Call { teacher: at(good.teacher, 0), ..good });
        assert!(null.contains("the teacher's logits") && null.contains("0x0"), "{null}");
        let odd = good.student.data as usize + 2;
        let unaligned = message(Call { student: at(good.student, odd), ..good });
        assert!(unaligned.contains(&format!("{odd:#x}")), "{unaligned}");
        let labels = message(Call { labels: Some(Labels::I64(std::ptr::null())), ..good });
        assert!(labels.contains("labels"), "{labels}");
        let later = at(good.student, good.student.data as usize + 4);
        let overlap = message(Call { gradient: Some(later), ..good });
        assert!(overlap.contains("overlaps the student's logits"), "{overlap}");
        let overlap = message(Call { gradient: Some(good.teacher), ..good });
        assert!(overlap.contains("overlaps the teacher's logits"), "{overlap}");
        let huge = message(Call { tokens: usize::MAX / 8, ..good });
        assert!(huge.contains("address space"), "{huge}");
    }
}
