//! Calls that keep nothing here: their workspace is memory of another framework.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result, sys};

use super::{Kernels, driver};
use crate::call::{
    RawCall, RawEntropies, RawLogits, RawOutput, RawSelection, RawSparseCall, RawTeacher,
};
use crate::device::kernel::Launch;
use crate::device::sparse;
use crate::device::stages::{
    Checked, launches, margins, scale_gradient, selection, token_entropies,
};
use crate::device::workspace::{Layout, Memory};
use crate::params::atkd_summary;
use crate::{Objective, Result};

impl Kernels {
    /// Bytes of device memory that a call of so many tokens works in.
    pub fn workspace_bytes(tokens: usize) -> usize {
        Layout { capacity: tokens }.bytes()
    }

    /// Enqueues a call that works in memory of the caller, which needs no preparation, and writes its results
    /// where they are wanted. Nothing that matters is kept from call to call: the memory may come from an
    /// allocator that follows streams and captured graphs.
    ///
    /// # Errors
    /// As [`Workspace::launch`](super::Workspace::launch).
    ///
    /// # Safety
    /// As [`Workspace::launch`](super::Workspace::launch). `workspace`, of [`workspace_bytes`](Self::workspace_bytes) for the
    /// call's tokens and aligned to 16 bytes, and the outputs are device memory of this context that nobody else uses
    /// until the stream is done with it.
    pub unsafe fn launch_raw(
        self: &Arc<Self>,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawCall,
        workspace: u64,
        output: &RawOutput,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let checked = Checked::new(objective, call)?;
        let memory = self.memory_of(call.tokens, workspace);
        let launches = launches(&checked, output, &self.plan(&checked.problem), memory)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe {
            clear_padding(stream, call)?;
            self.enqueue_in(stream, launches, workspace)
        }
    }

