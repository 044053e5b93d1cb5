//! The loss on host memory that is known by its address alone, for other languages and frameworks.
//!
//! ```
//! use atkd::call::{RawCall, RawLabels, RawLogits, RawOutput};
//! use atkd::cpu::raw;
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
//!     gradient_padding: 0,
//!     labels: Some(RawLabels::I64(labels.as_ptr() as u64)),
//!     sequences: None,
//!     margins: None,
//!     hard: None,
//!     token_weights: None,
//!     temperatures: None,
//!     upstream: None,
//! };
//! let mut loss = 0.0_f32;
//! let output = RawOutput { loss: Some(&raw mut loss as u64), ..RawOutput::default() };
//! // SAFETY: the addresses are of arrays of the shapes given.
//! unsafe { raw::run(None, &Objective::default(), &call, &output)? };
//! assert!(loss > 0.0);
//! # Ok::<(), atkd::Error>(())
//! ```

pub mod shards;

use rayon::ThreadPool;

use super::{Session, Workers};
use crate::call::{
    EASY, HARD, HARD_MASK, IGNORED, LOG_PROBS, RawCall, RawEntropies, RawLabels, RawLogits,
    RawOutput, RawRows, RawSelection, RawSparseCall, RawSparseTeacher, RawTeacher, RawTokens,
    TARGET_LOG_PROBS, TEMPERATURES, TOKEN_WEIGHTS,
};
use crate::{
    Batch, Dtype, Elements, Error, Labels, Logits, LogitsMut, Objective, Output, Result,
    SparseTeacher, Teacher, cpu, selection,
};

/// The loss on host memory: forward alone if the call has no gradient. The calling thread works, and all but
/// one of the threads of `pool`, or of rayon's current pool, if they are free: see [`cpu`] for that, and for forks.
///
/// # Errors
/// As [`cpu::forward_backward`]; and if an address is null or not aligned, or the gradient overlaps what it
/// is computed from without being the student's logits themselves. Nothing was written then.
///
/// # Safety
/// Every address is of what it is described to be: logits and gradient of `tokens` rows of `vocab` elements, the
/// gradient's with the padding announced, all of them initialised. Until the call returns nobody else writes to any of it, nor
/// reads what is written: gradient and outputs.
pub unsafe fn run(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    call: &RawCall,
    output: &RawOutput,
) -> Result<()> {
    call.check(objective)?;
    // SAFETY: the caller's.
    unsafe { run_checked(pool, objective, call, call.logits(call.teacher)?.into(), output) }
}

/// The loss with a sparse teacher, as [`run`].
///
/// # Errors
/// As there; and if a value of the teacher's is none that it may be. Nothing was written then.
///
/// # Safety
/// As [`run`].
pub unsafe fn run_sparse(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    call: &RawSparseCall,
    output: &RawOutput,
) -> Result<()> {
    call.check(objective)?;
    let of_student = call.of_student();
    // SAFETY: the caller's.
    unsafe {
        let teacher = call.teacher.of(&call.tokens)?;
        run_checked(pool, objective, &of_student, teacher.into(), output)
    }
}

/// # Safety
/// As [`run`], of a call that is valid but for its teacher's logits.
unsafe fn run_checked(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    call: &RawCall,
    teacher: Teacher,
    output: &RawOutput,
) -> Result<()> {
    output.check()?;
    // SAFETY: the caller's.
    let objective = unsafe { times_upstream(objective, call.upstream)? };
    let workers = Workers::of(pool);
    let (offsets, hard): (Vec<usize>, Vec<bool>);
    // SAFETY: the caller's, for as long as this function runs. What is borrowed mutably overlaps nothing
    // else: checked for the logits, and the caller's word for the rest.
    let result = unsafe {
        let mut batch = call.batch(teacher)?;
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
        if let Some(at) = call.token_weights {
            batch = batch.with_token_weights(slice(TOKEN_WEIGHTS, at, call.tokens)?)?;
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
    // SAFETY: the caller's.
    unsafe {
        call.clear_padding()?;
        write_output(&result, output);
    }
    Ok(())
}

/// Begins a call in stages: see [`Session`]. Threads as [`run`].
///
/// # Errors
/// The errors of [`Session::begin`]; and if an address is null or not aligned.
///
/// # Safety
/// The contract of [`run`] holds for the margins, the token weights and the temperatures until the session has ended, for
/// the rest until this returns.
pub unsafe fn begin<'a>(
    pool: Option<&'a ThreadPool>,
    objective: &Objective,
    tokens: &RawTokens,
) -> Result<Session<'a>> {
    tokens.check(objective)?;
    let RawTokens {
        tokens: count,
        vocab,
        labels,
        sequences,
        margins,
        hard,
        token_weights,
        temperatures,
        upstream,
    } = *tokens;
    // SAFETY: the caller's.
    unsafe {
        let objective = times_upstream(objective, upstream)?;
        let labels = labels.map(|labels| labels_at(labels, count)).transpose()?;
        let mut session = Session::by(Workers::of(pool), &objective, labels, count, vocab)?;
        if let Some(sequences) = sequences {
            session = session.with_sequences(offsets_at(sequences)?)?;
        }
        if let Some(at) = margins {
            session = session.with_margins(slice("the margins", at, count)?)?;
        }
        if let Some(at) = hard {
            session = session.with_hard(&bools_at(HARD_MASK, at, count)?)?;
        }
        if let Some(at) = token_weights {
            session = session.with_token_weights(slice(TOKEN_WEIGHTS, at, count)?)?;
        }
        if let Some(at) = temperatures {
            session = session.with_temperatures(slice(TEMPERATURES, at, count)?)?;
        }
        Ok(session)
    }
}

