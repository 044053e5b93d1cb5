//! The stages of [`shards`](crate::shards), through the CUDA kernels.

use super::machine::Buffer;
use super::{Extra, Inputs, Simulation, Traffic, address, input, raw};
use crate::call::{RawLogits, RawOutput, RawShard, RawStates};
use crate::device::session::Launches;
use crate::device::shards;
use crate::device::workspace::{Layout, Memory};
use crate::shards::{RowState, SweepTerms};
use crate::{Batch, Logits, LogitsMut, Objective, Output, Result};

/// One rank's shard of the vocabulary.
#[derive(Clone, Copy, Debug)]
pub struct Shard<'a> {
    /// The teacher's logits of its columns, and the tokens' labels in the whole vocabulary. Sequences and margins are not
    /// used.
    pub batch: Batch<'a>,
    /// The student's logits of its columns.
    pub student: Logits<'a>,
    /// The shard has no columns: of the logits, the shape alone counts.
    pub empty: bool,
    /// The token of the vocabulary that the first column is about.
    pub first_column: usize,
    /// Tokens of the whole vocabulary.
    pub vocab: usize,
    /// The numbers of valid and of hard tokens that the reduction is over.
    pub counts: Option<[u32; 2]>,
    /// The inputs beside the batch.
    pub extra: Extra,
}

/// What all ranks have exchanged, `[ranks, N]`.
#[derive(Clone, Copy, Debug)]
pub struct Exchanged<'a> {
    /// The ranks.
    pub ranks: usize,
    /// The states.
    pub states: &'a [RowState],
    /// The terms of the second sweep, if there is one.
    pub terms: Option<&'a [SweepTerms]>,
}

impl Simulation {
    /// The first stage: the states of the shard's rows, and what was read and written. So do the other stages.
    ///
    /// # Errors
    /// As [`Kernels::shard_states_raw`](crate::cuda::Kernels::shard_states_raw), or if a kernel does what it must not. So do
    /// the other stages.
    pub fn shard_states(
        self,
        objective: &Objective,
        shard: &Shard,
    ) -> Result<(Vec<RowState>, Traffic)> {
        let mut to = poisoned(shard);
        let to_buffer = Buffer::output("own states", &mut to);
        let run = Run::new(self, shard, None, logits(shard).chain([to_buffer]));
        let of = &run.raw;
        let traffic = run
            .launch(|device, memory| shards::states(objective, of, address(&to), device, memory))?;
        Ok((to, traffic))
    }

