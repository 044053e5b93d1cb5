//! The stages of [`cpu::shards`](crate::cpu::shards) by address. Threads as [`raw::run`](super::run).

use rayon::ThreadPool;

use super::{
    HARD_MASK, TEMPERATURES, TOKEN_WEIGHTS, bools_at, labels_at, slice, times_upstream, write,
    write_output,
};
use crate::call::{
    MARGINS, ROW_STATES, RawLogits, RawOutput, RawShard, RawSparseTeacher, RawStage, RawStates,
    SWEEP_TERMS, check_alignment, check_there,
};
use crate::cpu::shards::{
    finish_by, gradient_by, margins_by, rests_by, states_by, teacher_logits_by, terms_by,
};
use crate::cpu::{StudentRow, Workers, into_rows};
use crate::shards::{Exchanged, RowRest, RowState, Shard, SweepTerms};
use crate::{Error, LogitsMut, Objective, Result, SparseTeacher};

/// A stage. Nothing but the gradient depends on the shard's upstream gradient.
///
/// # Errors
/// As the function of [`cpu::shards`](crate::cpu::shards) that the stage is; and if shape, strides and addresses do not go
/// together, or the gradient overlaps what it is computed from without being the student's logits themselves. Nothing was
/// written then.
///
/// # Safety
/// The contract of [`raw::run`](super::run) holds for the shard, what was exchanged and the result.
pub unsafe fn run(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    stage: &RawStage,
) -> Result<()> {
    // SAFETY: the caller's.
    unsafe {
        match stage {
            RawStage::States(to) => states(pool, objective, shard, *to),
            RawStage::Margins(exchanged, to) => margins(pool, objective, shard, exchanged, *to),
            RawStage::Terms(exchanged, to) => terms(pool, objective, shard, exchanged, *to),
            RawStage::Gradient(exchanged, to, padding) => {
                gradient(pool, objective, shard, exchanged, *to, *padding)
            }
            RawStage::Finish(exchanged, output) => {
                finish(pool, objective, shard, exchanged, output)
            }
        }
    }
}

/// The student's sums over what a sparse teacher does not know, to `to`, [`RowRest`] `[N]`: see
/// [`cpu::shards::rests`](crate::cpu::shards::rests). The shard's own teacher has the student's logits.
///
/// # Errors
/// As there, and as [`run`].
///
/// # Safety
/// As [`run`].
pub unsafe fn sparse_rests(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    teacher: &RawSparseTeacher,
    to: u64,
) -> Result<()> {
    shard.check_output(RESTS, to)?;
    // SAFETY: the caller's, for as long as this function runs.
    unsafe {
        let teacher = checked_teacher(objective, shard, teacher)?;
        if shard.columns == 0 {
            write(Some(to), &vec![(); shard.tokens], |()| RowRest::EMPTY);
            return Ok(());
        }
        let student = shard.call(None, 0).logits(shard.student)?;
        let view = shard.view(None)?;
        let rests = rests_by(Workers::of(pool), objective, &view, &teacher, student)?;
        write(Some(to), &rests, |&rest| rest);
    }
    Ok(())
}

/// A sparse teacher's logits of the shard's columns, to `to`, float32 `[N, columns]` without gaps: see
/// [`cpu::shards::teacher_logits`](crate::cpu::shards::teacher_logits). `rests` are the address of all ranks' sums
/// `[ranks, N]` and the number of ranks, `None` for a tail that needs none. The shard's own teacher has the student's logits.
///
/// # Errors
/// As there, and as [`run`].
///
/// # Safety
/// As [`run`].
pub unsafe fn sparse_teacher_logits(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    teacher: &RawSparseTeacher,
    rests: Option<(u64, usize)>,
    to: u64,
) -> Result<()> {
    let elements = shard.tokens.saturating_mul(shard.columns);
    check_alignment("the teacher's logits", to, 4)?;
    check_there("the teacher's logits", Some(to), elements)?;
    // SAFETY: the caller's, for as long as this function runs; nobody else knows the memory that is written.
    unsafe {
        let teacher = checked_teacher(objective, shard, teacher)?;
        if elements == 0 {
            return Ok(());
        }
        let rests = match rests {
            Some((address, ranks)) => slice(RESTS, address, ranks.saturating_mul(shard.tokens))?,
            None => &[],
        };
        let student = shard.call(None, 0).logits(shard.student)?;
        let to = std::slice::from_raw_parts_mut(to as *mut f32, elements);
        let (workers, view) = (Workers::of(pool), shard.view(None)?);
        teacher_logits_by(workers, objective, &view, &teacher, rests, student, to)
    }
}

