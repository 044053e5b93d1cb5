//! A call in stages on a device: what the host remembers of each token, and the launches of each stage.

use std::ops::Range;

use super::kernel::Launch;
use super::stages::{Checked, Stages, check_sizes, problem};
use super::workspace::{Column, Memory};
use crate::call::{RawLogits, RawOutput, RawRows, RawTokens};
use crate::error::NO_GROUP_SIZES;
use crate::params::{ATKD_TARGET_TEACHER, atkd_summary};
use crate::plan::{DeviceProperties, Plan, Preference, Problem, Schedule, Stage};
use crate::{Error, Objective, Result, Target};

/// The launches of one stage, in order.
pub(crate) type Launches = Vec<Launch>;

/// A call in stages: see [`cuda::Session`](crate::cuda::Session). Its stages return the launches to make.
#[derive(Debug)]
pub(crate) struct Session {
    objective: Objective,
    tokens: RawTokens,
    device: DeviceProperties,
    preferred: Option<Preference>,
    memory: Memory,
    progress: Vec<Progress>,
    /// The hard tokens are known.
    selected: bool,
    /// Rows were launched since the exchanged states were cleared.
    states_used: bool,
}

/// The stages that a token is through.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Progress {
    Waiting,
    /// Its margin is known.
    Margin,
    /// Its rows were handed over, and need no repair.
    Done,
    /// Its gradient was written for the predicted group.
    Predicted,
    /// Its gradient was written for the other group.
    Mispredicted,
}

impl Session {
    /// The start, with the count of valid tokens and, where the caller has margins, the selection.
    ///
    /// # Errors
    /// If the addresses do not go together, or the tokens exceed the workspace.
    pub fn begin(
        objective: &Objective,
        tokens: &RawTokens,
        device: DeviceProperties,
        preferred: Option<Preference>,
        memory: Memory,
    ) -> Result<(Self, Launches)> {
        check_sizes(tokens.tokens, tokens.vocab)?;
        tokens.check(objective)?;
        memory.check(tokens.tokens)?;
        let mut session = Self {
            objective: *objective,
            tokens: *tokens,
            device,
            preferred,
            memory,
            progress: vec![Progress::Waiting; tokens.tokens],
            selected: tokens.hard.is_some(),
            states_used: false,
        };
        let stages = session.of_all(Schedule::Given);
        let mut launches: Launches =
            stages.launch(Stage::Count).unless_empty().into_iter().collect();
        if tokens.hard.is_none() && tokens.margins.is_some() {
            launches.extend(stages.launch(Stage::Select).unless_empty());
            session.selected = true;
        }
        Ok((session, launches))
    }

    /// The margins of the tokens from `first` on, of which there are `count`.
    pub fn margins(&mut self, first: usize, count: usize, teacher: RawLogits) -> Result<Launches> {
        let range = self.not_yet_done(first, count)?;
        let rows = RawRows::of_teacher(count, teacher);
        let memory = self.memory.starting_at(first);
        let stages = self.of_rows(first, &rows, memory, Schedule::SelectFirst, true)?;
        self.progress[range].fill(Progress::Margin);
        Ok(stages.launch(Stage::Margins).unless_empty().into_iter().collect())
    }

    /// The rows of the tokens from `first` on.
    pub fn rows(&mut self, first: usize, rows: &RawRows) -> Result<Launches> {
        let range = self.not_yet_done(first, rows.tokens)?;
        let predicts =
            !self.selected && rows.gradient.is_some() && self.objective.depends_on_selection();
        let schedule = if predicts { Schedule::PredictThenRepair } else { Schedule::Given };
        let have_margins = self.progress[range.clone()].iter().all(|&p| p == Progress::Margin);
        // The teacher's arg maxima are found by the pass that leaves the margins.
        let margin_pass = self.objective.target() == Target::Teacher && !have_margins;
        // Keys of margins that the caller gave have served: those of the rows are the teacher's own.
        let have_keys = (have_margins || margin_pass) && self.tokens.margins.is_none();
        let memory = self.memory.starting_at(first);
        let stages = self.of_rows(first, rows, memory, schedule, have_keys)?;
        if range.is_empty() {
            return Ok(Launches::new());
        }
        let scopes = stages.problem.scopes;
        let needs_sizes =
            rows.gradient.is_some() && self.objective.selects_before_gradients(scopes);
        if !self.selected && needs_sizes {
            return Err(Error::Stage { token: first, problem: NO_GROUP_SIZES });
        }
        let mut launches = Launches::new();
        if margin_pass {
            launches.push(stages.launch(Stage::Margins));
        }
        if self.states_used && stages.plan.row_kernel.needs_cleared_states() {
            launches.push(self.of_all(Schedule::Given).prepare(0, self.memory, false));
        }
        launches.push(stages.launch(Stage::Rows));
        self.states_used = true;
        self.progress[range].fill(if predicts { Progress::Predicted } else { Progress::Done });
        Ok(launches)
    }

