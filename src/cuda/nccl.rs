//! Calls over ranks, by NCCL.

use std::mem::offset_of;
use std::sync::Arc;

use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError, result};
use cudarc::nccl::Comm;
use cudarc::nccl::result::NcclError;

use super::{Kernels, Workspace, driver};
use crate::call::{RawLogits, RawOutput, RawShard, RawStage, RawStates};
use crate::device::shards::{select_among_ranks, valid_tokens};
use crate::device::workspace::{Column, Memory};
use crate::params::atkd_summary;
use crate::shards::{RowState, SweepTerms};
use crate::{Error, Objective, Result};

/// The ranks of a call, each of which makes it with the same objective. The communicators were made with the stream that the
/// call goes to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Ranks<'a> {
    /// Those that have the other columns of the same tokens, in the order of the columns. Without them the shard is the whole
    /// vocabulary.
    pub vocab: Option<&'a Comm>,
    /// Those that have other tokens, in their order, and how many tokens each has. Hard tokens are selected among all, and means
    /// are over all: the losses add up.
    pub tokens: Option<(&'a Comm, &'a [usize])>,
}

impl Workspace {
    /// Enqueues a call over ranks: the stages of [`shards`](crate::shards), with what they exchange gathered by NCCL, 40 bytes
    /// per token and rank of the vocabulary, 12 more for a divergence of two sweeps, and 5 per token and rank of the tokens for
    /// the selection. The host waits for nothing, and nothing is checked between the ranks: where they make other calls, or
    /// one of them none, all wait for ever, or have wrong results.
    ///
    /// The gradient, with as many columns after it as become 0, is of the shard's columns; without one the loss alone is
    /// computed. If the shard has hard tokens, nothing is selected, and it needs the counts of all ranks' tokens if there are
    /// others. Results are read as those of [`launch`](Self::launch).
    ///
    /// # Errors
    /// As [`launch_shard`](Self::launch_shard); if the communicators have another stream, the numbers of tokens are not one for
    /// each rank, or not the shard's, counts are missing, or NCCL refuses. The other ranks are not told.
    ///
    /// # Safety
    /// As [`launch_shard`](Self::launch_shard).
    pub unsafe fn launch_over_ranks(
        &mut self,
        stream: &Arc<CudaStream>,
        objective: &Objective,
        shard: &RawShard,
        ranks: &Ranks,
        gradient: Option<(RawLogits, usize)>,
        output: &RawOutput,
    ) -> Result<()> {
        check_ranks(stream, shard, ranks)?;
        let mut run = Run { workspace: self, stream, objective, shard: *shard, kept: Vec::new() };
        let tokens = shard.tokens;
        // SAFETY: the caller's, and the addresses of memory of this function, which is freed in the order of the stream.
        unsafe {
            let own = run.empty(tokens * size_of::<RowState>())?;
            run.stage(&RawStage::States(run.address(&own)))?;
            let states = run.gather(ranks.vocab, own)?;
            let vocab_ranks = ranks.vocab.map_or(1, Comm::world_size);
            let mut exchanged = RawStates { states, terms: None, ranks: vocab_ranks };
            if shard.hard.is_none() {
                run.select(&exchanged, ranks.tokens)?;
            }
            if objective.has_two_sweeps() {
                let own = run.empty(tokens * size_of::<SweepTerms>())?;
                run.stage(&RawStage::Terms(exchanged, run.address(&own)))?;
                exchanged.terms = Some(run.gather(ranks.vocab, own)?);
            }
            if let Some((gradient, padding)) = gradient {
                run.stage(&RawStage::Gradient(exchanged, gradient, padding))?;
            }
            run.stage(&RawStage::Finish(exchanged, *output))
        }
    }
}

fn check_ranks(stream: &CudaStream, shard: &RawShard, ranks: &Ranks) -> Result<()> {
    let comms = [ranks.vocab, ranks.tokens.map(|(comm, _)| comm)];
    if comms.into_iter().flatten().any(|comm| comm.stream().cu_stream() != stream.cu_stream()) {
        return Err(Error::OtherStream);
    }
    if let Some((comm, counts)) = ranks.tokens {
        let (rank, size) = (comm.rank(), comm.world_size());
        if counts.len() != size || counts[rank] != shard.tokens {
            let told = counts.get(rank).copied().unwrap_or(0);
            let (given, tokens) = (counts.len(), shard.tokens);
            return Err(Error::RankTokens { rank, tokens, told, given, size });
        }
        if shard.hard.is_some() && shard.counts.is_none() {
            return Err(Error::NoCounts { size });
        }
    }
    Ok(())
}

