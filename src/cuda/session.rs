//! A call in stages.

use std::sync::Arc;

use cudarc::driver::sys::CUstreamCaptureStatus;
use cudarc::driver::{CudaContext, CudaStream, CudaView, DevicePtr, DevicePtrMut, result};

use super::by_address::clear_padding;
use super::workspace::{check_shape, tracked_capture};
use super::{DeviceLogits, DeviceLogitsMut, DeviceTokens, Kernels, Workspace, driver};
use crate::call::{RawLogits, RawOutput, RawRows, RawTokens};
use crate::device::session::{self, Launches};
use crate::device::workspace::{Memory, read_summary};
use crate::params::atkd_summary;
use crate::{Error, Objective, Result};

/// A call in stages, by address: see [`Session`]. It works in a workspace of the caller's memory.
///
/// After an error of the driver, every further stage is one.
#[derive(Debug)]
pub struct RawSession {
    kernels: Arc<Kernels>,
    stream: Arc<CudaStream>,
    stages: session::Session,
    failed: bool,
}

impl Kernels {
    /// Begins a call in stages: enqueues the count of its valid tokens.
    ///
    /// # Errors
    /// As [`Workspace::launch`].
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw), of the addresses given here and in the later stages, until the stream is
    /// done with the last of them.
    pub unsafe fn begin_raw(
        self: &Arc<Self>,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        tokens: &RawTokens,
        workspace: u64,
    ) -> Result<RawSession> {
        let memory = self.memory_of(tokens.tokens, workspace);
        let (mut session, launches) = RawSession::begin(self, stream, objective, tokens, memory)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe {
            self.clear_summary(stream, workspace)?;
            session.enqueue(launches, None)?;
        }
        Ok(session)
    }
}

impl RawSession {
    fn begin(
        kernels: &Arc<Kernels>,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        tokens: &RawTokens,
        memory: Memory,
    ) -> Result<(Self, Launches)> {
        kernels.context().bind_to_thread().map_err(driver("using the context"))?;
        let (device, preferred) = (kernels.device(), kernels.preferred());
        let (stages, launches) =
            session::Session::begin(objective, tokens, device, preferred, memory)?;
        let (kernels, stream) = (kernels.clone(), stream.clone());
        Ok((Self { kernels, stream, stages, failed: false }, launches))
    }

    /// Enqueues the margins of the `count` tokens from `first` on: see [`Session::margins`].
    ///
    /// # Errors
    /// As [`Session::margins`].
    ///
    /// # Safety
    /// As [`Kernels::begin_raw`].
    pub unsafe fn margins(&mut self, first: usize, count: usize, teacher: RawLogits) -> Result<()> {
        let launches = self.stages.margins(first, count, teacher)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe { self.enqueue(launches, None) }
    }

    /// Enqueues the rows of the tokens from `first` on: see [`Session::rows`].
    ///
    /// # Errors
    /// As [`Session::rows`].
    ///
    /// # Safety
    /// As [`Kernels::begin_raw`].
    pub unsafe fn rows(&mut self, first: usize, rows: &RawRows) -> Result<()> {
        let launches = self.stages.rows(first, rows)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe { self.enqueue(launches, Some(rows)) }
    }

    /// Enqueues the selection and returns the mispredicted tokens: see [`Session::select`].
    ///
    /// # Errors
    /// As [`Session::select`].
    pub fn select(&mut self) -> Result<Vec<usize>> {
        let (launches, predicted) = self.stages.select()?;
        // SAFETY: whoever began vouches for all addresses.
        unsafe { self.enqueue(launches, None)? };
        if predicted {
            self.failed = true;
            let changed = self.changed()?;
            self.stages.mispredict(&changed);
            self.failed = false;
        }
        Ok(self.stages.mispredicted())
    }

    /// The tokens whose groups the selection changed. Waits for it.
    fn changed(&self) -> Result<Vec<u32>> {
        let (summary, tokens) = self.stages.changed();
        let mut memory = [0_u8; size_of::<atkd_summary>()];
        // SAFETY: the summary is so large.
        unsafe { self.read(&mut memory, summary)? };
        let mut changed = vec![0_u32; self.stages.count_changed(&read_summary(&memory))?];
        if !changed.is_empty() {
            // SAFETY: so many tokens are in that column.
            unsafe { self.read(&mut changed, tokens)? };
        }
        Ok(changed)
    }

