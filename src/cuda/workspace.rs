use std::mem::offset_of;
use std::ops::Range;
use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{
    CudaContext, CudaSlice, CudaStream, CudaView, CudaViewMut, DevicePtr, DevicePtrMut,
    DeviceSlice, result,
};

use super::by_address::{clear_hard, clear_padding};
use super::kernels::Clock;
use super::shards::clear_shard_padding;
use super::tensor::context_of;
use super::{
    DeviceBatch, DeviceLabels, DeviceLogits, DeviceLogitsMut, DeviceTeacher, DeviceTokens, Kernels,
    driver,
};
use crate::batch::check_count;
use crate::call::{
    ENTROPIES, HARD_MASK, RawCall, RawEntropies, RawLogits, RawOutput, RawRows, RawSelection,
    RawShard, RawSparseCall, RawStage, RawTeacher, TEMPERATURES,
};
use crate::device::kernel::Launch;
use crate::device::stages::{Checked, launches, margins, selection};
use crate::device::workspace::{Layout, Memory, check_faults, read_summary};
use crate::device::{shards, sparse};
use crate::params::atkd_summary;
use crate::{Error, Objective, Output, Result, SelectionRule};

/// The results of a call, and the memory that it works in: the loss, every token's terms, its group. 33 bytes a
/// token and 100 KB, on the device; made once, used by one call after another.
#[derive(Debug)]
pub struct Workspace {
    kernels: Arc<Kernels>,
    pub(super) memory: CudaSlice<u8>,
    /// The address of the memory.
    address: u64,
    layout: Layout,
    /// The last call's facts, for those who read its results.
    last: Option<Last>,
    /// Before the first kernel of the last call, and after each.
    clock: Option<Clock>,
    /// A call in stages has begun and did not end yet. Its session ends it when it is dropped, unless that was leaked.
    in_stages: bool,
}

/// The bytes of a summary that say what kernels met.
const FAULTS: Range<usize> =
    offset_of!(atkd_summary, label_fault)..offset_of!(atkd_summary, loss_f32);
/// The bytes of its loss in single precision.
const LOSS: Range<usize> = offset_of!(atkd_summary, loss_f32)..offset_of!(atkd_summary, valid);
/// A number of such bytes is NaN.
const NAN_BYTE: u8 = 0xff;
/// The bytes of its counters.
const COUNTERS: Range<usize> = offset_of!(atkd_summary, valid)..size_of::<atkd_summary>();

#[derive(Clone, Copy, Debug)]
struct Last {
    objective: Objective,
    /// 0 if it failed.
    tokens: usize,
    vocab: usize,
    /// The driver refused one of its kernels, so that there are no results.
    failed: bool,
}

impl Workspace {
    /// Room for calls of up to `capacity` tokens.
    ///
    /// # Errors
    /// If the device has not so much memory.
    pub fn new(kernels: &Arc<Kernels>, stream: &Arc<CudaStream>, capacity: usize) -> Result<Self> {
        if capacity > i32::MAX as usize {
            let most = i32::MAX as usize;
            return Err(Error::TooLarge {
                what: "the workspace's capacity",
                value: capacity,
                most,
            });
        }
        same_context("the stream", kernels.context(), stream.context())?;
        let layout = Layout { capacity };
        let memory =
            stream.alloc_zeros(layout.bytes()).map_err(driver("allocating a workspace"))?;
        let (address, _) = memory.device_ptr(stream);
        let kernels = kernels.clone();
        Ok(Self { kernels, memory, address, layout, last: None, clock: None, in_stages: false })
    }

    /// The kernels that it works with.
    pub fn kernels(&self) -> &Arc<Kernels> {
        &self.kernels
    }

    /// How many tokens a call may have.
    pub fn capacity(&self) -> usize {
        self.layout.capacity
    }