    /// The teacher's margins.
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_margins(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<(Vec<f32>, Traffic)> {
        let mut to: Vec<f32> = poisoned(shard);
        let to_buffer = Buffer::output("margins to", &mut to);
        let run = Run::new(self, shard, Some(exchanged), [to_buffer]);
        let (of, states) = (&run.raw, run.states());
        let traffic = run.launch(|device, memory| {
            shards::margins(objective, of, &states, address(&to), device, memory)
        })?;
        Ok((to, traffic))
    }

    /// The terms of the second sweep.
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_terms(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<(Vec<SweepTerms>, Traffic)> {
        let mut to = poisoned(shard);
        let to_buffer = Buffer::output("own terms", &mut to);
        let run = Run::new(self, shard, Some(exchanged), logits(shard).chain([to_buffer]));
        let (of, states) = (&run.raw, run.states());
        let traffic = run.launch(|device, memory| {
            shards::terms(objective, of, &states, address(&to), device, memory)
        })?;
        Ok((to, traffic))
    }

    /// The gradient of the shard's columns.
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_gradient(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        gradient: &mut LogitsMut,
    ) -> Result<Traffic> {
        let view = gradient.as_logits();
        let to = Buffer { writable: true, ..input("gradient", view.elements()) };
        let run = Run::new(self, shard, Some(exchanged), logits(shard).chain([to]));
        run.gradient(objective, raw(view))
    }

    /// The same over the student's logits, instead of the shard's.
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states).
    pub fn shard_gradient_in_place(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        student: &mut LogitsMut,
    ) -> Result<Traffic> {
        let view = student.as_logits();
        let both = [
            input("teacher", shard.batch.teacher().elements()),
            Buffer { writable: true, ..input("student", view.elements()) },
        ];
        let mut run = Run::new(self, shard, Some(exchanged), both);
        run.raw.student = raw(view);
        run.gradient(objective, raw(view))
    }

    /// The last stage: the loss and the terms of all tokens.
    ///
    /// # Errors
    /// As [`shard_states`](Self::shard_states), or if a label is out of range.
    pub fn shard_finish(
        self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<(Output, Traffic)> {
        let run = Run::new(self, shard, Some(exchanged), []);
        let (of, states) = (&run.raw, run.states());
        let traffic = run.launch(|device, memory| {
            shards::finish(objective, of, &states, &RawOutput::default(), device, memory)
        })?;
        // SAFETY: so many bytes are there, all of them written.
        let bytes = unsafe {
            std::slice::from_raw_parts(run.workspace.as_ptr().cast::<u8>(), run.layout.bytes())
        };
        let output = run.layout.read(bytes, of.tokens, shard.vocab, objective)?;
        Ok((output, traffic))
    }
}

/// Memory for one value per token, which the kernels write.
fn poisoned<T: Copy>(shard: &Shard) -> Vec<T> {
    // SAFETY: they are plain numbers.
    let value = unsafe {
        let mut value = std::mem::MaybeUninit::<T>::uninit();
        value.as_mut_ptr().cast::<u8>().write_bytes(0xee, size_of::<T>());
        value.assume_init()
    };
    vec![value; shard.batch.teacher().tokens()]
}

fn logits(shard: &Shard) -> impl Iterator<Item = Buffer> + use<> {
    let of = [("teacher", shard.batch.teacher()), ("student", shard.student)];
    // Not one element of an empty shard may be read.
    let of = of.map(|(name, logits)| input(name, logits.elements()));
    of.into_iter().take(if shard.empty { 0 } else { 2 })
}

/// A stage with its memory.
struct Run<'a> {
    simulation: Simulation,
    raw: RawShard,
    exchanged: Option<Exchanged<'a>>,
    buffers: Vec<Buffer>,
    layout: Layout,
    workspace: Vec<u128>,
    /// The owners of what the addresses are of.
    _inputs: Inputs<'a>,
    _counts: Option<Box<[u32; 2]>>,
}

impl<'a> Run<'a> {
    fn new(
        simulation: Simulation,
        shard: &Shard<'a>,
        exchanged: Option<&Exchanged<'a>>,
        buffers: impl IntoIterator<Item = Buffer>,
    ) -> Self {
        let inputs = Inputs::new(&shard.batch, shard.extra);
        let counts = shard.counts.map(Box::new);
        let mut buffers: Vec<Buffer> = buffers.into_iter().collect();
        buffers.extend(inputs.buffers());
        buffers.extend(counts.iter().map(|counts| Buffer::input("counts", &counts[..])));
        if let Some(Exchanged { states, terms, .. }) = exchanged {
            buffers.push(Buffer::input("states", states));
            buffers.extend(terms.map(|terms| Buffer::input("terms", terms)));
        }
        let tokens = shard.batch.teacher().tokens();
        let layout = Layout { capacity: tokens };
        let workspace = simulation.workspace(layout, &mut buffers);
        let of = &inputs.tokens;
        let raw = RawShard {
            tokens,
            vocab: shard.vocab,
            first_column: shard.first_column,
            columns: if shard.empty { 0 } else { shard.student.vocab() },
            teacher: raw(shard.batch.teacher()),
            student: raw(shard.student),
            labels: of.labels,
            hard: of.hard,
            token_weights: of.token_weights,
            temperatures: of.temperatures,
            upstream: of.upstream,
            counts: counts.as_ref().map(|counts| address(&counts[..])),
        };
        Self {
            simulation,
            raw,
            exchanged: exchanged.copied(),
            buffers,
            layout,
            workspace,
            _inputs: inputs,
            _counts: counts,
        }
    }

    fn states(&self) -> RawStates {
        let Exchanged { ranks, states, terms } = self.exchanged.expect("the stage is given them");
        RawStates { states: address(states), terms: terms.map(address), ranks }
    }

    fn gradient(&self, objective: &Objective, gradient: RawLogits) -> Result<Traffic> {
        let (of, states) = (&self.raw, self.states());
        self.launch(|device, memory| {
            shards::gradient(objective, of, &states, gradient, 0, device, memory)
        })
    }

    fn launch(
        &self,
        launches: impl FnOnce(&crate::plan::DeviceProperties, Memory) -> Result<Launches>,
    ) -> Result<Traffic> {
        let memory = Memory::new(self.layout, address(&self.workspace));
        let mut traffic = Traffic::new();
        for launch in launches(&self.simulation.device, memory)? {
            let mut buffers = self.buffers.clone();
            self.simulation.launch(&launch, &mut buffers)?;
            traffic.push((launch.kernel, buffers));
        }
        Ok(traffic)
    }
}
