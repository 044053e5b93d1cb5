//! Calls that keep nothing here: their workspace is memory of another framework.

use std::sync::Arc;

use cudarc::driver::{CudaStream, result};

use super::{Kernels, driver};
use crate::launch::{Layout, Place, RawCall, RawLogits, RawOutput, launches, scale_gradient};
use crate::params::atkd_summary;
use crate::{Objective, Result};

impl Kernels {
    /// Bytes of device memory that a call of so many tokens, in up to as many sequences, works in.
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
    /// As [`Workspace::launch`](super::Workspace::launch). `workspace`, of [`workspace_bytes`](Self::workspace_bytes) for the larger
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
        let place = Place { layout, workspace, guess: self.guess };
        let launches = launches(objective, call, output, &plan, place)?;
        // SAFETY: within the workspace, whose size is the caller's word.
        unsafe {
            let bytes = size_of::<atkd_summary>();
            result::memset_d8_async(workspace, 0, bytes, stream.cu_stream())
        }
        .map_err(driver("preparing a workspace"))?;
        let mut after = false;
        for launch in launches {
            // SAFETY: the caller vouches for all addresses.
            unsafe { self.launch(stream, &launch, after)? };
            after = launch.shape.team == 1;
        }
        Ok(())
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
        match scale_gradient(&self.device(), gradient, tokens, vocab, factor)? {
            // SAFETY: the caller vouches for the addresses.
            Some(launch) => unsafe { self.launch(stream, &launch, false) },
            None => Ok(()),
        }
    }
}
