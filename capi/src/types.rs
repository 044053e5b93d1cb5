//! A call as a C struct.

use std::ffi::c_void;

use atkd::{Dtype, raw};

use crate::status::Failure;

/// IEEE 754 binary32.
pub const ATKD_F32: i32 = 0;
/// IEEE 754 binary16.
pub const ATKD_F16: i32 = 1;
/// bfloat16.
pub const ATKD_BF16: i32 = 2;
/// A 64-bit signed integer.
pub const ATKD_I64: i32 = 3;
/// A 32-bit signed integer.
pub const ATKD_I32: i32 = 4;

/// Logits, or a gradient, [tokens, vocab]: each row contiguous, rows `row_stride` elements apart.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdMatrix {
    /// The first element, aligned to its size.
    pub data: *mut c_void,
    /// Elements from the start of one row to the start of the next, at least vocab.
    pub row_stride: i64,
    /// ATKD_F32, ATKD_F16 or ATKD_BF16.
    pub dtype: i32,
}

/// One label a token, without gaps.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdLabels {
    /// Null where there are none: the target must be ATKD_TARGET_TEACHER then.
    pub data: *const c_void,
    /// ATKD_I64 or ATKD_I32.
    pub dtype: i32,
}

/// One batch. Everything but `sequences` is memory of the workspace's device.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdCall {
    /// Rows, ignored ones included.
    pub tokens: i64,
    /// Logits in a row, at least 1.
    pub vocab: i64,
    /// The teacher's logits, which are never written to.
    pub teacher: AtkdMatrix,
    /// The student's logits, which are written to only if `gradient` names the same.
    pub student: AtkdMatrix,
    /// The labels.
    pub labels: AtkdLabels,
    /// Where the gradient goes.
    pub gradient: AtkdMatrix,
    /// One number that the gradient is multiplied by; null for 1.
    pub upstream: *const f32,
    /// Hard tokens are selected within each of this many sequences, or within the whole batch if it is
    /// 0.
    pub sequences: i64,
    /// [sequences + 1], in host memory: sequence i is tokens offsets[i] to offsets[i + 1] - 1.
    pub sequence_offsets: *const i64,
    /// One number: the reduced loss. Null if not wanted; so are the others.
    pub loss: *mut f32,
    /// [tokens]: 1 - p(target) of the teacher.
    pub uncertainty: *mut f32,
    /// [tokens]: the target part.
    pub tkd: *mut f32,
    /// [tokens]: the diversity part.
    pub dkd: *mut f32,
    /// [tokens]: 1 for a hard token, else 0.
    pub hard: *mut u8,
    /// The CUstream to work on, for a CUDA workspace; the workspace's own if null.
    pub stream: *mut c_void,
}

fn size(name: &'static str, value: i64) -> Result<usize, Failure> {
    usize::try_from(value).map_err(|_| {
        Failure::new(
            crate::ATKD_INVALID_ARGUMENT,
            format!("{name} is {value}, but must not be negative"),
        )
    })
}

impl AtkdMatrix {
    fn parse(&self) -> Result<raw::Matrix, Failure> {
        let dtype = match self.dtype {
            ATKD_F32 => Dtype::F32,
            ATKD_F16 => Dtype::F16,
            ATKD_BF16 => Dtype::Bf16,
            other => {
                let allowed = "ATKD_F32 (0), ATKD_F16 (1) or ATKD_BF16 (2)";
                return Err(Failure::value("a matrix's dtype", other, allowed));
            }
        };
        Ok(raw::Matrix {
            data: self.data,
            dtype,
            row_stride: size("a row stride", self.row_stride)?,
        })
    }
}

impl AtkdCall {
    /// # Safety
    /// The offsets are as many as the struct says.
    pub(crate) unsafe fn sequences(&self) -> Result<Option<Vec<usize>>, Failure> {
        let sequences = size("sequences", self.sequences)?;
        if sequences == 0 {
            return Ok(None);
        }
        if self.sequence_offsets.is_null() {
            return Err(Failure::null("sequence_offsets"));
        }
        // SAFETY: the caller's.
        let offsets = unsafe { std::slice::from_raw_parts(self.sequence_offsets, sequences + 1) };
        let offsets = offsets.iter().map(|&offset| size("a sequence offset", offset));
        Ok(Some(offsets.collect::<Result<_, _>>()?))
    }

    pub(crate) fn host<'a>(
        &self,
        sequences: Option<&'a [usize]>,
        with_gradient: bool,
    ) -> Result<raw::Call<'a>, Failure> {
        let labels = match (self.labels.data.is_null(), self.labels.dtype) {
            (true, _) if self.tokens == 0 => Some(raw::Labels::I64(std::ptr::null())),
            (true, _) => None,
            (false, ATKD_I64) => Some(raw::Labels::I64(self.labels.data.cast())),
            (false, ATKD_I32) => Some(raw::Labels::I32(self.labels.data.cast())),
            (false, other) => {
                let allowed = "ATKD_I64 (3) or ATKD_I32 (4)";
                return Err(Failure::value("the labels' dtype", other, allowed));
            }
        };
        Ok(raw::Call {
            tokens: size("tokens", self.tokens)?,
            vocab: size("vocab", self.vocab)?,
            teacher: self.teacher.parse()?,
            student: self.student.parse()?,
            labels,
            sequences,
            upstream: self.upstream,
            gradient: if with_gradient { Some(self.gradient.parse()?) } else { None },
            output: raw::Output {
                loss: self.loss,
                uncertainty: self.uncertainty,
                tkd: self.tkd,
                dkd: self.dkd,
                hard: self.hard,
            },
        })
    }
}