    /// # Safety
    /// As many elements are at the address.
    unsafe fn read<T>(&self, to: &mut [T], from: u64) -> Result<()> {
        let reading = driver("reading the mispredicted tokens");
        // SAFETY: the caller's; the copy is there before this returns.
        unsafe { result::memcpy_dtoh_async(to, from, self.stream.cu_stream()) }
            .and_then(|()| self.stream.synchronize())
            .map_err(reading)
    }

    /// Enqueues the rows of mispredicted tokens again: see [`Session::repair`]. `scratch` is memory like a workspace, for
    /// so many tokens, which needs no preparation.
    ///
    /// # Errors
    /// As [`Session::repair`].
    ///
    /// # Safety
    /// As [`Kernels::begin_raw`].
    pub unsafe fn repair(&mut self, tokens: &[usize], rows: &RawRows, scratch: u64) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.again(tokens, rows, scratch, false) }
    }

    /// [`repair`](Self::repair), or before that the gradients of the other group, which the tokens were given.
    ///
    /// # Safety
    /// As of it.
    unsafe fn again(
        &mut self,
        tokens: &[usize],
        rows: &RawRows,
        scratch: u64,
        other_group: bool,
    ) -> Result<()> {
        self.kernels.context().bind_to_thread().map_err(driver("using the context"))?;
        let status =
            self.stream.capture_status().map_err(driver("asking for the stream's state"))?;
        if status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE {
            // A graph would read the host's numbers when it is launched, and they are gone by then.
            return Err(Error::CapturedRepair);
        }
        let (launches, numbers) = self.stages.repair(tokens, rows, scratch, other_group)?;
        if launches.is_empty() {
            return Ok(());
        }
        let of_tokens: Vec<u32> = tokens.iter().map(|&token| token as u32).collect();
        // SAFETY: the caller says that there is room. The driver takes pageable memory before it returns.
        let copied =
            unsafe { result::memcpy_htod_async(numbers, &of_tokens, self.stream.cu_stream()) };
        self.failed |= copied.is_err();
        copied.map_err(driver("writing the tokens to repair"))?;
        // SAFETY: the caller vouches for all addresses.
        unsafe { self.enqueue(launches, Some(rows)) }
    }

    /// Enqueues the end of the call, whose results are written to where `output` wants them: see [`Session::finish`].
    ///
    /// # Errors
    /// As [`Session::finish`].
    ///
    /// # Safety
    /// As [`Kernels::begin_raw`].
    pub unsafe fn finish(mut self, output: &RawOutput) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.end(output) }
    }

    /// # Safety
    /// As [`finish`](Self::finish).
    unsafe fn end(&mut self, output: &RawOutput) -> Result<()> {
        let launches = self.stages.finish(output)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe { self.enqueue(launches, None) }
    }

    /// Enqueues the launches of a stage, behind the clearing of what its rows have for padding.
    ///
    /// # Safety
    /// As [`Kernels::begin_raw`].
    unsafe fn enqueue(&mut self, launches: Launches, rows: Option<&RawRows>) -> Result<()> {
        if self.failed {
            return Err(Error::FailedCall);
        }
        self.failed = true;
        self.kernels.context().bind_to_thread().map_err(driver("using the context"))?;
        // SAFETY: the caller's.
        unsafe {
            if let Some(rows) = rows {
                clear_padding(&self.stream, &rows.call(self.stages.vocab()))?;
            }
            self.kernels.enqueue(&self.stream, launches, None)?;
        }
        self.failed = false;
        Ok(())
    }
}