/// The margins of the `count` tokens from `first` on: see [`Session::margins`].
///
/// # Errors
/// As there; and if an address is null or not aligned.
///
/// # Safety
/// As [`run`].
pub unsafe fn margins(
    session: &mut Session,
    first: usize,
    count: usize,
    teacher: RawLogits,
) -> Result<()> {
    let rows = RawRows::of_teacher(count, teacher);
    let call = checked_call(session, &rows)?;
    // SAFETY: the caller's.
    session.margins(first, unsafe { call.logits(teacher)? })
}

/// The rows of the tokens from `first` on: see [`Session::rows`] and [`Session::rows_in_place`].
///
/// # Errors
/// As there; and if an address is null or not aligned, or the gradient overlaps what it is computed from without being
/// the student's logits themselves. Nothing was written then.
///
/// # Safety
/// As [`run`].
pub unsafe fn rows(session: &mut Session, first: usize, rows: &RawRows) -> Result<()> {
    let call = checked_call(session, rows)?;
    // SAFETY: the caller's.
    unsafe {
        let teacher = call.logits(rows.teacher)?;
        match rows.gradient {
            Some(gradient) if call.is_in_place() => {
                session.rows_in_place(first, teacher, call.logits_mut(gradient)?)
            }
            gradient => {
                let gradient = gradient.map(|gradient| call.logits_mut(gradient)).transpose()?;
                session.rows(first, teacher, call.logits(rows.student)?, gradient)
            }
        }?;
        call.clear_padding()
    }
}

/// The rows of mispredicted tokens again: see [`Session::repair`] and [`Session::repair_in_place`].
///
/// # Errors
/// As there, or if there is no gradient; and as [`rows`].
///
/// # Safety
/// As [`run`].
pub unsafe fn repair(session: &mut Session, tokens: &[usize], rows: &RawRows) -> Result<()> {
    let call = checked_call(session, rows)?;
    let Some(gradient) = rows.gradient else {
        let [_, vocab] = session.shape();
        let elements = rows.tokens * vocab;
        return Err(Error::Null { what: "the gradient", elements });
    };
    // SAFETY: the caller's.
    unsafe {
        let (teacher, gradient) = (call.logits(rows.teacher)?, call.logits_mut(gradient)?);
        if call.is_in_place() {
            session.repair_in_place(tokens, teacher, gradient)?;
        } else {
            session.repair(tokens, teacher, call.logits(rows.student)?, gradient)?;
        }
        call.clear_padding()
    }
}

/// Ends a call: see [`Session::finish`].
///
/// # Errors
/// As there; and if an address is not aligned.
///
/// # Safety
/// As [`run`].
pub unsafe fn finish(session: Session, output: &RawOutput) -> Result<()> {
    output.check()?;
    let result = session.finish()?;
    // SAFETY: the caller's.
    unsafe { write_output(&result, output) };
    Ok(())
}

/// The call about the rows of a stage.
fn checked_call(session: &Session, rows: &RawRows) -> Result<RawCall> {
    let [_, vocab] = session.shape();
    let call = rows.call(vocab);
    call.check_logits()?;
    Ok(call)
}

