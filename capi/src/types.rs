//! A call as a C struct.

use std::ffi::c_void;

use atkd::call::{
    RawCall, RawEntropies, RawLabels, RawLogits, RawOutput, RawSelection, RawShard, RawSparseCall,
    RawSparseTeacher, RawStates, RawTeacher,
};
use atkd::{Dtype, Strides, Tail};

use crate::settings::selection_rule;
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

/// Logits, or a gradient, [tokens, vocab]: each row contiguous, and no element in two rows. Row i starts at element
/// i * row_stride or, if `inner` is not 0, where it does in a tensor [outer, inner, vocab]: at
/// i / inner * outer_stride + i % inner * row_stride.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdMatrix {
    /// The first element, aligned to its size.
    pub data: *mut c_void,
    /// Elements from the start of one row to the start of the next; at least vocab if `inner` is 0.
    pub row_stride: i64,
    /// ATKD_F32, ATKD_F16 or ATKD_BF16.
    pub dtype: i32,
    /// Rows of one outer index, of which tokens is a multiple, such as the length of a sequence; 0 if all rows
    /// are row_stride elements apart.
    pub inner: i64,
    /// Elements from one outer index to the next, which may be fewer than row_stride; of an inner that is not 0.
    pub outer_stride: i64,
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

/// A token with the ignore index, in AtkdCall.groups.
pub const ATKD_IGNORED: u8 = 0;
/// A token that is not hard.
pub const ATKD_EASY: u8 = 1;
/// A token among those of which the teacher is least certain.
pub const ATKD_HARD: u8 = 2;

/// One batch. Every pointer but `stream` is to host memory, or for a CUDA workspace to its device's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdCall {
    /// Rows, ignored ones included.
    pub tokens: i64,
    /// Logits in a row that count, at least 1. A model whose vocabulary is padded has more: its row_stride is larger.
    pub vocab: i64,
    /// The teacher's logits, which are never written to.
    pub teacher: AtkdMatrix,
    /// The student's logits, which are written to only if `gradient` names the same.
    pub student: AtkdMatrix,
    /// The labels.
    pub labels: AtkdLabels,
    /// The place where the gradient is written.
    pub gradient: AtkdMatrix,
    /// Columns of the gradient after the first `vocab`, which become 0: where the student's vocabulary is padded. Else 0.
    pub gradient_padding: i64,
    /// One number that the gradient is multiplied by; null for 1. If it is infinite or NaN, the gradient of every
    /// valid token is NaN.
    pub upstream: *const f32,
    /// Hard tokens are selected within each of this many sequences, at most 2^31 - 1, or within the whole batch, which
    /// is this call's tokens, if it is 0. With gradient accumulation, or ranks that share a batch, that is a part of the
    /// batch, and the parts' gradients are 7 to 26% off the whole batch's (README.md): select by atkd_select_hard over
    /// the margins of all parts, and give each call its share as `hard`.
    pub sequences: i64,
    /// [sequences + 1]: sequence i is tokens offsets[i] to offsets[i + 1] - 1.
    pub sequence_offsets: *const i64,
    /// [tokens]: hard tokens are selected by these margins instead of the teacher's own. Null for none.
    pub margins: *const f32,
    /// [tokens]: not 0 for a hard token. Nothing is selected then; the hard ratio, sequences and margins are not
    /// used, and ignored tokens stay ignored. Null for none.
    pub hard: *const u8,
    /// [tokens]: each token's terms, cross entropy's too, are multiplied by its weight. A mean divides by the number of
    /// valid tokens nevertheless. The loss and the gradient of a token whose weight is infinite or NaN are NaN. Null for 1.
    pub token_weights: *const f32,
    /// [tokens]: divides each token's logits, of both models, instead of the settings' temperature; tokens are selected by
    /// their margins at these. A valid token's outside [1e-30, 1e30] is an error; on a CUDA workspace the token has the loss
    /// NaN. Null for none.
    pub temperatures: *const f32,
    /// One number: the reduced loss. Null if not wanted; so are the others.
    pub loss: *mut f32,
    /// [tokens]: 1 - p(target) of the teacher.
    pub uncertainty: *mut f32,
    /// [tokens]: the target part.
    pub tkd: *mut f32,
    /// [tokens]: the diversity part.
    pub dkd: *mut f32,
    /// [tokens]: the teacher's margin, log((1 - p) / p) of the target's p, by which hard tokens are selected;
    /// -infinity for an ignored token.
    pub margin: *mut f32,
    /// [tokens]: the token's loss before the reduction, its weight included.
    pub token_loss: *mut f32,
    /// [tokens]: ATKD_IGNORED, ATKD_EASY or ATKD_HARD.
    pub groups: *mut u8,
    /// The CUstream to work on, for a CUDA workspace; the default stream if null.
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