    /// Makes room for calls of up to `capacity` tokens, where there is less. The loss of the last call stays, and with it
    /// what the next one predicts by; the terms of its tokens do not.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn reserve(&mut self, stream: &Arc<CudaStream>, capacity: usize) -> Result<()> {
        if capacity <= self.capacity() {
            return Ok(());
        }
        let mut larger = Self::new(&self.kernels, stream, capacity)?;
        let summary = ..size_of::<atkd_summary>();
        stream
            .memcpy_dtod(&self.memory.slice(summary), &mut larger.memory.slice_mut(summary))
            .map_err(driver("writing to a workspace"))?;
        larger.last = self.last.map(|last| Last { tokens: 0, ..last });
        larger.clock = self.clock.take();
        // The counters that a leaked session has left were copied too.
        larger.in_stages = self.in_stages;
        *self = larger;
        Ok(())
    }

    /// Enqueues the loss and each token's terms.
    ///
    /// # Errors
    /// If shapes, contexts or capacity do not fit, or the driver refuses.
    pub fn forward(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        batch: &DeviceBatch,
        student: &DeviceLogits,
    ) -> Result<()> {
        check_shape(batch.teacher.shape(), "the student's logits", student.shape)?;
        self.check_batch(stream, batch, &[("the student's logits", student.context())], None)?;
        let (student, _guard) = student.raw(stream);
        self.enqueue(stream, objective, batch, student, None, None)
    }

    /// Enqueues the loss, each token's terms and the gradient with respect to the student's logits.
    ///
    /// `gradient` is of the student's dtype or float32, or of any if the student's is float32; each element is rounded
    /// once from float32. Rows of ignored tokens become 0. `upstream`, one float32 on the device, multiplies the gradient
    /// beside the objective's own upstream gradient; if it is infinite or NaN, the gradient of every valid token is NaN.
    ///
    /// # Errors
    /// The errors are those of [`forward`](Self::forward), and one for a gradient of another dtype.
    pub fn forward_backward(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        batch: &DeviceBatch,
        student: &DeviceLogits,
        mut gradient: DeviceLogitsMut,
        upstream: Option<&CudaView<f32>>,
    ) -> Result<()> {
        check_shape(batch.teacher.shape(), "the student's logits", student.shape)?;
        check_shape(batch.teacher.shape(), "the gradient", gradient.shape)?;
        let others =
            [("the student's logits", student.context()), ("the gradient", gradient.context())];
        self.check_batch(stream, batch, &others, upstream)?;
        let (student, _student) = student.raw(stream);
        let padding = gradient.padding();
        let (gradient, _gradient) = gradient.raw(stream);
        self.enqueue(stream, objective, batch, student, Some((gradient, padding)), upstream)
    }

    /// Does what [`forward_backward`](Self::forward_backward) does, with the gradient over the student's logits.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_backward_in_place(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        batch: &DeviceBatch,
        mut student: DeviceLogitsMut,
        upstream: Option<&CudaView<f32>>,
    ) -> Result<()> {
        check_shape(batch.teacher.shape(), "the student's logits", student.shape)?;
        self.check_batch(stream, batch, &[("the student's logits", student.context())], upstream)?;
        let padding = student.padding();
        let (student, _guard) = student.raw(stream);
        self.enqueue(stream, objective, batch, student, Some((student, padding)), upstream)
    }

    fn check_batch(
        &self,
        stream: &Arc<CudaStream>,
        batch: &DeviceBatch,
        others: &[(&'static str, &CudaContext)],
        upstream: Option<&CudaView<f32>>,
    ) -> Result<()> {
        let others = others.iter().copied().chain(batch.teacher.contexts());
        self.check(stream, &batch.tokens, others, upstream)
    }

    /// Checks a call but for its shapes. This comes before any address is asked for: cudarc then
    /// makes the stream wait for earlier uses of the memory, and later records this one, which a stream
    /// of another context or in a capture refuses.
    pub(super) fn check<'a>(
        &'a self,
        stream: &Arc<CudaStream>,
        tokens: &'a DeviceTokens,
        others: impl IntoIterator<Item = (&'static str, &'a CudaContext)>,
        upstream: Option<&'a CudaView<f32>>,
    ) -> Result<()> {
        let others = others.into_iter().map(|(what, context)| (what, Some(context)));
        let upstream_context = [("the upstream gradient", upstream.map(context_of))];
        self.check_memory(stream, others.chain(tokens.contexts()).chain(upstream_context))?;
        match upstream.map(CudaView::len) {
            None | Some(1) => Ok(()),
            Some(actual) => Err(Error::Upstream { actual }),
        }
    }

    /// Checks that all memory of a call, and the workspace's, is of its context, and can be used on the stream.
    fn check_memory<'a>(
        &'a self,
        stream: &Arc<CudaStream>,
        parts: impl Iterator<Item = (&'static str, Option<&'a CudaContext>)>,
    ) -> Result<()> {
        self.check_context("the stream", stream.context())?;
        let workspace = ("the workspace", Some(&**self.memory.context()));
        for (what, context) in parts.chain([workspace]) {
            let Some(context) = context else { continue };
            self.check_context(what, context)?;
            if tracked_capture(stream, context)? {
                return Err(Error::TrackedCapture);
            }
        }
        Ok(())
    }

    fn enqueue(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        batch: &DeviceBatch,
        student: RawLogits,
        gradient: Option<(RawLogits, usize)>,
        upstream: Option<&CudaView<f32>>,
    ) -> Result<()> {
        let (tokens, _tokens) = batch.tokens.raw(upstream, stream);
        let (gradient, padding) = gradient.unzip();
        let gradient_padding = padding.unwrap_or(0);
        let teacher = match &batch.teacher {
            DeviceTeacher::Dense(teacher) => teacher,
            DeviceTeacher::Sparse(teacher) => {
                let (teacher, _teacher) = teacher.raw(stream);
                let call = RawSparseCall { tokens, teacher, student, gradient, gradient_padding };
                // SAFETY: see below.
                return unsafe {
                    self.launch_sparse(stream, objective, &call, &RawOutput::default())
                };
            }
        };
        let (teacher, _teacher) = teacher.raw(stream);
        let rows = RawRows { tokens: tokens.tokens, teacher, student, gradient, gradient_padding };
        let call = tokens.whole_call(&rows);
        // SAFETY: the views were checked to hold what the call says, and the guards above let the memory's
        // owners wait for the stream.
        unsafe { self.launch(stream, objective, &call, &RawOutput::default()) }
    }

    /// Enqueues a call on memory of other frameworks, by address. Its results are also written to where `output`
    /// wants them.
    ///
    /// # Errors
    /// If shapes, strides, alignments or capacity do not fit, memory overlaps, or the driver refuses.
    ///
    /// # Safety
    /// Every address is of device memory of this workspace's context that holds what [`RawCall`] says, and
    /// that nobody frees or writes until the stream is done with it; the outputs are such memory with room for the
    /// call's tokens, which nobody else uses until then. Calls that share this workspace run
    /// one after the other: on one stream, or on streams that wait for each other.
    pub unsafe fn launch(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawCall,
        output: &RawOutput,
    ) -> Result<()> {
        let checked = Checked::new(objective, call)?;
        let plan = self.kernels.plan(&checked.problem);
        let launches = launches(&checked, output, &plan, self.memory_at())?;
        // SAFETY: the caller's.
        unsafe { self.launch_call(stream, objective, call, launches) }
    }

    /// As [`launch`](Self::launch), with a teacher of which some log-probabilities per token are known.
    ///
    /// # Errors
    /// As [`launch`](Self::launch), or if the tail is one that the kernels do not have.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_sparse(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawSparseCall,
        output: &RawOutput,
    ) -> Result<()> {
        let device = self.kernels.device();
        let launches = sparse::launches(objective, call, output, &device, self.memory_at())?;
        // SAFETY: the caller's.
        unsafe { self.launch_call(stream, objective, &call.of_student(), launches) }
    }

    /// # Safety
    /// As [`launch`](Self::launch), of a call that is valid, and its launches.
    unsafe fn launch_call(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawCall,
        launches: impl IntoIterator<Item = Launch>,
    ) -> Result<()> {
        self.check_context("the stream", stream.context())?;
        let context = self.kernels.context();
        context.bind_to_thread().map_err(driver("using the context"))?;
        self.clear_after_stages(stream);
        // Orders this call and those on other streams; within a capture the caller does.
        let ordered = !tracked_capture(stream, self.memory.context())?;
        let guard = ordered.then(|| self.memory.device_ptr_mut(stream));
        // SAFETY: the caller vouches for the call's addresses, the layout for the workspace's.
        let launched = unsafe {
            clear_padding(stream, call)
                .and_then(|()| self.kernels.enqueue(stream, launches, self.clock.as_mut()))
        };
        let failed = launched.is_err();
        if failed {
            clear_counters(stream, self.address);
        }
        drop(guard);
        let tokens = if failed { 0 } else { call.tokens };
        self.last = Some(Last { objective: *objective, tokens, vocab: call.vocab, failed });
        launched
    }

    /// Begins a call in stages, which has no results until it ends.
    pub(super) fn begin_stages(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        vocab: usize,
    ) {
        self.clear_after_stages(stream);
        self.in_stages = true;
        self.last = Some(Last { objective: *objective, tokens: 0, vocab, failed: true });
        if let Some(clock) = &mut self.clock {
            clock.clear();
        }
    }

    /// Ends a call in stages about so many tokens.
    pub(super) fn end_stages(&mut self, tokens: usize) {
        self.in_stages = false;
        self.last = self.last.map(|last| Last { tokens, failed: false, ..last });
    }

    /// Makes the counters ready for the next call after one in stages that did not end.
    pub(super) fn clear_after_stages(&mut self, stream: &Arc<CudaStream>) {
        if !std::mem::take(&mut self.in_stages) {
            return;
        }
        let _ = self.kernels.context().bind_to_thread();
        let ordered = !tracked_capture(stream, self.memory.context()).unwrap_or(true);
        let address = self.address;
        let _guard = ordered.then(|| self.memory.device_ptr_mut(stream));
        clear_counters(stream, address);
    }

    /// Enqueues the teacher's margins, one per token, to `to`: as [`cpu::teacher_margins`](crate::cpu::teacher_margins).
    /// A label out of range leaves NaN there, and is an error of the next read. Of the batch, teacher, labels and temperatures
    /// are read alone. The terms that the last call left for its tokens are gone.
    ///
    /// # Errors
    /// If shapes, contexts or capacity do not fit, or the driver refuses.
    pub fn teacher_margins(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        batch: &DeviceBatch,
        mut to: CudaViewMut<f32>,
    ) -> Result<()> {
        let DeviceTeacher::Dense(teacher) = &batch.teacher else {
            return Err(Error::NoTeacherLogits);
        };
        let [tokens, vocab] = teacher.shape;
        if to.len() != tokens {
            return Err(Error::MarginCount { margins: to.len(), tokens });
        }
        let parts = [
            ("the teacher's logits", Some(teacher.context())),
            ("the labels", batch.tokens.labels.as_ref().map(DeviceLabels::context)),
            (TEMPERATURES, batch.tokens.temperatures.as_ref().map(context_of)),
            ("the margins", Some(&**to.stream().context())),
        ];
        self.check_memory(stream, parts.into_iter())?;
        let (teacher, _teacher) = teacher.raw(stream);
        let labels = batch.tokens.labels.as_ref().map(|labels| labels.raw(stream));
        let (to, _to) = to.device_ptr_mut(stream);
        let labels = labels.as_ref().map(|(labels, _)| *labels);
        let temperatures = batch.tokens.temperatures.as_ref().map(|own| own.device_ptr(stream));
        let temperatures = temperatures.as_ref().map(|(address, _)| *address);
        let teacher = RawTeacher { tokens, vocab, teacher, labels, temperatures };
        // SAFETY: the views were checked to hold what the call says, and the guards above let the memory's
        // owners wait for the stream.
        unsafe { self.launch_margins(stream, objective, &teacher, to) }
    }

    /// Enqueues a selection, one byte per token to `hard`, 1 for a hard token and 0 for the others: as
    /// [`select_hard`](crate::select_hard). `valid`, a byte per token, tells which tokens count: those that are not 0, and
    /// all without it. Offsets of `sequences` that are out of order select nothing in theirs, and are an error of the next
    /// read. The terms that the last call left for its tokens are gone.
    ///
    /// # Errors
    /// If the ratio is not in [0, 1], counts, contexts or capacity do not fit, or the driver refuses.
    pub fn select_hard(
        &mut self,
        stream: &Arc<CudaStream>,
        margins: &CudaView<f32>,
        valid: Option<&CudaView<u8>>,
        hard_ratio: f64,
        sequences: Option<&CudaView<i64>>,
        mut hard: CudaViewMut<u8>,
    ) -> Result<()> {
        let tokens = margins.len();
        if let Some(valid) = valid {
            check_count("valid", valid.len(), tokens)?;
        }
        check_count(HARD_MASK, hard.len(), tokens)?;
        if sequences.is_some_and(|offsets| offsets.is_empty()) {
            let reason = "there must be at least one";
            return Err(Error::Sequences { index: 0, offset: 0, tokens, reason });
        }
        let parts = [
            ("the margins", Some(context_of(margins))),
            ("valid", valid.map(context_of)),
            ("the sequences' offsets", sequences.map(context_of)),
            ("the mask of hard tokens", Some(&**hard.stream().context())),
        ];
        self.check_memory(stream, parts.into_iter())?;
        let (margins, _margins) = margins.device_ptr(stream);
        let valid = valid.map(|valid| valid.device_ptr(stream));
        let sequences = sequences.map(|offsets| (offsets.device_ptr(stream), offsets.len() - 1));
        let (hard, _hard) = hard.device_ptr_mut(stream);
        let selection = RawSelection {
            tokens,
            margins,
            valid: valid.as_ref().map(|(address, _)| *address),
            sequences: sequences.as_ref().map(|((address, _), count)| (*address, *count)),
            rule: SelectionRule::TopK,
            hard,
        };
        // SAFETY: as for the margins.
        unsafe { self.launch_selection(stream, &selection, hard_ratio) }
    }

    /// Enqueues the entropies of one model's distributions, one per token, to `to`: as
    /// [`cpu::token_entropies`](crate::cpu::token_entropies). The workspace's memory is not used.
    ///
    /// # Errors
    /// If the temperature is not in [1e-30, 1e30], counts or contexts do not fit, or the driver refuses.
    pub fn token_entropies(
        &self,
        stream: &Arc<CudaStream>,
        logits: &DeviceLogits,
        temperature: f64,
        mut to: CudaViewMut<f32>,
    ) -> Result<()> {
        let [tokens, vocab] = logits.shape;
        check_count(ENTROPIES, to.len(), tokens)?;
        let parts =
            [("the logits", Some(logits.context())), (ENTROPIES, Some(&**to.stream().context()))];
        self.check_memory(stream, parts.into_iter())?;
        let (logits, _logits) = logits.raw(stream);
        let (to, _to) = to.device_ptr_mut(stream);
        let of = RawEntropies { tokens, vocab, logits, temperature, to };
        // SAFETY: as for the margins.
        unsafe { self.kernels.token_entropies_raw(stream, &of) }
    }

    /// Does what [`teacher_margins`](Self::teacher_margins) does, by address.
    ///
    /// # Errors
    /// If shapes, strides, alignments or capacity do not fit, or the driver refuses.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_margins(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        teacher: &RawTeacher,
        to: u64,
    ) -> Result<()> {
        let launch = margins(objective, teacher, to, &self.kernels.device(), self.memory_at())?;
        let failed = self.last.is_some_and(|last| last.failed);
        let last = Last { objective: *objective, tokens: 0, vocab: teacher.vocab, failed };
        // SAFETY: the caller's.
        unsafe { self.launch_alone(stream, launch, last) }
    }

    /// Does what [`select_hard`](Self::select_hard) does, by address.
    ///
    /// # Errors
    /// If the ratio is not in [0, 1], alignments or capacity do not fit, or the driver refuses.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    pub unsafe fn launch_selection(
        &mut self,
        stream: &Arc<CudaStream>,
        from: &RawSelection,
        hard_ratio: f64,
    ) -> Result<()> {
        let launch = selection(from, hard_ratio, &self.kernels.device(), self.memory_at())?;
        self.check_context("the stream", stream.context())?;
        let context = self.kernels.context();
        context.bind_to_thread().map_err(driver("using the context"))?;
        // SAFETY: the caller's.
        unsafe { clear_hard(stream, from)? };
        let first = Last { objective: Objective::default(), tokens: 0, vocab: 1, failed: false };
        let last = Last { tokens: 0, ..self.last.unwrap_or(first) };
        // SAFETY: the caller's.
        unsafe { self.launch_alone(stream, launch, last) }
    }

    /// Enqueues a stage of a call on a shard, by address: see [`Kernels::launch_shard_raw`]. The last stage leaves results
    /// for [`read`](Self::read); what other calls have left there is gone after any.
    ///
    /// # Errors
    /// As there, or if the tokens exceed the workspace's capacity.
    ///
    /// # Safety
    /// As there, but for the workspace.
    pub unsafe fn launch_shard(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        stage: &RawStage,
    ) -> Result<()> {
        self.check_context("the stream", stream.context())?;
        let context = self.kernels.context();
        context.bind_to_thread().map_err(driver("using the context"))?;
        let device = self.kernels.device();
        let launches = shards::launches(objective, shard, stage, &device, self.memory_at())?;
        self.in_stages = false;
        let ordered = !tracked_capture(stream, self.memory.context())?;
        let guard = ordered.then(|| self.memory.device_ptr_mut(stream));
        // Not every stage that counts tokens ends a call, which would make the counters 0 again.
        clear_counters(stream, self.address);
        // SAFETY: the caller vouches for the addresses, the layout for the workspace's.
        let launched = unsafe {
            clear_shard_padding(stream, shard, stage)
                .and_then(|()| self.kernels.enqueue(stream, launches, self.clock.as_mut()))
        };
        drop(guard);
        self.in_stages = true;
        let failed = launched.is_err();
        let ended = matches!(stage, RawStage::Finish(..)) && !failed;
        let tokens = if ended { shard.tokens } else { 0 };
        self.last = Some(Last { objective: *objective, tokens, vocab: shard.vocab, failed });
        launched
    }

    /// A kernel that is no part of a call, and overwrites what the last one left for its tokens.
    ///
    /// # Safety
    /// As [`launch`](Self::launch).
    unsafe fn launch_alone(
        &mut self,
        stream: &Arc<CudaStream>,
        launch: Option<Launch>,
        last: Last,
    ) -> Result<()> {
        self.check_context("the stream", stream.context())?;
        let Some(launch) = launch else { return Ok(()) };
        let context = self.kernels.context();
        context.bind_to_thread().map_err(driver("using the context"))?;
        let ordered = !tracked_capture(stream, self.memory.context())?;
        let _guard = ordered.then(|| self.memory.device_ptr_mut(stream));
        self.last = Some(last);
        // SAFETY: the caller vouches for the addresses, the layout for the workspace's.
        unsafe { self.kernels.enqueue(stream, [launch], None) }
    }

    /// From now on, takes the time of every kernel, for [`times`](Self::times). Costs a few microseconds
    /// between kernels.
    pub fn take_times(&mut self) {
        self.clock.get_or_insert_default();
    }

    /// The kernels of the last call and the milliseconds that each took, if times were taken. Waits for
    /// the last of them.
    ///
    /// # Errors
    /// If the driver reports an error.
    pub fn times(&self) -> Result<Vec<(&'static str, f32)>> {
        let clock = self.clock.as_deref().unwrap_or_default();
        clock
            .windows(2)
            .map(|pair| {
                let (name, end) = &pair[1];
                Ok((*name, pair[0].1.elapsed_ms(end).map_err(driver("taking times"))?))
            })
            .collect()
    }

    /// Waits for the stream and returns the loss of the last call; 0 before the first.
    ///
    /// # Errors
    /// If a kernel met a label or an offset out of range, if the driver refused a kernel of the last call, so that there
    /// is no loss, or if it reports an error.
    pub fn read_loss(&mut self, stream: &Arc<CudaStream>) -> Result<f64> {
        let bytes = self.memory.slice(..size_of::<atkd_summary>());
        let memory = stream.clone_dtoh(&bytes).map_err(driver("reading the loss"))?;
        stream.synchronize().map_err(driver("waiting for the stream"))?;
        let summary = read_summary(&memory);
        if let Some(last) = self.last {
            self.cleared(stream, check_faults(&summary, last.vocab, &last.objective))?;
            last.check()?;
        }
        Ok(summary.loss)
    }

    /// Waits for the stream and returns the loss of the last call and the terms of its tokens.
    ///
    /// # Errors
    /// As [`read_loss`](Self::read_loss).
    pub fn read(&mut self, stream: &Arc<CudaStream>) -> Result<Output> {
        let Some(last) = self.last else { return Ok(Output { loss: 0.0, tokens: Vec::new() }) };
        let memory =
            stream.clone_dtoh(&self.memory).map_err(driver("reading the tokens' terms"))?;
        stream.synchronize().map_err(driver("waiting for the stream"))?;
        let output = self.layout.read(&memory, last.tokens, last.vocab, &last.objective);
        let output = self.cleared(stream, output)?;
        last.check()?;
        Ok(output)
    }

    /// A fault is reported once.
    fn cleared<T>(&mut self, stream: &Arc<CudaStream>, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.clear_faults(stream)?;
        }
        result
    }

    /// Enqueues the forgetting of faults that nobody has read.
    pub(crate) fn clear_faults(&mut self, stream: &Arc<CudaStream>) -> Result<()> {
        let mut faults = self.memory.slice_mut(FAULTS);
        stream.memset_zeros(&mut faults).map_err(driver("writing to a workspace"))
    }

    /// The loss of the last call, a float32 scalar on the device. NaN if that call, or one before, met a label or an
    /// offset out of range, and nobody had read that yet, or if the driver refused one of its kernels.
    pub fn loss(&self) -> CudaView<'_, f32> {
        self.column(self.layout.offsets().loss, 1)
    }

    /// The last call's uncertainties, one a token, on the device; 0 for ignored tokens. Empty, as are the others, if the
    /// driver refused one of its kernels.
    pub fn uncertainty(&self) -> CudaView<'_, f32> {
        self.column(self.layout.offsets().uncertainty, self.tokens())
    }

    /// The last call's TKD, as [`uncertainty`](Self::uncertainty).
    pub fn tkd(&self) -> CudaView<'_, f32> {
        self.column(self.layout.offsets().tkd, self.tokens())
    }

    /// The last call's DKD, as [`uncertainty`](Self::uncertainty).
    pub fn dkd(&self) -> CudaView<'_, f32> {
        self.column(self.layout.offsets().dkd, self.tokens())
    }

    /// The last call's losses of the tokens, before the reduction.
    pub fn token_losses(&self) -> CudaView<'_, f64> {
        self.column(self.layout.offsets().token_loss, self.tokens())
    }

    /// The last call's groups: the tokens that it ignored (0), took for easy (1) and for hard (2).
    pub fn groups(&self) -> CudaView<'_, u8> {
        self.column(self.layout.offsets().groups, self.tokens())
    }

    /// True if the last call has left a threshold by which the next one's hard tokens can be predicted.
    #[cfg(feature = "head")]
    pub(super) fn can_predict(&self) -> bool {
        self.last.is_some_and(|last| !last.failed && last.objective.depends_on_selection())
    }

    pub(super) fn memory_at(&self) -> Memory {
        Memory::new(self.layout, self.address)
    }

    fn tokens(&self) -> usize {
        self.last.map_or(0, |last| last.tokens)
    }

    fn column<T>(&self, start: usize, elements: usize) -> CudaView<'_, T> {
        let bytes = self.memory.slice(start..start + elements * size_of::<T>());
        // SAFETY: the columns are aligned for their elements, plain numbers that are valid for any bits.
        unsafe { bytes.transmute(elements) }.expect("so many bytes were sliced")
    }

    fn check_context(&self, what: &'static str, context: &CudaContext) -> Result<()> {
        same_context(what, self.kernels.context(), context)
    }
}

