//! Calls whose vocabulary is in shards, of ranks that are simulated one after the other.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::ops::Range;

use atkd::battery::shards::{select, shard_of};
use atkd::shards::{Exchanged, RowState, Shard, SweepTerms};
use atkd::simt::{Extra, Simulation, Traffic};
use atkd::{Batch, Logits, LogitsMut, Objective, Output, Result};

/// The columns of each rank, in proportion to these widths.
pub fn columns(vocab: usize, widths: &[usize]) -> Vec<Range<usize>> {
    let all: usize = widths.iter().sum();
    let mut before = 0;
    let range = |width| {
        let start = vocab * before / all;
        before += width;
        start..vocab * before / all
    };
    widths.iter().map(range).collect()
}

/// The shards of a call.
pub struct Shards<'a> {
    pub simulation: Simulation,
    pub objective: &'a Objective,
    pub batch: Batch<'a>,
    pub student: Logits<'a>,
    pub columns: Vec<Range<usize>>,
    pub counts: Option<[usize; 2]>,
    pub extra: Extra,
}

/// The states and terms that the ranks have exchanged, and the traffic of each on the way.
#[derive(Default)]
pub struct Exchange {
    pub states: Vec<RowState>,
    pub terms: Option<Vec<SweepTerms>>,
    pub traffic: Vec<Traffic>,
}

impl Exchange {
    pub fn view(&self) -> Exchanged<'_> {
        let states = Exchanged::new(&self.states);
        self.terms.as_ref().map_or(states, |terms| states.with_terms(terms))
    }
}

impl<'a> Shards<'a> {
    pub fn new(
        simulation: Simulation,
        objective: &'a Objective,
        batch: &Batch<'a>,
        student: Logits<'a>,
        widths: &[usize],
    ) -> Self {
        let columns = columns(student.vocab(), widths);
        let (batch, counts, extra) = (*batch, None, Extra::default());
        Self { simulation, objective, batch, student, columns, counts, extra }
    }

    /// A rank's shard, with hard tokens or without.
    pub fn shard(&self, rank: usize, hard: Option<&'a [bool]>) -> Result<Shard<'a>> {
        let mut shard = shard_of(&self.batch, self.columns[rank].start)?;
        if let Some(hard) = hard {
            shard = shard.with_hard(hard)?;
        }
        if let Some([valid, hard]) = self.counts {
            shard = shard.with_counts(valid, hard);
        }
        Ok(shard)
    }

    /// Both models' logits of a rank's columns, if it has any.
    pub fn logits(&self, rank: usize) -> Option<[Logits<'a>; 2]> {
        let of = |logits: Logits<'a>| logits.columns(self.columns[rank].clone()).ok();
        Some([of(self.batch.teacher_logits().ok()?)?, of(self.student)?])
    }

    pub fn ranks(&self) -> Range<usize> {
        0..self.columns.len()
    }

    /// Both exchanges.
    pub fn exchange(&self) -> Result<Exchange> {
        let (mut all, tokens) = (Exchange::default(), self.student.tokens());
        for rank in self.ranks() {
            let (own, traffic) = match self.logits(rank) {
                None => (vec![RowState::EMPTY; tokens], Traffic::new()),
                Some([teacher, student]) => {
                    let shard = self.shard(rank, None)?;
                    self.simulation.shard_states(self.objective, &shard, teacher, student)?
                }
            };
            all.states.extend(own);
            all.traffic.push(traffic);
        }
        if self.objective.has_two_sweeps() {
            let mut terms = Vec::new();
            for rank in self.ranks() {
                let (own, traffic) = match self.logits(rank) {
                    None => (vec![SweepTerms::EMPTY; tokens], Traffic::new()),
                    Some([teacher, student]) => {
                        let (shard, view) = (self.shard(rank, None)?, all.view());
                        self.simulation.shard_terms(
                            self.objective,
                            &shard,
                            &view,
                            teacher,
                            student,
                        )?
                    }
                };
                terms.extend(own);
                all.traffic.push(traffic);
            }
            all.terms = Some(terms);
        }
        Ok(all)
    }

    /// The margins, which are every rank's to the bit.
    pub fn margins(&self, exchange: &Exchange) -> Result<Vec<f32>> {
        let of = |rank| {
            let (simulation, shard) = (self.simulation, self.shard(rank, None)?);
            Ok(simulation.shard_margins(self.objective, &shard, &exchange.view())?.0)
        };
        same(self.ranks().map(of), |margins: &Vec<f32>| {
            margins.iter().map(|margin| margin.to_bits()).collect::<Vec<_>>()
        })
    }

    /// The gradient of a rank's columns, to its part of the whole one.
    pub fn gradient(
        &self,
        rank: usize,
        exchange: &Exchange,
        hard: Option<&'a [bool]>,
        gradient: &mut LogitsMut,
    ) -> Result<Traffic> {
        let Some([teacher, student]) = self.logits(rank) else { return Ok(Traffic::new()) };
        let (shard, objective) = (self.shard(rank, hard)?, self.objective);
        let mut to = gradient.columns(self.columns[rank].clone())?;
        let view = exchange.view();
        self.simulation
            .shard_gradient(objective, &shard, &view, teacher, student, &mut to, self.extra)
    }

    /// The outcome, which is every rank's to the bit.
    pub fn finish(&self, exchange: &Exchange, hard: Option<&'a [bool]>) -> Result<Output> {
        let of = |rank| {
            let (simulation, shard) = (self.simulation, self.shard(rank, hard)?);
            Ok(simulation.shard_finish(self.objective, &shard, &exchange.view())?.0)
        };
        // They are compared as text, in which NaN equals NaN and every bit of a number tells.
        same(self.ranks().map(of), |output: &Output| format!("{output:?}"))
    }

    /// The whole call.
    pub fn run(&self, gradient: &mut LogitsMut) -> Result<Output> {
        let exchange = self.exchange()?;
        let hard = select(self.objective, &self.batch, &self.margins(&exchange)?)?;
        // It lives as long as the shards' other inputs.
        let hard: &'static [bool] = hard.leak();
        for rank in self.ranks() {
            self.gradient(rank, &exchange, Some(hard), gradient)?;
        }
        self.finish(&exchange, Some(hard))
    }
}

/// One of all ranks' results, which have the same bits.
fn same<T, B: PartialEq + std::fmt::Debug>(
    all: impl Iterator<Item = Result<T>>,
    bits: impl Fn(&T) -> B,
) -> Result<T> {
    let mut all = all.collect::<Result<Vec<_>>>()?;
    let first = bits(&all[0]);
    assert!(all.iter().all(|one| bits(one) == first), "ranks differ");
    Ok(all.swap_remove(0))
}