fn dtype(name: &'static str, value: i32) -> Result<Dtype, Failure> {
    Ok(match value {
        ATKD_F32 => Dtype::F32,
        ATKD_F16 => Dtype::F16,
        ATKD_BF16 => Dtype::Bf16,
        other => {
            let allowed = "ATKD_F32 (0), ATKD_F16 (1) or ATKD_BF16 (2)";
            return Err(Failure::value(name, other, allowed));
        }
    })
}

impl AtkdLabels {
    /// `None` for null, unless it is of no elements.
    fn parse(&self, name: &'static str, tokens: i64) -> Result<Option<RawLabels>, Failure> {
        Ok(match (address(self.data), self.dtype) {
            (None, _) if tokens == 0 => Some(RawLabels::I64(0)),
            (None, _) => None,
            (Some(address), ATKD_I64) => Some(RawLabels::I64(address)),
            (Some(address), ATKD_I32) => Some(RawLabels::I32(address)),
            (Some(_), other) => {
                return Err(Failure::value(name, other, "ATKD_I64 (3) or ATKD_I32 (4)"));
            }
        })
    }
}

impl AtkdMatrix {
    fn parse(&self) -> Result<RawLogits, Failure> {
        let dtype = dtype("a matrix's dtype", self.dtype)?;
        let row_stride = size("a row stride", self.row_stride)?;
        let strides = match size("a matrix's inner", self.inner)? {
            0 => row_stride.into(),
            inner => {
                Strides::nested(inner, size("an outer stride", self.outer_stride)?, row_stride)
            }
        };
        Ok(RawLogits { address: self.data as u64, dtype, strides })
    }
}

fn address<T>(pointer: *const T) -> Option<u64> {
    (!pointer.is_null()).then_some(pointer as u64)
}

/// How many, and their offsets.
fn sequences(count: i64, offsets: *const i64) -> Result<Option<(u64, usize)>, Failure> {
    Ok(match size("sequences", count)? {
        0 => None,
        count => Some((address(offsets).ok_or(Failure::null("sequence_offsets"))?, count)),
    })
}

impl AtkdCall {
    /// The teacher and the labels.
    pub(crate) fn parse_teacher(&self) -> Result<RawTeacher, Failure> {
        let labels = self.labels.parse("the labels' dtype", self.tokens)?;
        Ok(RawTeacher {
            tokens: size("tokens", self.tokens)?,
            vocab: size("vocab", self.vocab)?,
            teacher: self.teacher.parse()?,
            labels,
            temperatures: address(self.temperatures),
        })
    }

    pub(crate) fn parse(&self, with_gradient: bool) -> Result<RawCall, Failure> {
        let RawTeacher { tokens, vocab, teacher, labels, temperatures } = self.parse_teacher()?;
        Ok(RawCall {
            tokens,
            vocab,
            teacher,
            student: self.student.parse()?,
            gradient: if with_gradient { Some(self.gradient.parse()?) } else { None },
            labels,
            sequences: sequences(self.sequences, self.sequence_offsets)?,
            margins: address(self.margins),
            gradient_padding: size("gradient_padding", self.gradient_padding)?,
            hard: address(self.hard),
            token_weights: address(self.token_weights),
            temperatures,
            upstream: address(self.upstream),
        })
    }

