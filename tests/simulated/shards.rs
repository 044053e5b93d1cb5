//! Calls whose vocabulary is in shards, of ranks that are simulated one after the other.

#![allow(dead_code, reason = "each test binary uses a part")]

use std::ops::Range;

use atkd::shards::{RowState, SweepTerms};
use atkd::simt::{Exchanged, Extra, Shard, Simulation, Traffic};
use atkd::{
    Batch, Labels, Logits, LogitsMut, Objective, Output, Result, SelectionRule, select_hard,
};

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
    pub counts: Option<[u32; 2]>,
    pub extra: Extra,
}

/// What the ranks have exchanged, and the traffic of each on the way.
#[derive(Default)]
pub struct Exchange {
    pub ranks: usize,
    pub states: Vec<RowState>,
    pub terms: Option<Vec<SweepTerms>>,
    pub traffic: Vec<Traffic>,
}

impl Exchange {
    pub fn view(&self) -> Exchanged<'_> {
        Exchanged { ranks: self.ranks, states: &self.states, terms: self.terms.as_deref() }
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
        let range = self.columns[rank].clone();
        let (empty, first_column) = (range.is_empty(), range.start);
        let of =
            |logits: Logits<'a>| if empty { Ok(logits) } else { logits.columns(range.clone()) };
        let mut batch = match self.batch.labels() {
            Some(labels) => Batch::new(of(self.batch.teacher())?, labels)?,
            None => Batch::unlabelled(of(self.batch.teacher())?),
        };
        if let Some(weights) = self.batch.token_weights() {
            batch = batch.with_token_weights(weights)?;
        }
        if let Some(temperatures) = self.batch.temperatures() {
            batch = batch.with_temperatures(temperatures)?;
        }
        if let Some(hard) = hard {
            batch = batch.with_hard(hard)?;
        }
        Ok(Shard {
            batch,
            student: of(self.student)?,
            empty,
            first_column,
            vocab: self.student.vocab(),
            counts: self.counts,
            extra: self.extra,
        })
    }

    pub fn ranks(&self) -> Range<usize> {
        0..self.columns.len()
    }

    /// Both exchanges.
    pub fn exchange(&self) -> Result<Exchange> {
        let mut all = Exchange { ranks: self.columns.len(), ..Exchange::default() };
        for rank in self.ranks() {
            let (own, traffic) =
                self.simulation.shard_states(self.objective, &self.shard(rank, None)?)?;
            all.states.extend(own);
            all.traffic.push(traffic);
        }
        if self.objective.has_two_sweeps() {
            let mut terms = Vec::new();
            for rank in self.ranks() {
                let shard = self.shard(rank, None)?;
                let (own, traffic) =
                    self.simulation.shard_terms(self.objective, &shard, &all.view())?;
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

    /// The outcome, which is every rank's to the bit.
    pub fn finish(&self, exchange: &Exchange, hard: Option<&'a [bool]>) -> Result<Output> {
        let of = |rank| {
            let (simulation, shard) = (self.simulation, self.shard(rank, hard)?);
            Ok(simulation.shard_finish(self.objective, &shard, &exchange.view())?.0)
        };
        // As text, in which NaN equals NaN and every bit of a number tells.
        same(self.ranks().map(of), |output: &Output| format!("{output:?}"))
    }

    /// The hard tokens, by the batch's own mask or margins, else by those given.
    pub fn select(&self, margins: &[f32]) -> Result<Vec<bool>> {
        let (batch, objective) = (&self.batch, self.objective);
        if let Some(hard) = batch.hard() {
            return Ok(hard.to_vec());
        }
        let valid: Vec<bool> = (0..margins.len())
            .map(|token| {
                let label = batch.labels().map(|labels| match labels {
                    Labels::I64(labels) => labels[token],
                    Labels::I32(labels) => labels[token].into(),
                });
                label != Some(objective.ignore_index())
            })
            .collect();
        let margins = batch.margins().unwrap_or(margins);
        match objective.selection_rule() {
            SelectionRule::TopK => {
                select_hard(margins, Some(&valid), objective.hard_ratio(), batch.sequences())
            }
            SelectionRule::Median => Ok(by_median(margins, &valid, batch.sequences())),
        }
    }

    /// The whole call.
    pub fn run(&self, gradient: &mut LogitsMut) -> Result<Output> {
        let exchange = self.exchange()?;
        let hard = self.select(&self.margins(&exchange)?)?;
        // It lives as long as the shards' other inputs.
        let hard: &'static [bool] = hard.leak();
        for rank in self.ranks() {
            let (shard, range) = (self.shard(rank, Some(hard))?, self.columns[rank].clone());
            if !shard.empty {
                let mut gradient = gradient.columns(range)?;
                let (objective, exchanged) = (self.objective, exchange.view());
                self.simulation.shard_gradient(objective, &shard, &exchanged, &mut gradient)?;
            }
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

fn by_median(margins: &[f32], valid: &[bool], sequences: Option<&[usize]>) -> Vec<bool> {
    let all = [0, margins.len()];
    let mut hard = vec![false; margins.len()];
    for scope in sequences.unwrap_or(&all).windows(2) {
        // NaN is below every number.
        let rank = |token: usize| match margins[token] {
            margin if margin.is_nan() => (false, 0.0),
            margin => (true, margin + 0.0),
        };
        let compare = |a: usize, b: usize| {
            let (a, b) = (rank(a), rank(b));
            b.0.cmp(&a.0).then(b.1.total_cmp(&a.1))
        };
        let mut tokens: Vec<usize> = (scope[0]..scope[1]).filter(|&token| valid[token]).collect();
        tokens.sort_by(|&a, &b| compare(a, b));
        if let Some(&median) = tokens.get(tokens.len() / 2) {
            for token in tokens {
                hard[token] = compare(token, median).is_le();
            }
        }
    }
    hard
}