    /// As [`launch_raw`](Self::launch_raw), with a teacher of which some log-probabilities per token are known.
    ///
    /// # Errors
    /// As [`Workspace::launch_sparse`](super::Workspace::launch_sparse).
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw).
    pub unsafe fn launch_sparse_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawSparseCall,
        workspace: u64,
        output: &RawOutput,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let memory = self.memory_of(call.tokens.tokens, workspace);
        let launches = sparse::launches(objective, call, output, &self.device(), memory)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe {
            clear_padding(stream, &call.of_student())?;
            self.enqueue_in(stream, launches, workspace)
        }
    }

    /// Enqueues the teacher's margins: as [`Workspace::launch_margins`](super::Workspace::launch_margins), in memory of the
    /// caller as [`launch_raw`](Self::launch_raw). The margin of a token whose label is out of range is NaN.
    ///
    /// # Errors
    /// As [`Workspace::launch_margins`](super::Workspace::launch_margins).
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw).
    pub unsafe fn launch_margins_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        teacher: &RawTeacher,
        to: u64,
        workspace: u64,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let memory = self.memory_of(teacher.tokens, workspace);
        let launch = margins(objective, teacher, to, &self.device(), memory)?;
        // SAFETY: the caller's.
        unsafe { self.enqueue_in(stream, launch, workspace) }
    }

    /// Enqueues a selection: as [`Workspace::launch_selection`](super::Workspace::launch_selection), in memory of the
    /// caller as [`launch_raw`](Self::launch_raw).
    ///
    /// # Errors
    /// As [`Workspace::launch_selection`](super::Workspace::launch_selection).
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw).
    pub unsafe fn launch_selection_raw(
        &self,
        stream: &Arc<CudaStream>,
        from: &RawSelection,
        hard_ratio: f64,
        workspace: u64,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let memory = self.memory_of(from.tokens, workspace);
        let launch = selection(from, hard_ratio, &self.device(), memory)?;
        // SAFETY: the caller's.
        unsafe {
            clear_hard(stream, from)?;
            self.enqueue_in(stream, launch, workspace)
        }
    }

    /// Enqueues the entropies of one model's distributions: as [`cpu::token_entropies`](crate::cpu::token_entropies).
    ///
    /// # Errors
    /// If the temperature is not in [1e-30, 1e30], shape, strides and addresses do not go together, or the driver refuses.
    ///
    /// # Safety
    /// Both are device memory of this context. Until the stream is done with it nobody else writes to the logits, nor
    /// touches the entropies.
    pub unsafe fn token_entropies_raw(
        &self,
        stream: &Arc<CudaStream>,
        of: &RawEntropies,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let launch = token_entropies(&self.device(), of)?;
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.enqueue(stream, launch, None) }
    }

    /// The caller's workspace for so many tokens.
    pub(super) fn memory_of(&self, tokens: usize, workspace: u64) -> Memory {
        Memory::keeping(Layout { capacity: tokens }, workspace, self.kept_threshold)
    }

    /// Enqueues launches, if there are any, that work in memory of the caller, which holds anything.
    ///
    /// # Safety
    /// As [`launch_raw`](Self::launch_raw).
    pub(super) unsafe fn enqueue_in(
        &self,
        stream: &Arc<CudaStream>,
        launches: impl IntoIterator<Item = Launch>,
        workspace: u64,
    ) -> Result<()> {
        let mut launches = launches.into_iter().peekable();
        if launches.peek().is_none() {
            return Ok(());
        }
        // SAFETY: the caller vouches for all addresses.
        unsafe {
            self.clear_summary(stream, workspace)?;
            self.enqueue(stream, launches, None)
        }
    }

    /// # Safety
    /// As [`launch_raw`](Self::launch_raw).
    pub(super) unsafe fn clear_summary(&self, stream: &CudaStream, workspace: u64) -> Result<()> {
        // SAFETY: within the workspace, whose size is the caller's word.
        unsafe {
            let bytes = size_of::<atkd_summary>();
            result::memset_d8_async(workspace, 0, bytes, stream.cu_stream())
        }
        .map_err(driver("preparing a workspace"))
    }

    /// Enqueues the multiplication of a gradient `[tokens, vocab]`, in place, by the float32 scalar at `factor`. If
    /// that is 1, as it mostly is where nothing comes after the loss, only the scalar is read.
    ///
    /// # Errors
    /// If the shape, the strides and the addresses do not go together, or the driver refuses.
    ///
    /// # Safety
    /// Both are device memory of this context that nobody else writes to, nor reads the gradient, until the stream is
    /// done with it.
    pub unsafe fn scale_gradient(
        &self,
        stream: &Arc<CudaStream>,
        gradient: RawLogits,
        tokens: usize,
        vocab: usize,
        factor: u64,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let launch = scale_gradient(&self.device(), gradient, tokens, vocab, factor)?;
        // SAFETY: the caller vouches for the addresses.
        unsafe { self.enqueue(stream, launch, None) }
    }
}

/// Makes the gradient's padding 0.
///
/// # Safety
/// As [`Kernels::launch_raw`], of a call that is valid.
pub(super) unsafe fn clear_padding(stream: &CudaStream, call: &RawCall) -> Result<()> {
    let Some(RawLogits { address, dtype, strides }) = call.gradient else { return Ok(()) };
    if call.gradient_padding == 0 {
        return Ok(());
    }
    let bytes = |elements: usize| elements * dtype.size();
    // Rows of one outer index are evenly spaced.
    let (_, inner) = strides.skip();
    let rows = if strides.of(call.tokens) == strides.row().into() { call.tokens } else { inner };
    for first in (0..call.tokens).step_by(rows.max(1)) {
        let start = address + bytes(strides.start(first) + call.vocab) as u64;
        let (pitch, width) = (bytes(strides.row()), bytes(call.gradient_padding));
        // SAFETY: the caller says that the padding is the gradient's.
        unsafe { sys::cuMemsetD2D8Async(start, pitch, 0, width, rows, stream.cu_stream()) }
            .result()
            .map_err(driver("clearing the gradient's padding"))?;
    }
    Ok(())
}

/// Clears the mask of a selection within sequences: a kernel that meets offsets out of order writes nothing.
///
/// # Safety
/// As [`Kernels::launch_raw`], of a selection that is valid.
pub(super) unsafe fn clear_hard(stream: &CudaStream, selection: &RawSelection) -> Result<()> {
    if selection.sequences.is_none() || selection.tokens == 0 {
        return Ok(());
    }
    // SAFETY: the caller says that there is one byte per token.
    unsafe {
        result::memset_d8_async(selection.hard, 0, selection.tokens, stream.cu_stream())
            .map_err(driver("preparing a mask"))
    }
}