    pub(crate) fn output(&self) -> RawOutput {
        RawOutput {
            loss: address(self.loss),
            uncertainty: address(self.uncertainty),
            tkd: address(self.tkd),
            dkd: address(self.dkd),
            margin: address(self.margin),
            token_loss: address(self.token_loss),
            groups: address(self.groups),
        }
    }
}

/// The tokens of which a sparse teacher has no log-probability are one class: what is left of the mass, against the
/// student's mass on the same tokens. Nothing is assumed of how the teacher spreads it.
pub const ATKD_TAIL_BUCKET: i32 = 0;
/// They have no probability. The known ones are renormalised.
pub const ATKD_TAIL_ZERO: i32 = 1;
/// The teacher spreads what is left of the mass evenly over them.
pub const ATKD_TAIL_UNIFORM: i32 = 2;
/// They have no probability. The indices but the label are draws from what the teacher gives all tokens but the label, and
/// their log-probabilities are logarithms of weights in any unit, which share what the label leaves: target_log_probs is
/// needed. For forward KL, whose gradient then has the expectation of the whole teacher's.
pub const ATKD_TAIL_SAMPLED: i32 = 3;

/// A teacher of which a few log-probabilities per token are known, in the place of AtkdCall.teacher: natural logarithms at
/// the call's temperature, which divides the student's logits alone. Every pointer is to host memory, or for a CUDA workspace
/// to its device's; the arrays have no gaps.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdSparseTeacher {
    /// Places in a row, from 1 to 1024.
    pub top_k: i64,
    /// [tokens, top_k]: tokens of the vocabulary, none twice in a row, in any order; -1 for none.
    pub indices: AtkdLabels,
    /// [tokens, top_k]: their log-probabilities.
    pub log_probs: *const c_void,
    /// ATKD_F32, ATKD_F16 or ATKD_BF16: that of log_probs.
    pub dtype: i32,
    /// ATKD_TAIL_BUCKET, ATKD_TAIL_ZERO, ATKD_TAIL_UNIFORM or ATKD_TAIL_SAMPLED.
    pub tail: i32,
    /// [tokens]: the log-probabilities of the labels, which then need not be among the indices. Null for none; not used by
    /// ATKD_TARGET_TEACHER, whose target is the likeliest of the indices.
    pub target_log_probs: *const f32,
}

impl AtkdSparseTeacher {
    pub(crate) fn parse(
        &self,
        call: &AtkdCall,
        with_gradient: bool,
    ) -> Result<RawSparseCall, Failure> {
        if !call.teacher.data.is_null() {
            return Err(Failure::new(
                crate::ATKD_INVALID_ARGUMENT,
                format!(
                    "teacher.data is {:p}, but a call with a sparse teacher has no logits of it; set it to null",
                    call.teacher.data
                ),
            ));
        }
        // The student's matrix stands where the teacher has none.
        let whole = AtkdCall { teacher: call.student, ..*call }.parse(with_gradient)?;
        let indices = self.indices.parse("the indices' dtype", call.tokens)?;
        let teacher = RawSparseTeacher {
            top_k: size("top_k", self.top_k)?,
            indices: indices.ok_or(Failure::null("indices"))?,
            log_probs: self.log_probs as u64,
            dtype: dtype("the log-probabilities' dtype", self.dtype)?,
            target_log_probs: address(self.target_log_probs),
            target_rounding: Dtype::F32,
            tail: match self.tail {
                ATKD_TAIL_BUCKET => Tail::Bucket,
                ATKD_TAIL_ZERO => Tail::Zero,
                ATKD_TAIL_UNIFORM => Tail::Uniform,
                ATKD_TAIL_SAMPLED => Tail::Sampled,
                other => {
                    let allowed = "ATKD_TAIL_BUCKET (0), ATKD_TAIL_ZERO (1), ATKD_TAIL_UNIFORM (2) or \
                         ATKD_TAIL_SAMPLED (3)";
                    return Err(Failure::value("tail", other, allowed));
                }
            },
        };
        let RawCall { student, gradient, gradient_padding, .. } = whole;
        let tokens = whole.without_logits();
        Ok(RawSparseCall { tokens, teacher, student, gradient, gradient_padding })
    }
}