    /// The selection. Also returns whether the tokens whose groups it changed are then to be read, for
    /// [`mispredict`](Self::mispredict).
    pub fn select(&mut self) -> Result<(Launches, bool)> {
        if self.selected {
            return Ok((Launches::new(), false));
        }
        self.check("has no margin yet", |progress| progress != Progress::Waiting)?;
        let predicted = self.progress.contains(&Progress::Predicted);
        let schedule = if predicted { Schedule::PredictThenRepair } else { Schedule::Given };
        (self.selected, self.states_used) = (true, false);
        let launch = self.of_all(schedule).launch(Stage::Select);
        Ok((launch.unless_empty().into_iter().collect(), predicted))
    }

    /// The addresses at which a selection leaves the tokens whose groups it changed: of the summary, and of their numbers,
    /// uint32 each.
    pub fn changed(&self) -> (u64, u64) {
        (self.memory.summary() as u64, self.memory.column(Column::Mispredicted))
    }

    /// How many these are.
    ///
    /// # Errors
    /// If the sequences' offsets are out of order.
    pub fn count_changed(&self, summary: &atkd_summary) -> Result<usize> {
        match summary.offset_fault {
            0 => Ok((summary.counted_mispredicted as usize).min(self.tokens.tokens)),
            fault => Err(Error::DeviceSequences { sequence: !fault }),
        }
    }

    /// Marks these tokens, of which those are to be repaired that have a gradient of the other group.
    pub fn mispredict(&mut self, changed: &[u32]) {
        for &token in changed {
            if let Some(progress @ Progress::Predicted) = self.progress.get_mut(token as usize) {
                *progress = Progress::Mispredicted;
            }
        }
    }

    /// The tokens that wait for their repair, in ascending order.
    pub fn mispredicted(&self) -> Vec<usize> {
        let progress = self.progress.iter().enumerate();
        progress.filter(|(_, p)| **p == Progress::Mispredicted).map(|(token, _)| token).collect()
    }

    /// The rows of mispredicted tokens again, in memory like a workspace for so many; as of the `other_group`, for which
    /// their gradients were written, they still wait for their repair. Also returns the address to which
    /// the tokens' numbers, uint32 each, are to be written before.
    pub fn repair(
        &mut self,
        tokens: &[usize],
        rows: &RawRows,
        scratch: u64,
        other_group: bool,
    ) -> Result<(Launches, u64)> {
        let count = tokens.len();
        if rows.tokens != count {
            let (what, vocab) = ("the teacher's logits", self.tokens.vocab);
            let (expected, actual) = ([count, vocab], [rows.tokens, vocab]);
            return Err(Error::ShapeMismatch { what, expected, actual });
        }
        if rows.gradient.is_none() {
            return Err(Error::Null { what: "the gradient", elements: count * self.tokens.vocab });
        }
        let mut sorted = tokens.to_vec();
        sorted.sort_unstable();
        let twice = sorted.windows(2).find(|pair| pair[0] == pair[1]).map(|pair| pair[0]);
        let right = |&token: &usize| self.progress.get(token) == Some(&Progress::Mispredicted);
        if let Some(token) = twice.or_else(|| sorted.into_iter().find(|token| !right(token))) {
            return Err(Error::Stage { token, problem: "needs no repair" });
        }
        let memory = self.memory.with_columns_of(scratch, count);
        let mut stages = self.of_rows(0, rows, memory, Schedule::Given, true)?;
        // The targets that were gathered, be they labels or arg maxima.
        stages.batch.target = ATKD_TARGET_TEACHER;
        if !stages.batch.token_weights.is_null() {
            stages.batch.token_weights = memory.column(Column::Keys) as *const f32;
        }
        if !stages.batch.temperatures.is_null() {
            stages.batch.temperatures = memory.column(Column::Mispredicted) as *const f32;
        }
        let numbers = memory.column(Column::Mispredicted);
        if count == 0 {
            return Ok((Launches::new(), numbers));
        }
        let prepare = self.of_all(Schedule::Given).prepare(count, memory, other_group);
        if !other_group {
            for &token in tokens {
                self.progress[token] = Progress::Done;
            }
        }
        self.states_used = true;
        Ok((vec![prepare, stages.launch(Stage::Rows)], numbers))
    }

