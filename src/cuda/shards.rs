//! The stages of [`shards`](crate::shards) by address.

use std::sync::Arc;

use cudarc::driver::CudaStream;

use super::by_address::clear_padding;
use super::{Kernels, driver};
use crate::call::{RawShard, RawStage};
use crate::device::shards::launches;
use crate::{Objective, Result};

impl Kernels {
    /// Enqueues a stage of a call on a shard, in memory of the caller, as [`launch_raw`](Self::launch_raw): see
    /// [`shards`](crate::shards). Nothing is kept in the workspace from stage to stage.
    ///
    /// A token whose label is out of range, or whose target no rank has left out, has NaN for its margin, and the loss is NaN.
    /// By [`Target::Teacher`](crate::Target::Teacher) the stage of states reads the teacher's logits twice.
    ///
    /// # Errors
    /// If shapes, strides and addresses do not go together, the hard tokens or the terms of a second sweep are needed and
    /// missing, or the driver refuses.
    ///
    /// # Safety
    /// All addresses are of device memory of this context, for what and as much as the fields say. Until the stream is done
    /// with it nobody else writes to what is read, nor touches what is written, nor `workspace`, which is of
    /// [`workspace_bytes`](Self::workspace_bytes) for the tokens and aligned to 16 bytes.
    pub unsafe fn launch_shard_raw(
        &self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        stage: &RawStage,
        workspace: u64,
    ) -> Result<()> {
        self.context().bind_to_thread().map_err(driver("using the context"))?;
        let memory = self.memory_of(shard.tokens, workspace);
        let launches = launches(objective, shard, stage, &self.device(), memory)?;
        // SAFETY: the caller vouches for all addresses.
        unsafe {
            clear_shard_padding(stream, shard, stage)?;
            self.enqueue_in(stream, launches, workspace)
        }
    }
}

/// Makes the padding of a shard's gradient 0.
///
/// # Safety
/// The addresses of the stage, which is valid, are as in [`Kernels::launch_shard_raw`].
pub(super) unsafe fn clear_shard_padding(
    stream: &CudaStream,
    shard: &RawShard,
    stage: &RawStage,
) -> Result<()> {
    match *stage {
        // SAFETY: the caller's.
        RawStage::Gradient(_, to, padding) => unsafe {
            clear_padding(stream, &shard.call(Some(to), padding))
        },
        _ => Ok(()),
    }
}
