//! The stages of [`shards`](crate::shards) as launches.

use super::kernel::{Launch, Parameters, ShardKernel, of_shard};
use super::session::Launches;
#[cfg(feature = "nccl")]
use super::stages::rule;
use super::stages::{Checked, Stages, check_sizes, margin_pass, problem};
use super::workspace::Memory;
use crate::call::{
    MARGINS, ROW_STATES, RawLogits, RawOutput, RawShard, RawStage, RawStates, SWEEP_TERMS,
};
use crate::params::*;
use crate::plan::{self, DeviceProperties, LaunchShape, Plan, Stage};
use crate::{Error, Objective, Result, Target};

/// A shard whose sizes and addresses go together.
struct Shard<'a> {
    objective: &'a Objective,
    shard: &'a RawShard,
    exchanged: Option<&'a RawStates>,
    device: &'a DeviceProperties,
    /// The vocabulary of its batch is the whole one.
    stages: Stages,
}

/// The launches of a stage. Whoever has padding clears it.
///
/// # Errors
/// If sizes and addresses do not go together, the tokens exceed the workspace, or terms or hard tokens are needed and
/// missing.
pub(crate) fn launches(
    objective: &Objective,
    shard: &RawShard,
    stage: &RawStage,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    match stage {
        RawStage::States(to) => states(objective, shard, *to, device, memory),
        RawStage::Margins(exchanged, to) => {
            margins(objective, shard, exchanged, *to, device, memory)
        }
        RawStage::Terms(exchanged, to) => terms(objective, shard, exchanged, *to, device, memory),
        RawStage::Gradient(exchanged, to, padding) => {
            gradient(objective, shard, exchanged, *to, *padding, device, memory)
        }
        RawStage::Finish(exchanged, output) => {
            finish(objective, shard, exchanged, output, device, memory)
        }
    }
}

/// The states of a shard's rows, at `to`.
///
/// # Errors
/// If sizes and addresses do not go together, or the tokens exceed the workspace. So do the other stages.
fn states(
    objective: &Objective,
    shard: &RawShard,
    to: u64,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    let of = Shard::new(objective, shard, None, device, memory)?;
    shard.check_logits(None, 0)?;
    shard.check_output(ROW_STATES, to)?;
    let arg_max = objective.target() == Target::Teacher && shard.columns > 0;
    let launches = [
        arg_max.then(|| of.arg_max()),
        Some(of.rows(ShardKernel::States, |p| p.own_states = to as *mut atkd_row_state)),
    ];
    Ok(launches.into_iter().flatten().filter_map(Launch::unless_empty).collect())
}

/// The teacher's margins, from the states of all ranks.
fn margins(
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    to: u64,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    let of = Shard::new(objective, shard, Some(exchanged), device, memory)?;
    shard.check_output(MARGINS, to)?;
    Ok(of.merge(to, None).unless_empty().into_iter().collect())
}

/// The terms of the second sweep over a shard's rows.
///
/// # Errors
/// If the divergence has one sweep alone.
fn terms(
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    to: u64,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    if !objective.has_two_sweeps() {
        return Err(Error::NoSecondSweep);
    }
    let of = Shard::new(objective, shard, Some(exchanged), device, memory)?;
    shard.check_logits(None, 0)?;
    shard.check_output(SWEEP_TERMS, to)?;
    let launch = of.rows(ShardKernel::Terms, |p| p.own_terms = to as *mut atkd_sweep_terms);
    Ok(launch.unless_empty().into_iter().collect())
}

/// The gradient of a shard's columns. Whoever has padding clears it.
///
/// # Errors
/// If terms, or hard tokens, are needed and missing.
fn gradient(
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    gradient: RawLogits,
    gradient_padding: usize,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    let of =
        Shard::with_gradient(objective, shard, Some(exchanged), Some(gradient), device, memory)?;
    shard.check_logits(Some(gradient), gradient_padding)?;
    let terms = of.terms_and_groups()?;
    if shard.columns == 0 {
        return Ok(Launches::new());
    }
    let rows = of.rows(ShardKernel::Gradient, |p| p.terms = terms);
    Ok([of.count(), rows].into_iter().filter_map(Launch::unless_empty).collect())
}