impl Last {
    fn check(self) -> Result<()> {
        if self.failed { Err(Error::FailedCall) } else { Ok(()) }
    }
}

/// After a call whose last kernel did not run, which leaves the loss, and the counters at 0 for the next call. Faults stay
/// for whoever reads them. Where this fails, there is nothing to rescue: the context, or the capture, is gone.
fn clear_counters(stream: &CudaStream, workspace: u64) {
    for (bytes, value) in [(LOSS, NAN_BYTE), (COUNTERS, 0)] {
        let start = workspace + bytes.start as u64;
        // SAFETY: the bytes are of the workspace's summary.
        let _ = unsafe { result::memset_d8_async(start, value, bytes.len(), stream.cu_stream()) };
    }
}

/// Returns whether a stream is in a capture while the context tracks the use of its memory. cudarc's events of
/// earlier work cannot be waited for there; trying ends the capture.
pub(super) fn tracked_capture(stream: &CudaStream, context: &CudaContext) -> Result<bool> {
    if !context.is_managing_stream_synchronization() {
        return Ok(false);
    }
    let status = stream.capture_status().map_err(driver("asking for the stream's state"))?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

fn same_context(what: &'static str, expected: &CudaContext, actual: &CudaContext) -> Result<()> {
    if expected.cu_ctx() == actual.cu_ctx() {
        return Ok(());
    }
    Err(Error::OtherContext { what, expected: expected.ordinal(), actual: actual.ordinal() })
}

pub(super) fn check_shape(
    expected: [usize; 2],
    what: &'static str,
    actual: [usize; 2],
) -> Result<()> {
    if actual == expected { Ok(()) } else { Err(Error::ShapeMismatch { what, expected, actual }) }
}