/// A call in stages on a device: the batch is handed over in ranges of tokens, each with logits of its own, as
/// [`cpu::Session`](crate::cpu::Session) says. Begun by [`Workspace::begin`], where the results are after
/// [`finish`](Self::finish). Everything but [`select`](Self::select) returns when it is enqueued.
///
/// Loss, terms and gradients are those of one call to the bit, if the rows are done by the same kernel and the margins
/// found by the same pass. The kernel follows from the dtypes and from where rows start; each row is to start as far from
/// a multiple of 128 bytes as it does in the one call. The passes are the rows themselves, as in a call with the gradient
/// beside the logits, and that of [`margins`](Self::margins), as in a call in place or with sequences: they may round a
/// margin otherwise, and so decide otherwise between tokens whose margins are equal but for that.
///
/// Ignored tokens are known to the device alone: rows of all tokens are to be handed over. As on the CPU, rows with a
/// gradient of group means wait for a selection by the median or within sequences.
///
/// ```no_run
/// use atkd::Objective;
/// use atkd::cuda::cudarc::driver::CudaSlice;
/// use atkd::cuda::{self, DeviceLogits, DeviceLogitsMut, DeviceTokens, Kernels, Workspace};
///
/// # fn logits(of: &[usize]) -> (CudaSlice<half::bf16>, CudaSlice<half::bf16>) { unreachable!("the example is not run") }
/// # fn keep(of: &[usize], gradient: CudaSlice<half::bf16>) { unreachable!("the example is not run") }
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let context = cuda::context(0)?;
/// let stream = context.default_stream();
/// let (tokens, vocab, count) = (8192, 128_256, 1024);
/// let mut workspace = Workspace::new(&Kernels::load(&context)?, &stream, tokens)?;
/// let labels = stream.alloc_zeros::<i64>(tokens)?;
///
/// let of_batch = DeviceTokens::new(&labels, vocab);
/// let mut session = workspace.begin(&stream, &Objective::default(), of_batch, None)?;
/// for first in (0..tokens).step_by(count) {
///     let range: Vec<usize> = (first..first + count).collect();
///     let (teacher, mut student) = logits(&range);
///     let teacher = DeviceLogits::new(&teacher, count, vocab)?;
///     session.rows_in_place(first, &teacher, DeviceLogitsMut::new(&mut student, count, vocab)?)?;
///     keep(&range, student);
/// }
/// for again in session.select()?.chunks(count) {
///     let (teacher, mut student) = logits(again);
///     let teacher = DeviceLogits::new(&teacher, again.len(), vocab)?;
///     let rows = DeviceLogitsMut::new(&mut student, again.len(), vocab)?;
///     session.repair_in_place(again, &teacher, rows)?;
///     keep(again, student);
/// }
/// println!("loss {}", session.finish()?.read_loss(&stream)?);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Session<'a> {
    /// Until the call is finished.
    workspace: Option<&'a mut Workspace>,
    tokens: DeviceTokens<'a>,
    upstream: Option<CudaView<'a, f32>>,
    raw: RawSession,
}

impl Workspace {
    /// Begins a call in stages: enqueues the count of its valid tokens, and the selection if the margins are given.
    /// `upstream` is as in [`forward_backward`](Self::forward_backward).
    ///
    /// Times are not taken of such a call. If it is dropped before it is finished, this workspace has no results, as if
    /// the driver had refused the call.
    ///
    /// # Errors
    /// If labels are needed and missing, contexts or capacity do not fit, or the driver refuses.
    pub fn begin<'a>(
        &'a mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        tokens: DeviceTokens<'a>,
        upstream: Option<CudaView<'a, f32>>,
    ) -> Result<Session<'a>> {
        self.check(stream, &tokens, [], upstream.as_ref())?;
        let memory = self.memory_at();
        let (of_tokens, _) = tokens.raw(upstream.as_ref(), stream);
        let kernels = self.kernels().clone();
        let (raw, launches) = RawSession::begin(&kernels, stream, objective, &of_tokens, memory)?;
        self.begin_stages(stream, objective, tokens.shape[1]);
        let mut session = Session { workspace: Some(self), tokens, upstream, raw };
        // SAFETY: views are of memory as large as was checked, and the guards let its owners wait.
        session.stage(|raw| unsafe { raw.enqueue(launches, None) })?;
        Ok(session)
    }
}

/// Why a session has its workspace.
const UNFINISHED: &str = "a finished session is gone";