/// The loss and the terms of all tokens, from what all ranks have exchanged.
///
/// # Errors
/// If terms, or hard tokens, are needed and missing.
fn finish(
    objective: &Objective,
    shard: &RawShard,
    exchanged: &RawStates,
    output: &RawOutput,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Launches> {
    let mut of = Shard::new(objective, shard, Some(exchanged), device, memory)?;
    output.check()?;
    let terms = of.terms_and_groups()?;
    of.stages.output = *output;
    let launches = [of.count(), of.merge(0, Some(terms)), of.stages.launch(Stage::Finish)];
    Ok(launches.into_iter().filter_map(Launch::unless_empty).collect())
}

/// The kernel that fills the workspace's column of groups, of which the ignored tokens' alone is 0.
#[cfg(feature = "nccl")]
pub(crate) fn valid_tokens(
    objective: &Objective,
    shard: &RawShard,
    device: &DeviceProperties,
    memory: Memory,
) -> Result<Option<Launch>> {
    let of = Shard::new(objective, shard, None, device, memory)?;
    Ok(of.count().unless_empty())
}

/// The selection among the tokens of all ranks, at the addresses of margins, of which of them count, and of the mask. The
/// numbers of those that count and of hard ones are left in the summary of the workspace, which is 0 before.
#[cfg(feature = "nccl")]
pub(crate) fn select_among_ranks(
    objective: &Objective,
    tokens: usize,
    [margins, valid, hard]: [u64; 3],
    device: &DeviceProperties,
    memory: Memory,
) -> Option<Launch> {
    let launch = Launch {
        kernel: "select_hard",
        shape: plan::select_hard(device, tokens, 1),
        parameters: Parameters::SelectHard(atkd_select_hard {
            batch: memory.batch(tokens),
            margins: margins as *const f32,
            valid: valid as *const u8,
            offsets: std::ptr::null(),
            mispredicted: std::ptr::null_mut(),
            states: memory.states(),
            kept_threshold: memory.kept_threshold(),
            hard_to: hard as *mut u8,
            hard_ratio: objective.hard_ratio(),
            scopes: 1,
            count: 1,
            rule: rule(objective.selection_rule()),
            reserved: 0,
        }),
    };
    launch.unless_empty()
}

impl<'a> Shard<'a> {
    fn new(
        objective: &'a Objective,
        shard: &'a RawShard,
        exchanged: Option<&'a RawStates>,
        device: &'a DeviceProperties,
        memory: Memory,
    ) -> Result<Self> {
        Self::with_gradient(objective, shard, exchanged, None, device, memory)
    }

    fn with_gradient(
        objective: &'a Objective,
        shard: &'a RawShard,
        exchanged: Option<&'a RawStates>,
        gradient: Option<RawLogits>,
        device: &'a DeviceProperties,
        memory: Memory,
    ) -> Result<Self> {
        check_sizes(shard.tokens, shard.vocab)?;
        shard.check(objective, exchanged)?;
        memory.check(shard.tokens)?;
        let call = shard.call(gradient, 0);
        let problem = problem(objective, &call);
        let plan = Plan::new(device, &problem, None);
        let checked = Checked { objective, call: &call, problem };
        let mut stages = Stages::new(&checked, &RawOutput::default(), &plan, memory);
        stages.batch.vocab = shard.vocab as u32;
        Ok(Self { objective, shard, exchanged, device, stages })
    }

    /// The terms that a divergence of two sweeps needs, null for others; checks that hard tokens are told where they matter.
    fn terms_and_groups(&self) -> Result<*const atkd_sweep_terms> {
        if self.shard.hard.is_none() && self.objective.depends_on_selection() {
            return Err(Error::NoHardTokens);
        }
        let terms = self.exchanged.and_then(|exchanged| exchanged.terms);
        match terms.filter(|_| self.objective.has_two_sweeps()) {
            None if self.objective.has_two_sweeps() => Err(Error::NoSweepTerms),
            terms => Ok(terms.unwrap_or(0) as *const atkd_sweep_terms),
        }
    }

    /// The teacher's arg max of every token among the shard's columns: ignored ones are told later.
    fn arg_max(&self) -> Launch {
        let Stages { batch, plan, .. } = &self.stages;
        let batch =
            atkd_batch { labels: std::ptr::null(), vocab: self.shard.columns as u32, ..*batch };
        margin_pass(&self.shard.call(None, 0), batch, plan, 0)
    }

    fn count(&self) -> Launch {
        self.stages.count_by(self.shard.counts.unwrap_or(0), true)
    }

    /// A kernel for the shard's rows.
    fn rows(&self, kernel: ShardKernel, with: impl FnOnce(&mut atkd_shard)) -> Launch {
        let shape = plan::shard_rows(self.device, self.shard.tokens, self.shard.columns);
        self.launch(kernel, shape, with)
    }

    /// The kernel that leaves what the loss follows from, and the teacher's margins at `margins` if that is not 0.
    fn merge(&self, margins: u64, terms: Option<*const atkd_sweep_terms>) -> Launch {
        let shape = plan::merge_states(self.device, self.shard.tokens);
        self.launch(ShardKernel::Merge, shape, |p| {
            p.margins = margins as *mut f32;
            p.terms = terms.unwrap_or(std::ptr::null());
            p.rows.write_keys = 1;
        })
    }

    fn launch(
        &self,
        kernel: ShardKernel,
        shape: LaunchShape,
        with: impl FnOnce(&mut atkd_shard),
    ) -> Launch {
        let RawShard { columns, first_column, vocab, .. } = *self.shard;
        let RawStates { states, ranks, .. } =
            self.exchanged.copied().unwrap_or(RawStates { states: 0, terms: None, ranks: 0 });
        let mut rows = self.stages.parameters_of_rows(shape);
        rows.batch.vocab = columns as u32;
        let mut parameters = atkd_shard {
            rows,
            own_states: std::ptr::null_mut(),
            own_terms: std::ptr::null_mut(),
            states: states as *const atkd_row_state,
            terms: std::ptr::null(),
            margins: std::ptr::null_mut(),
            ranks: ranks as u32,
            first_column: first_column as u32,
            whole_vocab: vocab as u32,
            blocks: shape.grid,
        };
        with(&mut parameters);
        let types = [self.shard.teacher.dtype, self.shard.student.dtype];
        Launch {
            kernel: of_shard(kernel, self.objective.divergence().family(), types),
            shape,
            parameters: Parameters::Shard(parameters),
        }
    }
}
