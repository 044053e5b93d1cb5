//! The stages of [`shards`](crate::shards) by address.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::by_address::clear_padding;
use super::{Kernels, driver};
use crate::call::{RawLogits, RawOutput, RawShard, RawStates};
use crate::device::session::Launches;
use crate::device::shards;
use crate::device::workspace::Memory;
use crate::plan::DeviceProperties;
use crate::{Objective, Result};

/// All of them work in memory of the caller, as [`launch_raw`](Kernels::launch_raw), and keep nothing there: the
/// [`workspace`](Kernels::workspace_bytes) of each may be another one, or the same.
impl Kernels {
    /// Enqueues the first stage: the states of the shard's rows, [`RowState`](crate::shards::RowState) `[N]` at `to`. With
    /// [`Target::Teacher`](crate::Target::Teacher) a pass over the teacher's logits comes before.
    ///
    /// # Errors
    /// If shapes, strides and addresses do not go together, or the driver refuses. So do the other stages.
    ///
    /// # Safety
    /// All addresses are device memory of this context, of what and how much the fields say. Until the stream is done with
    /// it nobody else writes what is read, nor touches what is written, nor `workspace`, which is of
    /// [`workspace_bytes`](Self::workspace_bytes) for the tokens and aligned to 16 bytes.
    pub unsafe fn shard_states_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        to: u64,
        workspace: u64,
    ) -> Result<()> {
        let launches = |device: &_, memory| shards::states(objective, shard, to, device, memory);
        // SAFETY: the caller's.
        unsafe { self.stage(stream, shard, workspace, launches) }
    }

    /// Enqueues the teacher's margins, float32 `[N]` at `to`, from the states of all ranks: -inf for an ignored token, NaN
    /// for one whose label is out of range. The logits are not read.
    ///
    /// # Errors
    /// As [`shard_states_raw`](Self::shard_states_raw), or if there are no states.
    ///
    /// # Safety
    /// As [`shard_states_raw`](Self::shard_states_raw).
    pub unsafe fn shard_margins_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        exchanged: &RawStates,
        to: u64,
        workspace: u64,
    ) -> Result<()> {
        let launches =
            |device: &_, memory| shards::margins(objective, shard, exchanged, to, device, memory);
        // SAFETY: the caller's.
        unsafe { self.stage(stream, shard, workspace, launches) }
    }

    /// Enqueues the terms of the second sweep over the shard's rows, [`SweepTerms`](crate::shards::SweepTerms) `[N]` at `to`.
    ///
    /// # Errors
    /// As [`shard_margins_raw`](Self::shard_margins_raw), or if the divergence has no second sweep.
    ///
    /// # Safety
    /// As [`shard_states_raw`](Self::shard_states_raw).
    pub unsafe fn shard_terms_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        exchanged: &RawStates,
        to: u64,
        workspace: u64,
    ) -> Result<()> {
        let launches =
            |device: &_, memory| shards::terms(objective, shard, exchanged, to, device, memory);
        // SAFETY: the caller's.
        unsafe { self.stage(stream, shard, workspace, launches) }
    }

    /// Enqueues the gradient of the shard's columns, which may overwrite the student's logits. As many columns after them
    /// as `gradient_padding` says become 0.
    ///
    /// # Errors
    /// As [`shard_margins_raw`](Self::shard_margins_raw), or if the second sweep's terms or the hard tokens are needed and
    /// missing.
    ///
    /// # Safety
    /// As [`shard_states_raw`](Self::shard_states_raw).
    #[expect(clippy::too_many_arguments, reason = "each is another thing of the stage")]
    pub unsafe fn shard_gradient_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        exchanged: &RawStates,
        gradient: RawLogits,
        gradient_padding: usize,
        workspace: u64,
    ) -> Result<()> {
        let launches = |device: &_, memory| {
            let launches = shards::gradient(
                objective,
                shard,
                exchanged,
                gradient,
                gradient_padding,
                device,
                memory,
            )?;
            // SAFETY: the caller's; the stage is valid.
            unsafe { clear_padding(stream, &shard.call(Some(gradient), gradient_padding))? };
            Ok(launches)
        };
        // SAFETY: the caller's.
        unsafe { self.stage(stream, shard, workspace, launches) }
    }

    /// Enqueues the last stage: the loss and the terms of all tokens, where they are wanted. The logits are not read.
    ///
    /// # Errors
    /// As [`shard_gradient_raw`](Self::shard_gradient_raw).
    ///
    /// # Safety
    /// As [`shard_states_raw`](Self::shard_states_raw).
    pub unsafe fn shard_finish_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        exchanged: &RawStates,
        output: &RawOutput,
        workspace: u64,
    ) -> Result<()> {
        let launches = |device: &_, memory| {
            shards::finish(objective, shard, exchanged, output, device, memory)
        };
        // SAFETY: the caller's.
        unsafe { self.stage(stream, shard, workspace, launches) }
    }

    /// # Safety
    /// As [`shard_states_raw`](Self::shard_states_raw).
    unsafe fn stage(
        &self,
        stream: &Arc<CudaStream>,
        shard: &RawShard,
        workspace: u64,
        launches: impl FnOnce(&DeviceProperties, Memory) -> Result<Launches>,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let launches = launches(&self.device(), self.memory_of(shard.tokens, workspace))?;
        // SAFETY: the caller vouches for all addresses.
        unsafe { self.enqueue_in(stream, launches, workspace) }
    }
}
