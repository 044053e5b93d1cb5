//! The stages of a call on a shard of the vocabulary.

use atkd::call::{RawShard, RawStage, RawStates};
use atkd::cpu::raw;
use pyo3::prelude::*;

use super::{
    Labels, Matrix, Objective, Place, Sparse, device, exception, no_sparse_kernel, output_at,
    tell_hard, threads,
};

/// A shard by address, as `Shard` of `_native.py`, which says what each is.
#[derive(FromPyObject)]
pub struct Shard {
    tokens: usize,
    vocab: usize,
    first_column: usize,
    columns: usize,
    student: Matrix,
    teacher: Matrix,
    labels: Option<Labels>,
    hard: Option<u64>,
    token_weights: Option<u64>,
    temperatures: Option<u64>,
    scale: Option<u64>,
    counts: Option<u64>,
}

impl From<Shard> for RawShard {
    fn from(shard: Shard) -> Self {
        Self {
            tokens: shard.tokens,
            vocab: shard.vocab,
            first_column: shard.first_column,
            columns: shard.columns,
            teacher: shard.teacher.into(),
            student: shard.student.into(),
            labels: shard.labels.map(Into::into),
            hard: shard.hard,
            token_weights: shard.token_weights,
            temperatures: shard.temperatures,
            upstream: shard.scale,
            counts: shard.counts,
        }
    }
}

/// The address of the states of all ranks, and how many ranks there are.
type States = (u64, usize);

fn exchanged((states, ranks): States, terms: Option<u64>) -> RawStates {
    RawStates { states, terms, ranks }
}

fn run(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    stage: RawStage,
) -> PyResult<()> {
    let (objective, shard) = (&objective.0, shard.into());
    match place {
        Place::Host(threads) => {
            let pool = threads::pool(py, threads)?;
            // SAFETY: as for the loss.
            py.detach(|| unsafe { raw::shards::run(Some(&pool), objective, &shard, &stage) })
        }
        // SAFETY: as for the loss.
        Place::Device(queue, workspace) => {
            py.detach(|| unsafe { device::run_shard(queue, workspace, objective, &shard, &stage) })
        }
    }
    .map_err(exception)
}

/// The student's sums over what a sparse teacher does not know, `[tokens]`, to the address `to`.
#[pyfunction]
pub fn shard_rests(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    teacher: Sparse,
    to: u64,
) -> PyResult<()> {
    let (objective, shard, teacher) = (&objective.0, shard.into(), teacher.raw()?);
    let Place::Host(threads) = place else { return Err(no_sparse_kernel()) };
    let pool = threads::pool(py, threads)?;
    py.detach(|| {
        // SAFETY: as for the loss.
        unsafe { raw::shards::sparse_rests(Some(&pool), objective, &shard, &teacher, to) }
    })
    .map_err(exception)
}

/// A sparse teacher's logits of the shard's columns, float32 `[tokens, columns]`, to the address `to`.
#[pyfunction]
pub fn shard_teacher_logits(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    teacher: Sparse,
    rests: Option<States>,
    to: u64,
) -> PyResult<()> {
    let (objective, shard, teacher) = (&objective.0, shard.into(), teacher.raw()?);
    let Place::Host(threads) = place else { return Err(no_sparse_kernel()) };
    let pool = threads::pool(py, threads)?;
    py.detach(|| {
        // SAFETY: as for the loss.
        unsafe {
            raw::shards::sparse_teacher_logits(Some(&pool), objective, &shard, &teacher, rests, to)
        }
    })
    .map_err(exception)
}

/// The row states of the shard, `[tokens]`, to the address `to`.
#[pyfunction]
pub fn shard_states(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    to: u64,
) -> PyResult<()> {
    run(py, place, objective, shard, RawStage::States(to))
}

/// The teacher's margins, float32 `[tokens]`, to the address `to`.
#[pyfunction]
pub fn shard_margins(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    states: States,
    to: u64,
) -> PyResult<()> {
    run(py, place, objective, shard, RawStage::Margins(exchanged(states, None), to))
}

/// The terms of the second sweep over the shard, `[tokens]`, to the address `to`.
#[pyfunction]
pub fn shard_terms(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    states: States,
    to: u64,
) -> PyResult<()> {
    run(py, place, objective, shard, RawStage::Terms(exchanged(states, None), to))
}

/// The gradient of the shard's columns, and zeros for as many more as `gradient_padding` says.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a gradient follows from")]
pub fn shard_gradient(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    states: States,
    terms: Option<u64>,
    gradient: Matrix,
    gradient_padding: usize,
) -> PyResult<()> {
    let stage = RawStage::Gradient(exchanged(states, terms), gradient.into(), gradient_padding);
    run(py, place, objective, shard, stage)
}

/// The loss of the tokens, a float32 scalar, and their terms and groups as those of a call.
#[pyfunction]
#[expect(clippy::too_many_arguments, reason = "they are what a loss follows from, and its results")]
pub fn shard_loss(
    py: Python,
    place: Place,
    objective: &Objective,
    shard: Shard,
    states: States,
    terms: Option<u64>,
    loss: u64,
    columns: Option<u64>,
    groups: Option<u64>,
) -> PyResult<()> {
    let (tokens, on_host) = (shard.tokens, matches!(place, Place::Host(_)));
    let output = output_at(tokens, loss, columns, groups);
    run(py, place, objective, shard, RawStage::Finish(exchanged(states, terms), output))?;
    if on_host {
        // SAFETY: as for the loss; every byte was just written.
        unsafe { tell_hard(&output, tokens) };
    }
    Ok(())
}
