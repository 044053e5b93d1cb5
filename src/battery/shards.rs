//! A call on a vocabulary that is cut into shards: what ranks do, one after the other, with the exchange by hand.

use std::ops::Range;

use crate::cpu::shards as cpu;
use crate::shards::{Exchanged, RowState, Shard, SweepTerms};
use crate::{Batch, Labels, Logits, LogitsMut, Objective, Output, Result};

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
    let teacher = batch.teacher();
    let (tokens, vocab) = (teacher.tokens(), teacher.vocab());
    batch.check_shape("the student's logits", [student.tokens(), student.vocab()])?;
    let shards = columns(vocab, ranks).into_iter().map(|columns| {
        let shard = match batch.labels() {
            Some(labels) => Shard::new(labels, vocab, columns.start),
            None => Shard::unlabelled(tokens, vocab, columns.start),
        }?;
        let shard = batch.token_weights().map_or(Ok(shard), |w| shard.with_token_weights(w))?;
        let shard = batch.temperatures().map_or(Ok(shard), |t| shard.with_temperatures(t))?;
        Ok((shard, columns))
    });
    let mut shards = shards.collect::<Result<Vec<(Shard, Range<usize>)>>>()?;
    let mut states = Vec::with_capacity(ranks * tokens);
    for (shard, columns) in &shards {
        if columns.is_empty() {
            states.resize(states.len() + tokens, RowState::EMPTY);
        } else {
            let (teacher, student) =
                (teacher.columns(columns.clone())?, student.columns(columns.clone())?);
            states.extend(stages.states(objective, shard, teacher, student)?);
        }
    }
    let mut exchanged = Exchanged::new(&states);
    let margins = stages.margins(objective, &shards[0].0, &exchanged)?;
    let of_batch = batch.margins().unwrap_or(&margins);
    let valid = valid(objective, batch.labels(), tokens);
    let selected = match batch.hard() {
        Some(hard) => hard.to_vec(),
        None => objective.select_hard(of_batch, Some(&valid), batch.sequences())?,
    };
    for (shard, _) in &mut shards {
        *shard = shard.with_hard(&selected)?;
    }
    let mut terms = Vec::with_capacity(ranks * tokens);
    if objective.has_two_sweeps() {
        for (shard, columns) in &shards {
            if columns.is_empty() {
                terms.resize(terms.len() + tokens, SweepTerms::EMPTY);
            } else {
                let (teacher, student) =
                    (teacher.columns(columns.clone())?, student.columns(columns.clone())?);
                terms.extend(stages.terms(objective, shard, &exchanged, teacher, student)?);
            }
        }
        exchanged = exchanged.with_terms(&terms);
    }
    if let Some(gradient) = &mut gradient {
        for (shard, columns) in shards.iter().filter(|(_, columns)| !columns.is_empty()) {
            let (teacher, student) =
                (teacher.columns(columns.clone())?, student.columns(columns.clone())?);
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

/// The tokens that are not ignored.
fn valid(objective: &Objective, labels: Option<Labels>, tokens: usize) -> Vec<bool> {
    let ignored = objective.ignore_index();
    (0..tokens).map(|token| labels.is_none_or(|labels| labels.get(token) != ignored)).collect()
}