/// The entropies of one model's distributions. Every pointer but `stream` is to host memory, or for a CUDA workspace to its
/// device's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdEntropies {
    /// Rows.
    pub tokens: i64,
    /// Logits in a row.
    pub vocab: i64,
    /// [tokens, vocab]: a model's logits.
    pub logits: AtkdMatrix,
    /// Divides the logits; in [1e-30, 1e30].
    pub temperature: f64,
    /// [tokens]: becomes -sum p log p, in nats. NaN where the logits have a NaN or +inf, or are all -inf.
    pub entropies: *mut f32,
    /// The CUstream to work on, for a CUDA workspace; the default stream if null.
    pub stream: *mut c_void,
}

impl AtkdEntropies {
    pub(crate) fn parse(&self) -> Result<RawEntropies, Failure> {
        Ok(RawEntropies {
            tokens: size("tokens", self.tokens)?,
            vocab: size("vocab", self.vocab)?,
            logits: self.logits.parse()?,
            temperature: self.temperature,
            to: self.entropies as u64,
        })
    }
}

/// A selection of hard tokens by itself, over the tokens of as many calls as there are. Every pointer but `stream` is to
/// host memory, or for a CUDA workspace to its device's.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdSelection {
    /// Margins.
    pub tokens: i64,
    /// [tokens]: the larger, the harder; NaN ranks below every number, and among equals the lower index is harder.
    pub margins: *const f32,
    /// [tokens]: not 0 for a token that counts. Null for all.
    pub valid: *const u8,
    /// The share of the valid tokens that is hard, in [0, 1], rounded up to whole tokens.
    pub hard_ratio: f64,
    /// ATKD_SELECTION_RULE_TOP_K, or ATKD_SELECTION_RULE_MEDIAN, which has no ratio.
    pub rule: i32,
    /// The same as AtkdCall.sequences.
    pub sequences: i64,
    /// [sequences + 1]: as AtkdCall.sequence_offsets.
    pub sequence_offsets: *const i64,
    /// [tokens]: becomes 1 for a hard token, else 0.
    pub hard: *mut u8,
    /// The CUstream to work on, for a CUDA workspace; the default stream if null.
    pub stream: *mut c_void,
}

impl AtkdSelection {
    pub(crate) fn parse(&self) -> Result<RawSelection, Failure> {
        Ok(RawSelection {
            tokens: size("tokens", self.tokens)?,
            margins: self.margins as u64,
            valid: address(self.valid),
            sequences: sequences(self.sequences, self.sequence_offsets)?,
            rule: selection_rule(self.rule)?,
            hard: self.hard as u64,
        })
    }
}

/// One rank's shard of the vocabulary, and what the ranks have exchanged. Every pointer is to host memory, or for a CUDA
/// workspace to its device's, but for those to this struct and to the call.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdShard {
    /// The shard's columns of the tokens: `vocab` is how many, which may be 0, and the labels are tokens of the whole
    /// vocabulary. Nothing is selected: `hard` is needed where the objective depends on it, and sequences and margins are not
    /// used.
    pub call: *const AtkdCall,
    /// Tokens of the whole vocabulary.
    pub whole_vocab: i64,
    /// The token of the vocabulary that the first column is about.
    pub first_column: i64,
    /// Two numbers: the valid and the hard tokens of all ranks that the reduction is over; null for those of the call.
    pub counts: *const u32,
    /// [ranks, tokens]: the states of all ranks, in the order of their columns, after they were exchanged.
    pub states: *const AtkdRowState,
    /// [ranks, tokens]: the second sweep's terms of all ranks, after they were exchanged; null if the divergence has none:
    /// ATKD_DIVERGENCE_FORWARD_KL and ATKD_DIVERGENCE_REVERSE_KL.
    pub terms: *const AtkdSweepTerms,
    /// Ranks of the vocabulary.
    pub ranks: i64,
}