const RESTS: &str = "the student's sums";

/// # Safety
/// As [`run`], for `'a`.
unsafe fn checked_teacher<'a>(
    objective: &Objective,
    shard: &RawShard,
    teacher: &RawSparseTeacher,
) -> Result<SparseTeacher<'a>> {
    shard.check(objective, None)?;
    teacher.check(shard.tokens)?;
    shard.check_logits(None, 0)?;
    // SAFETY: the caller's.
    unsafe { teacher.of_rows(shard.tokens, shard.vocab) }
}

/// # Safety
/// As [`run`].
unsafe fn states(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    to: u64,
) -> Result<()> {
    shard.check(objective, None)?;
    shard.check_output(ROW_STATES, to)?;
    shard.check_logits(None, 0)?;
    if shard.columns == 0 {
        // SAFETY: the caller says that there is room for one state per token.
        unsafe { write(Some(to), &vec![(); shard.tokens], |()| RowState::EMPTY) };
        return Ok(());
    }
    let call = shard.call(None, 0);
    // SAFETY: the caller's, for as long as this function runs.
    unsafe {
        let (teacher, student) = (call.logits(shard.teacher)?, call.logits(shard.student)?);
        let states = states_by(Workers::of(pool), objective, &shard.view(None)?, teacher, student)?;
        write(Some(to), &states, |&state| state);
    }
    Ok(())
}

/// # Safety
/// As [`run`].
unsafe fn margins(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    to: u64,
) -> Result<()> {
    shard.check(objective, Some(exchanged))?;
    shard.check_output(MARGINS, to)?;
    // SAFETY: the caller's, for as long as this function runs.
    unsafe {
        let exchanged = exchanged.view(shard.tokens)?;
        let margins = margins_by(Workers::of(pool), objective, &shard.view(None)?, &exchanged)?;
        write(Some(to), &margins, |&margin| margin);
    }
    Ok(())
}

/// # Safety
/// As [`run`].
unsafe fn terms(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    to: u64,
) -> Result<()> {
    shard.check(objective, Some(exchanged))?;
    shard.check_output(SWEEP_TERMS, to)?;
    if !objective.has_two_sweeps() {
        return Err(Error::NoSecondSweep);
    }
    shard.check_logits(None, 0)?;
    if shard.columns == 0 {
        // SAFETY: the caller says that there is room for one of them per token.
        unsafe { write(Some(to), &vec![(); shard.tokens], |()| SweepTerms::EMPTY) };
        return Ok(());
    }
    let (call, workers) = (shard.call(None, 0), Workers::of(pool));
    // SAFETY: the caller's, for as long as this function runs.
    unsafe {
        let (teacher, student) = (call.logits(shard.teacher)?, call.logits(shard.student)?);
        let (view, exchanged) = (shard.view(None)?, exchanged.view(shard.tokens)?);
        let terms = terms_by(workers, objective, &view, &exchanged, teacher, student)?;
        write(Some(to), &terms, |&terms| terms);
    }
    Ok(())
}