    /// Logits in a row.
    #[cfg(feature = "cuda")]
    pub fn vocab(&self) -> usize {
        self.tokens.vocab
    }

    /// The end of the call, and the selection before it if that is missing.
    pub fn finish(&mut self, output: &RawOutput) -> Result<Launches> {
        output.check()?;
        self.check("was never handed over", |progress| {
            !matches!(progress, Progress::Waiting | Progress::Margin)
        })?;
        if !self.selected {
            self.check("waits for the selection", |progress| progress != Progress::Predicted)?;
        }
        self.check("waits for its repair", |progress| progress != Progress::Mispredicted)?;
        let (mut launches, _) = self.select()?;
        let mut stages = self.of_all(Schedule::Given);
        stages.output = *output;
        launches.push(stages.launch(Stage::Finish));
        Ok(launches)
    }

    /// The stages that are of all tokens, and read no logits.
    fn of_all(&self, schedule: Schedule) -> Stages {
        let call = self.tokens.call_without_logits();
        let problem = problem(&self.objective, &call);
        let plan = Plan { schedule, ..Plan::new(&self.device, &problem, self.preferred) };
        let checked = Checked { objective: &self.objective, call: &call, problem };
        Stages::new(&checked, &RawOutput::default(), &plan, self.memory)
    }

    /// The stages of rows, whose tokens' columns start where those of `memory` do; the labels are those from token
    /// `first` on.
    fn of_rows(
        &self,
        first: usize,
        rows: &RawRows,
        memory: Memory,
        schedule: Schedule,
        have_keys: bool,
    ) -> Result<Stages> {
        let call = self.tokens.call(first, rows);
        let checked = Checked::new(&self.objective, &call)?;
        // The plan of the whole call, which has the blocks of a row depend on how many rows there are. So has the size of
        // a group.
        let Problem { tokens, scopes, hard, .. } =
            problem(&self.objective, &self.tokens.call_without_logits());
        let problem = Problem { tokens, scopes, hard, ..checked.problem };
        let plan = Plan::new(&self.device, &problem, self.preferred).of_range(rows.tokens);
        let plan = Plan { schedule, margin_pass: have_keys, ..plan };
        let checked = Checked { problem, ..checked };
        Ok(Stages::new(&checked, &RawOutput::default(), &plan, memory))
    }

    /// The tokens from `first` on, whose rows were not handed over yet.
    fn not_yet_done(&self, first: usize, count: usize) -> Result<Range<usize>> {
        let tokens = self.tokens.tokens;
        let end = first.checked_add(count).filter(|&end| end <= tokens);
        let range = first..end.ok_or(Error::TokenRange { first, count, tokens })?;
        let undone =
            |token: &usize| matches!(self.progress[*token], Progress::Waiting | Progress::Margin);
        match range.clone().find(|token| !undone(token)) {
            Some(token) => Err(Error::Stage { token, problem: "was handed over before" }),
            None => Ok(range),
        }
    }

    /// That every token is as it must be for the next stage.
    fn check(&self, problem: &'static str, fine: impl Fn(Progress) -> bool) -> Result<()> {
        match self.progress.iter().position(|&progress| !fine(progress)) {
            Some(token) => Err(Error::Stage { token, problem }),
            None => Ok(()),
        }
    }
}