/// # Safety
/// Each has room for one number per token, the loss for one.
unsafe fn write_output(result: &Output, output: &RawOutput) {
    // SAFETY: the caller's.
    unsafe {
        if let Some(loss) = output.loss {
            (loss as *mut f32).write(result.loss as f32);
        }
        write(output.uncertainty, &result.tokens, |token| token.uncertainty as f32);
        write(output.tkd, &result.tokens, |token| token.tkd as f32);
        write(output.dkd, &result.tokens, |token| token.dkd as f32);
        write(output.token_loss, &result.tokens, |token| token.loss as f32);
        write(output.margin, &result.tokens, |token| token.margin as f32);
        write(output.groups, &result.tokens, |token| match (token.valid, token.hard) {
            (false, _) => IGNORED,
            (true, false) => EASY,
            (true, true) => HARD,
        });
    }
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
    let call = teacher.call();
    // SAFETY: the caller's, for as long as this function runs.
    let batch = unsafe { call.batch(call.logits(call.teacher)?.into())? };
    let margins = cpu::teacher_margins_by(Workers::of(pool), objective, &batch)?;
    // SAFETY: the caller says that there is room for one number per token.
    unsafe { write(Some(to), &margins, |&margin| margin) };
    Ok(())
}

/// A sparse teacher's margins, as [`teacher_margins`]. Of the tokens the labels count alone.
///
/// # Errors
/// As there; and if a value of the teacher's is none that it may be.
///
/// # Safety
/// As [`run`].
pub unsafe fn sparse_margins(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    tokens: &RawTokens,
    teacher: &RawSparseTeacher,
    to: u64,
) -> Result<()> {
    teacher.check_margins(objective, tokens, to)?;
    // SAFETY: the caller's, for as long as this function runs.
    let batch = unsafe {
        let teacher = teacher.of(tokens)?;
        match tokens.labels {
            Some(labels) => Batch::new(teacher, labels_at(labels, tokens.tokens)?)?,
            None => Batch::unlabelled(teacher),
        }
    };
    let margins = cpu::teacher_margins_by(Workers::of(pool), objective, &batch)?;
    // SAFETY: the caller says that there is room for one number per token.
    unsafe { write(Some(to), &margins, |&margin| margin) };
    Ok(())
}