/// # Safety
/// As [`run`].
unsafe fn gradient(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    gradient: RawLogits,
    padding: usize,
) -> Result<()> {
    shard.check(objective, Some(exchanged))?;
    let workers = Workers::of(pool);
    // SAFETY: the caller's, for as long as this function runs. What is borrowed mutably overlaps nothing else: checked for
    // the logits, and the caller's word for the rest.
    unsafe {
        let objective = times_upstream(objective, shard.upstream)?;
        let hard = shard.hard.map(|at| bools_at(HARD_MASK, at, shard.tokens)).transpose()?;
        let (view, exchanged) = (shard.view(hard.as_deref())?, exchanged.view(shard.tokens)?);
        shard.check_logits(Some(gradient), padding)?;
        if shard.columns == 0 {
            if padding > 0 {
                let RawLogits { address, dtype, strides } = gradient;
                let address = address as *mut u8;
                let mut rows = LogitsMut::at(address, dtype, shard.tokens, padding, strides)?;
                rows.rows().into_iter().for_each(|mut row| row.fill_zero());
            }
            return Ok(());
        }
        let call = shard.call(Some(gradient), padding);
        let teacher = call.logits(shard.teacher)?;
        let mut to = call.logits_mut(gradient)?;
        let rows = if call.is_in_place() {
            to.rows().into_iter().map(StudentRow::InPlace).collect()
        } else {
            into_rows(call.logits(shard.student)?, Some(&mut to))?
        };
        gradient_by(workers, &objective, &view, &exchanged, teacher, rows)?;
        call.clear_padding()
    }
}

/// # Safety
/// As [`run`].
unsafe fn finish(
    pool: Option<&ThreadPool>,
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    output: &RawOutput,
) -> Result<()> {
    shard.check(objective, Some(exchanged))?;
    output.check()?;
    // SAFETY: the caller's, for as long as this function runs.
    unsafe {
        let hard = shard.hard.map(|at| bools_at(HARD_MASK, at, shard.tokens)).transpose()?;
        let (view, exchanged) = (shard.view(hard.as_deref())?, exchanged.view(shard.tokens)?);
        let result = finish_by(Workers::of(pool), objective, &view, &exchanged)?;
        write_output(&result, output);
    }
    Ok(())
}

impl RawShard {
    /// The shard, with the hard tokens given.
    ///
    /// # Safety
    /// As [`run`], for `'a`, of a shard that was checked.
    unsafe fn view<'a>(&self, hard: Option<&'a [bool]>) -> Result<Shard<'a>> {
        let Self { tokens, vocab, first_column, labels, .. } = *self;
        // SAFETY: the caller's.
        unsafe {
            let mut shard = match labels {
                Some(labels) => Shard::new(labels_at(labels, tokens)?, vocab, first_column)?,
                None => Shard::unlabelled(tokens, vocab, first_column)?,
            };
            if let Some(at) = self.token_weights {
                shard = shard.with_token_weights(slice(TOKEN_WEIGHTS, at, tokens)?)?;
            }
            if let Some(at) = self.temperatures {
                shard = shard.with_temperatures(slice(TEMPERATURES, at, tokens)?)?;
            }
            if let Some(at) = self.counts {
                let counts = slice::<u32>("the counts", at, 2)?;
                shard = shard.with_counts(counts[0] as usize, counts[1] as usize);
            }
            hard.map_or(Ok(shard), |hard| shard.with_hard(hard))
        }
    }
}

impl RawStates {
    /// # Safety
    /// As [`run`], for `'a`.
    unsafe fn view<'a>(&self, tokens: usize) -> Result<Exchanged<'a>> {
        let count = self.ranks.saturating_mul(tokens);
        // SAFETY: the caller's.
        unsafe {
            let exchanged = Exchanged::new(slice(ROW_STATES, self.states, count)?);
            match self.terms {
                Some(at) => Ok(exchanged.with_terms(slice(SWEEP_TERMS, at, count)?)),
                None => Ok(exchanged),
            }
        }
    }
}
