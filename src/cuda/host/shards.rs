//! The stages of shards from and to host memory: everything is copied to the device and back.

use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr};

use super::upload;
use crate::battery::shards::Stages;
use crate::call::{RawLabels, RawLogits, RawOutput, RawShard, RawStage, RawStates};
use crate::cuda::{Kernels, Workspace, driver};
use crate::shards::{Exchanged, RowState, Shard, SweepTerms};
use crate::{Dtype, Elements, ElementsMut, Labels, Logits, LogitsMut, Objective, Output, Result};

impl Stages for Arc<Kernels> {
    fn states(
        &self,
        objective: &Objective,
        shard: &Shard,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<RowState>> {
        let mut run = Run::new(self, shard, None, Some([teacher, student]))?;
        run.values(objective, RowState::EMPTY, |_, to| RawStage::States(to))
    }

    fn margins(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Vec<f32>> {
        Run::new(self, shard, Some(exchanged), None)?.values(objective, 0.0, RawStage::Margins)
    }

    fn terms(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
        teacher: Logits,
        student: Logits,
    ) -> Result<Vec<SweepTerms>> {
        let mut run = Run::new(self, shard, Some(exchanged), Some([teacher, student]))?;
        run.values(objective, SweepTerms::EMPTY, RawStage::Terms)
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
        let mut run = Run::new(self, shard, Some(exchanged), Some([teacher, student]))?;
        // The elements between the rows come back as they went.
        let copy = upload(&run.stream, bytes_of(gradient.as_logits().elements()))?;
        let to = raw(gradient.as_logits(), run.address(&copy));
        run.launch(objective, |exchanged| RawStage::Gradient(exchanged, to, 0))?;
        let to = match gradient.elements_mut() {
            ElementsMut::F32(to) => bytes_mut(to),
            ElementsMut::F16(to) => bytes_mut(to),
            ElementsMut::Bf16(to) => bytes_mut(to),
        };
        run.download(&copy, to)
    }

    fn finish(
        &self,
        objective: &Objective,
        shard: &Shard,
        exchanged: &Exchanged,
    ) -> Result<Output> {
        let mut run = Run::new(self, shard, Some(exchanged), None)?;
        run.launch(objective, |exchanged| RawStage::Finish(exchanged, RawOutput::default()))?;
        run.workspace.read(&run.stream)
    }
}

/// A stage with its memory on the device, all of which is used on one stream, and outlives what is enqueued there.
struct Run {
    stream: Arc<CudaStream>,
    workspace: Workspace,
    shard: RawShard,
    exchanged: RawStates,
    /// The memory that the addresses are of.
    copies: Vec<CudaSlice<u8>>,
}

impl Run {
    fn new(
        kernels: &Arc<Kernels>,
        shard: &Shard,
        exchanged: Option<&Exchanged>,
        logits: Option<[Logits; 2]>,
    ) -> Result<Self> {
        let (tokens, stream) = (shard.tokens(), kernels.context().default_stream());
        let workspace = Workspace::new(kernels, &stream, tokens)?;
        let nothing = RawLogits { address: 0, dtype: Dtype::F32, strides: 0.into() };
        let raw_shard = RawShard {
            tokens,
            vocab: shard.vocab(),
            first_column: shard.first_column(),
            columns: logits.map_or(0, |[teacher, _]| teacher.vocab()),
            teacher: nothing,
            student: nothing,
            labels: None,
            hard: None,
            token_weights: None,
            temperatures: None,
            upstream: None,
            counts: None,
        };
        let states = RawStates { states: 0, terms: None, ranks: 0 };
        let mut run =
            Self { stream, workspace, shard: raw_shard, exchanged: states, copies: Vec::new() };
        if let Some([teacher, student]) = logits {
            run.shard.teacher = raw(teacher, run.upload(bytes_of(teacher.elements()))?);
            run.shard.student = raw(student, run.upload(bytes_of(student.elements()))?);
        }
        run.shard.labels = match shard.labels() {
            None => None,
            Some(Labels::I64(labels)) => Some(RawLabels::I64(run.upload(bytes(labels))?)),
            Some(Labels::I32(labels)) => Some(RawLabels::I32(run.upload(bytes(labels))?)),
        };
        let hard: Option<Vec<u8>> =
            shard.hard().map(|hard| hard.iter().map(|&hard| hard.into()).collect());
        let counts = shard.given_counts().map(|counts| counts.map(|count| count as u32));
        let own = shard.settings();
        run.shard.hard = hard.map(|hard| run.upload(&hard)).transpose()?;
        run.shard.counts = counts.map(|counts| run.upload(bytes(&counts))).transpose()?;
        run.shard.token_weights = own.weights.map(|own| run.upload(bytes(own))).transpose()?;
        run.shard.temperatures = own.temperatures.map(|own| run.upload(bytes(own))).transpose()?;
        if let Some(exchanged) = exchanged {
            run.exchanged.states = run.upload(bytes(exchanged.states()))?;
            run.exchanged.terms =
                exchanged.terms().map(|terms| run.upload(bytes(terms))).transpose()?;
            run.exchanged.ranks = exchanged.states().len() / tokens.max(1);
        }
        Ok(run)
    }

    fn address(&self, copy: &CudaSlice<u8>) -> u64 {
        copy.device_ptr(&self.stream).0
    }

    fn upload(&mut self, from: &[u8]) -> Result<u64> {
        let copy = upload(&self.stream, from)?;
        let address = self.address(&copy);
        self.copies.push(copy);
        Ok(address)
    }

    fn download(&self, from: &CudaSlice<u8>, to: &mut [u8]) -> Result<()> {
        self.stream
            .memcpy_dtoh(&from.slice(..to.len()), to)
            .and_then(|()| self.stream.synchronize())
            .map_err(driver("copying from the device"))
    }

    fn launch(
        &mut self,
        objective: &Objective,
        stage: impl FnOnce(RawStates) -> RawStage,
    ) -> Result<()> {
        let stage = stage(self.exchanged);
        // SAFETY: the copies are of what the addresses say, and live until the stream is done.
        unsafe { self.workspace.launch_shard(&self.stream, objective, &self.shard, &stage) }
    }

    /// A stage that makes one value per token.
    fn values<T: Clone>(
        &mut self,
        objective: &Objective,
        value: T,
        stage: impl FnOnce(RawStates, u64) -> RawStage,
    ) -> Result<Vec<T>> {
        let mut values = vec![value; self.shard.tokens];
        let copy = upload(&self.stream, bytes(&values))?;
        let to = self.address(&copy);
        self.launch(objective, |exchanged| stage(exchanged, to))?;
        self.download(&copy, bytes_mut(&mut values))?;
        Ok(values)
    }
}

fn raw(logits: Logits, address: u64) -> RawLogits {
    RawLogits { address, dtype: logits.dtype(), strides: logits.strides() }
}

fn bytes_of(elements: Elements<'_>) -> &[u8] {
    match elements {
        Elements::F32(elements) => bytes(elements),
        Elements::F16(elements) => bytes(elements),
        Elements::Bf16(elements) => bytes(elements),
    }
}

/// The memory of numbers, or of structs of floats and integers without padding: all that is called with.
fn bytes<T>(of: &[T]) -> &[u8] {
    // SAFETY: every byte is initialised.
    unsafe { std::slice::from_raw_parts(of.as_ptr().cast(), size_of_val(of)) }
}

fn bytes_mut<T>(of: &mut [T]) -> &mut [u8] {
    // SAFETY: every byte is initialised, and may be anything.
    unsafe { std::slice::from_raw_parts_mut(of.as_mut_ptr().cast(), size_of_val(of)) }
}