/// A call on its way through the stages.
struct Run<'a> {
    workspace: &'a mut Workspace,
    stream: &'a Arc<CudaStream>,
    objective: &'a Objective,
    shard: RawShard,
    /// The memory that addresses are of, until the last stage is enqueued.
    kept: Vec<CudaSlice<u8>>,
}

impl Run<'_> {
    /// # Safety
    /// As [`Workspace::launch_shard`].
    unsafe fn stage(&mut self, stage: &RawStage) -> Result<()> {
        // SAFETY: the caller's.
        unsafe { self.workspace.launch_shard(self.stream, self.objective, &self.shard, stage) }
    }

    /// So many bytes, of which the driver refuses none.
    fn empty(&self, bytes: usize) -> Result<CudaSlice<u8>> {
        self.stream.alloc_zeros(bytes.max(1)).map_err(memory)
    }

    fn address(&self, memory: &CudaSlice<u8>) -> u64 {
        memory.device_ptr(self.stream).0
    }

    /// The memory of all ranks, one after the other: the address of it.
    fn gather(&mut self, comm: Option<&Comm>, own: CudaSlice<u8>) -> Result<u64> {
        let all = match comm {
            None => own,
            Some(comm) => {
                let mut all = self.empty(own.len() * comm.world_size())?;
                comm.all_gather(&own, &mut all).map_err(nccl("gathering what ranks exchange"))?;
                self.kept.push(own);
                all
            }
        };
        let address = self.address(&all);
        self.kept.push(all);
        Ok(address)
    }

    /// Selects the hard tokens among those of all ranks, by their margins, and counts them.
    ///
    /// # Safety
    /// As [`Workspace::launch_shard`].
    unsafe fn select(
        &mut self,
        exchanged: &RawStates,
        ranks: Option<(&Comm, &[usize])>,
    ) -> Result<()> {
        let tokens = self.shard.tokens;
        let (comm, rank, size) = match ranks {
            None => (None, 0, 1),
            Some((comm, _)) => (Some(comm), comm.rank(), comm.world_size()),
        };
        // Tokens that are added to a rank's do not count.
        let most = ranks.map_or(tokens, |(_, counts)| counts.iter().copied().max().unwrap_or(0));
        let (margins, valid) = (self.empty(4 * most)?, self.empty(most)?);
        // SAFETY: the caller's; the memory has room for so many tokens.
        let [margins, valid] = unsafe {
            self.stage(&RawStage::Margins(*exchanged, self.address(&margins)))?;
            self.write_valid(&valid)?;
            [self.gather(comm, margins)?, self.gather(comm, valid)?]
        };
        let all = most * size;
        let (selection, hard) = (self.empty(Kernels::workspace_bytes(all))?, self.empty(all)?);
        let hard_address = self.address(&hard);
        let kernels = self.workspace.kernels().clone();
        let workspace = Memory::new(
            crate::device::workspace::Layout { capacity: all },
            self.address(&selection),
        );
        let launch = select_among_ranks(
            self.objective,
            all,
            [margins, valid, hard_address],
            &kernels.device(),
            workspace,
        );
        // SAFETY: the memory is of this call.
        unsafe { kernels.enqueue(self.stream, launch, None)? };
        let counts = workspace.summary() as u64 + offset_of!(atkd_summary, counted_valid) as u64;
        self.kept.extend([selection, hard]);
        self.shard.hard = Some(hard_address + (rank * most) as u64);
        self.shard.counts = Some(counts);
        Ok(())
    }

    /// Writes a byte per token, 0 for those that are ignored.
    fn write_valid(&mut self, to: &CudaSlice<u8>) -> Result<()> {
        let tokens = self.shard.tokens;
        let memory = self.workspace.memory_at();
        let kernels = self.workspace.kernels().clone();
        let launches = valid_tokens(self.objective, &self.shard, &kernels.device(), memory)?;
        // SAFETY: the workspace's column has a group for each token, and the memory room for as many.
        unsafe {
            kernels.enqueue(self.stream, launches, None)?;
            let from = memory.column(Column::Groups);
            let (to, stream) = (self.address(to), self.stream.cu_stream());
            result::memcpy_dtod_async(to, from, tokens, stream).map_err(driver("copying groups"))
        }
    }
}

fn memory(error: DriverError) -> Error {
    driver("making memory for what ranks exchange")(error)
}

fn nccl(what: &'static str) -> impl Fn(NcclError) -> Error {
    move |error| Error::Nccl { what, status: error.0 as u32 }
}
