//! Calls whose results, or even workspace, are memory of other frameworks.

use std::mem::offset_of;
use std::sync::Arc;

use cudarc::driver::{CudaStream, DevicePtr, result};

use super::{Kernels, Workspace, driver};
use crate::launch::{Layout, RawCall, RawLogits, launches, scale_gradient};
use crate::params::atkd_summary;
use crate::raw::RawOutput;
use crate::{Objective, Result};

/// Both fault words of a summary, which lie side by side.
const FAULTS: usize = 2 * size_of::<u64>();
const _: () = assert!(
    offset_of!(atkd_summary, offset_fault) == offset_of!(atkd_summary, label_fault) + FAULTS / 2
);

impl Kernels {
    /// Bytes of device memory that a call of so many tokens, in up to as many sequences, works in.
    pub fn workspace_bytes(tokens: usize) -> usize {
        Layout { capacity: tokens }.bytes()
    }

    /// Enqueues a call that works in memory of the caller, which needs no preparation, and has its results
    /// copied to where they are wanted. Nothing that matters is kept from call to call: the memory may come from an
    /// allocator that follows streams and captured graphs.
    ///
    /// # Errors
    /// As [`Workspace::launch`].
    ///
    /// # Safety
    /// As [`Workspace::launch`]. `workspace`, of [`workspace_bytes`](Self::workspace_bytes) for the larger
    /// of the call's numbers of tokens and of sequences and aligned to 16 bytes, and the outputs are device
    /// memory of this context that nobody else uses until the stream is done with it.
    pub unsafe fn launch_raw(
        self: &Arc<Self>,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        call: &RawCall,
        workspace: u64,
        output: &RawOutput,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        call.validate(objective)?;
        let problem = call.problem(objective);
        let layout = Layout { capacity: call.tokens.max(problem.scopes) };
        let plan = self.plan(&problem);
        let launches = launches(objective, call, &plan, layout, workspace)?;
        let faults = workspace + offset_of!(atkd_summary, label_fault) as u64;
        let fill = |address, value, bytes| {
            // SAFETY: within the workspace, whose size is the caller's word.
            unsafe { result::memset_d8_async(address, value, bytes, stream.cu_stream()) }
                .map_err(driver("preparing a workspace"))
        };
        fill(workspace, 0, size_of::<atkd_summary>())?;
        fill(faults, 0xff, FAULTS)?;
        let guess = workspace + offset_of!(atkd_summary, guess) as u64;
        let copy_guess = |to, from| {
            // SAFETY: a word of the workspace, and one of these kernels'.
            unsafe { result::memcpy_dtod_async(to, from, size_of::<u32>(), stream.cu_stream()) }
                .map_err(driver("copying a guess"))
        };
        copy_guess(guess, self.guess)?;
        let mut after = false;
        for launch in launches {
            // SAFETY: the caller vouches for all addresses.
            unsafe { self.launch(stream, &launch, after)? };
            after = launch.shape.team == 1;
        }
        copy_guess(self.guess, guess)?;
        // SAFETY: the caller's.
        unsafe { copy(stream, layout, workspace, call.tokens, output) }
    }

    /// Enqueues the multiplication of a gradient `[tokens, vocab]`, in place, by the float32 scalar at `factor`. If
    /// that is 1, as it mostly is where nothing comes after the loss, only the scalar is read.
    ///
    /// # Errors
    /// If the shape, the stride and the addresses do not go together, or the driver refuses.
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
        match scale_gradient(&self.device(), gradient, tokens, vocab, factor)? {
            // SAFETY: the caller vouches for the addresses.
            Some(launch) => unsafe { self.launch(stream, &launch, false) },
            None => Ok(()),
        }
    }
}

impl Workspace {
    /// Enqueues copies of the last call's results to where they are wanted.
    ///
    /// # Errors
    /// If the driver refuses.
    ///
    /// # Safety
    /// The outputs are device memory of this workspace's context with room for the last call's tokens,
    /// that nobody else uses until the stream is done with it; the stream is the last call's, or waits
    /// for it.
    pub unsafe fn copy_raw(&self, stream: &Arc<CudaStream>, output: &RawOutput) -> Result<()> {
        let layout = Layout { capacity: self.capacity() };
        let (loss, uncertainty) = (self.loss(), self.uncertainty());
        let (address, _guard) = loss.device_ptr(stream);
        let workspace = address - layout.offsets().loss as u64;
        // SAFETY: the caller's, and the workspace's own memory.
        unsafe { copy(stream, layout, workspace, uncertainty.len(), output) }
    }
}

/// # Safety
/// `workspace` is one of this layout, the outputs have room for `tokens`.
unsafe fn copy(
    stream: &CudaStream,
    layout: Layout,
    workspace: u64,
    tokens: usize,
    output: &RawOutput,
) -> Result<()> {
    let from = layout.offsets();
    for (to, from, bytes) in [
        (output.loss, from.loss, size_of::<f32>()),
        (output.uncertainty, from.uncertainty, tokens * size_of::<f32>()),
        (output.tkd, from.tkd, tokens * size_of::<f32>()),
        (output.dkd, from.dkd, tokens * size_of::<f32>()),
        (output.modes, from.modes, tokens),
    ] {
        let Some(to) = to.filter(|_| bytes > 0) else { continue };
        let from = workspace + from as u64;
        // SAFETY: the caller's.
        unsafe { result::memcpy_dtod_async(to, from, bytes, stream.cu_stream()) }
            .map_err(driver("copying the results"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_fills_prepare_a_summary() {
        const SIZE: usize = size_of::<atkd_summary>();
        let mut filled = [0_u8; SIZE];
        filled[offset_of!(atkd_summary, label_fault)..][..FAULTS].fill(0xff);
        // SAFETY: plain numbers without padding.
        let expected: [u8; SIZE] = unsafe { std::mem::transmute(Layout::empty_summary()) };
        assert_eq!(filled, expected);
    }
}