impl<'a> Session<'a> {
    /// Enqueues the margins of the tokens from `first` on, from the teacher's logits alone. After that of all tokens,
    /// [`select`](Self::select) needs no rows.
    ///
    /// # Errors
    /// If the shape or the contexts do not fit, rows of a token were handed over before, or the driver refuses.
    pub fn margins(&mut self, first: usize, teacher: &DeviceLogits) -> Result<()> {
        let [count, _] = self.check_shape(teacher)?;
        self.check([("the teacher's logits", teacher.context())])?;
        self.stage(|raw| {
            let stream = raw.stream.clone();
            let (teacher, _guard) = teacher.raw(&stream);
            // SAFETY: as in `Workspace::begin`.
            unsafe { raw.margins(first, count, teacher) }
        })
    }

    /// Enqueues the terms of the tokens from `first` on, and their gradient where one is wanted, in the student's dtype or
    /// float32, or in any if the student's is float32. Rows of ignored tokens become 0. All three have one shape
    /// `[range, vocab]`. As long as the hard tokens are not known, gradients are written for predicted ones.
    ///
    /// # Errors
    /// If shapes, contexts or dtypes do not fit, a token was handed over before, or the driver refuses.
    pub fn rows(
        &mut self,
        first: usize,
        teacher: &DeviceLogits,
        student: &DeviceLogits,
        gradient: Option<DeviceLogitsMut>,
    ) -> Result<()> {
        self.with_rows(teacher, student, gradient, |raw, rows| {
            // SAFETY: as in `Workspace::begin`.
            unsafe { raw.rows(first, rows) }
        })
    }

    /// Does what [`rows`](Self::rows) does, with the gradient written over the student's logits.
    ///
    /// # Errors
    /// As [`rows`](Self::rows).
    pub fn rows_in_place(
        &mut self,
        first: usize,
        teacher: &DeviceLogits,
        student: DeviceLogitsMut,
    ) -> Result<()> {
        self.with_rows_in_place(teacher, student, |raw, rows| {
            // SAFETY: as in `Workspace::begin`.
            unsafe { raw.rows(first, rows) }
        })
    }

    /// Selects the hard tokens and returns those whose gradients were written for the other group, in ascending order:
    /// none if the selection was known, or changes no gradient. Waits for the device where gradients were written for
    /// predicted tokens.
    ///
    /// # Errors
    /// If neither margins nor rows of a token were handed over, or the driver refuses.
    pub fn select(&mut self) -> Result<Vec<usize>> {
        self.check([])?;
        self.stage(RawSession::select)
    }

    /// Enqueues the right gradients of mispredicted tokens. Row `i` of all three is of token `tokens[i]`: any part of
    /// those that [`select`](Self::select) returned, in any order.
    ///
    /// # Errors
    /// If shapes, contexts or dtypes do not fit, a token needs no repair, or the driver refuses.
    pub fn repair(
        &mut self,
        tokens: &[usize],
        teacher: &DeviceLogits,
        student: &DeviceLogits,
        gradient: DeviceLogitsMut,
    ) -> Result<()> {
        self.with_rows(teacher, student, Some(gradient), |raw, rows| {
            repair(raw, tokens, rows, false)
        })
    }

    /// Does what [`repair`](Self::repair) does, with the gradient written over the student's logits.
    ///
    /// # Errors
    /// As [`repair`](Self::repair).
    pub fn repair_in_place(
        &mut self,
        tokens: &[usize],
        teacher: &DeviceLogits,
        student: DeviceLogitsMut,
    ) -> Result<()> {
        self.with_rows_in_place(teacher, student, |raw, rows| repair(raw, tokens, rows, false))
    }