/// The entropies of one model's distributions in host memory: see [`cpu::token_entropies`]. Threads as [`run`].
///
/// # Errors
/// As [`cpu::token_entropies`]; and if shape, strides and addresses do not go together. Nothing was written then.
///
/// # Safety
/// As [`run`].
pub unsafe fn token_entropies(pool: Option<&ThreadPool>, of: &RawEntropies) -> Result<()> {
    of.check()?;
    let RawLogits { address, dtype, strides } = of.logits;
    // SAFETY: the caller's, for as long as this function runs.
    let logits = unsafe { Logits::at(address as *const u8, dtype, of.tokens, of.vocab, strides)? };
    let entropies = cpu::token_entropies_by(Workers::of(pool), logits, of.temperature)?;
    // SAFETY: the caller says that there is room for one number per token.
    unsafe { write(Some(of.to), &entropies, |&entropy| entropy) };
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
    let RawSelection { tokens, margins, valid, sequences, rule, hard } = *selection;
    // SAFETY: the caller's, for as long as this function runs.
    let selected = unsafe {
        let margins = slice("the margins", margins, tokens)?;
        let valid = valid.map(|at| bools_at("valid", at, tokens)).transpose()?;
        let offsets = sequences.map(|sequences| offsets_at(sequences)).transpose()?;
        selection::select_hard_by(rule, margins, valid.as_deref(), hard_ratio, offsets.as_deref())?
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

impl RawSparseTeacher {
    /// The teacher of these tokens.
    ///
    /// # Safety
    /// As [`run`], for `'a`, of a call that is valid.
    unsafe fn of<'a>(&self, tokens: &RawTokens) -> Result<SparseTeacher<'a>> {
        // SAFETY: the caller's.
        unsafe { self.of_rows(tokens.tokens, tokens.vocab) }
    }

    /// The teacher of so many rows and a vocabulary of this size.
    ///
    /// # Safety
    /// As [`of`](Self::of).
    unsafe fn of_rows<'a>(&self, tokens: usize, vocab: usize) -> Result<SparseTeacher<'a>> {
        let Self { top_k, indices, log_probs, dtype, target_log_probs, target_rounding, tail } =
            *self;
        let entries = tokens * top_k;
        // SAFETY: the caller's.
        unsafe {
            let log_probs = match dtype {
                Dtype::F32 => Elements::F32(slice(LOG_PROBS, log_probs, entries)?),
                Dtype::F16 => Elements::F16(slice(LOG_PROBS, log_probs, entries)?),
                Dtype::Bf16 => Elements::Bf16(slice(LOG_PROBS, log_probs, entries)?),
            };
            let indices = labels_at(indices, entries)?;
            let teacher = SparseTeacher::new(indices, log_probs, tokens, top_k, vocab)?;
            let teacher = teacher.with_tail(tail).with_target_rounding(target_rounding);
            match target_log_probs {
                Some(at) => teacher.with_target_log_probs(slice(TARGET_LOG_PROBS, at, tokens)?),
                None => Ok(teacher),
            }
        }
    }
}

impl RawCall {
    /// The batch of this teacher and the labels.
    ///
    /// # Safety
    /// As [`run`], for `'a`, of a call that is valid.
    unsafe fn batch<'a>(&self, teacher: Teacher<'a>) -> Result<Batch<'a>> {
        // SAFETY: the caller's.
        unsafe {
            let batch = match self.labels {
                Some(labels) => Batch::new(teacher, labels_at(labels, self.tokens)?)?,
                None => Batch::unlabelled(teacher),
            };
            match self.temperatures {
                Some(at) => batch.with_temperatures(slice(TEMPERATURES, at, self.tokens)?),
                None => Ok(batch),
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

    /// Makes the gradient's padding 0.
    ///
    /// # Safety
    /// As [`run`], of a call that is valid.
    unsafe fn clear_padding(&self) -> Result<()> {
        let Some(RawLogits { address, dtype, strides }) = self.gradient else { return Ok(()) };
        if self.gradient_padding == 0 {
            return Ok(());
        }
        let columns = self.vocab + self.gradient_padding;
        // SAFETY: the caller's.
        let gradient =
            unsafe { LogitsMut::at(address as *mut u8, dtype, self.tokens, columns, strides)? };
        gradient.with_vocab(self.vocab).map(drop)
    }
}

/// The objective with the gradient of what comes after.
///
/// # Safety
/// One number is at the address, if there is one, unless it is null, and aligned.
unsafe fn times_upstream(objective: &Objective, upstream: Option<u64>) -> Result<Objective> {
    let Some(at) = upstream else { return Ok(*objective) };
    // SAFETY: the caller's.
    let upstream = unsafe { slice::<f32>("the upstream gradient", at, 1)?[0] };
    Ok(objective.times_upstream_gradient(upstream.into()))
}

/// # Safety
/// So many labels are at the address for `'a`, unless it is null, and aligned.
unsafe fn labels_at<'a>(labels: RawLabels, tokens: usize) -> Result<Labels<'a>> {
    // SAFETY: the caller's.
    unsafe {
        Ok(match labels {
            RawLabels::I64(at) => Labels::I64(slice("the labels", at, tokens)?),
            RawLabels::I32(at) => Labels::I32(slice("the labels", at, tokens)?),
        })
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
    use crate::{Dtype, Strides};

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
            gradient_padding: 0,
            labels: Some(RawLabels::I64(at(labels))),
            sequences: None,
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
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
        let mut terms = [[f32::NAN; TOKENS]; 5];
        let mut groups = [9_u8; TOKENS];
        let mut gradient = vec![f32::NAN; 15];
        let to = RawOutput {
            loss: Some(&raw mut loss as u64),
            uncertainty: Some(terms[0].as_mut_ptr() as u64),
            tkd: Some(terms[1].as_mut_ptr() as u64),
            dkd: Some(terms[2].as_mut_ptr() as u64),
            margin: Some(terms[3].as_mut_ptr() as u64),
            token_loss: Some(terms[4].as_mut_ptr() as u64),
            groups: Some(groups.as_mut_ptr() as u64),
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
            let expected = [token.uncertainty, token.tkd, token.dkd, token.margin, token.loss];
            let expected = expected.map(|term| term as f32);
            assert_eq!(terms.map(|column| column[i]), expected);
            assert_eq!((groups[i] != IGNORED, groups[i] == HARD), (token.valid, token.hard));
        }

        let mut in_place = student.clone();
        let place = RawLogits { address: in_place.as_mut_ptr() as u64, ..call.student };
        let call = RawCall { student: place, gradient: Some(place), ..call };
        // SAFETY: as before.
        unsafe { run(None, &objective, &call, &to)? };
        assert_eq!(in_place, gradient);
        Ok(())
    }

    /// Tokens whose group was predicted wrong are repaired in place.
    #[test]
    fn stages_come_to_the_bits_of_one_call() -> Result<()> {
        const TOKENS: usize = 40;
        let (teacher, student) = (random(1, TOKENS * VOCAB), random(2, TOKENS * VOCAB));
        let labels: Vec<i32> = (0..TOKENS as i32).map(|token| token % 6 - 1).collect();
        let objective = Objective::default().with_ignore_index(-1);
        let columns =
            || ([f32::NAN; 5 * TOKENS + 1], [9_u8; TOKENS], vec![f32::NAN; TOKENS * VOCAB]);
        let output = |floats: &mut [f32], groups: &mut [u8]| RawOutput {
            loss: Some(at(&floats[5 * TOKENS..])),
            uncertainty: Some(floats.as_mut_ptr() as u64),
            tkd: Some(at(&floats[TOKENS..])),
            dkd: Some(at(&floats[2 * TOKENS..])),
            margin: Some(at(&floats[3 * TOKENS..])),
            token_loss: Some(at(&floats[4 * TOKENS..])),
            groups: Some(groups.as_mut_ptr() as u64),
        };
        let tokens = RawTokens {
            tokens: TOKENS,
            vocab: VOCAB,
            labels: Some(RawLabels::I32(at(&labels))),
            sequences: Some((at(&[0_i64, 9, TOKENS as i64]), 2)),
            margins: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: Some(at(&[0.5_f32])),
        };
        let rows = |teacher: &[f32], student: &[f32], gradient: &mut [f32]| RawRows {
            tokens: teacher.len() / VOCAB,
            teacher: logits(teacher, VOCAB),
            student: logits(student, VOCAB),
            gradient: Some(logits(gradient, VOCAB)),
            gradient_padding: 0,
        };
        let (mut expected_floats, mut expected_groups, mut expected) = columns();
        let whole = tokens.whole_call(&rows(&teacher, &student, &mut expected));
        // SAFETY: all are arrays of the shapes given, as they are below.
        unsafe {
            run(None, &objective, &whole, &output(&mut expected_floats, &mut expected_groups))?;
        }

        for margins_first in [false, true] {
            let (mut floats, mut groups, mut gradient) = columns();
            // SAFETY: as above.
            unsafe {
                let mut session = begin(None, &objective, &tokens)?;
                let halves = [(TOKENS / 2, TOKENS / 2), (0, TOKENS / 2)];
                if margins_first {
                    for (first, count) in halves {
                        let teacher = logits(&teacher[first * VOCAB..], VOCAB);
                        margins(&mut session, first, count, teacher)?;
                    }
                    assert!(session.select()?.is_empty());
                }
                for (first, count) in halves {
                    let of = first * VOCAB..(first + count) * VOCAB;
                    let to = &mut gradient[of.clone()];
                    super::rows(
                        &mut session,
                        first,
                        &rows(&teacher[of.clone()], &student[of], to),
                    )?;
                }
                let mispredicted = session.select()?.to_vec();
                assert_eq!(mispredicted.is_empty(), margins_first);
                for token in mispredicted {
                    let of = token * VOCAB..(token + 1) * VOCAB;
                    let to = &mut gradient[of.clone()];
                    to.copy_from_slice(&student[of.clone()]);
                    let place = logits(to, VOCAB);
                    let again = RawRows { student: place, ..rows(&teacher[of], &[], to) };
                    repair(&mut session, &[token], &again)?;
                }
                finish(session, &output(&mut floats, &mut groups))?;
            }
            assert_eq!(floats.map(f32::to_bits), expected_floats.map(f32::to_bits));
            assert_eq!((groups, &gradient), (expected_groups, &expected));
        }
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
            rule: crate::SelectionRule::TopK,
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
        let of_teacher = RawTeacher {
            tokens,
            vocab,
            teacher: call.teacher,
            labels: call.labels,
            temperatures: None,
        };
        let objective = Objective::default();
        let [mut margins, mut in_call] = [[f32::NAN; TOKENS]; 2];
        let [mut hard, mut groups] = [[9_u8; TOKENS]; 2];
        let valid = [1_u8, 0, 255];
        let selection = RawSelection {
            rule: crate::SelectionRule::TopK,
            tokens,
            margins: margins.as_mut_ptr() as u64,
            valid: Some(valid.as_ptr() as u64),
            sequences: None,
            hard: hard.as_mut_ptr() as u64,
        };
        let to = RawOutput {
            margin: Some(in_call.as_mut_ptr() as u64),
            groups: Some(groups.as_mut_ptr() as u64),
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
        assert_eq!(hard, groups.map(|group| u8::from(group == HARD)));

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
            assert_eq!(groups, expected);
        }
        Ok(())
    }
}
