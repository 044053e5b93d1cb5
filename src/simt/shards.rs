//! The stages of [`shards`](crate::shards), through the CUDA kernels.

use super::machine::Buffer;
use super::{Extra, Simulation, Traffic, address, input, labels, raw, raw_labels};
use crate::call::{RawLogits, RawOutput, RawShard, RawStage, RawStates};
use crate::device::shards::launches;
use crate::device::workspace::{Layout, Memory};
use crate::shards::{Exchanged, RowState, Shard, SweepTerms};
use crate::{Dtype, Logits, LogitsMut, Objective, Output, Result};

/// Each stage also returns what was read and written.
impl Simulation {
    /// See [`cpu::shards::states`](crate::cpu::shards::states). Labels are checked by the kernels alone, as on a GPU.
    ///
    /// # Errors
    /// As there, or if a kernel does what it must not. So do the other stages.
    pub fn shard_states(
        self,
        objective: &Objective,
        shard: &Shard,
        teacher: Logits,
        student: Logits,
    ) -> Result<(Vec<RowState>, Traffic)> {
        let run = Run::new(self, shard, None).with_logits(teacher, student);
        run.values(objective, "own states", |_, to| RawStage::States(to))
    }

    /// See [`cpu::shards::margins`](crate::cpu::shards::margins).
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_margins(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<(Vec<f32>, Traffic)> {
        Run::new(self, shard, Some(exchanged)).values(objective, "margins to", RawStage::Margins)
    }

    /// See [`cpu::shards::terms`](crate::cpu::shards::terms).
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_terms(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
    ) -> Result<(Vec<SweepTerms>, Traffic)> {
        let run = Run::new(self, shard, Some(exchanged)).with_logits(teacher, student);
        run.values(objective, "own terms", RawStage::Terms)
    }

    /// See [`cpu::shards::gradient`](fn@crate::cpu::shards::gradient).
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    #[expect(clippy::too_many_arguments, reason = "each is another thing of the stage")]
    pub fn shard_gradient(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
        gradient: &mut LogitsMut,
        extra: Extra,
    ) -> Result<Traffic> {
        let mut run = Run::new(self, shard, Some(exchanged)).with_logits(teacher, student);
        let upstream = extra.upstream.map(|upstream| vec![upstream]);
        run.raw.upstream = upstream.as_ref().map(|upstream| address(upstream));
        run.buffers.extend(upstream.iter().map(|upstream| Buffer::input("upstream", upstream)));
        run.gradient(objective, gradient)
    }

    /// See [`cpu::shards::gradient_in_place`](crate::cpu::shards::gradient_in_place).
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_gradient_in_place(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: &mut LogitsMut,
    ) -> Result<Traffic> {
        let mut run =
            Run::new(self, shard, Some(exchanged)).with_logits(teacher, student.as_logits());
        run.buffers.retain(|buffer| buffer.name != "student");
        run.gradient(objective, student)
    }

    /// See [`cpu::shards::finish`](crate::cpu::shards::finish).
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states), or if a label is out of range.
    pub fn shard_finish(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<(Output, Traffic)> {
        let mut run = Run::new(self, shard, Some(exchanged));
        let layout = run.layout;
        let traffic =
            run.launch(objective, |exchanged| RawStage::Finish(exchanged, RawOutput::default()))?;
        // SAFETY: so many bytes are there, all of them written.
        let bytes = unsafe {
            std::slice::from_raw_parts(run.workspace.as_ptr().cast::<u8>(), layout.bytes())
        };
        Ok((layout.read(bytes, shard.tokens(), shard.vocab(), objective)?, traffic))
    }
}

/// A stage with its memory.
struct Run {
    simulation: Simulation,
    raw: RawShard,
    exchanged: RawStates,
    buffers: Vec<Buffer>,
    layout: Layout,
    workspace: Vec<u128>,
    /// The memory that the shard's own address is of.
    _counts: Option<Box<[u32; 2]>>,
}

impl Run {
    fn new(simulation: Simulation, shard: &Shard, exchanged: Option<&Exchanged>) -> Self {
        let (tokens, own) = (shard.tokens(), shard.settings());
        let counts = shard.given_counts().map(|counts| Box::new(counts.map(|count| count as u32)));
        let nothing = RawLogits { address: 0, dtype: Dtype::F32, strides: 0.into() };
        let raw = RawShard {
            tokens,
            vocab: shard.vocab(),
            first_column: shard.first_column(),
            columns: 0,
            teacher: nothing,
            student: nothing,
            labels: shard.labels().map(raw_labels),
            hard: shard.hard().map(address),
            token_weights: own.weights.map(address),
            temperatures: own.temperatures.map(address),
            upstream: None,
            counts: counts.as_ref().map(|counts| address(&counts[..])),
        };
        let mut buffers: Vec<Buffer> = [
            shard.labels().map(labels),
            shard.hard().map(|hard| Buffer::input("hard", hard)),
            own.weights.map(|weights| Buffer::input("token weights", weights)),
            own.temperatures.map(|own| Buffer::input("temperatures", own)),
            counts.as_ref().map(|counts| Buffer::input("counts", &counts[..])),
        ]
        .into_iter()
        .flatten()
        .collect();
        let mut states = RawStates { states: 0, terms: None, ranks: 0 };
        if let Some(exchanged) = exchanged {
            states = RawStates {
                states: address(exchanged.states()),
                terms: exchanged.terms().map(address),
                ranks: exchanged.states().len() / tokens.max(1),
            };
            buffers.push(Buffer::input("states", exchanged.states()));
            buffers.extend(exchanged.terms().map(|terms| Buffer::input("terms", terms)));
        }
        let layout = Layout { capacity: tokens };
        let workspace = simulation.workspace(layout, &mut buffers);
        Self { simulation, raw, exchanged: states, buffers, layout, workspace, _counts: counts }
    }