    /// Enqueues the end of the call, and the selection if that is missing and changes no gradient. Returns the workspace,
    /// which has the results.
    ///
    /// # Errors
    /// If a token has not been through all of its stages, or the driver refuses.
    pub fn finish(mut self) -> Result<&'a mut Workspace> {
        self.check([])?;
        // SAFETY: no address is wanted.
        self.stage(|raw| unsafe { raw.end(&RawOutput::default()) })?;
        let workspace = self.workspace.take().expect(UNFINISHED);
        workspace.end_stages(self.tokens.shape[0]);
        Ok(workspace)
    }

    fn with_rows(
        &mut self,
        teacher: &DeviceLogits,
        student: &DeviceLogits,
        mut gradient: Option<DeviceLogitsMut>,
        stage: impl FnOnce(&mut RawSession, &RawRows) -> Result<()>,
    ) -> Result<()> {
        let shape = self.check_shape(teacher)?;
        check_shape(shape, "the student's logits", student.shape)?;
        if let Some(gradient) = &gradient {
            check_shape(shape, "the gradient", gradient.shape)?;
        }
        let models = [
            ("the teacher's logits", teacher.context()),
            ("the student's logits", student.context()),
        ];
        let gradient_context = gradient.as_ref().map(|g| ("the gradient", g.context()));
        self.check(models.into_iter().chain(gradient_context))?;
        self.stage(|raw| {
            let stream = raw.stream.clone();
            let (teacher, _teacher) = teacher.raw(&stream);
            let (student, _student) = student.raw(&stream);
            let gradient_padding = gradient.as_ref().map_or(0, DeviceLogitsMut::padding);
            let gradient = gradient.as_mut().map(|gradient| gradient.raw(&stream));
            let (gradient, _gradient) = gradient.unzip();
            stage(raw, &RawRows { tokens: shape[0], teacher, student, gradient, gradient_padding })
        })
    }

    fn with_rows_in_place(
        &mut self,
        teacher: &DeviceLogits,
        mut student: DeviceLogitsMut,
        stage: impl FnOnce(&mut RawSession, &RawRows) -> Result<()>,
    ) -> Result<()> {
        let shape = self.check_shape(teacher)?;
        check_shape(shape, "the student's logits", student.shape)?;
        self.check([
            ("the teacher's logits", teacher.context()),
            ("the student's logits", student.context()),
        ])?;
        self.stage(|raw| {
            let stream = raw.stream.clone();
            let (teacher, _teacher) = teacher.raw(&stream);
            let gradient_padding = student.padding();
            let (student, _student) = student.raw(&stream);
            let gradient = Some(student);
            stage(raw, &RawRows { tokens: shape[0], teacher, student, gradient, gradient_padding })
        })
    }

    /// The shape of the teacher's logits of a range, which must have the call's vocabulary.
    fn check_shape(&self, teacher: &DeviceLogits) -> Result<[usize; 2]> {
        let [_, vocab] = self.tokens.shape;
        let expected = [teacher.shape[0], vocab];
        check_shape(expected, "the teacher's logits", teacher.shape)?;
        Ok(expected)
    }

    /// Checks that the memory of a stage can be used on the stream, as [`Workspace::check`] does.
    fn check<'s>(
        &'s self,
        others: impl IntoIterator<Item = (&'static str, &'s CudaContext)>,
    ) -> Result<()> {
        let workspace = self.workspace.as_ref().expect(UNFINISHED);
        workspace.check(&self.raw.stream, &self.tokens, others, self.upstream.as_ref())
    }

    /// Enqueues a stage, while the owners of the call's memory wait for it.
    pub(super) fn stage<T>(
        &mut self,
        enqueue: impl FnOnce(&mut RawSession) -> Result<T>,
    ) -> Result<T> {
        let Self { workspace, tokens, upstream, raw } = self;
        let workspace = workspace.as_mut().expect(UNFINISHED);
        let stream = raw.stream.clone();
        let (_, _tokens) = tokens.raw(upstream.as_ref(), &stream);
        // Orders this call and those on other streams; within a capture the caller does.
        let ordered = !tracked_capture(&stream, workspace.memory.context())?;
        let _workspace = ordered.then(|| workspace.memory.device_ptr_mut(&stream));
        enqueue(raw)
    }
}

/// Enqueues the rows of mispredicted tokens again, as of the group that they are in, or of the other.
pub(super) fn repair(
    raw: &mut RawSession,
    tokens: &[usize],
    rows: &RawRows,
    other_group: bool,
) -> Result<()> {
    let bytes = Kernels::workspace_bytes(tokens.len());
    // SAFETY: kernels write what others read of it.
    let scratch = unsafe { raw.stream.alloc::<u8>(bytes) };
    let scratch = scratch.map_err(driver("allocating memory for a repair"))?;
    let stream = raw.stream.clone();
    let (address, _guard) = scratch.device_ptr(&stream);
    // SAFETY: as in `Workspace::begin`; the scratch memory is freed on this stream.
    unsafe { raw.again(tokens, rows, address, other_group) }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        if let Some(workspace) = self.workspace.take() {
            workspace.clear_after_stages(&self.raw.stream);
        }
    }
}