impl AtkdShard {
    /// # Safety
    /// The call is null, or one.
    pub(crate) unsafe fn parse(
        &self,
        with_gradient: bool,
    ) -> Result<(RawShard, AtkdCall), Failure> {
        // SAFETY: the caller's.
        let call = *unsafe { self.call.as_ref() }.ok_or(Failure::null("the shard's call"))?;
        let RawCall { tokens, vocab: columns, teacher, student, labels, .. } =
            call.parse(with_gradient)?;
        let shard = RawShard {
            tokens,
            vocab: size("whole_vocab", self.whole_vocab)?,
            first_column: size("first_column", self.first_column)?,
            columns,
            teacher,
            student,
            labels,
            hard: address(call.hard),
            token_weights: address(call.token_weights),
            temperatures: address(call.temperatures),
            upstream: address(call.upstream),
            counts: address(self.counts),
        };
        Ok((shard, call))
    }

    pub(crate) fn exchanged(&self) -> Result<RawStates, Failure> {
        let ranks = size("ranks", self.ranks)?;
        Ok(RawStates { states: self.states as u64, terms: address(self.terms), ranks })
    }
}

/// A row's sums, or those of the part that a shard has, with the target left out: 40 bytes that ranks exchange. With the
/// exponents x_j = z_j log2(e) / T of the teacher's logits and y_j of the student's, X is the integer nearest to the exponent
/// of teacher_max, and Y to that of student_max; where that is 2^18 or more in size, the exponent itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdRowState {
    /// sum 2^(x_j - X)
    pub teacher_sum: f32,
    /// sum 2^(y_j - Y)
    pub student_sum: f32,
    /// This is student_sum at T = 1, if cross entropy needs it beside the other; else 0.
    pub student_sum_at_1: f32,
    /// Forward KL: sum 2^(x_j - X) (x_j - X - y_j + Y) / 2^64, or infinity where the student rules out (-infinity) a token
    /// that the teacher does not. Reverse KL, with r the token of student_max: sum 2^(y_j - Y) (x_j - x_r - y_j + y_r) / 2^64,
    /// or -infinity where the teacher rules out what the student does not. Other divergences: 0.
    pub cross_term: f32,
    /// The largest logit, or a little less; finite.
    pub teacher_max: f32,
    /// Likewise.
    pub student_max: f32,
    /// Reverse KL: the teacher's logit of token r; finite.
    pub teacher_reference: f32,
    /// The logits of the target, where this part has it.
    pub teacher_target: f32,
    /// Likewise.
    pub student_target: f32,
    /// A token of the whole vocabulary, or -1: it is in another part, or the token is ignored.
    pub target: i32,
}

/// The sums of the second sweep over a part of a row. With p_j and q_j renormalised without the target, or plain over the
/// whole vocabulary, and the mixture m of the divergence:
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub struct AtkdSweepTerms {
    /// A mixture: sum p_j log2(p_j / m_j). Total variation: sum |p_j - q_j|.
    pub teacher: f32,
    /// A mixture: sum q_j log2(q_j / m_j). Total variation: sum q_j sign(q_j - p_j).
    pub student: f32,
    /// A mixture whose KL divergences are skewed: sum q_j (p_j - q_j) / m_j; else 0.
    pub slope: f32,
}

const _: () = {
    assert!(size_of::<AtkdRowState>() == size_of::<atkd::shards::RowState>());
    assert!(size_of::<AtkdSweepTerms>() == size_of::<atkd::shards::SweepTerms>());
};