    fn with_logits(mut self, teacher: Logits, student: Logits) -> Self {
        self.raw.columns = teacher.vocab();
        (self.raw.teacher, self.raw.student) = (raw(teacher), raw(student));
        self.buffers.push(input("teacher", teacher.elements()));
        self.buffers.push(input("student", student.elements()));
        self
    }

    /// A stage that makes one value per token, all of whose memory it writes.
    fn values<T: Copy>(
        mut self,
        objective: &Objective,
        name: &'static str,
        stage: impl FnOnce(RawStates, u64) -> RawStage,
    ) -> Result<(Vec<T>, Traffic)> {
        // SAFETY: they are plain numbers, which may have any bits.
        let poison = unsafe {
            let mut value = std::mem::MaybeUninit::<T>::uninit();
            value.as_mut_ptr().cast::<u8>().write_bytes(0xee, size_of::<T>());
            value.assume_init()
        };
        let mut values = vec![poison; self.raw.tokens];
        self.buffers.push(Buffer::output(name, &mut values));
        let to = address(&values);
        let traffic = self.launch(objective, |exchanged| stage(exchanged, to))?;
        Ok((values, traffic))
    }

    fn gradient(mut self, objective: &Objective, to: &mut LogitsMut) -> Result<Traffic> {
        let view = to.as_logits();
        let name =
            if raw(view).address == self.raw.student.address { "student" } else { "gradient" };
        self.buffers.push(Buffer { writable: true, ..input(name, view.elements()) });
        let to = raw(view);
        self.launch(objective, |exchanged| RawStage::Gradient(exchanged, to, 0))
    }

    fn launch(
        &mut self,
        objective: &Objective,
        stage: impl FnOnce(RawStates) -> RawStage,
    ) -> Result<Traffic> {
        let memory = Memory::new(self.layout, address(&self.workspace));
        let (simulation, stage) = (self.simulation, stage(self.exchanged));
        let mut traffic = Traffic::new();
        for launch in launches(objective, &self.raw, &stage, &simulation.device, memory)? {
            let mut buffers = self.buffers.clone();
            simulation.launch(&launch, &mut buffers)?;
            traffic.push((launch.kernel, buffers));
        }
        Ok(traffic)
    }
}

impl crate::battery::shards::Stages for Simulation {
    fn states(
        &self,
        objective: &Objective,
        shard: &Shard,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<RowState>> {
        Ok(self.shard_states(objective, shard, teacher, student)?.0)
    }

    fn margins(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Vec<f32>> {
        Ok(self.shard_margins(objective, shard, exchanged)?.0)
    }

    fn terms(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<SweepTerms>> {
        Ok(self.shard_terms(objective, shard, exchanged, teacher, student)?.0)
    }

    fn gradient(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
        mut gradient: LogitsMut,
    ) -> Result<()> {
        let extra = Extra::default();
        self.shard_gradient(objective, shard, exchanged, teacher, student, &mut gradient, extra)?;
        Ok(())
    }

    fn finish(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Output> {
        Ok(self.shard_finish(objective, shard, exchanged)?.0)
    }
}
