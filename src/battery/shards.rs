//! A call on a vocabulary that is cut into shards: what ranks do, one after the other, with the exchange by hand.

use std::ops::Range;

use crate::cpu::shards as cpu;
use crate::shards::{Exchanged, RowState, Shard, SweepTerms};
use crate::{Batch, Logits, LogitsMut, Objective, Output, Result};

/// The stages of a backend: see [`shards`](crate::shards).
pub trait Stages {
    /// See [`cpu::states`].
    ///
    /// # Errors
    /// As there.
    fn states(
        &self,
        objective: &Objective,
        shard: &Shard,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<RowState>>;

    /// See [`cpu::margins`].
    ///
    /// # Errors
    /// As there.
    fn margins(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Vec<f32>>;

    /// See [`cpu::terms`].
    ///
    /// # Errors
    /// As there.
    fn terms(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<SweepTerms>>;

    /// See [`cpu::gradient`](fn@cpu::gradient).
    ///
    /// # Errors
    /// As there.
    fn gradient(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
        gradient: LogitsMut,
    ) -> Result<()>;

    /// See [`cpu::finish`].
    ///
    /// # Errors
    /// As there.
    fn finish(&self, objective: &Objective, shard: &Shard, exchanged: &Exchanged)
    -> Result<Output>;
}

/// Those of [`cpu::shards`](crate::cpu::shards).
#[derive(Clone, Copy, Debug)]
pub struct Cpu;

impl Stages for Cpu {
    fn states(
        &self,
        objective: &Objective,
        shard: &Shard,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<RowState>> {
        cpu::states(objective, shard, teacher, student)
    }

    fn margins(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Vec<f32>> {
        cpu::margins(objective, shard, exchanged)
    }

    fn terms(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<SweepTerms>> {
        cpu::terms(objective, shard, exchanged, teacher, student)
    }

    fn gradient(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
        gradient: LogitsMut,
    ) -> Result<()> {
        cpu::gradient(objective, shard, exchanged, teacher, student, gradient)
    }

    fn finish(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Output> {
        cpu::finish(objective, shard, exchanged)
    }
}

/// The columns of each of so many ranks: uneven, in proportion to 1, 2, 0, 4, 5 and so on, so that the third is empty.
pub fn columns(vocab: usize, ranks: usize) -> Vec<Range<usize>> {
    let share = |rank: usize| if rank == 2 { 0 } else { rank + 1 };
    let before = |rank: usize| (0..rank).map(share).sum::<usize>();
    let start = |rank: usize| vocab * before(rank) / before(ranks);
    (0..ranks).map(|rank| start(rank)..start(rank + 1)).collect()
}

/// The loss, each token's terms, and the gradient if it is wanted, by so many ranks.
///
/// # Errors
/// As [`cpu::forward_backward`](crate::cpu::forward_backward).
///
/// # Panics
/// If there are no ranks, or those that must have the same bits do not.
pub fn in_shards(
    stages: &impl Stages,
    ranks: usize,
    objective: &Objective,
    batch: &Batch,
    student: Logits,
    mut gradient: Option<LogitsMut>,
) -> Result<Output> {
    let teacher = batch.teacher_logits()?;
    let (tokens, vocab) = (teacher.tokens(), teacher.vocab());
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    let part = |columns: &Range<usize>| {
        Ok((teacher.columns(columns.clone())?, student.columns(columns.clone())?))
    };
    let shards = columns(vocab, ranks)
        .into_iter()
        .map(|columns| Ok((shard_of(batch, columns.start)?, columns)));
    let mut shards = shards.collect::<Result<Vec<(Shard, Range<usize>)>>>()?;
    let mut states = Vec::with_capacity(ranks * tokens);
    for (shard, columns) in &shards {
        if columns.is_empty() {
            states.resize(states.len() + tokens, RowState::EMPTY);
        } else {
            let (teacher, student) = part(columns)?;
            states.extend(stages.states(objective, shard, teacher, student)?);
        }
    }
    let mut exchanged = Exchanged::new(&states);
    let margins = stages.margins(objective, &shards[0].0, &exchanged)?;
    let selected = select(objective, batch, &margins)?;
    for (shard, _) in &mut shards {
        *shard = shard.with_hard(&selected)?;
    }
    let mut terms = Vec::with_capacity(ranks * tokens);
    if objective.has_two_sweeps() {
        for (shard, columns) in &shards {
            if columns.is_empty() {
                terms.resize(terms.len() + tokens, SweepTerms::EMPTY);
            } else {
                let (teacher, student) = part(columns)?;
                terms.extend(stages.terms(objective, shard, &exchanged, teacher, student)?);
            }
        }
        exchanged = exchanged.with_terms(&terms);
    }
    if let Some(gradient) = &mut gradient {
        for (shard, columns) in shards.iter().filter(|(_, columns)| !columns.is_empty()) {
            let (teacher, student) = part(columns)?;
            let to = gradient.columns(columns.clone())?;
            stages.gradient(objective, shard, &exchanged, teacher, student, to)?;
        }
    }
    let mut outputs = shards.iter().map(|(shard, _)| stages.finish(objective, shard, &exchanged));
    let output = outputs.next().expect("there is a rank")?;
    for other in outputs {
        let (one, other) = (format!("{output:?}"), format!("{:?}", other?));
        assert_eq!(one, other, "ranks disagree");
    }
    Ok(output)
}

/// The shard of a batch from this column on, without hard tokens.
///
/// # Errors
/// As [`Shard::new`].
pub fn shard_of<'a>(batch: &Batch<'a>, first_column: usize) -> Result<Shard<'a>> {
    let (tokens, vocab) = (batch.teacher_logits()?.tokens(), batch.teacher_logits()?.vocab());
    let mut shard = match batch.labels() {
        Some(labels) => Shard::new(labels, vocab, first_column)?,
        None => Shard::unlabelled(tokens, vocab, first_column)?,
    };
    if let Some(weights) = batch.token_weights() {
        shard = shard.with_token_weights(weights)?;
    }
    if let Some(temperatures) = batch.temperatures() {
        shard = shard.with_temperatures(temperatures)?;
    }
    Ok(shard)
}

/// The hard tokens, by the batch's own mask or margins, else by those given.
///
/// # Errors
/// As [`Objective::select_hard`].
pub fn select(objective: &Objective, batch: &Batch, margins: &[f32]) -> Result<Vec<bool>> {
    if let Some(hard) = batch.hard() {
        return Ok(hard.to_vec());
    }
    let (labels, ignored) = (batch.labels(), objective.ignore_index());
    let is_valid = |token| labels.is_none_or(|labels| labels.get(token) != ignored);
    let valid: Vec<bool> = (0..margins.len()).map(is_valid).collect();
    objective.select_hard(batch.margins().unwrap_or(margins), Some(&valid), batch.sequences())
}
